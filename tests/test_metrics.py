"""MAP@12 against an independent implementation, and the bootstrap against known answers."""

import numpy as np
import polars as pl
import pytest

from hm_reco.ranking.metrics import average_precision, bootstrap, recall


def compute_ap_in_loop(actual: set[int], predicted: list[int], k: int) -> float:
    """AP@k as the competition defines it, in a loop."""
    hits, total = 0, 0.0
    for position, article in enumerate(predicted[:k], start=1):
        if article in actual:
            hits += 1
            total += hits / position
    return total / min(len(actual), k)


def build_frames(actual: dict[int, list[int]], predicted: dict[int, list[int]]):
    recommended = [
        (c, a, i + 1) for c, articles in predicted.items() for i, a in enumerate(articles)
    ]
    purchased = [(c, a) for c, articles in actual.items() for a in articles]
    return (
        pl.DataFrame(recommended, schema=["customer", "article", "rank"], orient="row"),
        pl.DataFrame(purchased, schema=["customer", "article"], orient="row"),
    )


@pytest.mark.parametrize("k", [1, 3, 12, 20])
def test_average_precision_equals_loop(k):
    rng = np.random.default_rng(k)
    actual = {c: rng.integers(0, 60, rng.integers(1, 30)).tolist() for c in range(200)}
    predicted = {c: rng.permutation(60)[: rng.integers(1, 25)].tolist() for c in range(0, 200, 2)}
    result = average_precision(*build_frames(actual, predicted), k)
    expected = {c: compute_ap_in_loop(set(actual[c]), predicted.get(c, []), k) for c in actual}
    assert result["customer"].to_list() == sorted(actual)
    assert np.allclose(result["ap"], [expected[c] for c in sorted(actual)])


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
    result = average_precision(*build_frames({7: actual}, {7: predicted}))
    assert result["ap"].item() == pytest.approx(expected)


def test_recall_counts_pairs_once():
    recommended, purchased = build_frames({1: [1, 1, 2], 2: [3]}, {1: [1, 5], 2: [4, 3]})
    assert recall(recommended, purchased, 2) == pytest.approx(2 / 3)
    assert recall(recommended, purchased, 1) == pytest.approx(1 / 3)


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
