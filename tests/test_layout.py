"""The layout: which package may import which, and the parts of a notebook."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from docs.site import PACKAGES as PACKAGE_ORDER  # may import itself and earlier packages

ROOT = Path(__file__).parents[1]
LIBRARY = [name for name in PACKAGE_ORDER if name != "explore"]
EXTRA_IMPORTS = {  # further imports that a package may have
    "hm_reco/api": {"reports"},
    "hm_reco/reporting": {"reports"},
    "hm_reco/stages": {"reports"},
    "runner": {"hm_reco.lake", "runner", "reports"},
    "reports": {"reports"},
    "deploy": {"hm_reco.lake.fingerprint", "deploy"},
}
PACKAGES = (*(f"hm_reco/{name}" for name in LIBRARY), "runner", "reports", "deploy")
MAX_SHARE = 0.18  # of the library's lines, in one package
MAX_STAGE_CELLS = 15  # exported
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[0-9]*.ipynb"))
NOT_EXPORTED = ("nbs", "explore")  # folders whose notebooks are not exported
STAGES = [path for path in NOTEBOOKS if path.parent.name == "stages" and path.name[0] != "0"]


def list_imports(path: Path, include_lazy: bool = True) -> set[str]:
    """Absolute names of the modules that a file imports; `include_lazy`: in functions, too."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if not include_lazy:
        lazy_nodes = {n for f in nodes if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        nodes = [node for node in nodes if node not in lazy_nodes]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in (n for n in nodes if isinstance(n, ast.ImportFrom)):
        base = ".".join(package[: -node.level]) + "." if node.level else ""
        names.add(f"{base}{node.module or ''}".strip("."))
    return names


def list_allowed_imports(package: str) -> set[str]:
    """The packages that `package` may import."""
    allowed = set(EXTRA_IMPORTS.get(package, ()))
    if package.startswith("hm_reco/"):
        earlier = LIBRARY[: LIBRARY.index(package.removeprefix("hm_reco/")) + 1]
        allowed |= {f"hm_reco.{name}" for name in earlier}
    return allowed


def find_forbidden_imports(path: Path, package: str) -> set[str]:
    # the command line may import any package, but only in functions
    is_cli = path.is_relative_to(ROOT / "runner" / "cli")
    own_imports = {
        name
        for name in list_imports(path, include_lazy=not is_cli)
        if name.split(".")[0] in ("hm_reco", "runner", "reports", "deploy")
    }
    allowed = list_allowed_imports(package)
    return {n for n in own_imports if not any((n + ".").startswith(f"{a}.") for a in allowed)}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_packages_before_it(package):
    paths = list((ROOT / package).rglob("*.py"))
    assert paths
    for path in paths:
        forbidden = find_forbidden_imports(path, package)
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_library_has_no_other_package():
    folders = {path.parent.name for path in (ROOT / "hm_reco").glob("*/*.py")}
    assert folders == set(LIBRARY)


def test_library_package_share_is_bounded():
    lines = {
        name: sum(len(p.read_text().splitlines()) for p in (ROOT / "hm_reco" / name).glob("*.py"))
        for name in LIBRARY
    }
    shares = {name: count / sum(lines.values()) for name, count in lines.items()}
    assert max(shares.values()) <= MAX_SHARE, shares


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_stage_exports_few_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    assert sum(cell.source.startswith("#| export") for cell in cells) <= MAX_STAGE_CELLS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_title_purpose_export_and_next_step(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith("# ") and "\n> " in cells[0].source
    exported = path.parent.name not in NOT_EXPORTED
    assert cells[1].source.startswith("#| default_exp ") == exported
    text = path.read_text()
    assert str(ROOT) not in text and "/tmp/" not in text
    assert path.stem == "00_start" or "ry next" in text or "to try" in text
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert outputs and not any(o.output_type == "error" for o in outputs)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_stage_has_one_parameters_cell_with_help_and_manifest(path):
    from runner.parameters import read_parameters

    parameters = read_parameters(path)
    assert [p.name for p in parameters[:2]] == ["lake", "run_id"]
    assert all(p.help for p in parameters)
    cells = nbformat.read(path, as_version=4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and "#| export" not in tagged[0].source
    assert "write_manifest(" in cells[-1].source
    assert any(c.source.startswith(("## Run", "## Report")) for c in cells)


def list_library_functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{path.stem}.{node.name}", node)
        for path in (ROOT / "hm_reco").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def test_functions_are_short_and_public_ones_documented():
    for name, node in list_library_functions():
        lines = (node.end_lineno or 0) - node.lineno
        assert lines <= 45, f"{name}: {lines} lines"
        public = not node.name.startswith("_") and node.col_offset == 0
        assert not public or ast.get_docstring(node), f"{name} has no docstring"
        assert not public or node.returns is not None, f"{name} has no return type"


def test_guide_links_resolve():
    guides = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, target)
        for page in guides
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    ]
    assert len(links) > 20
    assert not [
        (page.name, target) for page, target in links if not (page.parent / target).exists()
    ]
