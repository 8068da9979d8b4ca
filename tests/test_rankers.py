"""Each kind of ranker keeps the protocol: training, scores, contributions, bytes, serving."""

import sys
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from hm_reco.data.history import History, generate_history
from hm_reco.lake.storage import open_lake
from hm_reco.ranking.backtest import evaluate
from hm_reco.ranking.features import FeatureMatrix
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RANKER, Ranker, RankerSettings
from hm_reco.ranking.rankers import RANKERS, compute_importance, get_ranker_kind, train
from hm_reco.ranking.weeks import build_training_matrix, build_week
from hm_reco.registry.bundle import Bundle, BundleError, load_bundle, save_bundle
from hm_reco.serving.recommend import recommend
from hm_reco.serving.recommender import build_recommender
from hm_reco.serving.snapshot import load_snapshot, save_snapshot

KINDS = [kind.name for kind in RANKERS]


@pytest.fixture(scope="module")
def history() -> History:
    return generate_history(600)


@pytest.fixture(scope="module")
def week(history: History) -> FeatureMatrix:
    return build_training_matrix(build_week(history, history.day - timedelta(days=14), days=14))


@pytest.fixture(scope="module", params=KINDS)
def ranker(request: pytest.FixtureRequest, week: FeatureMatrix) -> Ranker:
    return train([week], RankerSettings(rounds=60, lambda_l2=1.0, kind=request.param))


def test_ranker_scores_purchases_higher(ranker, week):
    scores = ranker.predict(week.values)
    assert scores.shape == week.label.shape and scores.dtype == np.float64
    assert scores[week.label == 1].mean() > 1.5 * scores[week.label == 0].mean()
    assert ranker.probability and ((scores > 0) & (scores < 1)).all()


def test_ranker_contributions_explain_differences(ranker, week):
    """Two rows differ in the score before the sigmoid by the difference of their contributions."""
    rows = week.values[[0, len(week.values) // 2]]
    contributions, scores = ranker.contributions(rows), ranker.predict(rows)
    assert contributions.shape == rows.shape
    raw = np.log(scores / (1 - scores))
    assert np.isclose(contributions[0].sum() - contributions[1].sum(), raw[0] - raw[1], atol=1e-4)


def test_ranker_importance_is_a_share_by_feature(ranker):
    importance = compute_importance(ranker, len(ranker.features))
    assert importance.height == len(ranker.features)
    assert importance["gain"].sum() == pytest.approx(1) and "trees" in ranker.describe()


def test_ranker_bytes_give_same_scores(ranker, week):
    read = get_ranker_kind(ranker.kind).from_bytes(ranker.to_bytes())
    assert read.features == ranker.features
    np.testing.assert_array_equal(read.predict(week.values), ranker.predict(week.values))


def test_ranker_serves_from_bundle_and_snapshot(ranker, history, tmp_path):
    lake = open_lake(str(tmp_path))
    save_bundle(lake, Bundle("v1", RANKER, history.day, ranker, {}, {}))
    bundle = load_bundle(lake, "v1")
    assert bundle.ranker.kind == ranker.kind
    recommender = build_recommender(history, bundle)
    loaded = load_snapshot(lake, bundle, save_snapshot(lake, recommender, {}))
    customers = [recommender.customer_ids.text[n].decode() for n in range(5)] + ["unknown"]
    assert recommend(loaded, customers) == recommend(recommender, customers)


def test_bundle_with_altered_ranker_is_refused(ranker, history, tmp_path):
    lake = open_lake(str(tmp_path))
    save_bundle(lake, Bundle("v1", RANKER, history.day, ranker, {}, {}))
    manifest = lake.path("artifacts", "models", "v1", "bundle.json")
    manifest.write_text(manifest.read_text().replace(f'"{ranker.kind}"', '"another"'))
    with pytest.raises(BundleError, match="expected one of lightgbm, catboost, found 'another'"):
        load_bundle(lake, "v1")


@pytest.mark.parametrize("kind", KINDS)
def test_backtest_evaluates_any_kind(kind, history):
    plan = BacktestPlan(history.day, evaluation_weeks=1, training_weeks=2, tuning_weeks=0)
    settings = RankerSettings(rounds=20, kind=kind)
    result = evaluate(history, plan, settings)
    assert result.ranker.kind == kind and RANKER in result.scores["method"].unique()


def test_ranker_without_its_library_names_the_extra(week, monkeypatch):
    monkeypatch.setitem(sys.modules, "catboost", None)
    with pytest.raises(ValueError, match=r"pip install 'hm-reco\[catboost\]'"):
        train([week], RankerSettings(kind="catboost"))


@pytest.mark.parametrize("kind", KINDS)
def test_ranker_without_positives_says_what_to_do(kind, week):
    nothing_bought = replace(week, label=np.zeros_like(week.label))
    with pytest.raises(ValueError, match="use more weeks or more customers"):
        train([nothing_bought], RankerSettings(kind=kind))
