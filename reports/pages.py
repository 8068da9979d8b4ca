"""The pages: executed notebooks without their code, each run, each sweep, the index of a lake."""

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import ChoiceLoader, Environment, FunctionLoader, PackageLoader, StrictUndefined

if TYPE_CHECKING:  # the service draws pages, too, and has no notebooks
    from nbformat import NotebookNode

REPORT_PART = re.compile(r"^## (Run|Report)\b")
TRIAL = re.compile(r"(.+)-t\d+")  # the run of a sweep's trial, named after the sweep
SCROLLED = re.compile(r'<(pre|div(?= class="output_html))')  # by keyboard, too
HEADING = re.compile(r"<h([2-4])>([^<]+)</h\1>")
INDEX_RUNS = 200  # runs that the index lists
BANNER_TAG = "papermill-error-cell-tag"


class Entry(Protocol):
    """What the pages need of a stage of a run; see `hm_reco.lake.runs.Entry`."""

    run_id: str
    stage: str
    error: str
    started: datetime
    inputs: dict[str, int]  # tables read and their versions
    metrics: dict[str, Any]

    @property
    def state(self) -> str:
        """How it ended."""


class Stage(Protocol):
    """What they need of the pipeline; see `runner.graph.Stage`."""

    @property
    def after(self) -> Sequence[str]:
        """The stages before it."""

    @property
    def headline(self) -> Mapping[str, str]:
        """Figures worth showing: label, and path in the metrics."""


@cache
def _load(name: str) -> str:
    return files("reports").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment(package: str) -> Environment:
    loaders = [PackageLoader(package)] if package else []
    environment = Environment(
        loader=ChoiceLoader([*loaders, FunctionLoader(_load)]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.globals |= {"style": _load("style.css"), "search": _load("search.js")}
    environment.filters |= {"number": _number, "leaves": _leaves}
    return environment


def render_page(template: str, package: str = "", **values: Any) -> str:
    """A page from a template of this folder, or of another package's `templates` folder.

    Templates of other packages may extend those of this folder, and have its style and filters.
    """
    return _environment(package).get_template(template).render(**values)


def script_source() -> str:
    """The index's script, as a Content-Security-Policy names it: no other may run."""
    digest = b64encode(sha256(_load("search.js").encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _number(value: Any) -> str:
    """A figure as a reader wants it: 31,788,324 and 0.0444."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _leaves(metrics: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested metrics as (path, value)."""
    if isinstance(metrics, dict):
        for name, value in metrics.items():
            yield from _leaves(value, f"{path} · {name}" if path else name)
    else:
        yield path, ", ".join(map(_number, metrics)) if isinstance(metrics, list) else metrics


def add_banner(notebook: "NotebookNode", entry: Entry) -> None:
    """Say on top of a saved notebook that its stage did not succeed, and why.

    Its cells do not tell: after a kill, the last one looks as if it had ended.
    """
    from nbformat.v4 import new_markdown_cell

    tags = [cell.metadata.get("tags", []) for cell in notebook.cells[:1]]
    if tags and BANNER_TAG in tags[0]:
        del notebook.cells[0]  # papermill's, which knows nothing of the process
    running = [c.metadata.get("papermill", {}).get("status") != "completed" for c in notebook.cells]
    where = f" In cell {running.index(True) + 1} of {len(running)}." if True in running else ""
    text = f"**This stage did not succeed: {entry.state}.**{where}\n\n```text\n{entry.error}\n```"
    banner = new_markdown_cell(text, id="banner", metadata={"tags": [BANNER_TAG]})
    notebook.cells.insert(0, banner)


def _title(notebook: "NotebookNode") -> tuple[str, str]:
    """The H1 and the one-line purpose of a notebook's first cell that has one."""
    heads = [cell.source for cell in notebook.cells if cell.source.startswith("# ")]
    lines = [line for line in (heads[0] if heads else "").splitlines() if line.strip()]
    title = lines[0].lstrip("# ") if lines else ""
    purpose = next((line.lstrip("> ") for line in lines[1:] if line.startswith(">")), "")
    return title, purpose.replace("`", "")


def _shown(notebook: "NotebookNode") -> "NotebookNode":
    """The part of a stage notebook that a report's reader wants: from `## Run` or `## Report`.

    What comes before defines functions. A notebook that fails before has its error shown.
    """
    cells = notebook.cells
    starts = [i for i, cell in enumerate(cells) if REPORT_PART.match(cell.source)]
    first = starts[0] + 1 if starts else 1
    failed = [c for c in cells[:first] if any(o.output_type == "error" for o in _outputs(c))]
    kept = [c for c in cells[first:] if c.cell_type != "code" or _outputs(c)]
    return type(notebook)({**notebook, "cells": failed + kept})


def _outputs(cell: "NotebookNode") -> "list[NotebookNode]":
    return cell.get("outputs", [])


def _with_id(heading: re.Match[str]) -> str:
    """A heading that a link can lead to, as alerts name it: words joined by hyphens."""
    level, text = heading.groups()
    return f'<h{level} id="{text.replace(" ", "-")}">{text}</h{level}>'


def notebook_page(notebook: "NotebookNode", entry: Entry) -> str:
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
    body = SCROLLED.sub(r'<\1 tabindex="0"', body)
    body = HEADING.sub(_with_id, body)
    title, purpose = _title(notebook)
    return render_page("report.html.j2", title=title, purpose=purpose, body=body, entry=entry)


def _figure(metrics: Any, path: str) -> Any:
    """The figure at `map12.ranker.0` in nested metrics; None where there is none."""
    for part in path.split("."):
        if isinstance(metrics, dict):
            metrics = metrics.get(part)
        else:
            there = isinstance(metrics, list) and part.isdigit() and int(part) < len(metrics)
            metrics = metrics[int(part)] if there else None
    return metrics


def headline(entry: Entry, stages: Mapping[str, Stage]) -> dict[str, Any]:
    """The figures that the pipeline names for a stage, as far as its metrics have them."""
    named = stages[entry.stage].headline if entry.stage in stages else {}
    found = {name: _figure(entry.metrics, path) for name, path in named.items()}
    return {name: value for name, value in found.items() if value is not None}


def _graph(entries: Sequence[Entry], stages: Mapping[str, Stage]) -> dict[str, Any]:
    """Where each stage of a run stands in its picture, and the arrows between them."""
    here = {e.stage: e for e in entries}
    before = {name: stages[name].after if name in stages else () for name in here}
    column: dict[str, int] = {}
    for name in sorted(here, key=lambda n: list(stages).index(n) if n in stages else -1):
        column[name] = max((column[a] + 1 for a in before[name] if a in column), default=0)
    row = {n: [m for m in column if column[m] == column[n]].index(n) for n in column}
    boxes: list[dict[str, Any]] = [
        {"entry": here[n], "x": 10 + 190 * column[n], "y": 10 + 76 * row[n], "name": n}
        for n in column
    ]
    at = {box["name"]: box for box in boxes}
    arrows = [
        (at[a]["x"] + 150, at[a]["y"] + 28, at[n]["x"] - 4, at[n]["y"] + 28)
        for n in column
        for a in before[n]
        if a in at
    ]
    width = 190 * (max(column.values(), default=0) + 1) - 20
    return {"boxes": boxes, "arrows": arrows, "width": width} | {
        "height": 76 * (max(row.values(), default=0) + 1)
    }


def run_page(run_id: str, entries: Sequence[Entry], stages: Mapping[str, Stage], lake: str) -> str:
    """What ran, with what, how it went, what came out, and how to repeat it."""
    shown = sorted(entries, key=lambda e: e.started)
    sweep = TRIAL.fullmatch(run_id)
    return render_page(
        "run.html.j2",
        run_id=run_id,
        entries=shown,
        figures={e.stage: headline(e, stages) for e in shown},
        graph=_graph(shown, stages),
        lake=lake,
        sweep=sweep[1] if sweep else "",
    )


def sweep_page(
    sweep_id: str,
    varied: Mapping[str, Mapping[str, Any]],
    entries: Sequence[Entry],
    stages: Mapping[str, Stage],
    lake: str,
) -> str:
    """The trials of a sweep side by side; `varied` holds the values of each run that vary."""
    rows = [(entry, dict(varied[entry.run_id]), headline(entry, stages)) for entry in entries]
    return render_page("sweep.html.j2", sweep_id=sweep_id, rows=rows, lake=lake)


def index_page(
    entries: Sequence[Entry],
    stages: Mapping[str, Stage],
    lake: str,
    models: Sequence[Mapping[str, Any]] = (),
    shadow: bool = False,
) -> str:
    """Figures over time, models and runs, the newest first; `entries` are in order of time.

    `models` are rows of `hm_reco.registry.registry.model_rows`; `shadow`: a page on a challenger.
    """
    runs: dict[str, list[Entry]] = {}
    for entry in entries:
        runs.setdefault(entry.run_id, []).append(entry)
    newest = dict(list(reversed(runs.items()))[:INDEX_RUNS])
    figures = {(e.run_id, e.stage): headline(e, stages) for part in newest.values() for e in part}
    whole = [e for e in entries if not TRIAL.fullmatch(e.run_id)][-5 * INDEX_RUNS :]
    return render_page(
        "index.html.j2",
        lake=lake,
        runs=newest,
        figures=figures,
        series=_series(whole, stages),
        models=models,
        shadow=shadow,
        trial=TRIAL.fullmatch,
    )


def _series(entries: Sequence[Entry], stages: Mapping[str, Stage]) -> list[dict[str, Any]]:
    """Each headline figure of succeeded stages over time, as points in a picture 200 x 48."""
    found: dict[tuple[str, str], list[tuple[Entry, Any]]] = {}
    for entry in entries:
        if entry.state == "succeeded":
            for name, value in headline(entry, stages).items():
                found.setdefault((entry.stage, name), []).append((entry, value))
    return [
        {"stage": stage, "name": name, "last": values[-1][1], "points": _points(values)}
        for (stage, name), values in found.items()
    ]


def _points(values: Sequence[tuple[Entry, Any]]) -> list[dict[str, Any]]:
    figures = [value for _, value in values]
    low, spread = min(figures), (max(figures) - min(figures)) or 1.0
    step = 184 / max(len(values) - 1, 1)
    return [
        {"x": round(8 + step * i, 1), "y": round(40 - 32 * (v - low) / spread, 1)}
        | {"run_id": e.run_id, "value": v}
        for i, (e, v) in enumerate(values)
    ]
