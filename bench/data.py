"""Cost of ingestion and processing, compared with DuckDB and pandas, and its growth with the data.

    make bench                          at 1 % of H&M's size
    make bench CUSTOMERS=1371980        at full size: some minutes, 10 GB of disk

Everything is measured in one run on the synthetic data set, each workload in its own process.
Compare the ratios: the seconds depend on this machine and its load.
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
from external_data import get_peak_mb

from hm_reco.data import ingestion, processing
from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import open_lake
from hm_reco.lake.tables import scan

EXTERNAL_PYTHON = Path(__file__).parents[1] / ".venv-bench-data" / "bin" / "python"
SHARDS = 4
FULL_CUSTOMERS, WEEK_ROWS = 1_371_980, 300_000  # customers of H&M's data; rows of a new week there


def generate_csv(customers: str, source: str) -> dict[str, float]:
    """The synthetic data set, as CSV files."""
    return {"rows": write_synthetic(Path(source), int(customers))["transactions"]}


def ingest_csv(source: str, root: str) -> dict[str, float]:
    """CSV files to committed raw tables."""
    loads = ingestion.ingest(open_lake(root), source)
    return {"rows": sum(load.rows for load in loads if load.state != "unchanged")}


def process_tables(root: str, _: str) -> dict[str, float]:
    """Raw tables to processed ones: the changed weeks, at first all."""
    lake = open_lake(root)
    change = processing.detect_changes(lake, SHARDS)
    processing.process(lake, SHARDS, change)
    return {"weeks": len(change.weeks)}


def ingest_new_week(source: str, root: str) -> dict[str, float]:
    """Ingest a new file, and process the weeks that it changes."""
    return ingest_csv(source, root) | process_tables(root, "")


WORKLOADS: dict[str, Callable[[str, str], dict[str, float]]] = {
    "generate": generate_csv,
    "ingest": ingest_csv,
    "process": process_tables,
    "week": ingest_new_week,
}


@dataclass
class Cost:
    """Cost of a workload: its seconds, and the peak memory of its process."""

    seconds: float
    peak_mb: float
    figures: dict[str, float]


def measure(*command: str) -> Cost:
    """Run a command that prints its seconds and figures as JSON."""
    result = run_command(command, stdout=PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    figures = json.loads(result.stdout.splitlines()[-1])
    return Cost(figures.pop("seconds"), figures.pop("peak_mb"), figures)


def measure_own(workload: str, *args: str) -> Cost:
    """Measure a workload of this file."""
    return measure(sys.executable, __file__, "--work", workload, *args)


def measure_external(workload: str, source: str, out: str) -> Cost:
    """Measure a workload of `external_data.py`."""
    return measure(
        str(EXTERNAL_PYTHON),
        str(Path(__file__).with_name("external_data.py")),
        workload,
        source,
        out,
    )


def build_lake(customers: int, folder: Path) -> dict[str, Cost]:
    """Generate, ingest and process a data set of some size."""
    source, lake = str(folder / "source"), str(folder / "lake")
    return {
        "generate": measure_own("generate", str(customers), source),
        "ingest": measure_own("ingest", source, lake),
        "process": measure_own("process", lake, ""),
    }


def measure_new_weeks(folder: Path, rows: int) -> list[Cost]:
    """Ingest three new weeks in turn: copies of the last seven days, 7, 14 and 21 days later."""
    day = pl.col("t_dat").str.to_date()
    transactions = pl.scan_csv(folder / "source" / "transactions_train.csv", infer_schema=False)
    last_day = transactions.select(day.max()).collect().item()
    costs = []
    for days_later in (7, 14, 21):
        shifted = transactions.filter(day > last_day - timedelta(days=7)).head(rows)
        shifted = shifted.with_columns(
            t_dat=(day + timedelta(days=days_later)).dt.to_string("%Y-%m-%d")
        )
        shifted.sink_csv(folder / "source" / f"transactions_{days_later}.csv")
        costs.append(measure_own("week", str(folder / "source"), str(folder / "lake")))
    return sorted(costs, key=lambda cost: cost.seconds)


def compute_totals(root: Path) -> dict[str, float]:
    """The totals that the external libraries must reproduce."""
    purchases, units = scan(open_lake(str(root)), "processed/purchases"), pl.col("units")
    totals = purchases.select(
        purchases=pl.len(),
        weeks=pl.col("week").n_unique(),
        units=units.sum(),
        spend=(pl.col("price").cast(pl.Float64) * units).sum(),
    )
    return totals.collect().row(0, named=True)


def check_totals(
    name: str, external_totals: dict[str, float], own_totals: dict[str, float]
) -> None:
    """Exit if the totals of an external library differ."""
    for figure, value in own_totals.items():
        if not math.isclose(value, external_totals[figure], rel_tol=1e-6):
            raise SystemExit(f"{name}: {figure} is {external_totals[figure]}, ours {value}")


def print_cost(label: str, cost: Cost, *notes: str) -> None:
    """Print a line."""
    print(
        f"{label:<34}{cost.seconds:8.1f} s {cost.peak_mb:8.0f} MB  {', '.join(notes)}", flush=True
    )


def compute_exponent(small: Cost, large: Cost, size_ratio: float) -> float:
    """Exponent of the growth of the time: 1 is proportional to the data."""
    return math.log(large.seconds / small.seconds) / math.log(size_ratio)


def run_bench(customers: int, folder: Path) -> None:
    """Measure all and print it."""
    costs = build_lake(customers, folder / "1")
    raw_folder, source = folder / "1" / "lake" / "raw", folder / "1" / "source"
    parse_cost = measure_external("parse", str(source / "transactions_train.csv"), "")
    external = {
        name: measure_external(name, str(raw_folder), str(folder / name))
        for name in ("duckdb", "pandas")
    }
    own_totals = compute_totals(folder / "1" / "lake")
    for name, cost in external.items():
        check_totals(name, cost.figures, own_totals)
    print_cost("generate", costs["generate"], f"{costs['generate'].figures['rows']:,} transactions")
    print_cost("parse only (pyarrow)", parse_cost)
    ratio = costs["ingest"].seconds / parse_cost.seconds
    print_cost("ingest", costs["ingest"], f"{ratio:.2f} x parsing only (goal 4)")
    for name, cost in external.items():
        print_cost(f"the same tables in {name}", cost)
    process_cost = costs["process"]
    notes = [
        f"{process_cost.seconds / cost.seconds:.2f} x the time and "
        f"{process_cost.peak_mb / cost.peak_mb:.2f} x the memory of {name}"
        for name, cost in external.items()
    ]
    print_cost("process", process_cost, *notes, "(goals 1.5 x DuckDB's time, 0.5 x pandas' both)")
    _, new_week, _ = measure_new_weeks(
        folder / "1", max(WEEK_ROWS * customers // FULL_CUSTOMERS, 100)
    )
    share = new_week.seconds / (costs["ingest"].seconds + process_cost.seconds)
    note = f"{new_week.figures['rows']:,} rows, {new_week.figures['weeks']} weeks"
    print_cost(
        "a new week (median of three)", new_week, note, f"{share:.1%} of the full build (goal 3 %)"
    )
    print_growth(customers, folder, costs)
    if customers < FULL_CUSTOMERS:
        print("The goals are for full size; with fewer data, fixed costs weigh more.")


def print_growth(customers: int, folder: Path, full_costs: dict[str, Cost]) -> None:
    """Print how the costs grow from 1 % and 10 % of the data."""
    for divisor in (100, 10):
        if customers // divisor < 100:
            continue
        smaller = build_lake(customers // divisor, folder / str(divisor))
        for name in ("ingest", "process"):
            power = compute_exponent(smaller[name], full_costs[name], divisor)
            memory = full_costs[name].peak_mb / smaller[name].peak_mb
            notes = (
                f"{divisor} x the data: time to the power {power:.2f}",
                f"memory x {memory:.1f}",
            )
            print_cost(f"{name} {100 / divisor:g} % of it", smaller[name], *notes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--customers", type=int, default=FULL_CUSTOMERS // 100)
    parser.add_argument("--work", nargs=3, metavar=("NAME", "FROM", "TO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, *args = options.work
        started = time.perf_counter()
        figures = WORKLOADS[name](*args)
        cost = {"seconds": time.perf_counter() - started, "peak_mb": get_peak_mb()}
        print(json.dumps(cost | figures))
        return
    with TemporaryDirectory(prefix="hm-bench-") as folder:
        run_bench(options.customers, Path(folder))


if __name__ == "__main__":
    main()
