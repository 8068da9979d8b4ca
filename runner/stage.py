"""Runs one stage: its notebook through papermill, what it leaves to the lake and the ledger."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat

from hm_reco.lake.published import read_manifest
from hm_reco.lake.runs import Entry, Outcome, enter, git_commit
from hm_reco.lake.storage import Lake, put_file, write_json
from reports.pages import add_banner, notebook_page
from runner.board import Board
from runner.graph import Stage, project_root
from runner.parameters import Resolved
from runner.watch import Watch, watching

TEMPORARY = "hm-run-"  # and the runner's process id
BALLAST_BYTES = 8_000_000


@dataclass(frozen=True)
class Job:
    """A stage that shall run, its parameters, and the name of the run it belongs to."""

    stage: Stage
    parameters: Resolved
    run_id: str
    root: Path = field(default_factory=project_root)  # the checkout that its code comes from


def _papermill(
    job: Job, output: Path, given: dict[str, Any], watch: Watch, board: Board
) -> Outcome:
    """Execute into `output`; the outcome is that of the kernel's process, not of the notebook."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    from runner.engine import ENGINE

    # an idle thread of LightGBM or Polars should not spin while another process works
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "TMPDIR": str(output.parent)}
    if job.root != project_root():
        env["PYTHONPATH"] = str(job.root)
    try:
        execute_notebook(
            job.stage.notebook,
            output,
            parameters=given,
            engine_name=ENGINE,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            watch=watch,
            listen=board.output,
            cwd_of_kernel=job.stage.notebook.parent,
            env=env,
        )
    except PapermillExecutionError as err:
        return watch.ordered or Outcome("failed", f"{err.ename}: {err.evalue}")
    except DeadKernelError as err:
        return watch.verdict() or Outcome("killed", str(err))
    except Exception as err:
        # jupyter_client's words for a kernel that ends while it starts
        early = watch.verdict() if "Kernel died" in str(err) else None
        return watch.ordered or early or Outcome("failed", f"{type(err).__name__}: {err}")
    return watch.ordered or Outcome("succeeded")


def run_stage(lake: Lake, job: Job, key: dict[str, Any], watch: Watch, board: Board) -> Entry:
    """Run one stage once and keep what it left: notebook, report, manifest, ledger."""
    given = job.parameters.values | {"lake": lake.root, "run_id": job.run_id}
    entry = Entry(job.run_id, job.stage.name, given, git_commit(job.root), key=key)
    entry.origins, entry.attempt = job.parameters.origins, watch.attempt
    enter(lake, entry)
    # a manifest of an earlier attempt says nothing about this one
    lake.path("runs", entry.run_id, f"{entry.stage}.json").unlink(missing_ok=True)
    with TemporaryDirectory(prefix=f"{TEMPORARY}{os.getpid()}-") as folder:
        output = Path(folder) / f"{entry.stage}.ipynb"
        with watching(watch, job.stage.timeout):
            outcome = _papermill(job, output, given, watch, board)
        if outcome.state == "succeeded":
            outcome = _take_manifest(lake, entry)
        entry.state, entry.error = outcome.state, outcome.cause[:4000]
        entry.seconds, entry.peak_memory_mb = watch.seconds, watch.peak_memory_mb
        entry.cpu_seconds = watch.cpu_seconds
        _make_room(lake)
        if output.is_file():
            _keep(lake, entry, nbformat.read(output, as_version=4))
    enter(lake, entry)
    return entry


def _keep(lake: Lake, entry: Entry, notebook: nbformat.NotebookNode) -> None:
    """Keep the executed notebook and its report; one that did not succeed says so on top."""
    if entry.state != "succeeded":
        add_banner(notebook, entry)
    entry.notebook = f"runs/{entry.run_id}/{entry.stage}.ipynb"
    entry.report = f"reports/{entry.run_id}/{entry.stage}.html"
    put_file(lake.path(entry.notebook), nbformat.writes(notebook))
    put_file(lake.path(entry.report), notebook_page(notebook, entry))


def _take_manifest(lake: Lake, entry: Entry) -> Outcome:
    """Take over what the notebook's manifest says, and add to it what the runner knows."""
    try:
        manifest = read_manifest(lake, entry.run_id, entry.stage)
    except FileNotFoundError:
        return Outcome("failed", "the notebook ended without calling write_manifest")
    for name in ("sources", "inputs", "outputs", "metrics"):
        setattr(entry, name, manifest.get(name, {}))
    known = {"parameters": entry.parameters, "key": entry.key, "commit": entry.git_commit}
    write_json(lake.path("runs", entry.run_id, f"{entry.stage}.json"), manifest | known)
    return Outcome("succeeded")


def _ballast(lake: Lake) -> Path | None:
    return None if lake.client else Path(lake.root) / "runs" / "ballast"


def load_ballast(lake: Lake) -> None:
    """Keep some space of the lake's disk, so that a run that fills it can still be recorded."""
    path = _ballast(lake)
    if path and not path.is_file():
        put_file(path, bytes(BALLAST_BYTES))


def _make_room(lake: Lake) -> None:
    path = _ballast(lake)
    if path and path.is_file() and shutil.disk_usage(lake.root).free < BALLAST_BYTES:
        path.unlink()
