"""Small stage notebooks for tests of the runner, and how to run one."""

import sys
from pathlib import Path
from typing import Any

import nbformat
from rich.console import Console

from hm_reco.lake.runs import StageRun, generate_run_id
from hm_reco.lake.storage import Lake
from runner.cli.options import get_library_hooks
from runner.display import RunDisplay
from runner.graph import Stage
from runner.parameters import resolve
from runner.scheduler import StageError, run_jobs
from runner.stage import Job

PARAMETERS = """lake: str = ""  # root of the lake
run_id: str = "notebook"  # name of the run
article: str = "0108775015"  # an id, # and all
rate: float = 0.1  # a number
weeks: int | None = None  # how many
kind: Literal["lambdarank", "binary"] = "binary"  # which
start: date = "2020-09-16"  # first day
names: list[str] = [
    "a # b",  # the first
    "c",
]
"""
MANIFEST = """from hm_reco.lake.published import write_manifest
from hm_reco.lake.storage import open_lake
metrics = {"article": article, "rate": rate, "twice": 2 * rate}
write_manifest(open_lake(lake), run_id, "toy", {}, {}, metrics)
"""


def build_toy_stage(
    folder: Path,
    body: str = MANIFEST,
    parameters: str = PARAMETERS,
    name: str = "toy",
    **options: Any,
) -> Stage:
    """A stage whose notebook runs `body`."""
    cells = [
        nbformat.v4.new_markdown_cell("# Toy\n\n> A stage for tests."),
        nbformat.v4.new_code_cell("from datetime import date\nfrom typing import Literal"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell("## Run"),
        nbformat.v4.new_code_cell(body),
        nbformat.v4.new_code_cell("print('to the end')"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return Stage(name=name, notebook=path, **options)


def build_job(stage: Stage, run_id: str | None = None, **assignments: Any) -> Job:
    """A job with a run of its own."""
    return Job(
        stage, resolve([stage], ("-p", assignments))[stage.name], run_id or generate_run_id()
    )


def run_toy_jobs(lake: Lake, *jobs: Job, limit: int = 2, force: bool = False) -> list[StageRun]:
    """Run jobs; returns their stage runs, succeeded or not."""
    try:
        return run_jobs(
            lake, jobs, RunDisplay(Console(file=sys.stderr)), get_library_hooks(), limit, force
        )
    except StageError as err:
        return err.stage_runs
