"""Sweeps (a stage with many parameter sets) and reproductions of earlier runs."""

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
from hm_reco.lake.runs import StageRun, read_runs
from hm_reco.lake.storage import Lake, get_owner
from runner.cache import LOCATION_PARAMETERS, compute_cache_key
from runner.display import RunDisplay
from runner.graph import Stage, find_project_root, load_pipeline, read_yaml
from runner.hooks import Hooks
from runner.parameters import (
    ParameterError,
    ResolvedParameters,
    accepts_collection,
    build_parameters_model,
    resolve,
)
from runner.scheduler import Scheduler
from runner.stage import Job


def build_trials(
    stage: Stage, assignments: Mapping[str, Any], file_parameters: Mapping[str, Any], run_id: str
) -> dict[str, tuple[dict[str, Any], ResolvedParameters]]:
    """Build the trials of a sweep by run id: the values that vary, and all parameters.

    A parameter with a list of values, `[0.03, 0.1]`, varies; several lists make a grid. Raises
    `ParameterError` when no parameter varies or a trial has invalid parameters.
    """
    model = build_parameters_model(stage.notebook)
    grid = {}
    for name, text in assignments.items():
        field = model.model_fields.get(name)
        try:
            values = read_yaml(text) if text.startswith("[") else None
        except yaml.YAMLError as err:
            raise ParameterError(f"-p {name}={text}: expected a list, [a, b]: {err}") from err
        nested = isinstance(values, list) and any(isinstance(v, list) for v in values)
        if isinstance(values, list) and (
            nested or not (field and accepts_collection(field.annotation))
        ):
            grid[name] = values
    if not all(grid.values()) or not grid:
        raise ParameterError("a sweep needs a list of values: -p learning_rate=[0.03,0.1]")
    fixed = {name: value for name, value in assignments.items() if name not in grid}
    trials = {}
    for index, values in enumerate(itertools.product(*grid.values()), 1):
        varied = dict(zip(grid, values, strict=True))
        layers = (("pipeline.yaml", stage.sweep), ("file", file_parameters), ("-p", fixed | varied))
        trials[f"{run_id}-t{index}"] = (varied, resolve([stage], *layers)[stage.name])
    return trials


def reproduce_run(
    lake: Lake, run_id: str, into: str | None, display: RunDisplay, hooks: Hooks
) -> list[dict[str, Any]]:
    """Run the stages of a run again, on a branch of the lake before it, and compare the metrics.

    Returns one row per stage: `stage`, `agree`, `differences`. Raises `LookupError` for a run that
    did not succeed, and `StageError` when a stage fails now.
    """
    stage_runs = [e for e in read_runs(lake) if e.run_id == run_id and e.state != "cached"]
    if not stage_runs or any(e.state != "succeeded" for e in stage_runs):
        states = ", ".join(f"{e.stage} {e.state}" for e in stage_runs) or "no such run"
        raise LookupError(f"run {run_id!r} cannot be reproduced: {states}; see hm runs")
    for source, recorded in (pair for e in stage_runs for pair in e.sources.items()):
        if hooks.fingerprint(source) != recorded:
            display.log(f"warning: {source} has changed since the run", "yellow")
    with (
        checkout_code(stage_runs, display) as root,
        TemporaryDirectory(prefix="hm-reproduce-") as folder,
    ):
        pipeline = load_pipeline(root / "runner" / "pipeline.yaml", root)
        branched = branch(lake, into or folder, _get_tables_before(lake, run_id, stage_runs))
        jobs = [
            Job(pipeline[e.stage], _get_recorded_parameters(e), run_id, root) for e in stage_runs
        ]
        reproduced = Scheduler(branched, jobs, display, hooks, limit=2).run()
    return [
        _compare_metrics(stage_run, next(e for e in reproduced if e.stage == stage_run.stage))
        for stage_run in stage_runs
    ]


def _get_recorded_parameters(stage_run: StageRun) -> ResolvedParameters:
    values = {n: v for n, v in stage_run.parameters.items() if n not in LOCATION_PARAMETERS}
    return ResolvedParameters(values, dict.fromkeys(values, "recorded"))


def _get_tables_before(
    lake: Lake, run_id: str, stage_runs: Sequence[StageRun]
) -> dict[str, dict[str, int]]:
    """Return the table versions that were visible before the run."""
    run_record = json.loads(lake.path("runs", run_id, "run.json").read_text())
    published: dict[str, dict[str, int]] = run_record["published"]
    written = {name for stage_run in stage_runs for name in stage_run.outputs}
    for name, version in (pair for e in stage_runs for pair in e.inputs.items()):
        owner = get_owner(name) or ""
        if (
            name not in written and owner not in run_record["published"]
        ):  # written without a manifest
            published = {**published, owner: {**published.get(owner, {}), name: version}}
    return published


@contextmanager
def checkout_code(stage_runs: Sequence[StageRun], display: RunDisplay) -> Iterator[Path]:
    """Yield a checkout with the code of a run: this one if it is unchanged, else the commit's."""
    root, pipeline = find_project_root(), load_pipeline()
    known_runs = [e for e in stage_runs if e.stage in pipeline]
    matches = [
        compute_cache_key(pipeline[e.stage], e.parameters) == e.cache_key for e in known_runs
    ]
    commit = stage_runs[0].git_commit
    if len(known_runs) == len(stage_runs) and all(matches):
        yield root
        return
    sha, _, changed = commit.partition("+")
    archive = ["git", "-C", str(root), "archive", "--format=tar", sha]
    is_sha = re.fullmatch("[0-9a-f]{7,64}", sha)  # not a git option
    result = subprocess.run(archive, capture_output=True, check=False) if is_sha else None
    if result is None or result.returncode:
        display.log(f"warning: commit {sha} not found; reproducing with the current code", "yellow")
        yield root
        return
    remark = "; it had uncommitted changes, which are lost" if changed else ""
    display.log(f"warning: this checkout differs; reproducing with commit {sha}{remark}", "yellow")
    with TemporaryDirectory(prefix="hm-commit-") as folder:
        with tarfile.open(fileobj=io.BytesIO(result.stdout)) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder)


def _compare_metrics(recorded: StageRun, reproduced: StageRun) -> dict[str, Any]:
    old, new = _flatten(recorded.metrics), _flatten(reproduced.metrics)
    names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
    differences = [f"{n}: {old.get(n)} → {new.get(n)}" for n in names[:5]]
    return {"stage": recorded.stage, "agree": not names, "differences": "; ".join(differences)}


def _flatten(metrics: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(metrics, dict):
        return {path: metrics}
    parts = [_flatten(value, f"{path}.{name}" if path else name) for name, value in metrics.items()]
    return {name: value for part in parts for name, value in part.items()}
