"""Does a stage have to run again? Its code, parameters, sources and tables tell."""

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.util import resolve_name
from inspect import getfile
from pathlib import Path
from typing import Any, NamedTuple

from hm_reco.core.lake import Lake, fingerprint
from hm_reco.core.ledger import Entry
from runner.graph import Stage, project_root

PACKAGE = Path(getfile(Lake)).parents[1]  # hm_reco, wherever it is installed
NOT_PART = ("lake", "run_id")  # parameters that say where, not what


class Decision(NamedTuple):
    """Run the stage, or take what an earlier run left (`reuse`); and why."""

    reason: str
    key: dict[str, Any]
    reuse: Entry | None = None


def _sha(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


@cache
def _cells(notebook: Path) -> list[tuple[str, str]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def _imports(source: str, package: str) -> Iterator[str]:
    """Modules of ours that a source imports; of a `from` import, the names may be modules too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = resolve_name(name, package) if node.level else name
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


@cache
def _module(name: str) -> tuple[str, frozenset[str]] | None:
    """Hash of a module of the library, and what it imports; None: not a module of ours."""
    path = PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")
    # a stage leans on no other stage: their demo lakes are for notebooks without a lake
    if not name.startswith("hm_reco.") or name.startswith("hm_reco.stages") or not path.is_file():
        return None
    source = path.read_text(encoding="utf-8")
    return _sha(source), frozenset(_imports(source, name.rpartition(".")[0]))


def _library(names: Iterable[str]) -> dict[str, str]:
    """Hashes of the modules of these names and of all that they import."""
    found: dict[str, str] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found and (module := _module(name)):
            found[name] = module[0]
            todo += module[1]
    return dict(sorted(found.items()))


def _notebook_imports(cells: Sequence[tuple[str, str]]) -> Iterator[str]:
    for kind, source in cells:
        if kind == "code" and "hm_reco" in source:
            try:
                yield from _imports(source, "")
            except SyntaxError:  # a cell with %magic or !command
                from IPython.core.inputtransformer2 import TransformerManager

                yield from _imports(TransformerManager().transform_cell(source), "")


def key_of(stage: Stage, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage's outputs depend on, besides sources and tables."""
    cells = _cells(stage.notebook)
    lock = project_root() / "requirements.lock"
    return {
        "notebook": _sha(json.dumps(cells)),
        "library": _library(_notebook_imports(cells)),
        "packages": _sha(lock.read_text()) if lock.is_file() else "",
        "parameters": {n: v for n, v in parameters.items() if n not in NOT_PART},
    }


def decide(
    vouched: Mapping[str, Mapping[str, int]],
    stage: Stage,
    parameters: Mapping[str, Any],
    entries: Sequence[Entry],
) -> Decision:
    """Compare a stage with its succeeded runs in the ledger's `entries`, and the lake's tables."""
    key = key_of(stage, parameters)
    own = [e for e in entries if e.stage == stage.name and e.state != "reused"]
    done = [e for e in own if e.state == "succeeded"]
    if not done:
        return Decision(f"its last run was {own[-1].state}" if own else "it never ran here", key)
    same = next((e for e in reversed(done) if e.key == key), None)
    if same is None:
        return Decision("; ".join(_differences(done[-1].key, key)), key)
    reasons = list(_moved(vouched, same))
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


def _moved(vouched: Mapping[str, Mapping[str, int]], entry: Entry) -> Iterator[str]:
    """What has changed around a run whose code and parameters are the same."""
    for source, seen in entry.sources.items():
        if fingerprint(source) != seen:
            yield f"source {source} changed"
    visible = {name: v for tables in vouched.values() for name, v in tables.items()}
    for what, tables in (("input", entry.inputs), ("output", entry.outputs)):
        for name, version in tables.items():
            if visible.get(name) != version:
                yield f"{what} {name}: version {version} → {visible.get(name, 'none')}"
