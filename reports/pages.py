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


class StageRun(Protocol):
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
def _load_asset(name: str) -> str:
    return files("reports").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment(package: str) -> Environment:
    loaders = [PackageLoader(package)] if package else []
    environment = Environment(
        loader=ChoiceLoader([*loaders, FunctionLoader(_load_asset)]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.globals |= {"style": _load_asset("style.css"), "search": _load_asset("search.js")}
    environment.filters |= {"number": _format_number, "leaves": _iter_leaves}
    return environment


def render_page(template: str, package: str = "", **values: Any) -> str:
    """A page from a template of this folder, or of another package's `templates` folder.

    Templates of other packages may extend those of this folder, and have its style and filters.
    """
    return _environment(package).get_template(template).render(**values)


def script_source() -> str:
    """The index's script, as a Content-Security-Policy names it: no other may run."""
    digest = b64encode(sha256(_load_asset("search.js").encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _format_number(value: Any) -> str:
    """A figure as a reader wants it: 31,788,324 and 0.0444."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _iter_leaves(metrics: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested metrics as (path, value)."""
    if isinstance(metrics, dict):
        for name, value in metrics.items():
            yield from _iter_leaves(value, f"{path} · {name}" if path else name)
    else:
        yield (
            path,
            ", ".join(map(_format_number, metrics)) if isinstance(metrics, list) else metrics,
        )


def add_banner(notebook: "NotebookNode", stage_run: StageRun) -> None:
    """Say on top of a saved notebook that its stage did not succeed, and why.

    Its cells do not show it: after a kill, the last one looks as if it had ended.
    """
    from nbformat.v4 import new_markdown_cell

    tags = [cell.metadata.get("tags", []) for cell in notebook.cells[:1]]
    if tags and BANNER_TAG in tags[0]:
        del notebook.cells[0]  # papermill's, which knows nothing of the process
    running = [c.metadata.get("papermill", {}).get("status") != "completed" for c in notebook.cells]
    location = f" In cell {running.index(True) + 1} of {len(running)}." if True in running else ""
    text = f"**This stage did not succeed: {stage_run.state}.**{location}"
    text += f"\n\n```text\n{stage_run.error}\n```"
    banner = new_markdown_cell(text, id="banner", metadata={"tags": [BANNER_TAG]})
    notebook.cells.insert(0, banner)


def _parse_title(notebook: "NotebookNode") -> tuple[str, str]:
    """The H1 and the one-line purpose of a notebook's first cell that has one."""
    heads = [cell.source for cell in notebook.cells if cell.source.startswith("# ")]
    lines = [line for line in (heads[0] if heads else "").splitlines() if line.strip()]
    title = lines[0].lstrip("# ") if lines else ""
    purpose = next((line.lstrip("> ") for line in lines[1:] if line.startswith(">")), "")
    return title, purpose.replace("`", "")


def _select_report_cells(notebook: "NotebookNode") -> "NotebookNode":
    """The part of a stage notebook that a report's reader wants: from `## Run` or `## Report`.

    What comes before defines functions. A notebook that fails before has its error shown.
    """
    cells = notebook.cells
    starts = [i for i, cell in enumerate(cells) if REPORT_PART.match(cell.source)]
    first_cell = starts[0] + 1 if starts else 1
    failed = [
        c for c in cells[:first_cell] if any(o.output_type == "error" for o in _get_outputs(c))
    ]
    report_cells = [c for c in cells[first_cell:] if c.cell_type != "code" or _get_outputs(c)]
    return type(notebook)({**notebook, "cells": failed + report_cells})


def _get_outputs(cell: "NotebookNode") -> "list[NotebookNode]":
    return cell.get("outputs", [])


def _add_heading_id(heading: re.Match[str]) -> str:
    """A heading that a link can lead to, as alerts name it: words joined by hyphens."""
    level, text = heading.groups()
    return f'<h{level} id="{text.replace(" ", "-")}">{text}</h{level}>'


def notebook_page(notebook: "NotebookNode", stage_run: StageRun) -> str:
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
    body, _ = exporter.from_notebook_node(_select_report_cells(notebook))
    body = SCROLLED.sub(r'<\1 tabindex="0"', body)
    body = HEADING.sub(_add_heading_id, body)
    title, purpose = _parse_title(notebook)
    return render_page("report.html.j2", title=title, purpose=purpose, body=body, entry=stage_run)


def _get_figure(metrics: Any, path: str) -> Any:
    """The figure at `scores.ranker.0` in nested metrics; None where there is none."""
    for part in path.split("."):
        if isinstance(metrics, dict):
            metrics = metrics.get(part)
        else:
            exists = isinstance(metrics, list) and part.isdigit() and int(part) < len(metrics)
            metrics = metrics[int(part)] if exists else None
    return metrics


def get_headline_figures(stage_run: StageRun, stages: Mapping[str, Stage]) -> dict[str, Any]:
    """The figures that the pipeline names for a stage, as far as its metrics have them."""
    labels = stages[stage_run.stage].headline if stage_run.stage in stages else {}
    figures = {name: _get_figure(stage_run.metrics, path) for name, path in labels.items()}
    return {name: value for name, value in figures.items() if value is not None}


def _build_graph(stage_runs: Sequence[StageRun], stages: Mapping[str, Stage]) -> dict[str, Any]:
    """Where each stage of a run stands in its picture, and the arrows between them."""
    runs_by_stage = {e.stage: e for e in stage_runs}
    predecessors = {name: stages[name].after if name in stages else () for name in runs_by_stage}
    column: dict[str, int] = {}
    for name in sorted(runs_by_stage, key=lambda n: list(stages).index(n) if n in stages else -1):
        column[name] = max((column[a] + 1 for a in predecessors[name] if a in column), default=0)
    row = {n: [m for m in column if column[m] == column[n]].index(n) for n in column}
    boxes: list[dict[str, Any]] = [
        {"entry": runs_by_stage[n], "x": 10 + 190 * column[n], "y": 10 + 76 * row[n], "name": n}
        for n in column
    ]
    box_by_stage = {box["name"]: box for box in boxes}
    arrows = [
        (
            box_by_stage[a]["x"] + 150,
            box_by_stage[a]["y"] + 28,
            box_by_stage[n]["x"] - 4,
            box_by_stage[n]["y"] + 28,
        )
        for n in column
        for a in predecessors[n]
        if a in box_by_stage
    ]
    width = 190 * (max(column.values(), default=0) + 1) - 20
    return {"boxes": boxes, "arrows": arrows, "width": width} | {
        "height": 76 * (max(row.values(), default=0) + 1)
    }


def run_page(
    run_id: str, stage_runs: Sequence[StageRun], stages: Mapping[str, Stage], lake: str
) -> str:
    """What ran, with what, how it went, what came out, and how to repeat it."""
    ordered = sorted(stage_runs, key=lambda e: e.started)
    sweep = TRIAL.fullmatch(run_id)
    return render_page(
        "run.html.j2",
        run_id=run_id,
        entries=ordered,
        figures={e.stage: get_headline_figures(e, stages) for e in ordered},
        graph=_build_graph(ordered, stages),
        lake=lake,
        sweep=sweep[1] if sweep else "",
    )


def sweep_page(
    sweep_id: str,
    varied: Mapping[str, Mapping[str, Any]],
    stage_runs: Sequence[StageRun],
    stages: Mapping[str, Stage],
    lake: str,
) -> str:
    """The trials of a sweep side by side; `varied` holds the values of each run that vary."""
    rows = [
        (stage_run, dict(varied[stage_run.run_id]), get_headline_figures(stage_run, stages))
        for stage_run in stage_runs
    ]
    return render_page("sweep.html.j2", sweep_id=sweep_id, rows=rows, lake=lake)


def index_page(
    stage_runs: Sequence[StageRun],
    stages: Mapping[str, Stage],
    lake: str,
    models: Sequence[Mapping[str, Any]] = (),
    shadow: bool = False,
) -> str:
    """Figures over time, models and runs, the newest first; `entries` are in order of time.

    `models` are rows of `hm_reco.registry.registry.model_rows`; `shadow`: a page on a challenger.
    """
    runs: dict[str, list[StageRun]] = {}
    for stage_run in stage_runs:
        runs.setdefault(stage_run.run_id, []).append(stage_run)
    latest_runs = dict(list(reversed(runs.items()))[:INDEX_RUNS])
    figures = {
        (e.run_id, e.stage): get_headline_figures(e, stages)
        for run in latest_runs.values()
        for e in run
    }
    full_runs = [e for e in stage_runs if not TRIAL.fullmatch(e.run_id)][-5 * INDEX_RUNS :]
    return render_page(
        "index.html.j2",
        lake=lake,
        runs=latest_runs,
        figures=figures,
        series=_build_series(full_runs, stages),
        models=models,
        shadow=shadow,
        trial=TRIAL.fullmatch,
    )


def _build_series(
    stage_runs: Sequence[StageRun], stages: Mapping[str, Stage]
) -> list[dict[str, Any]]:
    """Each headline number of succeeded stages over time, as points in a picture 200 x 48."""
    points_by_figure: dict[tuple[str, str], list[tuple[StageRun, Any]]] = {}
    for stage_run in stage_runs:
        if stage_run.state == "succeeded":
            for name, value in get_headline_figures(stage_run, stages).items():
                if isinstance(value, int | float):  # the name of a metric has no curve
                    points = points_by_figure.setdefault((stage_run.stage, name), [])
                    points.append((stage_run, value))
    return [
        {"stage": stage, "name": name, "last": values[-1][1], "points": _build_points(values)}
        for (stage, name), values in points_by_figure.items()
    ]


def _build_points(values: Sequence[tuple[StageRun, Any]]) -> list[dict[str, Any]]:
    figures = [value for _, value in values]
    low, spread = min(figures), (max(figures) - min(figures)) or 1.0
    step = 184 / max(len(values) - 1, 1)
    return [
        {"x": round(8 + step * i, 1), "y": round(40 - 32 * (v - low) / spread, 1)}
        | {"run_id": e.run_id, "value": v}
        for i, (e, v) in enumerate(values)
    ]
