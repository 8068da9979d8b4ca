"""No leakage: data of the target week do not change its predictions."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from hm_reco.data.history import as_of, build_history, generate_history
from hm_reco.ranking.backtest import evaluate
from hm_reco.ranking.baselines import BASELINES
from hm_reco.ranking.features import build_feature_matrix
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RankerSettings
from hm_reco.ranking.weeks import build_week
from hm_reco.retrieval.aggregates import compute_aggregates
from hm_reco.retrieval.arrays import build_customer_arrays, select_purchases
from hm_reco.retrieval.tower_training import fit_until
from hm_reco.retrieval.two_tower import TwoTower, TwoTowerSettings, build_vocabulary, to_bytes
from hm_reco.serving.array_file import flatten

WEEK = timedelta(days=7)


@pytest.fixture(scope="module")
def history():
    return generate_history(800)


@pytest.fixture(scope="module")
def planted_history(history):
    """The same history, plus a last week in which all customers buy one article at a high price."""
    day = history.day - WEEK
    customers = history.customers.select("customer")
    article = history.purchases["article"][0]
    rows = customers.select(
        "customer",
        article=pl.lit(article, pl.Int32),
        day=pl.lit(day),
        channel=pl.lit(2, pl.Int8),
        price=pl.lit(0.9, pl.Float32),
        units=pl.lit(40, pl.Int32),
    )
    purchases = pl.concat([history.purchases, rows.select(history.purchases.columns)])
    return build_history(history.articles, history.customers, purchases)


def test_planted_purchases_change_later_aggregates(history, planted_history):
    first, second = (compute_aggregates(data).article_stats for data in (history, planted_history))
    assert not first.equals(second)


def test_later_purchases_do_not_change_aggregates(history, planted_history):
    day = history.day - WEEK
    first, second = (compute_aggregates(as_of(data, day)) for data in (history, planted_history))
    assert first.article_stats.equals(second.article_stats)
    arrays, later_arrays = (dict(flatten("index", data.index)) for data in (first, second))
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, later_arrays[name], name)


def test_later_purchases_do_not_change_features_or_baselines(history, planted_history):
    day = history.day - WEEK
    customers = history.customers.select("customer").head(200)
    values, lists = [], []
    for data in (history, planted_history):
        before = as_of(data, day)
        aggregates, purchases = compute_aggregates(before), select_purchases(before, customers)
        matrix = build_feature_matrix(
            aggregates.index, build_customer_arrays(aggregates, purchases, customers)
        )
        values.append(matrix.values)
        lists.append(
            [baseline(aggregates, purchases, customers, 12) for baseline in BASELINES.values()]
        )
    assert np.array_equal(*values, equal_nan=True) and len(values[0]) > 1_000
    assert all(a.equals(b) for a, b in zip(*lists, strict=True))


def test_later_purchases_do_not_change_model(history, planted_history):
    plan = BacktestPlan(history.day - WEEK, evaluation_weeks=1, training_weeks=6)
    settings = RankerSettings(rounds=20)
    first, second = (
        evaluate(as_of(h, plan.as_of), plan, settings, build_small_two_tower(h))
        for h in (history, planted_history)
    )
    assert first.ranker.to_bytes() == second.ranker.to_bytes()
    assert first.scores.equals(second.scores) and first.lists.equals(second.lists)
    assert first.source_recall.budget == second.source_recall.budget
    assert to_bytes(first.two_tower) == to_bytes(second.two_tower)


def build_small_two_tower(history):
    return TwoTower(
        build_vocabulary(history.articles), TwoTowerSettings(max_examples=2_000, batch_size=256)
    )


def test_two_tower_trained_on_target_week_is_rejected(history):
    two_tower = build_small_two_tower(history)
    fit_until(two_tower, history)
    with pytest.raises(ValueError, match="two-tower model was trained until"):
        two_tower.build_space(as_of(history, history.day - WEEK))


def test_ground_truth_is_limited_to_target_week(history):
    day = history.day - 3 * WEEK
    week = build_week(history, day)
    week_purchases = history.purchases.filter(
        pl.col("day").is_between(day, day + timedelta(days=6))
    )
    assert week.ground_truth.sort("customer", "article").equals(
        week_purchases.select("customer", "article").unique().sort("customer", "article")
    )
    assert week.purchases["days_ago"].min() >= 1
    assert week.aggregates.day == day


def test_history_as_of_excludes_later_purchases(history):
    before = as_of(history, history.day - WEEK)
    assert before.purchases["day"].max() < before.day
    with pytest.raises(ValueError, match="ends before"):
        as_of(before, history.day)
    assert replace(before, day=history.day).purchases.equals(before.purchases)
