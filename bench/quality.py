"""How good are the recommendations, beside those that others would give?

    python bench/quality.py                            the synthetic data set, 20,000 customers
    python bench/quality.py FOLDER --weeks 52          three files as in the H&M competition
    python bench/quality.py FOLDER --no-peers          ours and the ladder of baselines alone

Every judged week is predicted as of its first day. Peers (`quality_peers.py`, in `.venv-bench-models`)
get the same purchases, customers and tuning weeks; whom they do not know gets what sells, as with
us. MAP@12 with a 95 % bootstrap interval over customers; `hits` of which a
share is `first-time`: articles that she had not bought before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from peers import peak_mb

from hm_reco.data.history import History, as_of, get_ground_truth, load_history
from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import Lake, open_lake
from hm_reco.ranking.backtest import Evaluation, evaluate
from hm_reco.ranking.baselines import backfill, rank_best_sellers
from hm_reco.ranking.comparison import compute_means
from hm_reco.ranking.metrics import average_precision, compute_paired_difference
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RANKER, RankerSettings
from hm_reco.ranking.tuning import tune
from hm_reco.retrieval.aggregates import compute_aggregates
from hm_reco.retrieval.two_tower import TwoTower, TwoTowerSettings, build_vocabulary
from hm_reco.stages.ingestion import ingest
from hm_reco.stages.processing import process

ROOT = Path(__file__).parents[1]
RIVALS = ROOT / ".venv-bench-models" / "bin" / "python"


def read_history(lake: Lake, source: str, customers: int) -> History:
    """Ingest and process a folder, or the synthetic data set when there is none."""
    if not source:
        source = str(Path(lake.root).with_name("source"))
        write_synthetic(Path(source), customers)
    ingest(lake, source)
    process(lake)
    return load_history(lake)


def judge_ours(
    lake: Lake, history: History, plan: BacktestPlan, minutes: float, examples: int
) -> Evaluation:
    """The ladder and the ranker, tuned on the plan's tuning weeks."""
    settings = TwoTowerSettings(max_examples=examples)
    tower = TwoTower(build_vocabulary(history.articles), settings) if examples else None
    usual = RankerSettings()
    find = partial(_find, lake, usual, minutes)
    return evaluate(history, plan, usual, tower, find)


def _find(
    lake: Lake, usual: RankerSettings, minutes: float, learned: Any, exams: Any
) -> RankerSettings:
    tuned = tune(lake, "quality", learned, exams, usual, minutes)
    print(f"{tuned.trials.height} trials; {tuned.settings}", flush=True)
    return tuned.settings


def judge_peers(folder: Path, history: History, result: Evaluation) -> pl.DataFrame:
    """The peers' lists, filled with what sells: `day`, `method`, `customer`, `article`, `rank`."""
    plan = result.plan
    folder.mkdir()
    history.purchases.select("customer", "article", "day").write_parquet(
        folder / "purchases.parquet"
    )
    people = result.customers.select("day", "customer").sort("day", "customer")
    people.write_parquet(folder / "judged.parquet")
    tuning = range(plan.evaluation_weeks + plan.tuning_weeks, plan.evaluation_weeks, -1)
    days = [plan.get_week_start(back).isoformat() for back in tuning]
    about = {"tuning": days, "horizon": plan.horizon_days, "refit": plan.refit_every}
    (folder / "plan.json").write_text(json.dumps(about))
    command = [RIVALS, ROOT / "bench" / "quality_peers.py", folder]
    subprocess.run(command, check=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    lists = pl.read_parquet(folder / "lists.parquet")
    return pl.concat(_filled(history, part) for part in lists.partition_by("day"))


def _filled(history: History, lists: pl.DataFrame) -> pl.DataFrame:
    """Lists of one day, filled up to twelve with what sells."""
    day = lists["day"][0]
    known = compute_aggregates(as_of(history, day))
    parts = []
    for method in lists["method"].unique().sort():
        mine = lists.filter(method=method).filter(pl.col("article").is_not_null())
        who = lists.filter(method=method).select("customer").unique().sort("customer")
        columns = ["customer", "article", "rank"]
        fill = rank_best_sellers(known, who, 24).select(columns)
        whole = backfill(mine.select(columns), fill.cast({"rank": pl.Int64}), 12)
        parts.append(whole.with_columns(day=pl.lit(day), method=pl.lit(method)))
    return pl.concat(parts)


def scored(
    history: History, plan: BacktestPlan, lists: pl.DataFrame, people: pl.DataFrame
) -> pl.DataFrame:
    """`day`, `customer`, `method`, `ap` of lists."""
    parts = []
    for (day, method), part in lists.partition_by("day", "method", as_dict=True).items():
        sold = get_ground_truth(history, day, plan.horizon_days)
        sold = sold.join(people.filter(day=day), on="customer", how="semi")
        ap = average_precision(part, sold)
        parts.append(
            ap.select(pl.lit(day).alias("day"), "customer", method=pl.lit(method), ap="ap")
        )
    return pl.concat(parts)


def first_time(
    history: History, plan: BacktestPlan, lists: pl.DataFrame
) -> dict[str, tuple[int, float]]:
    """By method: hits, and the share of them that she had not bought before."""
    found: dict[str, list[bool]] = {}
    for (day, method), part in lists.partition_by("day", "method", as_dict=True).items():
        sold = get_ground_truth(history, day, plan.horizon_days)
        hits = part.filter(pl.col("rank") <= 12).join(sold, on=["customer", "article"], how="semi")
        past = as_of(history, day).purchases.select("customer", "article", again=True).unique()
        marked = hits.join(past, on=["customer", "article"], how="left")
        found.setdefault(str(method), []).extend(marked["again"].is_null())
    return {name: (len(new), sum(new) / max(len(new), 1)) for name, new in found.items()}


def report(history: History, plan: BacktestPlan, scores: pl.DataFrame, lists: pl.DataFrame) -> None:
    """Print the table, and how the ranker compares with the best of the others."""
    intervals, hits = compute_means(scores), first_time(history, plan, lists)
    print(f"\n{'method':<34}{'MAP@12':>8}  {'95 % interval':<18}{'hits':>7}{'first-time':>12}")
    for name, i in sorted(intervals.items(), key=lambda pair: pair[1].mean):
        count, new = hits[name]
        print(f"{name:<34}{i.mean:>8.4f}  {i.low:.4f} .. {i.high:.4f}  {count:>7,}{new:>12.1%}")
    best = max(
        (name for name in intervals if name != RANKER), key=lambda name: intervals[name].mean
    )
    lead = compute_paired_difference(*(scores.filter(method=name) for name in (RANKER, best)))
    ratio = intervals[RANKER].mean / intervals[best].mean
    print(f"\nranker against {best!r}: {ratio:.2f} x, difference {lead}")


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "source", nargs="?", default="", help="folder; default: the synthetic data set"
    )
    parser.add_argument(
        "--customers", type=int, default=20_000, help="size of the synthetic data set"
    )
    parser.add_argument("--weeks", type=int, default=4, help="weeks judged, the last ones")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for tuning")
    parser.add_argument("--refit", type=int, default=4, help="weeks between trainings")
    parser.add_argument("--examples", type=int, default=200_000, help="of the tower; 0: no tower")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    asked = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hm-quality-") as folder:
        lake = open_lake(str(Path(folder) / "lake"))
        history = read_history(lake, asked.source, asked.customers)
        plan = BacktestPlan(history.day, evaluation_weeks=asked.weeks, refit_every=asked.refit)
        result = judge_ours(lake, history, plan, asked.minutes, asked.examples)
        print(
            f"{result.plan}\nbudget {result.source_recall.budget}, recall {result.candidate_recall:.3f}"
        )
        print(
            f"ours: {time.monotonic() - started:.0f} s, peak {peak_mb() / 1000:.1f} GB", flush=True
        )
        scores, lists = (
            result.scores,
            result.lists.select("day", "method", "customer", "article", "rank"),
        )
        if asked.peers:
            theirs = judge_peers(Path(folder) / "peers", history, result)
            columns = pl.col("rank").cast(pl.Int16)
            lists = pl.concat([lists, theirs.with_columns(columns).select(lists.columns)])
            more = scored(history, plan, theirs, result.customers)
            scores = pl.concat([scores, more.select(scores.columns)])
        report(history, plan, scores, lists)


if __name__ == "__main__":
    sys.exit(main())
