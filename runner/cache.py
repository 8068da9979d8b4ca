"""Decide from code, parameters, sources and tables whether a stage must run again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hm_reco.lake.fingerprint import fingerprint_notebook, hash_text
from hm_reco.lake.runs import StageRun
from hm_reco.lake.storage import REGISTRY
from runner.graph import Stage, find_project_root

LOCATION_PARAMETERS = ("lake", "run_id")  # set by the run; they do not affect the outputs


class Decision(NamedTuple):
    """Whether to run a stage or to use an earlier run's outputs (`cached_run`), and why."""

    reason: str
    cache_key: dict[str, Any]
    cached_run: StageRun | None = None


def compute_cache_key(stage: Stage, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Compute what a stage's outputs depend on, besides sources and tables."""
    lock = find_project_root() / "requirements.lock"
    return fingerprint_notebook(stage.notebook) | {
        "packages": hash_text(lock.read_text()) if lock.is_file() else "",
        "parameters": {n: v for n, v in parameters.items() if n not in LOCATION_PARAMETERS},
    }


def decide(
    published: Mapping[str, Mapping[str, int]],
    stage: Stage,
    parameters: Mapping[str, Any],
    stage_runs: Sequence[StageRun],
    fingerprint: Callable[[str], str],
) -> Decision:
    """Compare a stage with its succeeded `stage_runs` and with the `published` table versions.

    `fingerprint` returns the fingerprint of a source outside the lake.
    """
    cache_key = compute_cache_key(stage, parameters)
    previous_runs = [e for e in stage_runs if e.stage == stage.name and e.state != "cached"]
    succeeded = [e for e in previous_runs if e.state == "succeeded"]
    if not succeeded:
        return Decision(
            f"its last run was {previous_runs[-1].state}" if previous_runs else "it never ran here",
            cache_key,
        )
    match = next((e for e in reversed(succeeded) if e.cache_key == cache_key), None)
    if match is None:
        return Decision("; ".join(_list_differences(succeeded[-1].cache_key, cache_key)), cache_key)
    reasons = list(_list_changed_tables(published, match, fingerprint))
    return (
        Decision("; ".join(reasons), cache_key)
        if reasons
        else Decision("unchanged", cache_key, match)
    )


def _list_differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    if not old:
        yield "its last run has no cache key"
        return
    if old["notebook"] != new["notebook"]:
        yield "notebook changed"
    if old["packages"] != new["packages"]:
        yield "requirements.lock changed"
    changed = {n for n, _ in old["library"].items() ^ new["library"].items()}
    if changed:
        yield f"code changed: {', '.join(sorted(changed))}"
    old_parameters, new_parameters = old["parameters"], new["parameters"]
    for name in sorted(
        {
            n
            for n in {**old_parameters, **new_parameters}
            if old_parameters.get(n) != new_parameters.get(n)
        }
    ):
        yield f"{name}: {old_parameters.get(name)!r} → {new_parameters.get(name)!r}"


def _list_changed_tables(
    published: Mapping[str, Mapping[str, int]],
    stage_run: StageRun,
    fingerprint: Callable[[str], str],
) -> Iterator[str]:
    """List the changed sources and tables of a run with the same code and parameters."""
    for source, recorded in stage_run.sources.items():
        if fingerprint(source) != recorded:
            yield f"source {source} changed"
    visible = {name: v for tables in published.values() for name, v in tables.items()}
    for role, tables in (("input", stage_run.inputs), ("output", stage_run.outputs)):
        for name, version in tables.items():
            if role == "output" and name == REGISTRY and visible.get(name, -1) > version:
                continue  # a promotion does not require training again
            if visible.get(name) != version:
                yield f"{role} {name}: version {version} → {visible.get(name, 'none')}"
