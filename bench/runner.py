"""What the runner costs: a stage through it against its exported function, and a no-change run.

    .venv/bin/python bench/runner.py [--customers 20000] [--repeat 5]

Everything is measured in one run on one lake; look at the ratios, the seconds are this machine's.
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


def medians(repeat: int, **works: Callable[[], object]) -> dict[str, float]:
    """Median wall time of each, taken in turns so that a busy moment meets them all."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def call(*words: str) -> str:
    """Run a command; its output."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    return done.stdout


FUNCTION = """
import sys
from hm_reco.lake.storage import open_lake
from hm_reco.stages.processing import process, what_changed
lake = open_lake(sys.argv[1])
process(lake, change=what_changed(lake, rebuild=True))
"""


def stage_seconds(lake: Lake) -> float:
    """How long the stage took by the ledger, when it is run through the runner."""
    out = call(
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
        words = ("--data", str(data), "--lake", lake.root)
        call(HM, "run", *STAGES, *words)
        out = f"{folder}/out.ipynb"
        bare = ("-p", "lake", lake.root, "--cwd", str(NOTEBOOK.parent), "--no-progress-bar")
        ledger: list[float] = []
        took = medians(
            options.repeat,
            function=lambda: call(sys.executable, "-c", FUNCTION, lake.root),
            command=lambda: ledger.append(stage_seconds(lake)),
            papermill=lambda: call(PAPERMILL, str(NOTEBOOK), out, *bare),
        )
        call(HM, "run", *STAGES, *words)
        nothing = lambda: call(HM, "run", *STAGES, *words)  # noqa: E731
        took |= medians(options.repeat, unchanged=nothing)
    function, peer = took["function"], took["papermill"]
    memory = psutil.virtual_memory().total / 2**30
    size = f"{rows['transactions']:,} transactions, median of {options.repeat}"
    print(f"{os.cpu_count()} cores, {memory:.0f} GiB; {size}")
    print(f"processing as a function, python -c  {function:6.2f} s")
    for name, wall in (("hm run, start to end", took["command"]), ("the ledger", median(ledger))):
        share = 100 * (wall - function) / LONG_STAGE_SECONDS
        over = f"overhead {wall - function:.2f} s, {share:.1f} % of {LONG_STAGE_SECONDS:.0f} s"
        print(f"  {name:<34} {wall:6.2f} s   {over}")
    print(
        f"  papermill alone, start to end      {peer:6.2f} s   hm is {took['command'] / peer:.2f} x"
    )
    print(f"hm run of three, nothing changed     {took['unchanged']:6.2f} s")


if __name__ == "__main__":
    main()
