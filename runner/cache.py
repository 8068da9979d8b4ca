"""Does a stage have to run again? Its code, parameters, sources and tables tell."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hm_reco.lake.fingerprint import code_key, short_hash
from hm_reco.lake.runs import Entry
from hm_reco.lake.storage import REGISTRY
from runner.graph import Stage, project_root

NOT_PART = ("lake", "run_id")  # parameters that say where, not what


class Decision(NamedTuple):
    """Run the stage, or take what an earlier run left (`reuse`); and why."""

    reason: str
    key: dict[str, Any]
    reuse: Entry | None = None


def key_of(stage: Stage, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage's outputs depend on, besides sources and tables."""
    lock = project_root() / "requirements.lock"
    return code_key(stage.notebook) | {
        "packages": short_hash(lock.read_text()) if lock.is_file() else "",
        "parameters": {n: v for n, v in parameters.items() if n not in NOT_PART},
    }


def decide(
    vouched: Mapping[str, Mapping[str, int]],
    stage: Stage,
    parameters: Mapping[str, Any],
    entries: Sequence[Entry],
    fingerprint: Callable[[str], str],
) -> Decision:
    """Compare a stage with its succeeded runs in the ledger's `entries`, and the lake's tables.

    `fingerprint` is that of a source outside of the lake.
    """
    key = key_of(stage, parameters)
    own = [e for e in entries if e.stage == stage.name and e.state != "reused"]
    done = [e for e in own if e.state == "succeeded"]
    if not done:
        return Decision(f"its last run was {own[-1].state}" if own else "it never ran here", key)
    same = next((e for e in reversed(done) if e.key == key), None)
    if same is None:
        return Decision("; ".join(_differences(done[-1].key, key)), key)
    reasons = list(_moved(vouched, same, fingerprint))
    return Decision("; ".join(reasons), key) if reasons else Decision("unchanged", key, same)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    if not old:
        yield "its last run left no key"
        return
    if old["notebook"] != new["notebook"]:
        yield "notebook changed"
    if old["packages"] != new["packages"]:
        yield "requirements.lock changed"
    changed = {n for n, _ in old["library"].items() ^ new["library"].items()}
    if changed:
        yield f"code changed: {', '.join(sorted(changed))}"
    before, after = old["parameters"], new["parameters"]
    for name in sorted({n for n in {**before, **after} if before.get(n) != after.get(n)}):
        yield f"{name}: {before.get(name)!r} → {after.get(name)!r}"


def _moved(
    vouched: Mapping[str, Mapping[str, int]], entry: Entry, fingerprint: Callable[[str], str]
) -> Iterator[str]:
    """What has changed around a run whose code and parameters are the same."""
    for source, seen in entry.sources.items():
        if fingerprint(source) != seen:
            yield f"source {source} changed"
    visible = {name: v for tables in vouched.values() for name, v in tables.items()}
    for what, tables in (("input", entry.inputs), ("output", entry.outputs)):
        for name, version in tables.items():
            if what == "output" and name == REGISTRY and visible.get(name, -1) > version:
                continue  # a promotion is no reason to train again
            if visible.get(name) != version:
                yield f"{what} {name}: version {version} → {visible.get(name, 'none')}"
