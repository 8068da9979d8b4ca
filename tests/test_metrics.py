"""Metrics against independent implementations, and the bootstrap against known answers."""

from math import log2

import numpy as np
import polars as pl
import pytest

from hm_reco.ranking.metrics import METRICS, bootstrap, get_metric
from hm_reco.ranking.scoring import score_lists


def compute_in_loop(name: str, actual: set[int], predicted: list[int], k: int) -> float:
    """Return a metric of one list as its definition says, without arrays."""
    ranks = [rank for rank, article in enumerate(predicted[:k], 1) if article in actual]
    best = min(len(actual), k)
    return {
        "MAP": sum((n + 1) / rank for n, rank in enumerate(ranks)) / best,
        "NDCG": sum(1 / log2(r + 1) for r in ranks) / sum(1 / log2(n + 2) for n in range(best)),
        "recall": len(ranks) / len(actual),
        "hit_rate": float(bool(ranks)),
        "MRR": 1 / ranks[0] if ranks else 0.0,
    }[name]


def build_frames(actual: dict[int, list[int]], predicted: dict[int, list[int]]):
    recommended = [
        (c, a, i + 1) for c, articles in predicted.items() for i, a in enumerate(articles)
    ]
    purchased = [(c, a) for c, articles in actual.items() for a in articles]
    return (
        pl.DataFrame(recommended, schema=["customer", "article", "rank"], orient="row"),
        pl.DataFrame(purchased, schema=["customer", "article"], orient="row"),
    )


@pytest.mark.parametrize("metric", METRICS, ids=str)
@pytest.mark.parametrize("k", [1, 3, 12, 20])
def test_metric_equals_loop(metric, k):
    rng = np.random.default_rng(k)
    actual = {c: rng.integers(0, 60, rng.integers(1, 30)).tolist() for c in range(200)}
    predicted = {c: rng.permutation(60)[: rng.integers(1, 25)].tolist() for c in range(0, 200, 2)}
    label = f"{metric.name}@{k}"
    scores = score_lists(*build_frames(actual, predicted), [get_metric(label)])
    expected = [
        compute_in_loop(metric.name, set(actual[c]), predicted.get(c, []), k)
        for c in sorted(actual)
    ]
    assert scores["customer"].to_list() == sorted(actual)
    np.testing.assert_allclose(scores[label], expected)


@pytest.mark.parametrize(
    ("actual", "predicted", "expected"),
    [
        ([1], [1], 1.0),
        ([1], [2, 1], 1 / 2),
        ([1, 2], [2, 3, 1], (1 / 1 + 2 / 3) / 2),
        ([1, 1, 1], [1], 1.0),  # three units of one article are one article
        (list(range(30)), list(range(12)), 1.0),  # the maximum for a list of 12
        ([9], [1, 2, 3], 0.0),
    ],
)
def test_average_precision_example(actual, predicted, expected):
    scores = score_lists(*build_frames({7: actual}, {7: predicted}), METRICS[:1])
    assert scores["MAP@12"].item() == pytest.approx(expected)


@pytest.mark.parametrize("label", ["MAP", "MAP@0", "MAP@101", "map@12", "precision@12", "MAP@-1"])
def test_unknown_metric_is_refused_with_the_names(label):
    with pytest.raises(ValueError, match="MAP, NDCG, recall, hit_rate, MRR"):
        get_metric(label)


def test_bootstrap_interval_width_matches_standard_error():
    values = np.random.default_rng(0).normal(0.02, 0.1, 4_000)
    interval = bootstrap(np.arange(4_000), values)
    error = values.std() / np.sqrt(values.size)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert interval.low < interval.mean < interval.high


def test_bootstrap_samples_customers_not_weeks():
    """Ten equal weeks of a customer add no information to one week."""
    values = np.random.default_rng(1).normal(size=300)
    single = bootstrap(np.arange(300), values)
    repeated = bootstrap(np.repeat(np.arange(300), 10), np.repeat(values, 10))
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low, rel=0.15)
