"""Write the pages of `reports` into a lake."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hm_reco.lake.runs import StageRun, read_runs
from hm_reco.lake.storage import Lake, write_file
from reports.pages import index_page, run_page, sweep_page
from runner.graph import load_pipeline
from runner.hooks import Hooks


def render_run(lake: Lake, run_id: str, stage_runs: Sequence[StageRun] | None = None) -> None:
    """Write `reports/<run_id>/index.html`; reads the stage runs from the lake by default."""
    if stage_runs is None:
        stage_runs = [e for e in read_runs(lake) if e.run_id == run_id]
    page = run_page(run_id, stage_runs, load_pipeline(), lake.root)
    write_file(lake.path("reports", run_id, "index.html"), page)


def render_sweep(
    lake: Lake,
    sweep_id: str,
    varied: Mapping[str, Mapping[str, Any]],
    stage_runs: Sequence[StageRun],
) -> None:
    """Write `reports/<sweep_id>/index.html`."""
    page = sweep_page(sweep_id, varied, stage_runs, load_pipeline(), lake.root)
    write_file(lake.path("reports", sweep_id, "index.html"), page)


def render_index(lake: Lake, hooks: Hooks) -> None:
    """Write `reports/index.html`."""
    lake = replace(lake)  # an open lake caches the published versions of its first access
    shadow = lake.path("reports", "shadow.html").is_file()
    stage_runs, models = read_runs(lake), hooks.build_model_rows(lake)
    page = index_page(stage_runs, load_pipeline(), lake.root, models, shadow)
    write_file(lake.path("reports", "index.html"), page)
