"""The synthetic data set is calibrated: baselines score as on H&M's data."""

from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from hm_reco.data.history import generate_history
from hm_reco.data.synthetic import (
    build_customer_ids,
    build_customers,
    generate_shop,
    write_synthetic,
)
from hm_reco.ranking.baselines import BASELINES
from hm_reco.ranking.metrics import METRICS
from hm_reco.ranking.scoring import score_lists
from hm_reco.ranking.weeks import build_week


@pytest.fixture(scope="module")
def baselines() -> dict[str, float]:
    """MAP@12 of two baselines over the last four weeks of the default data set."""
    history = generate_history(20_000)
    weeks = [
        build_week(history, history.day - timedelta(days=7 * weeks_back))
        for weeks_back in range(1, 5)
    ]
    return {
        name: np.concatenate(
            [
                score_lists(
                    BASELINES[name](w.aggregates, w.purchases, w.buyers, 12),
                    w.ground_truth,
                    METRICS[:1],
                )["MAP@12"]
                for w in weeks
            ]
        ).mean()
        for name in ("popular, 7 days", "own history, half-life 28 days")
    }


def test_synthetic_popularity_scores_as_on_real_data(baselines):
    assert 0.007 <= baselines["popular, 7 days"] <= 0.009


def test_synthetic_decayed_history_scores_as_on_real_data(baselines):
    assert 0.020 <= baselines["own history, half-life 28 days"] <= 0.024


def test_synthetic_data_depend_on_seed_only(tmp_path):
    for name in "ab":
        write_synthetic(tmp_path / name, 200, seed=5)
    for file in ("articles.csv", "customers.csv", "transactions_train.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_synthetic_missing_values_match_real_file():
    shop = generate_shop(5_000, 1)
    frame = build_customers(shop.ages, build_customer_ids(5_000, 1), 1)
    n_missing = frame.null_count().row(0, named=True)
    assert 0.6 < n_missing["FN"] / 5_000 < 0.7 and 0.6 < n_missing["Active"] / 5_000 < 0.7
    assert 0.005 < n_missing["age"] / 5_000 < 0.02
    assert n_missing["customer_id"] == 0


def test_synthetic_without_customers_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="customers: expected 1 or more, found 0"):
        write_synthetic(tmp_path, 0)


@pytest.mark.parametrize("customers", [1, 2, 30])
def test_synthetic_smallest_sizes_are_generated(tmp_path, customers):
    rows = write_synthetic(tmp_path, customers)
    assert pl.read_csv(tmp_path / "customers.csv").height == rows["customers"] == customers
