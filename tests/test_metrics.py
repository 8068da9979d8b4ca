"""MAP@12 against an independent implementation, and the bootstrap against known answers."""

import numpy as np
import polars as pl
import pytest

from hm_reco.ranking.metrics import average_precision, bootstrap, recall


def ap_by_loop(actual: set[int], predicted: list[int], k: int) -> float:
    """AP@k as the competition's page writes it, by a plain loop."""
    hits, total = 0, 0.0
    for position, article in enumerate(predicted[:k], start=1):
        if article in actual:
            hits += 1
            total += hits / position
    return total / min(len(actual), k)


def frames(actual: dict[int, list[int]], predicted: dict[int, list[int]]):
    shown = [(c, a, i + 1) for c, articles in predicted.items() for i, a in enumerate(articles)]
    sold = [(c, a) for c, articles in actual.items() for a in articles]
    return (
        pl.DataFrame(shown, schema=["customer", "article", "rank"], orient="row"),
        pl.DataFrame(sold, schema=["customer", "article"], orient="row"),
    )


@pytest.mark.parametrize("k", [1, 3, 12, 20])
def test_average_precision_agrees_with_a_plain_loop(k):
    rng = np.random.default_rng(k)
    actual = {c: rng.integers(0, 60, rng.integers(1, 30)).tolist() for c in range(200)}
    predicted = {c: rng.permutation(60)[: rng.integers(1, 25)].tolist() for c in range(0, 200, 2)}
    result = average_precision(*frames(actual, predicted), k)
    expected = {c: ap_by_loop(set(actual[c]), predicted.get(c, []), k) for c in actual}
    assert result["customer"].to_list() == sorted(actual)
    assert np.allclose(result["ap"], [expected[c] for c in sorted(actual)])


@pytest.mark.parametrize(
    ("actual", "predicted", "expected"),
    [
        ([1], [1], 1.0),
        ([1], [2, 1], 1 / 2),
        ([1, 2], [2, 3, 1], (1 / 1 + 2 / 3) / 2),
        ([1, 1, 1], [1], 1.0),  # three units of one article are one article
        (list(range(30)), list(range(12)), 1.0),  # no list of 12 can do better
        ([9], [1, 2, 3], 0.0),
    ],
)
def test_average_precision_by_hand(actual, predicted, expected):
    result = average_precision(*frames({7: actual}, {7: predicted}))
    assert result["ap"].item() == pytest.approx(expected)


def test_recall_counts_pairs_once():
    shown, sold = frames({1: [1, 1, 2], 2: [3]}, {1: [1, 5], 2: [4, 3]})
    assert recall(shown, sold, 2) == pytest.approx(2 / 3)
    assert recall(shown, sold, 1) == pytest.approx(1 / 3)


def test_bootstrap_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).normal(0.02, 0.1, 4_000)
    interval = bootstrap(np.arange(4_000), values)
    error = values.std() / np.sqrt(values.size)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert interval.low < interval.mean < interval.high


def test_bootstrap_draws_customers_not_weeks():
    """Ten equal weeks of a customer say no more than one of them."""
    values = np.random.default_rng(1).normal(size=300)
    once = bootstrap(np.arange(300), values)
    ten = bootstrap(np.repeat(np.arange(300), 10), np.repeat(values, 10))
    assert ten.high - ten.low == pytest.approx(once.high - once.low, rel=0.15)
