"""What ingestion and processing cost, beside peers, and how the cost grows with the data.

    make bench                          at 1 % of H&M's size
    make bench CUSTOMERS=1371980        at full size: some minutes, 10 GB of disk

Everything is measured in one run on the synthetic data set, each work in a process of its own. Look at
the ratios: the seconds are this machine's, on which others may work as well.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE
from subprocess import run as run_command
from tempfile import TemporaryDirectory

import polars as pl
from peers import peak_mb

from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import open_lake
from hm_reco.lake.tables import scan
from hm_reco.stages import ingestion, processing

PEERS = Path(__file__).parents[1] / ".venv-bench-data" / "bin" / "python"
SHARDS = 4
FULL, WEEK_ROWS = 1_371_980, 300_000  # customers of H&M's data; rows of a new week there


def generate(customers: str, source: str) -> dict[str, float]:
    """The synthetic data set, as CSV files."""
    return {"rows": write_synthetic(Path(source), int(customers))["transactions"]}


def ingest(source: str, root: str) -> dict[str, float]:
    """CSV files to committed raw tables."""
    loads = ingestion.ingest(open_lake(root), source)
    return {"rows": sum(load.rows for load in loads if load.state != "unchanged")}


def process(root: str, _: str) -> dict[str, float]:
    """Raw tables to processed ones: what has changed, which is all at first."""
    lake = open_lake(root)
    change = processing.detect_changes(lake, SHARDS)
    processing.process(lake, SHARDS, change)
    return {"weeks": len(change.weeks)}


def week(source: str, root: str) -> dict[str, float]:
    """A new file: ingested, and the weeks that it touches processed."""
    return ingest(source, root) | process(root, "")


WORKS: dict[str, Callable[[str, str], dict[str, float]]] = {
    "generate": generate,
    "ingest": ingest,
    "process": process,
    "week": week,
}


@dataclass
class Cost:
    """What a work took: seconds of the work itself, peak memory of its process."""

    seconds: float
    peak_mb: float
    figures: dict[str, float]


def measure(*words: str) -> Cost:
    """Run a command that prints its seconds and figures as JSON."""
    done = run_command(words, stdout=PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    figures = json.loads(done.stdout.splitlines()[-1])
    return Cost(figures.pop("seconds"), figures.pop("peak_mb"), figures)


def ours(work: str, *words: str) -> Cost:
    """Measure a work of this file."""
    return measure(sys.executable, __file__, "--work", work, *words)


def peer(work: str, source: str, out: str) -> Cost:
    """Measure a work of `peers.py`."""
    return measure(str(PEERS), str(Path(__file__).with_name("peers.py")), work, source, out)


def build(customers: int, folder: Path) -> dict[str, Cost]:
    """Generate, ingest and process a world of some size."""
    source, lake = str(folder / "source"), str(folder / "lake")
    return {
        "generate": ours("generate", str(customers), source),
        "ingest": ours("ingest", source, lake),
        "process": ours("process", lake, ""),
    }


def new_weeks(folder: Path, rows: int) -> list[Cost]:
    """Three weeks that arrive one after the other: the last seven days again, 7, 14, 21 later."""
    day = pl.col("t_dat").str.to_date()
    old = pl.scan_csv(folder / "source" / "transactions_train.csv", infer_schema=False)
    last = old.select(day.max()).collect().item()
    costs = []
    for later in (7, 14, 21):
        moved = old.filter(day > last - timedelta(days=7)).head(rows)
        moved = moved.with_columns(t_dat=(day + timedelta(days=later)).dt.to_string("%Y-%m-%d"))
        moved.sink_csv(folder / "source" / f"transactions_{later}.csv")
        costs.append(ours("week", str(folder / "source"), str(folder / "lake")))
    return sorted(costs, key=lambda cost: cost.seconds)


def totals(root: Path) -> dict[str, float]:
    """The figures that peers must agree with."""
    lake = open_lake(str(root))
    sums = scan(lake, "processed/customer_features").select("units", "spend").sum().collect()
    counts = [
        scan(lake, f"processed/{name}").select(pl.len()).collect().item()
        for name in ("purchases", "weekly_customers")
    ]
    return dict(zip(("purchases", "weeks", "units", "spend"), (*counts, *sums.row(0)), strict=True))


def compare(name: str, peer_figures: dict[str, float], own: dict[str, float]) -> None:
    """Stop when a peer has made something else."""
    for figure, value in own.items():
        if not math.isclose(value, peer_figures[figure], rel_tol=1e-6):
            raise SystemExit(f"{name}: {figure} is {peer_figures[figure]}, ours {value}")


def show(what: str, cost: Cost, *notes: str) -> None:
    """Print a line."""
    print(f"{what:<34}{cost.seconds:8.1f} s {cost.peak_mb:8.0f} MB  {', '.join(notes)}", flush=True)


def exponent(small: Cost, large: Cost, times: float) -> float:
    """How the time grows: 1 is in proportion to the data."""
    return math.log(large.seconds / small.seconds) / math.log(times)


def run(customers: int, folder: Path) -> None:
    """Measure all and print it."""
    costs = build(customers, folder / "1")
    raw, source = folder / "1" / "lake" / "raw", folder / "1" / "source"
    parsed = peer("parse", str(source / "transactions_train.csv"), "")
    peers = {name: peer(name, str(raw), str(folder / name)) for name in ("duckdb", "pandas")}
    own = totals(folder / "1" / "lake")
    for name, cost in peers.items():
        compare(name, cost.figures, own)
    show("generate", costs["generate"], f"{costs['generate'].figures['rows']:,} transactions")
    show("parse only (pyarrow)", parsed)
    ratio = costs["ingest"].seconds / parsed.seconds
    show("ingest", costs["ingest"], f"{ratio:.2f} x parsing only (goal 4)")
    for name, cost in peers.items():
        show(f"the same features in {name}", cost)
    work = costs["process"]
    notes = [
        f"{work.seconds / cost.seconds:.2f} x the time and {work.peak_mb / cost.peak_mb:.2f} x"
        f" the memory of {name}"
        for name, cost in peers.items()
    ]
    show("process", work, *notes, "(goals 1.5 x DuckDB's time, 0.5 x pandas' both)")
    _, arrived, _ = new_weeks(folder / "1", max(WEEK_ROWS * customers // FULL, 100))
    share = arrived.seconds / (costs["ingest"].seconds + work.seconds)
    note = f"{arrived.figures['rows']:,} rows, {arrived.figures['weeks']} weeks"
    show("a new week (median of three)", arrived, note, f"{share:.1%} of the full build (goal 3 %)")
    grow(customers, folder, costs)
    if customers < FULL:
        print("The goals are for full size; the smaller the data, the more the fixed costs weigh.")


def grow(customers: int, folder: Path, whole: dict[str, Cost]) -> None:
    """Print how the costs grow from 1 % and 10 % of the data."""
    for part in (100, 10):
        if customers // part < 100:
            continue
        smaller = build(customers // part, folder / str(part))
        for name in ("ingest", "process"):
            up = exponent(smaller[name], whole[name], part)
            memory = whole[name].peak_mb / smaller[name].peak_mb
            notes = (f"{part} x the data: time to the power {up:.2f}", f"memory x {memory:.1f}")
            show(f"{name} {100 / part:g} % of it", smaller[name], *notes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--customers", type=int, default=FULL // 100)
    parser.add_argument("--work", nargs=3, metavar=("NAME", "FROM", "TO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, *words = options.work
        began = time.perf_counter()
        figures = WORKS[name](*words)
        cost = {"seconds": time.perf_counter() - began, "peak_mb": peak_mb()}
        print(json.dumps(cost | figures))
        return
    with TemporaryDirectory(prefix="hm-bench-") as folder:
        run(options.customers, Path(folder))


if __name__ == "__main__":
    main()
