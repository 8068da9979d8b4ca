"""Cost of single units of work, sized as at 1, 10 and 100 times H&M.

    python bench/scale.py                            synthetic data of H&M's size: ten minutes
    python bench/scale.py --customers 137198         a tenth of it: a quick look

More data mean more units, not larger ones; but what each unit needs besides its own rows grows
with all customers, or with all purchases. So each runs in a separate process, on one core, with
data of each size. docs/scaling.md uses the figures.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from subprocess import PIPE
from subprocess import run as run_command
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
from external_data import get_peak_mb

from hm_reco.data import ingestion, processing
from hm_reco.data.changes import _list_weeks
from hm_reco.data.history import load_history, map_purchases
from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import open_lake
from hm_reco.lake.tables import scan

FULL_CUSTOMERS, SHARDS = 1_371_980, 8
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS"), "1")
Figures = dict[str, float]


def build_lake(root: str, customers: int) -> Figures:
    """A lake with a synthetic data set, ingested and processed."""
    folder = Path(root).parent / "source"
    rows = write_synthetic(folder, customers)["transactions"]
    lake = open_lake(root)
    ingestion.ingest(lake, str(folder))
    processing.process(lake, SHARDS)
    return {"rows": rows}


def measure_block(root: str, weeks: int) -> Figures:
    """Some weeks of processing: read, map, write."""
    lake = open_lake(root)
    week_starts = _list_weeks(scan(lake, "raw/transactions"))[-weeks:]
    rows = processing.process_block(lake, processing.load_ids(lake), SHARDS, week_starts)
    return {"rows": rows}


def measure_ids(_: str, customers: int) -> Figures:
    """Map three million rows to the internal ids of customers with ids of 64 characters."""
    customer_ids = pl.int_range(customers, eager=True).cast(pl.String).str.zfill(64)
    customer_table = pl.DataFrame(
        {"customer_id": customer_ids, "customer": np.arange(customers, dtype=np.int32)}
    )
    articles = pl.DataFrame({"article_id": ["0108775015"], "article": [0]})
    sampled = np.random.default_rng(0).integers(0, customers, 3_000_000)
    raw = pl.DataFrame({"customer_id": customer_ids.gather(sampled)}).with_columns(
        article_id=pl.lit("0108775015"),
        t_dat=pl.lit(date(2020, 9, 1)),
        sales_channel_id=pl.lit(1, pl.Int8),
        price=pl.lit(0.02),
    )
    return {"rows": map_purchases(raw.lazy(), articles, customer_table).collect()["units"].sum()}


def measure_sales(root: str, shards: int) -> Figures:
    """Sales aggregates of one shard, merged with those of another."""
    from hm_reco.retrieval.article_stats import _aggregate_shard, _merge_sales

    history = load_history(open_lake(root))
    started = time.perf_counter()
    first = _aggregate_shard(history, shards, 0)
    aggregation_seconds = time.perf_counter() - started
    second = _aggregate_shard(history, shards, 1)
    started = time.perf_counter()
    merged = _merge_sales(first, second)
    size = merged.daily.estimated_size() + merged.repurchase_gaps.estimated_size()
    figures = {"aggregating": aggregation_seconds, "merging": time.perf_counter() - started}
    return figures | {"rows": merged.daily.height, "mb": size / 1e6}


def measure_week(root: str, buyers: int) -> Figures:
    """Candidates and features of the last week."""
    from hm_reco.ranking.backtest import WeekJob, WeekTask
    from hm_reco.ranking.plan import BacktestPlan
    from hm_reco.retrieval.article_stats import aggregate_sales
    from hm_reco.retrieval.candidate_sources import SOURCE_LIMITS

    history = aggregate_sales(load_history(open_lake(root)))
    week_job = WeekJob(
        history,
        BacktestPlan(history.day, customers_per_week=buyers, pooled_weeks=26),
        SOURCE_LIMITS,
        lambda *_: None,
    )
    matrix = week_job.run(1, week_job.build(WeekTask(1, None)))[1]  # also compiles
    started = time.perf_counter()
    week_data = week_job.build(WeekTask(1, None))
    build_seconds = time.perf_counter() - started
    _, matrix = week_job.run(1, week_data)
    figures = {
        "building": build_seconds,
        "candidates": time.perf_counter() - started - build_seconds,
    }
    size = history.purchases.estimated_size() / 1e6
    return figures | {
        "rows": len(matrix.label),
        "buyers": week_data.buyers.height,
        "history_mb": size,
    }


WORKLOADS: dict[str, Callable[[str, int], Figures]] = {
    "build": build_lake,
    "block": measure_block,
    "ids": measure_ids,
    "sales": measure_sales,
    "week": measure_week,
}
MEASUREMENTS = [
    ("block", 13),
    ("block", 1),
    ("ids", FULL_CUSTOMERS),
    ("ids", 10 * FULL_CUSTOMERS),
    ("sales", SHARDS),
    ("week", 10_000),
]


def run_workload(name: str, root: str, size: int, threads: dict[str, str]) -> Figures:
    """Run a workload in a separate process; its figures."""
    command = [sys.executable, __file__, "--work", name, root, str(size)]
    result = run_command(command, env=os.environ | threads, stdout=PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    """Measure each unit of work and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--customers", type=int, default=FULL_CUSTOMERS)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, root, size = options.work
        started = time.perf_counter()
        figures = WORKLOADS[name](root, int(size))
        figures |= {"seconds": time.perf_counter() - started, "peak_mb": get_peak_mb()}
        return print(json.dumps(figures))
    with TemporaryDirectory(prefix="hm-scale-") as folder:
        root = str(Path(folder, "lake"))
        build_figures = run_workload("build", root, options.customers, {})
        print(
            f"{options.customers:,} customers, {build_figures['rows']:,} transactions", flush=True
        )
        for name, size in MEASUREMENTS:
            measured = run_workload(name, root, size, ONE_THREAD)
            formatted = ", ".join(f"{key} {value:,.1f}" for key, value in measured.items())
            print(f"{name:<6} {size:>12,}  {formatted}", flush=True)
    return None


if __name__ == "__main__":
    main()
