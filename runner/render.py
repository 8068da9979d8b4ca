"""Reports: executed notebooks as HTML pages without code, and the index of a lake's reports."""

import json
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from nbformat import NotebookNode

from hm_reco.core.lake import Lake, put_file
from runner.ledger import read_ledger

if TYPE_CHECKING:
    from runner.ledger import Entry

REPORT_PART = re.compile(r"^## (Run|Report)\b")


@cache
def _environment() -> Environment:
    def load(name: str) -> str:
        return files("reports").joinpath(name).read_text(encoding="utf-8")

    loader = FunctionLoader(load)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.globals["style"] = load("style.css")
    environment.filters["from_json"] = json.loads
    return environment


def _page(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)


def _title(notebook: NotebookNode) -> tuple[str, str]:
    """The H1 and the one-line purpose of a notebook's first cell."""
    lines = [line for line in notebook.cells[0].source.splitlines() if line.strip()]
    title = lines[0].lstrip("# ") if lines else ""
    purpose = next((line.lstrip("> ") for line in lines[1:] if line.startswith(">")), "")
    return title, purpose.replace("`", "")


def _shown(notebook: NotebookNode) -> NotebookNode:
    """The part of a stage notebook that a report's reader wants: from `## Run` or `## Report`.

    What comes before defines functions. A notebook that fails before has its error shown.
    """
    cells = notebook.cells
    starts = [i for i, cell in enumerate(cells) if REPORT_PART.match(cell.source)]
    first = starts[0] + 1 if starts else 1
    failed = [c for c in cells[:first] if any(o.output_type == "error" for o in _outputs(c))]
    kept = [c for c in cells[first:] if c.cell_type != "code" or _outputs(c)]
    return NotebookNode({**notebook, "cells": failed + kept})


def _outputs(cell: NotebookNode) -> list[NotebookNode]:
    return cell.get("outputs", [])


def render_notebook(notebook: NotebookNode, entry: "Entry") -> str:
    """An executed stage notebook as one self-contained HTML page, code left out."""
    from nbconvert.exporters import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
    body, _ = exporter.from_notebook_node(_shown(notebook))
    title, purpose = _title(notebook)
    return _page("report.html.j2", title=title, purpose=purpose, body=body, entry=entry)


def render_index(lake: Lake) -> None:
    """Write `reports/index.html`: the lake's runs, newest first, with links to their reports."""
    rows = read_ledger(lake).to_dicts()
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["run_id"], []).append(row)
    page = _page("index.html.j2", lake=lake.root, runs=dict(reversed(runs.items())))
    put_file(lake.path("reports", "index.html"), page)
