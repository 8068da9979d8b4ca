"""Runs made from others: a stage with many parameter sets, a run once more from its records."""

import io
import itertools
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from hm_reco.lake.published import branch
from hm_reco.lake.runs import Entry, read_ledger
from hm_reco.lake.storage import Lake, stage_of
from runner.board import Board
from runner.cache import key_of
from runner.execute import Execution
from runner.graph import Stage, load_pipeline, project_root, read_yaml
from runner.hooks import Hooks
from runner.parameters import ParameterError, Resolved, is_list, model_of, resolve
from runner.stage import Job


def trials(
    stage: Stage, given: Mapping[str, Any], file: Mapping[str, Any], run_id: str
) -> dict[str, tuple[dict[str, Any], Resolved]]:
    """The trials of a sweep by run id: the values that vary, and all parameters.

    A parameter given as a list, `[0.03, 0.1]`, varies; several make a grid. Raises
    `ParameterError` when none does, or for what is wrong with any trial.
    """
    model = model_of(stage.notebook)
    grid = {}
    for name, text in given.items():
        field = model.model_fields.get(name)
        try:
            values = read_yaml(text) if text.startswith("[") else None
        except yaml.YAMLError as err:
            raise ParameterError(f"-p {name}={text}: expected a list, [a, b]: {err}") from err
        nested = isinstance(values, list) and any(isinstance(v, list) for v in values)
        if isinstance(values, list) and (nested or not (field and is_list(field.annotation))):
            grid[name] = values
    if not all(grid.values()) or not grid:
        raise ParameterError("a sweep needs a list of values: -p learning_rate=[0.03,0.1]")
    fixed = {name: value for name, value in given.items() if name not in grid}
    found = {}
    for number, values in enumerate(itertools.product(*grid.values()), 1):
        varied = dict(zip(grid, values, strict=True))
        layers = (("pipeline.yaml", stage.sweep), ("file", file), ("-p", fixed | varied))
        found[f"{run_id}-t{number}"] = (varied, resolve([stage], *layers)[stage.name])
    return found


def repeat(
    lake: Lake, run_id: str, into: str | None, board: Board, hooks: Hooks
) -> list[dict[str, Any]]:
    """Run the stages of a run again, on a branch of the lake as it was, and compare the metrics.

    Returns a row a stage: `stage`, `agree`, `differences`. Raises `LookupError` for a run that did
    not succeed, and `StageError` when a stage fails now.
    """
    entries = [e for e in read_ledger(lake) if e.run_id == run_id and e.state != "reused"]
    if not entries or any(e.state != "succeeded" for e in entries):
        states = ", ".join(f"{e.stage} {e.state}" for e in entries) or "no such run"
        raise LookupError(f"run {run_id!r} cannot be repeated: {states}; see hm runs")
    for source, seen in (pair for e in entries for pair in e.sources.items()):
        if hooks.fingerprint(source) != seen:
            board.say(f"warning: {source} has changed since the run", "yellow")
    with code_of(entries, board) as root, TemporaryDirectory(prefix="hm-repeat-") as folder:
        pipeline = load_pipeline(root / "runner" / "pipeline.yaml", root)
        beside = branch(lake, into or folder, _tables_before(lake, run_id, entries))
        jobs = [Job(pipeline[e.stage], _parameters(e), run_id, root) for e in entries]
        again = Execution(beside, jobs, board, hooks, limit=2).run()
    return [_compare(entry, next(e for e in again if e.stage == entry.stage)) for entry in entries]


def _parameters(entry: Entry) -> Resolved:
    given = {n: v for n, v in entry.parameters.items() if n not in ("lake", "run_id")}
    return Resolved(given, dict.fromkeys(given, "recorded"))


def _tables_before(lake: Lake, run_id: str, entries: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """The table versions that were visible before the run."""
    note = json.loads(lake.path("runs", run_id, "run.json").read_text())
    vouched: dict[str, dict[str, int]] = note["vouched"]
    written = {name for entry in entries for name in entry.outputs}
    for name, version in (pair for e in entries for pair in e.inputs.items()):
        owner = stage_of(name) or ""
        if name not in written and owner not in note["vouched"]:  # written without a manifest
            vouched = {**vouched, owner: {**vouched.get(owner, {}), name: version}}
    return vouched


@contextmanager
def code_of(entries: Sequence[Entry], board: Board) -> Iterator[Path]:
    """A checkout with the code of a run: this one when nothing differs, else the commit's."""
    here, pipeline = project_root(), load_pipeline()
    known = [e for e in entries if e.stage in pipeline]
    same = [key_of(pipeline[e.stage], e.parameters) == e.key for e in known]
    commit = entries[0].git_commit
    if len(known) == len(entries) and all(same):
        yield here
        return
    sha, _, changed = commit.partition("+")
    archive = ["git", "-C", str(here), "archive", "--format=tar", sha]
    is_sha = re.fullmatch("[0-9a-f]{7,64}", sha)  # and no option of git's
    done = subprocess.run(archive, capture_output=True, check=False) if is_sha else None
    if done is None or done.returncode:
        board.say(f"warning: no commit {sha} here; repeating with the present code", "yellow")
        yield here
        return
    extra = "; it had uncommitted changes, which are lost" if changed else ""
    board.say(f"warning: this checkout differs; repeating with commit {sha}{extra}", "yellow")
    with TemporaryDirectory(prefix="hm-commit-") as folder:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder)


def _compare(before: Entry, after: Entry) -> dict[str, Any]:
    old, new = _flat(before.metrics), _flat(after.metrics)
    names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
    shown = [f"{n}: {old.get(n)} → {new.get(n)}" for n in names[:5]]
    return {"stage": before.stage, "agree": not names, "differences": "; ".join(shown)}


def _flat(metrics: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(metrics, dict):
        return {path: metrics}
    parts = [_flat(value, f"{path}.{name}" if path else name) for name, value in metrics.items()]
    return {name: value for part in parts for name, value in part.items()}
