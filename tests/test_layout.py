"""The house: who may lean on whom, and the anatomy of a notebook."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "hm_reco/core": {"hm_reco.core"},
    "hm_reco/model": {"hm_reco.core", "hm_reco.model"},
    "hm_reco/eda": {"hm_reco.core", "hm_reco.model", "hm_reco.eda"},
    "hm_reco/service": {"hm_reco.core", "hm_reco.model", "hm_reco.service", "reports"},
    "hm_reco/stages": {
        "hm_reco.core",
        "hm_reco.model",
        "hm_reco.eda",
        "hm_reco.service",
        "hm_reco.stages",
    },
    "runner": {"hm_reco.core", "runner", "reports"},
    "reports": {"reports"},
    "deploy": {"hm_reco.core", "hm_reco.service", "deploy"},
}
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[0-9]*.ipynb"))
READ_ONLY = ("nbs", "explore")  # folders whose notebooks are not exported
STAGES = [path for path in NOTEBOOKS if path.parent.name == "stages" and path.name[0] != "0"]


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    return found | {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_leans_only_on_those_below_it(room):
    paths = list((ROOT / room).rglob("*.py"))
    assert paths
    for path in paths:
        ours = {
            m
            for m in imports(path)
            if m.split(".")[0] in ("hm_reco", "runner", "reports", "deploy")
        }
        stray = {m for m in ours if not any((m + ".").startswith(f"{a}.") for a in ROOMS[room])}
        assert not stray, f"{path.relative_to(ROOT)} imports {stray}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_title_purpose_and_export_and_leads_on(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith("# ") and "\n> " in cells[0].source
    exported = path.parent.name not in READ_ONLY
    assert cells[1].source.startswith("#| default_exp ") == exported
    text = path.read_text()
    assert str(ROOT) not in text and "/tmp/" not in text
    assert path.stem == "00_start" or "ry next" in text or "to try" in text
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert outputs and not any(o.output_type == "error" for o in outputs)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_has_one_parameters_cell_with_help_and_a_manifest(path):
    from runner.parameters import read_parameters

    parameters = read_parameters(path)
    assert [p.name for p in parameters[:2]] == ["lake", "run_id"]
    assert all(p.help for p in parameters)
    cells = nbformat.read(path, as_version=4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and "#| export" not in tagged[0].source
    assert "write_manifest(" in cells[-1].source
    assert any(c.source.startswith(("## Run", "## Report")) for c in cells)


def exported_functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{path.stem}.{node.name}", node)
        for path in (ROOT / "hm_reco").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def test_public_functions_say_what_they_do_and_stay_short():
    for name, node in exported_functions():
        lines = (node.end_lineno or 0) - node.lineno
        assert lines <= 45, f"{name}: {lines} lines"
        public = not node.name.startswith("_") and node.col_offset == 0
        assert not public or ast.get_docstring(node), f"{name} has no docstring"
        assert not public or node.returns is not None, f"{name} has no return type"


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    text = path.read_text()
    told = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            told |= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    lines = enumerate(text.splitlines(), 1)
    return sum(
        n not in told and not line.strip().startswith(("#",)) and bool(line.strip())
        for n, line in lines
    )


def test_the_runner_stays_small():
    assert sum(code_lines(path) for path in (ROOT / "runner").glob("*.py")) <= 1_500


def test_links_of_the_guides_lead_somewhere():
    guides = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, to) for page in guides for to in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    ]
    assert len(links) > 20
    assert not [(page.name, to) for page, to in links if not (page.parent / to).exists()]
