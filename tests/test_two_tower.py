"""The two-tower model: resumed training, new customers, unsold articles."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
import torch

from hm_reco.data.history import as_of, generate_history
from hm_reco.retrieval import tower_training
from hm_reco.retrieval.aggregates import compute_aggregates
from hm_reco.retrieval.arrays import build_customer_arrays, select_purchases
from hm_reco.retrieval.candidates import generate_candidates
from hm_reco.retrieval.tower_training import fit_until, sampled_softmax
from hm_reco.retrieval.two_tower import (
    TwoTower,
    TwoTowerSettings,
    build_space,
    build_vocabulary,
    from_bytes,
    to_bytes,
)

SETTINGS = TwoTowerSettings(max_examples=6_000, batch_size=256, sampled_negatives=256)


@pytest.fixture(scope="module")
def history():
    return generate_history(600)


@pytest.fixture(scope="module")
def model(history):
    model = TwoTower(build_vocabulary(history.articles), SETTINGS)
    fit_until(model, history)
    return model


def test_two_tower_training_resumes_from_checkpoint(history, model, monkeypatch):
    monkeypatch.setattr(tower_training, "CHECKPOINT_STEPS", 5)
    saved: list[bytes] = []

    def save(unfinished: TwoTower) -> None:
        saved.append(to_bytes(unfinished))
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_until(
            TwoTower(build_vocabulary(history.articles), SETTINGS), history, on_checkpoint=save
        )
    resumed = from_bytes(saved[-1])
    assert resumed.trained_until is None and resumed.steps_done == 10
    fit_until(resumed, history)
    assert to_bytes(resumed) == to_bytes(model)


def test_two_tower_depends_on_seed(history, model):
    other_model = TwoTower(build_vocabulary(history.articles), replace(SETTINGS, seed=1))
    fit_until(other_model, history)
    assert to_bytes(other_model) != to_bytes(model)


def test_two_tower_from_invalid_bytes_raises():
    with pytest.raises(ValueError, match="not a two-tower model"):
        from_bytes(b"\x10\0\0\0\0\0\0\0" + b"{}".ljust(16))


def test_two_tower_places_unsold_article_near_its_variants(history, model):
    sold_articles = set(history.purchases["article"].unique().to_list())
    vectors, shares = build_space(model, history).article_vectors, []
    for articles in history.articles.group_by("product").agg("article")["article"].to_list():
        unsold, sold_variants = (
            [a for a in articles if (a in sold_articles) is sold] for sold in (False, True)
        )
        if unsold and sold_variants:
            similarity = vectors @ vectors[unsold[0]].astype(int)
            shares.append((similarity < similarity[sold_variants[0]]).mean())
    assert len(shares) > 20 and np.mean(shares) > 0.8


def test_two_tower_session_changes_candidates_of_unknown_customer(history, model):
    aggregates = compute_aggregates(history, model.build_space(history))
    customer = pl.DataFrame({"customer": [-1]}, schema={"customer": pl.Int32})
    no_purchases = select_purchases(history, customer)
    recent = (
        select_purchases(history, history.customers).sort("days_ago", "customer", "article").head(3)
    )
    clicks = recent.with_columns(customer=pl.lit(-1, pl.Int32))
    candidates = [
        generate_candidates(
            aggregates.index,
            build_customer_arrays(aggregates, purchases, customer),
            {"two_tower": 12},
        ).article.tolist()
        for purchases in (no_purchases, clicks)
    ]
    assert len(candidates[0]) == len(candidates[1]) == 12 and candidates[0] != candidates[1]


def test_two_tower_customer_vector_is_independent_of_batch(history, model):
    aggregates, customers = (
        compute_aggregates(history, model.build_space(history)),
        history.customers.sort("customer"),
    )
    purchases = select_purchases(history, customers)
    batch_vectors, positions = (
        build_customer_arrays(aggregates, purchases, customers).vector,
        [0, 7, 300, 599],
    )
    single_vectors = [
        build_customer_arrays(
            aggregates, select_purchases(history, customers[n]), customers[n]
        ).vector
        for n in positions
    ]
    assert np.array_equal(np.concatenate(single_vectors), batch_vectors[positions])


def test_two_tower_trains_incrementally_by_week(history):
    model = TwoTower(build_vocabulary(history.articles), SETTINGS)
    first_weeks = as_of(history, history.day - timedelta(days=7))
    fit_until(model, first_weeks)
    steps = model.steps
    assert model.trained_until == first_weeks.day and fit_until(model, first_weeks) == []
    assert (
        len(fit_until(model, history)) > 0
        and model.steps > steps
        and model.trained_until == history.day
    )


def test_logq_corrects_sampling_frequency():
    score = torch.tensor([[1.0, 2.0, 3.0]])
    article_ids, positives = torch.tensor([4, 5, 6]), torch.tensor([0])
    uniform = sampled_softmax(score, positives, article_ids, torch.full((3,), -1.0))
    assert torch.isclose(uniform, torch.nn.functional.cross_entropy(score, positives))
    oversampled = sampled_softmax(score, positives, article_ids, torch.tensor([-1.0, -1.0, 1.0]))
    assert oversampled < uniform  # the third is sampled often: its score counts less
    duplicated = sampled_softmax(score, positives, torch.tensor([4, 5, 4]), torch.full((3,), -1.0))
    assert torch.isclose(duplicated, torch.nn.functional.cross_entropy(score[:, :2], positives))
