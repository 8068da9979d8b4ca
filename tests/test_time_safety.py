"""Nothing of a week reaches what is predicted for it."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from hm_reco.data.history import as_of, build_history, generate_history
from hm_reco.ranking.backtest import evaluate
from hm_reco.ranking.baselines import BASELINES
from hm_reco.ranking.features import build_feature_matrix, build_week
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RankerSettings
from hm_reco.retrieval.aggregates import compute_aggregates
from hm_reco.retrieval.article_index import build_customer_arrays, build_index, select_purchases
from hm_reco.retrieval.two_tower import (
    TwoTower,
    TwoTowerSettings,
    build_vocabulary,
    fit_until,
    to_bytes,
)

WEEK = timedelta(days=7)


@pytest.fixture(scope="module")
def shop():
    return generate_history(800)


@pytest.fixture(scope="module")
def planted(shop):
    """The same shop, where in the last week everybody buys one article at an absurd price."""
    day = shop.day - WEEK
    everybody = shop.customers.select("customer")
    article = shop.purchases["article"][0]
    rows = everybody.select(
        "customer",
        article=pl.lit(article, pl.Int32),
        day=pl.lit(day),
        channel=pl.lit(2, pl.Int8),
        price=pl.lit(0.9, pl.Float32),
        units=pl.lit(40, pl.Int32),
    )
    purchases = pl.concat([shop.purchases, rows.select(shop.purchases.columns)])
    return build_history(shop.articles, shop.customers, purchases)


def test_the_plant_is_seen_when_its_time_has_come(shop, planted):
    first, second = (compute_aggregates(history).article_stats for history in (shop, planted))
    assert not first.equals(second)


def test_a_later_purchase_changes_no_shared_table(shop, planted):
    day = shop.day - WEEK
    first, second = (compute_aggregates(as_of(history, day)) for history in (shop, planted))
    assert first.article_stats.equals(second.article_stats)
    for tables in ("item_neighbours", "segments"):
        for kind, table in getattr(first, tables).items():
            assert table.equals(getattr(second, tables)[kind]), (tables, kind)
    assert (first.user_neighbours.interactions != second.user_neighbours.interactions).nnz == 0


def test_a_later_purchase_changes_no_feature_and_no_baseline(shop, planted):
    day = shop.day - WEEK
    who = shop.customers.select("customer").head(200)
    values, lists = [], []
    for history in (shop, planted):
        before = as_of(history, day)
        known, own = compute_aggregates(before), select_purchases(before, who)
        matrix = build_feature_matrix(
            build_index(known, before), build_customer_arrays(known, own, who)
        )
        values.append(matrix.values)
        lists.append([baseline(known, own, who, 12) for baseline in BASELINES.values()])
    assert np.array_equal(*values, equal_nan=True) and len(values[0]) > 1_000
    assert all(a.equals(b) for a, b in zip(*lists, strict=True))


def test_a_later_purchase_changes_no_model(shop, planted):
    plan = BacktestPlan(shop.day - WEEK, evaluation_weeks=1, training_weeks=6)
    settings = RankerSettings(rounds=20)
    first, second = (
        evaluate(as_of(h, plan.as_of), plan, settings, _tower(h)) for h in (shop, planted)
    )
    assert first.booster.model_to_string() == second.booster.model_to_string()
    assert first.scores.equals(second.scores) and first.lists.equals(second.lists)
    assert first.source_recall.budget == second.source_recall.budget
    assert to_bytes(first.two_tower) == to_bytes(second.two_tower)


def _tower(history):
    return TwoTower(
        build_vocabulary(history.articles), TwoTowerSettings(max_examples=2_000, batch_size=256)
    )


def test_a_tower_that_knows_the_week_is_refused(shop):
    tower = _tower(shop)
    fit_until(tower, shop)
    with pytest.raises(ValueError, match="the tower has learned until"):
        tower.build_space(as_of(shop, shop.day - WEEK))


def test_labels_are_only_of_the_week(shop):
    day = shop.day - 3 * WEEK
    week = build_week(shop, day)
    inside = shop.purchases.filter(pl.col("day").is_between(day, day + timedelta(days=6)))
    assert week.ground_truth.sort("customer", "article").equals(
        inside.select("customer", "article").unique().sort("customer", "article")
    )
    assert week.purchases["days_ago"].min() >= 1
    assert week.aggregates.day == day


def test_a_history_does_not_know_beyond_its_day(shop):
    before = as_of(shop, shop.day - WEEK)
    assert before.purchases["day"].max() < before.day
    with pytest.raises(ValueError, match="ends before"):
        as_of(before, shop.day)
    assert replace(before, day=shop.day).purchases.equals(before.purchases)
