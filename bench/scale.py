"""What one piece of work takes, of the size that it has at 1, 10 and 100 times H&M.

    python bench/scale.py                            with a synthetic data set of H&M's size: ten minutes
    python bench/scale.py --customers 137198         of a tenth of it: a first look

More data mean more pieces, not larger ones; but what each piece needs beside its own rows grows
with all customers, or with all purchases. So each is run in a process of its own, on one core, with
that at each size. docs/scaling.md reckons with the figures.
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
from peers import peak_mb

from hm_reco.data.history import load_history, map_purchases
from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import open_lake
from hm_reco.lake.tables import scan
from hm_reco.stages import ingestion, processing

FULL, SHARDS = 1_371_980, 8
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS"), "1")
Figures = dict[str, float]


def build(root: str, customers: int) -> Figures:
    """A lake with a synthetic data set, ingested and processed."""
    folder = Path(root).parent / "source"
    rows = write_synthetic(folder, customers)["transactions"]
    lake = open_lake(root)
    ingestion.ingest(lake, str(folder))
    processing.process(lake, SHARDS)
    return {"rows": rows}


def block(root: str, weeks: int) -> Figures:
    """Some weeks of processing: read, map, count, write."""
    lake = open_lake(root)
    ids = processing.IdTables(
        *(scan(lake, f"processed/{name}").collect() for name in processing.IdTables._fields)
    )
    days = processing._weeks(scan(lake, "raw/transactions"))[-weeks:]
    moved = processing.process_block(lake, ids, SHARDS, False, days)
    assert moved is not None
    rows = scan(lake, "processed/purchases").filter(pl.col("week").is_in(days))
    return {"rows": rows.select(pl.len()).collect().item()}


def ids(_: str, customers: int) -> Figures:
    """Three million rows meet the numbers of so many customers, whose ids have 64 letters."""
    name = pl.int_range(customers, eager=True).cast(pl.String).str.zfill(64)
    people = pl.DataFrame({"customer_id": name, "customer": np.arange(customers, dtype=np.int32)})
    articles = pl.DataFrame({"article_id": ["0108775015"], "article": [0]})
    draw = np.random.default_rng(0).integers(0, customers, 3_000_000)
    raw = pl.DataFrame({"customer_id": name.gather(draw)}).with_columns(
        article_id=pl.lit("0108775015"),
        t_dat=pl.lit(date(2020, 9, 1)),
        sales_channel_id=pl.lit(1, pl.Int8),
        price=pl.lit(0.02),
    )
    return {"rows": map_purchases(raw.lazy(), articles, people).collect()["units"].sum()}


def shard(root: str, _: int) -> Figures:
    """A shard of the customers' figures."""
    lake = open_lake(root)
    processing.process_shard(lake, None, 0)
    found = scan(lake, "processed/customer_features").filter(shard=0).select(pl.len())
    return {"rows": found.collect().item()}


def sales(root: str, shards: int) -> Figures:
    """How articles sell, of one of so many shards, added to that of another."""
    from hm_reco.retrieval.aggregates import _aggregate_shard, _merge_sales

    history = load_history(open_lake(root))
    began = time.perf_counter()
    one = _aggregate_shard(history, shards, 0)
    counted = time.perf_counter() - began
    other = _aggregate_shard(history, shards, 1)
    began = time.perf_counter()
    both = _merge_sales(one, other)
    size = both.daily.estimated_size() + both.repurchase_gaps.estimated_size()
    figures = {"counting": counted, "adding": time.perf_counter() - began}
    return figures | {"rows": both.daily.height, "mb": size / 1e6}


def week(root: str, buyers: int) -> Figures:
    """Candidates and features of the last week."""
    from hm_reco.ranking.backtest import WeekJob, WeekTask
    from hm_reco.ranking.plan import BacktestPlan
    from hm_reco.retrieval.aggregates import aggregate_sales
    from hm_reco.retrieval.candidates import SOURCE_LIMITS

    history = aggregate_sales(load_history(open_lake(root)))
    work = WeekJob(
        history,
        BacktestPlan(history.day, customers_per_week=buyers, pooled_weeks=26),
        SOURCE_LIMITS,
        lambda *_: None,
    )
    matrix = work.run(1, work.build(WeekTask(1, None)))[1]  # compiles, too
    began = time.perf_counter()
    opened = work.build(WeekTask(1, None))
    known = time.perf_counter() - began
    _, matrix = work.run(1, opened)
    figures = {"known": known, "candidates": time.perf_counter() - began - known}
    size = history.purchases.estimated_size() / 1e6
    return figures | {"rows": len(matrix.label), "buyers": opened.buyers.height, "history_mb": size}


WORKS: dict[str, Callable[[str, int], Figures]] = {
    "build": build,
    "block": block,
    "ids": ids,
    "shard": shard,
    "sales": sales,
    "week": week,
}
RUNS = [
    ("block", 13),
    ("block", 1),
    ("ids", FULL),
    ("ids", 10 * FULL),
    ("shard", 0),
    ("sales", SHARDS),
    ("week", 10_000),
]


def measure(name: str, root: str, size: int, threads: dict[str, str]) -> Figures:
    """A work in a process of its own."""
    command = [sys.executable, __file__, "--work", name, root, str(size)]
    done = run_command(command, env=os.environ | threads, stdout=PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure each piece and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--customers", type=int, default=FULL)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        name, root, size = asked.work
        began = time.perf_counter()
        figures = WORKS[name](root, int(size))
        figures |= {"seconds": time.perf_counter() - began, "peak_mb": peak_mb()}
        return print(json.dumps(figures))
    with TemporaryDirectory(prefix="hm-scale-") as folder:
        root = str(Path(folder, "lake"))
        built = measure("build", root, asked.customers, {})
        print(f"{asked.customers:,} customers, {built['rows']:,} transactions", flush=True)
        for name, size in RUNS:
            found = measure(name, root, size, ONE_THREAD)
            told = ", ".join(f"{key} {value:,.1f}" for key, value in found.items())
            print(f"{name:<6} {size:>12,}  {told}", flush=True)
    return None


if __name__ == "__main__":
    main()
