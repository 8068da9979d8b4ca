"""The measures of the notebooks that CONTRIBUTING names: short cells, examples, early outputs."""

import ast
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
STAGES = [p for p in NOTEBOOKS if p.parent.name == "stages" and p.name[0] != "0"]
EXPORT = re.compile(r"^#\|\s*exports?\b", re.M)
CHECK = re.compile(r"\bassert\b|\btest_\w+\(|\bpytest\.raises")
HIDE = re.compile(r"^#\|\s*hide", re.M)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Measures:
    """What is counted in all notebooks."""

    cell_lines: list[int] = field(default_factory=list)
    function_lines: list[int] = field(default_factory=list)
    first_outputs: list[float] = field(default_factory=list)  # share of the cells before it
    documented: int = 0  # functions with a docstring
    commented: int = 0  # functions with a comment on an argument
    checks: int = 0  # code cells with an assert
    outputs: int = 0  # code cells with an output
    hidden: int = 0  # code cells


def count_function(measures: Measures, function: Function, lines: list[str]) -> None:
    signature = "\n".join(lines[function.lineno - 1 : function.body[0].lineno - 1])
    measures.function_lines.append((function.end_lineno or 0) - function.lineno + 1)
    measures.documented += ast.get_docstring(function) is not None
    measures.commented += bool(function.args.args) and "#" in signature


def count_cell(measures: Measures, cell: nbformat.NotebookNode) -> None:
    lines = cell.source.splitlines()
    measures.cell_lines.append(len(lines))
    measures.checks += bool(CHECK.search(cell.source))
    measures.outputs += bool(cell.outputs)
    measures.hidden += bool(HIDE.search(cell.source))
    if EXPORT.search(cell.source):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, Function) and not node.name.startswith("_"):
                count_function(measures, node, lines)


@pytest.fixture(scope="module")
def measures() -> Measures:
    """All notebooks together."""
    result = Measures()
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        with_output = [n for n, cell in enumerate(cells) if cell.get("outputs")]
        result.first_outputs.append(with_output[0] / len(cells) if with_output else 1.0)
        for cell in (cell for cell in cells if cell.cell_type == "code"):
            count_cell(result, cell)
    return result


def compute_p90(values: list[int]) -> int:
    return sorted(values)[int(0.9 * (len(values) - 1))]


def test_code_cells_are_short(measures):
    assert statistics.median(measures.cell_lines) <= 5
    assert compute_p90(measures.cell_lines) <= 15


def test_exported_functions_are_short_and_documented(measures):
    count = len(measures.function_lines)
    assert statistics.median(measures.function_lines) <= 8
    assert compute_p90(measures.function_lines) <= 20
    assert measures.documented == count
    assert measures.commented / count >= 0.6


def test_cells_check_and_show_results(measures):
    count = len(measures.cell_lines)
    assert measures.checks / count >= 0.25
    assert measures.outputs / count >= 0.3
    assert measures.hidden == 0


def test_median_notebook_shows_its_first_output_early(measures):
    assert statistics.median(measures.first_outputs) <= 0.3


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_stage_reaches_its_run_within_the_first_third(path):
    cells = nbformat.read(path, as_version=4).cells
    run = next(n for n, cell in enumerate(cells) if cell.source.startswith("## Run"))
    assert run <= len(cells) / 3
