"""Quality of the recommendations, compared with other libraries.

    python bench/quality.py                            the synthetic data set, 20,000 customers
    python bench/quality.py FOLDER --weeks 52          three files as in the H&M competition
    python bench/quality.py FOLDER --no-external          our ranker and the baselines only

Every evaluation week is predicted as of its first day. `external_models.py` in `.venv-bench-models`
gets the same purchases, customers and tuning weeks; customers unknown to a model get best sellers,
as in ours. MAP@12 with a 95 % bootstrap interval over customers; `hits` of which a
share is `first-time`: articles that the customer had not bought before.
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
from external_data import get_peak_mb

from hm_reco.data.history import History, as_of, get_ground_truth, load_history
from hm_reco.data.ingestion import ingest
from hm_reco.data.processing import process
from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import Lake, open_lake
from hm_reco.ranking.backtest import evaluate
from hm_reco.ranking.baselines import backfill, rank_best_sellers
from hm_reco.ranking.comparison import compute_means
from hm_reco.ranking.evaluation import Evaluation
from hm_reco.ranking.metrics import METRICS, compute_paired_difference
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RANKER, RankerSettings
from hm_reco.ranking.scoring import score_lists
from hm_reco.ranking.tuning import tune
from hm_reco.retrieval.aggregates import compute_aggregates
from hm_reco.retrieval.two_tower import TwoTower, TwoTowerSettings, build_vocabulary

ROOT = Path(__file__).parents[1]
EXTERNAL_PYTHON = ROOT / ".venv-bench-models" / "bin" / "python"


def read_history(lake: Lake, source: str, customers: int) -> History:
    """Ingest and process a folder, or the synthetic data set when there is none."""
    if not source:
        source = str(Path(lake.root).with_name("source"))
        write_synthetic(Path(source), customers)
    ingest(lake, source)
    process(lake)
    return load_history(lake)


def evaluate_own(
    lake: Lake, history: History, plan: BacktestPlan, minutes: float, examples: int
) -> Evaluation:
    """Baselines and ranker, tuned on the plan's tuning weeks."""
    settings = TwoTowerSettings(max_examples=examples)
    two_tower = TwoTower(build_vocabulary(history.articles), settings) if examples else None
    defaults = RankerSettings()
    tuner = partial(_tune, lake, defaults, minutes)
    return evaluate(history, plan, defaults, two_tower, tuner)


def _tune(
    lake: Lake, defaults: RankerSettings, minutes: float, matrices: Any, validation_sets: Any
) -> RankerSettings:
    tuned = tune(lake, "quality", matrices, validation_sets, defaults, minutes)
    print(f"{tuned.trials.height} trials; {tuned.settings}", flush=True)
    return tuned.settings


def run_external_models(folder: Path, history: History, result: Evaluation) -> pl.DataFrame:
    """External lists, with best sellers: `day`, `method`, `customer`, `article`, `rank`."""
    plan = result.plan
    folder.mkdir()
    history.purchases.select("customer", "article", "day").write_parquet(
        folder / "purchases.parquet"
    )
    customers = result.customers.select("day", "customer").sort("day", "customer")
    customers.write_parquet(folder / "evaluation.parquet")
    tuning_weeks_back = range(plan.evaluation_weeks + plan.tuning_weeks, plan.evaluation_weeks, -1)
    days = [plan.get_week_start(weeks_back).isoformat() for weeks_back in tuning_weeks_back]
    plan_record = {"tuning": days, "horizon": plan.horizon_days, "refit": plan.refit_every}
    (folder / "plan.json").write_text(json.dumps(plan_record))
    command = [EXTERNAL_PYTHON, ROOT / "bench" / "external_models.py", folder]
    subprocess.run(command, check=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    lists = pl.read_parquet(folder / "lists.parquet")
    return pl.concat(_backfill_lists(history, day_lists) for day_lists in lists.partition_by("day"))


def _backfill_lists(history: History, lists: pl.DataFrame) -> pl.DataFrame:
    """Lists of one day, backfilled to twelve with best sellers."""
    day = lists["day"][0]
    aggregates = compute_aggregates(as_of(history, day))
    parts = []
    for method in lists["method"].unique().sort():
        ranked = lists.filter(method=method).filter(pl.col("article").is_not_null())
        customers = lists.filter(method=method).select("customer").unique().sort("customer")
        columns = ["customer", "article", "rank"]
        best_sellers = rank_best_sellers(aggregates, customers, 24).select(columns)
        complete = backfill(ranked.select(columns), best_sellers.cast({"rank": pl.Int64}), 12)
        parts.append(complete.with_columns(day=pl.lit(day), method=pl.lit(method)))
    return pl.concat(parts)


def compute_scores(
    history: History, plan: BacktestPlan, lists: pl.DataFrame, customers: pl.DataFrame
) -> pl.DataFrame:
    """AP@12 of lists: `day`, `customer`, `method`, `value`."""
    parts = []
    for (day, method), part in lists.partition_by("day", "method", as_dict=True).items():
        ground_truth = get_ground_truth(history, day, plan.horizon_days)
        ground_truth = ground_truth.join(customers.filter(day=day), on="customer", how="semi")
        ap = score_lists(part, ground_truth, METRICS[:1])
        columns = {"method": pl.lit(method), "value": pl.col(str(METRICS[0]))}
        parts.append(ap.select(pl.lit(day).alias("day"), "customer", **columns))
    return pl.concat(parts)


def compute_first_time_shares(
    history: History, plan: BacktestPlan, lists: pl.DataFrame
) -> dict[str, tuple[int, float]]:
    """By method: hits, and the share of first-time purchases among them."""
    is_first_time: dict[str, list[bool]] = {}
    for (day, method), part in lists.partition_by("day", "method", as_dict=True).items():
        ground_truth = get_ground_truth(history, day, plan.horizon_days)
        hits = part.filter(pl.col("rank") <= 12).join(
            ground_truth, on=["customer", "article"], how="semi"
        )
        past_purchases = (
            as_of(history, day).purchases.select("customer", "article", is_repurchase=True).unique()
        )
        flagged = hits.join(past_purchases, on=["customer", "article"], how="left")
        is_first_time.setdefault(str(method), []).extend(flagged["is_repurchase"].is_null())
    return {
        name: (len(flags), sum(flags) / max(len(flags), 1)) for name, flags in is_first_time.items()
    }


def print_report(
    history: History, plan: BacktestPlan, scores: pl.DataFrame, lists: pl.DataFrame
) -> None:
    """Print the table, and the ranker compared with the best other method."""
    intervals, hits = compute_means(scores), compute_first_time_shares(history, plan, lists)
    print(f"\n{'method':<34}{'MAP@12':>8}  {'95 % interval':<18}{'hits':>7}{'first-time':>12}")
    for name, interval in sorted(intervals.items(), key=lambda pair: pair[1].mean):
        count, share = hits[name]
        print(
            f"{name:<34}{interval.mean:>8.4f}  "
            f"{interval.low:.4f} .. {interval.high:.4f}  {count:>7,}{share:>12.1%}"
        )
    best = max(
        (name for name in intervals if name != RANKER), key=lambda name: intervals[name].mean
    )
    improvement = compute_paired_difference(
        *(scores.filter(method=name) for name in (RANKER, best))
    )
    ratio = intervals[RANKER].mean / intervals[best].mean
    print(f"\nranker against {best!r}: {ratio:.2f} x, difference {improvement}")


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "source", nargs="?", default="", help="folder; default: the synthetic data set"
    )
    parser.add_argument(
        "--customers", type=int, default=20_000, help="size of the synthetic data set"
    )
    parser.add_argument("--weeks", type=int, default=4, help="evaluation weeks, the last ones")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for tuning")
    parser.add_argument("--refit", type=int, default=4, help="weeks between trainings")
    parser.add_argument("--examples", type=int, default=200_000, help="of the tower; 0: no tower")
    parser.add_argument("--external", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hm-quality-") as folder:
        lake = open_lake(str(Path(folder) / "lake"))
        history = read_history(lake, options.source, options.customers)
        plan = BacktestPlan(history.day, evaluation_weeks=options.weeks, refit_every=options.refit)
        result = evaluate_own(lake, history, plan, options.minutes, options.examples)
        print(
            f"{result.plan}\nbudget {result.source_recall.budget}, "
            f"recall {result.candidate_recall:.3f}"
        )
        print(
            f"ours: {time.monotonic() - started:.0f} s, peak {get_peak_mb() / 1000:.1f} GB",
            flush=True,
        )
        scores, lists = (
            result.scores,
            result.lists.select("day", "method", "customer", "article", "rank"),
        )
        if options.external:
            external_lists = run_external_models(Path(folder) / "external", history, result)
            rank_column = pl.col("rank").cast(pl.Int16)
            lists = pl.concat(
                [lists, external_lists.with_columns(rank_column).select(lists.columns)]
            )
            external_scores = compute_scores(history, plan, external_lists, result.customers)
            scores = pl.concat([scores, external_scores.select(scores.columns)])
        print_report(history, plan, scores, lists)


if __name__ == "__main__":
    sys.exit(main())
