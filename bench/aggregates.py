"""What it costs to count sales and customers anew in each run, instead of storing the counts.

    python bench/aggregates.py --customers 137200

Training and inference count how articles sell; the data report counts by customer, article and
week. The counts are compared with one week of training: its aggregates, candidates and features.
"""

import argparse
import time
from collections.abc import Callable
from datetime import timedelta

from hm_reco.data.history import History, generate_history
from hm_reco.ranking.weeks import build_training_matrix, build_week
from hm_reco.reporting.articles import aggregate_by_article
from hm_reco.reporting.customers import aggregate_by_customer
from hm_reco.reporting.purchases import sum_by_week
from hm_reco.retrieval.article_stats import aggregate_sales

REPETITIONS = 3  # the fastest counts; the first one also compiles


def measure(function: Callable[[], object]) -> float:
    """CPU seconds of all threads."""
    seconds = []
    for _ in range(REPETITIONS):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return min(seconds)


def build_training_week(counted: History) -> None:
    """The candidates and features of the last week."""
    week = build_week(counted, counted.day - timedelta(days=7), max_customers=10_000)
    build_training_matrix(week)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--customers", type=int, default=20_000)
    history = generate_history(parser.parse_args().customers)
    counted, rows = aggregate_sales(history), history.purchases.lazy()
    week_seconds = measure(lambda: build_training_week(counted))
    print(f"{history.purchases.height:,} purchases")
    print(f"{'a training week':<24} {week_seconds:7.2f} CPU seconds")
    counts: dict[str, Callable[[], object]] = {
        "sales by article and day": lambda: aggregate_sales(history),
        "totals by customer": lambda: aggregate_by_customer(rows),
        "totals by article": lambda: aggregate_by_article(rows),
        "units by week": lambda: sum_by_week(rows),
    }
    for name, count in counts.items():
        seconds = measure(count)
        print(f"{name:<24} {seconds:7.2f} CPU seconds, {seconds / week_seconds:.1%} of the week")


if __name__ == "__main__":
    main()
