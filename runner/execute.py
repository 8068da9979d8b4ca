"""Runs a stage: the notebook through papermill, then its files to the lake and the ledger."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import psutil

from hm_reco.core.lake import Lake, put_file, read_manifest
from runner.graph import Stage, project_root
from runner.ledger import Entry, enter, git_commit
from runner.render import render_index, render_notebook


class StageError(RuntimeError):
    """A stage that failed; the message names the notebook to look at."""


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Samples the resident memory of this process's children; the last value is the peak, MB."""
    peak, done = [0.0], threading.Event()

    def sample() -> None:
        me = psutil.Process()
        while not done.wait(0.2):
            peak[0] = max(peak[0], sum(_resident(c) for c in me.children(recursive=True)) / 1e6)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _papermill(stage: Stage, output: Path, parameters: dict[str, Any], progress: bool) -> str:
    """Execute into `output`; returns the error (`Name: message`), or nothing."""
    # an idle thread of LightGBM or Polars should not spin while another process works
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    try:
        execute_notebook(
            stage.notebook,
            output,
            parameters=parameters,
            kernel_name="python3",
            language="python",
            progress_bar={"desc": stage.name, "leave": False} if progress else False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            cwd=stage.notebook.parent,
        )
    except PapermillExecutionError as err:
        return f"{err.ename}: {err.evalue}"
    return ""


def run_stage(
    lake: Lake, stage: Stage, parameters: dict[str, Any], run_id: str, progress: bool = False
) -> Entry:
    """Run one stage and keep what it left: notebook, report, manifest, ledger.

    Raises `StageError` when the notebook fails; its notebook, with the traceback, is kept too.
    """
    given = parameters | {"lake": lake.root, "run_id": run_id}
    entry = Entry(run_id, stage.name, given, git_commit(project_root()))
    enter(lake, entry)
    start = time.monotonic()
    with TemporaryDirectory(prefix="hm-run-") as folder, _peak_memory() as peak:
        output = Path(folder) / f"{stage.name}.ipynb"
        try:
            entry.error = _papermill(stage, output, given, progress)
        except BaseException as err:
            entry.error = f"{type(err).__name__}: {err}"
            raise
        finally:
            entry.seconds, entry.peak_memory_mb = time.monotonic() - start, peak[0]
            _keep(lake, entry, output)
    if entry.error:
        raise StageError(f"stage {stage.name!r} failed, {entry.error}\nnotebook: {entry.notebook}")
    return entry


def _keep(lake: Lake, entry: Entry, output: Path) -> None:
    """Upload the executed notebook and its report, and close the entry in the ledger."""
    if output.is_file():
        notebook = nbformat.read(output, as_version=4)
        name = f"{entry.stage}.ipynb"
        path = put_file(lake.path("runs", entry.run_id, name), output.read_bytes())
        html = render_notebook(notebook, entry)
        report = put_file(lake.path("reports", entry.run_id, f"{entry.stage}.html"), html)
        entry.notebook, entry.report = str(path), str(report)
    if not entry.error:
        _take_manifest(lake, entry)
    entry.state = "failed" if entry.error else "succeeded"
    enter(lake, entry)
    render_index(lake)


def _take_manifest(lake: Lake, entry: Entry) -> None:
    try:
        manifest = read_manifest(lake, entry.run_id, entry.stage)
    except FileNotFoundError:
        entry.error = "no manifest: the notebook ran to its end, but never called write_manifest"
        return
    entry.inputs, entry.outputs = manifest["inputs"], manifest["outputs"]
    entry.metrics = manifest["metrics"]


def run_pipeline(
    lake: Lake,
    stages: Sequence[Stage],
    parameters: dict[str, dict[str, Any]],
    run_id: str,
    report: Callable[[str, Entry | None], None] = lambda stage, entry: None,
    progress: bool = False,
) -> list[Entry]:
    """Run stages one after the other; `report` is told when each starts and when it has ended."""
    entries = []
    for stage in stages:
        report(stage.name, None)
        entries.append(run_stage(lake, stage, parameters[stage.name], run_id, progress))
        report(stage.name, entries[-1])
    return entries


def to_json(entries: Sequence[Entry]) -> str:
    """Entries as JSON text."""
    return json.dumps([vars(entry) for entry in entries], default=str, indent=2)
