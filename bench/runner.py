"""Overhead of the runner: a stage compared with its function, and a run without changes.

    .venv/bin/python bench/runner.py [--customers 20000] [--repeat 5]

Everything is measured in one run on one lake; compare the ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil

from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import Lake, open_lake

HM = str(Path(sys.executable).with_name("hm"))
PAPERMILL = str(Path(sys.executable).with_name("papermill"))
NOTEBOOK = Path(__file__).parents[1] / "nbs" / "stages" / "20_processing.ipynb"
STAGES = ("ingestion", "processing", "eda")
LONG_STAGE_SECONDS = 120.0


def measure_medians(repeat: int, **workloads: Callable[[], object]) -> dict[str, float]:
    """Median wall time of each, measured in turns so that load affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in workloads}
    for _ in range(repeat):
        for name, workload in workloads.items():
            started = time.perf_counter()
            workload()
            times[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in times.items()}


def run_command(*command: str) -> str:
    """Run a command; its output."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return result.stdout


FUNCTION_SCRIPT = """
import sys
from hm_reco.lake.storage import open_lake
from hm_reco.data.changes import detect_changes
from hm_reco.data.processing import process
lake = open_lake(sys.argv[1])
process(lake, change=detect_changes(lake, full_refresh=True))
"""


def measure_stage_seconds(lake: Lake) -> float:
    """Run the stage with `hm run`; seconds by the run store."""
    out = run_command(
        HM, "run", "processing", "--lake", lake.root, "-p", "full_refresh=true", "--force", "--json"
    )
    return json.loads(out)[0]["seconds"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--customers", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with TemporaryDirectory(prefix="hm-bench-") as folder:
        data, lake = Path(folder) / "data", open_lake(f"{folder}/lake")
        rows = write_synthetic(data, options.customers)
        args = ("--data", str(data), "--lake", lake.root)
        run_command(HM, "run", *STAGES, *args)
        out = f"{folder}/out.ipynb"
        papermill_args = (
            "-p",
            "lake",
            lake.root,
            "--cwd",
            str(NOTEBOOK.parent),
            "--no-progress-bar",
        )
        recorded_seconds: list[float] = []
        median_seconds = measure_medians(
            options.repeat,
            function=lambda: run_command(sys.executable, "-c", FUNCTION_SCRIPT, lake.root),
            command=lambda: recorded_seconds.append(measure_stage_seconds(lake)),
            papermill=lambda: run_command(PAPERMILL, str(NOTEBOOK), out, *papermill_args),
        )
        run_command(HM, "run", *STAGES, *args)
        run_unchanged = lambda: run_command(HM, "run", *STAGES, *args)  # noqa: E731
        median_seconds |= measure_medians(options.repeat, unchanged=run_unchanged)
    function_seconds, papermill_seconds = median_seconds["function"], median_seconds["papermill"]
    memory = psutil.virtual_memory().total / 2**30
    size = f"{rows['transactions']:,} transactions, median of {options.repeat}"
    print(f"{os.cpu_count()} cores, {memory:.0f} GiB; {size}")
    print(f"processing as a function, python -c  {function_seconds:6.2f} s")
    for name, seconds in (
        ("hm run, start to end", median_seconds["command"]),
        ("the run store", median(recorded_seconds)),
    ):
        share = 100 * (seconds - function_seconds) / LONG_STAGE_SECONDS
        overhead = f"overhead {seconds - function_seconds:.2f} s, {share:.1f} % of"
        print(f"  {name:<34} {seconds:6.2f} s   {overhead} {LONG_STAGE_SECONDS:.0f} s")
    ratio = median_seconds["command"] / papermill_seconds
    print(f"  papermill alone, start to end      {papermill_seconds:6.2f} s   hm is {ratio:.2f} x")
    print(f"hm run of three, nothing changed     {median_seconds['unchanged']:6.2f} s")


if __name__ == "__main__":
    main()
