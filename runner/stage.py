"""Run one stage: execute its notebook with papermill, save its outputs and record the run."""

import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat

from hm_reco.lake.published import read_manifest
from hm_reco.lake.runs import Outcome, StageRun, get_git_commit, record
from hm_reco.lake.storage import Lake, write_file, write_json
from reports.pages import add_banner, notebook_page
from runner.display import RunDisplay
from runner.graph import Stage, find_project_root
from runner.monitor import StageMonitor, monitoring
from runner.parameters import ResolvedParameters

TEMP_PREFIX = "hm-run-"  # followed by the runner's process id
RESERVE_BYTES = 8_000_000


@dataclass(frozen=True)
class Job:
    """A stage to run, its parameters, and the id of its run."""

    stage: Stage
    parameters: ResolvedParameters
    run_id: str
    root: Path = field(default_factory=find_project_root)  # the checkout with its code


def _execute_notebook(
    job: Job, output: Path, parameters: dict[str, Any], monitor: StageMonitor, display: RunDisplay
) -> Outcome:
    """Execute the notebook into `output`; returns the outcome of the kernel's process."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    from runner.engine import ENGINE

    # papermill also parses types in the parameters cell, and warns of those that it cannot parse;
    # `runner.parameters` has already validated names and types
    logging.getLogger("papermill").setLevel(logging.ERROR)
    # an idle thread of LightGBM or Polars should not spin while another process works
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "TMPDIR": str(output.parent)}
    if job.root != find_project_root():
        env["PYTHONPATH"] = str(job.root)
    try:
        execute_notebook(
            job.stage.notebook,
            output,
            parameters=parameters,
            engine_name=ENGINE,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            monitor=monitor,
            on_output=display.on_output,
            cwd_of_kernel=job.stage.notebook.parent,
            env=env,
        )
    except PapermillExecutionError as err:
        return monitor.stop_reason or Outcome("failed", f"{err.ename}: {err.evalue}")
    except DeadKernelError as err:
        return monitor.get_exit_outcome() or Outcome("killed", str(err))
    except Exception as err:
        # jupyter_client's message for a kernel that dies while it starts
        exit_outcome = monitor.get_exit_outcome() if "Kernel died" in str(err) else None
        return (
            monitor.stop_reason or exit_outcome or Outcome("failed", f"{type(err).__name__}: {err}")
        )
    return monitor.stop_reason or Outcome("succeeded")


def run_stage(
    lake: Lake, job: Job, cache_key: dict[str, Any], monitor: StageMonitor, display: RunDisplay
) -> StageRun:
    """Run one stage once; save notebook and report, extend the manifest, record the stage run."""
    parameters = job.parameters.values | {"lake": lake.root, "run_id": job.run_id}
    stage_run = StageRun(
        job.run_id, job.stage.name, parameters, get_git_commit(job.root), cache_key=cache_key
    )
    stage_run.origins, stage_run.attempt = job.parameters.origins, monitor.attempt
    record(lake, stage_run)
    # a manifest of an earlier attempt is not valid for this one
    lake.path("runs", stage_run.run_id, f"{stage_run.stage}.json").unlink(missing_ok=True)
    with TemporaryDirectory(prefix=f"{TEMP_PREFIX}{os.getpid()}-") as folder:
        output = Path(folder) / f"{stage_run.stage}.ipynb"
        with monitoring(monitor, job.stage.timeout):
            outcome = _execute_notebook(job, output, parameters, monitor, display)
        if outcome.state == "succeeded":
            outcome = _apply_manifest(lake, stage_run)
        stage_run.state, stage_run.error = outcome.state, outcome.cause[:4000]
        stage_run.seconds, stage_run.peak_memory_mb = monitor.seconds, monitor.peak_memory_mb
        stage_run.cpu_seconds = monitor.cpu_seconds
        _release_reserve(lake)
        if output.is_file():
            _save_outputs(lake, stage_run, nbformat.read(output, as_version=4))
    record(lake, stage_run)
    return stage_run


def _save_outputs(lake: Lake, stage_run: StageRun, notebook: nbformat.NotebookNode) -> None:
    """Save the executed notebook and its report, with a banner if the stage did not succeed."""
    if stage_run.state != "succeeded":
        add_banner(notebook, stage_run)
    stage_run.notebook = f"runs/{stage_run.run_id}/{stage_run.stage}.ipynb"
    stage_run.report = f"reports/{stage_run.run_id}/{stage_run.stage}.html"
    write_file(lake.path(stage_run.notebook), nbformat.writes(notebook))
    write_file(lake.path(stage_run.report), notebook_page(notebook, stage_run))


def _apply_manifest(lake: Lake, stage_run: StageRun) -> Outcome:
    """Copy the manifest's fields to the stage run, and add the runner's fields to the manifest."""
    try:
        manifest = read_manifest(lake, stage_run.run_id, stage_run.stage)
    except FileNotFoundError:
        return Outcome("failed", "the notebook ended without calling write_manifest")
    for name in ("sources", "inputs", "outputs", "metrics"):
        setattr(stage_run, name, manifest.get(name, {}))
    run_fields = {
        "parameters": stage_run.parameters,
        "cache_key": stage_run.cache_key,
        "commit": stage_run.git_commit,
    }
    write_json(
        lake.path("runs", stage_run.run_id, f"{stage_run.stage}.json"), manifest | run_fields
    )
    return Outcome("succeeded")


def _get_reserve_path(lake: Lake) -> Path | None:
    return Path(lake.root) / "runs" / "reserve" if lake.storage.is_local else None


def reserve_space(lake: Lake) -> None:
    """Reserve disk space in the lake, so that a run that fills the disk can still be recorded."""
    path = _get_reserve_path(lake)
    if path and not path.is_file():
        write_file(path, bytes(RESERVE_BYTES))


def _release_reserve(lake: Lake) -> None:
    path = _get_reserve_path(lake)
    if path and path.is_file() and shutil.disk_usage(lake.root).free < RESERVE_BYTES:
        path.unlink()
