"""The tower goes on where it stopped, and has an answer for who and what is new."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
import torch

from hm_reco.data.history import as_of, generate_history
from hm_reco.retrieval import two_tower as towers
from hm_reco.retrieval.aggregates import compute_aggregates
from hm_reco.retrieval.article_index import build_customer_arrays, build_index, select_purchases
from hm_reco.retrieval.candidates import generate_candidates
from hm_reco.retrieval.two_tower import (
    TwoTower,
    TwoTowerSettings,
    build_space,
    build_vocabulary,
    fit_until,
    from_bytes,
    sampled_softmax,
    to_bytes,
)

SETTINGS = TwoTowerSettings(max_examples=6_000, batch_size=256, sampled_negatives=256)


@pytest.fixture(scope="module")
def shop():
    return generate_history(600)


@pytest.fixture(scope="module")
def tower(shop):
    tower = TwoTower(build_vocabulary(shop.articles), SETTINGS)
    fit_until(tower, shop)
    return tower


def test_a_run_broken_off_goes_on_from_its_checkpoint(shop, tower, monkeypatch):
    monkeypatch.setattr(towers, "CHECKPOINT_STEPS", 5)
    saved: list[bytes] = []

    def save(unfinished: TwoTower) -> None:
        saved.append(to_bytes(unfinished))
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_until(TwoTower(build_vocabulary(shop.articles), SETTINGS), shop, on_checkpoint=save)
    again = from_bytes(saved[-1])
    assert again.trained_until is None and again.steps_done == 10
    fit_until(again, shop)
    assert to_bytes(again) == to_bytes(tower)


def test_another_seed_is_another_tower(shop, tower):
    other = TwoTower(build_vocabulary(shop.articles), replace(SETTINGS, seed=1))
    fit_until(other, shop)
    assert to_bytes(other) != to_bytes(tower)


def test_bytes_that_are_no_tower_are_refused():
    with pytest.raises(ValueError, match="no tower"):
        from_bytes(b"\x10\0\0\0\0\0\0\0" + b"{}".ljust(16))


def test_an_article_never_sold_lies_nearer_to_its_variants_than_to_others(shop, tower):
    known = set(shop.purchases["article"].unique().to_list())
    vectors, places = build_space(tower, shop).article_vectors, []
    for articles in shop.articles.group_by("product").agg("article")["article"].to_list():
        new, old = ([a for a in articles if (a in known) is sold] for sold in (False, True))
        if new and old:
            near = vectors @ vectors[new[0]].astype(int)
            places.append((near < near[old[0]]).mean())
    assert len(places) > 20 and np.mean(places) > 0.8


def test_a_visitor_with_three_clicks_is_not_a_stranger(shop, tower):
    known = compute_aggregates(shop, tower)
    who = pl.DataFrame({"customer": [-1]}, schema={"customer": pl.Int32})
    nothing = select_purchases(shop, who)
    seen = select_purchases(shop, shop.customers).sort("days_ago", "customer", "article").head(3)
    clicks = seen.with_columns(customer=pl.lit(-1, pl.Int32))
    arrays = build_index(known, shop)
    lists = [
        generate_candidates(
            arrays, build_customer_arrays(known, own, who), {"two_tower": 12}
        ).article.tolist()
        for own in (nothing, clicks)
    ]
    assert len(lists[0]) == len(lists[1]) == 12 and lists[0] != lists[1]


def test_a_customer_alone_has_the_vector_that_she_has_in_company(shop, tower):
    known, everyone = compute_aggregates(shop, tower), shop.customers.sort("customer")
    own = select_purchases(shop, everyone)
    together, some = build_customer_arrays(known, own, everyone).vector, [0, 7, 300, 599]
    alone = [
        build_customer_arrays(known, select_purchases(shop, everyone[n]), everyone[n]).vector
        for n in some
    ]
    assert np.array_equal(np.concatenate(alone), together[some])


def test_weeks_are_learned_one_by_one(shop):
    tower = TwoTower(build_vocabulary(shop.articles), SETTINGS)
    before = as_of(shop, shop.day - timedelta(days=7))
    fit_until(tower, before)
    steps = tower.steps
    assert tower.trained_until == before.day and fit_until(tower, before) == []
    assert (
        len(fit_until(tower, shop)) > 0 and tower.steps > steps and tower.trained_until == shop.day
    )


def test_logq_takes_back_what_being_drawn_often_adds():
    score = torch.tensor([[1.0, 2.0, 3.0]])
    number, right = torch.tensor([4, 5, 6]), torch.tensor([0])
    even = sampled_softmax(score, right, number, torch.full((3,), -1.0))
    assert torch.isclose(even, torch.nn.functional.cross_entropy(score, right))
    often = sampled_softmax(score, right, number, torch.tensor([-1.0, -1.0, 1.0]))
    assert often < even  # the third was easy to be drawn: its score counts less
    twin = sampled_softmax(score, right, torch.tensor([4, 5, 4]), torch.full((3,), -1.0))
    assert torch.isclose(twin, torch.nn.functional.cross_entropy(score[:, :2], right))
