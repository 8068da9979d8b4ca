"""Nothing of a week reaches what is predicted for it."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from hm_reco.data.history import as_of, make_history, sample_history
from hm_reco.ranking.backtest import evaluate
from hm_reco.ranking.baselines import BASELINES
from hm_reco.ranking.features import candidates_for, open_week
from hm_reco.ranking.plan import Plan
from hm_reco.ranking.ranker import RankerSettings
from hm_reco.retrieval.aggregates import learn
from hm_reco.retrieval.article_index import gather, open_shop, own_purchases
from hm_reco.retrieval.two_tower import Tower, TowerSettings, advance, learn_vocabulary, to_bytes

WEEK = timedelta(days=7)


@pytest.fixture(scope="module")
def shop():
    return sample_history(800)


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
    return make_history(shop.articles, shop.customers, purchases)


def test_the_plant_is_seen_when_its_time_has_come(shop, planted):
    first, second = (learn(history).state for history in (shop, planted))
    assert not first.equals(second)


def test_a_later_purchase_changes_no_shared_table(shop, planted):
    day = shop.day - WEEK
    first, second = (learn(as_of(history, day)) for history in (shop, planted))
    assert first.state.equals(second.state)
    for tables in ("near", "segments"):
        for kind, table in getattr(first, tables).items():
            assert table.equals(getattr(second, tables)[kind]), (tables, kind)
    assert (first.kin.bought != second.kin.bought).nnz == 0


def test_a_later_purchase_changes_no_feature_and_no_baseline(shop, planted):
    day = shop.day - WEEK
    who = shop.customers.select("customer").head(200)
    values, lists = [], []
    for history in (shop, planted):
        before = as_of(history, day)
        known, own = learn(before), own_purchases(before, who)
        matrix = candidates_for(open_shop(known, before), gather(known, own, who))
        values.append(matrix.values)
        lists.append([baseline(known, own, who, 12) for baseline in BASELINES.values()])
    assert np.array_equal(*values, equal_nan=True) and len(values[0]) > 1_000
    assert all(a.equals(b) for a, b in zip(*lists, strict=True))


def test_a_later_purchase_changes_no_model(shop, planted):
    plan = Plan(shop.day - WEEK, evaluation_weeks=1, training_weeks=6)
    settings = RankerSettings(rounds=20)
    first, second = (
        evaluate(as_of(h, plan.as_of), plan, settings, _tower(h)) for h in (shop, planted)
    )
    assert first.booster.model_to_string() == second.booster.model_to_string()
    assert first.scores.equals(second.scores) and first.lists.equals(second.lists)
    assert first.probe.budget == second.probe.budget
    assert to_bytes(first.tower) == to_bytes(second.tower)


def _tower(history):
    return Tower(learn_vocabulary(history.articles), TowerSettings(examples=2_000, batch=256))


def test_a_tower_that_knows_the_week_is_refused(shop):
    tower = _tower(shop)
    advance(tower, shop)
    with pytest.raises(ValueError, match="the tower has learned until"):
        tower.space(as_of(shop, shop.day - WEEK))


def test_labels_are_only_of_the_week(shop):
    day = shop.day - 3 * WEEK
    week = open_week(shop, day)
    inside = shop.purchases.filter(pl.col("day").is_between(day, day + timedelta(days=6)))
    assert week.sold.sort("customer", "article").equals(
        inside.select("customer", "article").unique().sort("customer", "article")
    )
    assert week.own["ago"].min() >= 1
    assert week.known.day == day


def test_a_history_does_not_know_beyond_its_day(shop):
    before = as_of(shop, shop.day - WEEK)
    assert before.purchases["day"].max() < before.day
    with pytest.raises(ValueError, match="ends before"):
        as_of(before, shop.day)
    assert replace(before, day=shop.day).purchases.equals(before.purchases)
