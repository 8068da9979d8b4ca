"""Models without improvement do not serve; registration and reports are correct."""

from dataclasses import replace
from datetime import date, timedelta

import polars as pl
import pytest
from fastapi.testclient import TestClient

from hm_reco.api.app import create_app
from hm_reco.api.model_manager import find_target, load_model
from hm_reco.data.history import (
    as_of,
    build_history,
    generate_history,
    load_history,
    map_customers,
    parse_day,
)
from hm_reco.lake.storage import Lake
from hm_reco.ranking.backtest import evaluate
from hm_reco.ranking.comparison import compare_with_baselines
from hm_reco.ranking.features import FeatureMatrix
from hm_reco.ranking.metrics import Interval
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RANKER, RankerSettings, rank_candidates
from hm_reco.ranking.rankers import train
from hm_reco.ranking.weeks import build_training_matrix, build_week
from hm_reco.registry.bundle import MANIFEST, Bundle, BundleError, load_bundle, save_bundle
from hm_reco.registry.registration import Provenance, build_bundles, register_bundles
from hm_reco.registry.registry import NoModelError, get_champion, get_model_states, read_models
from hm_reco.registry.training_run import train_and_register
from hm_reco.reporting.analysis import ModelReportInputs
from hm_reco.reporting.model_sections import build_model_report
from hm_reco.serving.batch import predict_all
from hm_reco.stages.demo import demo_lake
from hm_reco.stages.training import build_metrics

BASELINE = "own history, half-life 28 days"


@pytest.fixture(scope="module")
def history():
    return generate_history(600)


@pytest.fixture(scope="module")
def week(history) -> FeatureMatrix:
    return build_training_matrix(build_week(history, history.day - timedelta(days=28), days=28))


def test_ranker_without_improvement_stays_candidate():
    lake = demo_lake("processing", 300)
    history = load_history(lake)
    plan = BacktestPlan(history.day, evaluation_weeks=1, training_weeks=12)
    result = evaluate(history, plan, RankerSettings(rounds=3))
    comparison = replace(
        compare_with_baselines(result.scores),
        improvement=Interval(0.001, -0.001, 0.003),
        baseline=BASELINE,
    )
    provenance = Provenance("r1", {})
    message = register_bundles(
        lake, build_bundles(result, comparison, provenance), result.scores, provenance
    )
    assert get_champion(lake) == "r1-baseline" and "champion" in message
    assert get_model_states(read_models(lake)) == {
        "r1-ranker": "candidate",
        "r1-baseline": "champion",
    }
    assert load_bundle(lake, "r1-ranker").ranker.booster.num_trees() == 3

    with TestClient(create_app(lake)) as client:
        assert client.get("/healthz").json()["method"] == BASELINE
        response = client.post("/predict", json={"customer_ids": ["x"]}).json()
    assert response["model_version"] == "r1-baseline"
    assert {a["source"] for a in response["recommendations"][0]["articles"]} == {"popular"}


def test_training_registers_model_and_builds_report(lake: Lake):
    history = generate_history(1_500)
    plan = BacktestPlan(history.day, evaluation_weeks=1, training_weeks=5)
    settings, tables = RankerSettings(rounds=40), {"processed/x": 1}
    unregistered = train_and_register(
        lake, history, plan, settings, Provenance("r0", tables), register=False
    )
    assert load_bundle(lake, unregistered.bundles[-1].version).tables == tables
    with pytest.raises(NoModelError):
        get_champion(lake)
    trained = train_and_register(lake, history, plan, settings, Provenance("r1", tables))
    metrics = build_metrics(trained)
    assert get_champion(lake) == metrics["version"]
    assert metrics["scores"][RANKER][0] == pytest.approx(
        trained.comparison.means[RANKER].mean, abs=1e-6
    )
    assert load_bundle(lake, get_champion(lake)).tables == tables
    inputs = ModelReportInputs(trained.result, trained.comparison, history, trained.promotion)
    report = build_model_report(inputs, "r1", tables)
    assert report.tables == tables and metrics["promotion"] in " ".join(report.sections[0].findings)


def test_incomplete_bundle_is_rejected(lake: Lake, week):
    bundle = Bundle(
        "v1", RANKER, date(2020, 9, 23), train([week], RankerSettings(rounds=2)), {}, {}
    )
    with pytest.raises(BundleError, match="never completely written"):
        load_bundle(lake, "v1")
    save_bundle(lake, bundle)
    lake.path("artifacts", "models", "v1", "ranker.model").unlink()
    with pytest.raises(BundleError, match=r"'ranker.model' is missing"):
        load_bundle(lake, "v1")
    save_bundle(lake, replace(bundle, method="magic"))
    with pytest.raises(BundleError, match="cannot serve method 'magic'"):
        load_bundle(lake, "v1")
    assert lake.path("artifacts", "models", "v1", MANIFEST).is_file()


def test_model_of_other_features_is_rejected(week):
    ranker = train([week], RankerSettings(rounds=2))
    fewer_features = replace(week, values=week.values[:, 1:], names=week.names[1:])
    with pytest.raises(ValueError, match="trained on other features"):
        rank_candidates(ranker, fewer_features)


def test_training_without_positives_raises(week):
    with pytest.raises(ValueError, match="there are no positives"):
        train([replace(week, label=week.label * 0)])


def test_backtest_plan_longer_than_history_is_rejected(history):
    with pytest.raises(ValueError, match=r"the plan needs 100 \+ 0 \+ 30 weeks"):
        evaluate(history, BacktestPlan(history.day, evaluation_weeks=100, training_weeks=30))


def test_customers_per_week_samples_buyers(history):
    day = history.day - timedelta(days=28)
    all_buyers, sampled_buyers = (build_week(history, day, 28, customers) for customers in (0, 20))
    assert sampled_buyers.buyers.height == 20 < all_buyers.buyers.height
    assert sampled_buyers.ground_truth.join(
        sampled_buyers.buyers, on="customer", how="anti"
    ).is_empty()
    assert build_week(history, day, 28, 20, seed=1).buyers.equals(sampled_buyers.buyers) is False


@pytest.mark.parametrize(
    ("text", "message"),
    [("16.9.2020", "expected a day like"), ("2031-01-01", "run from"), ("2018-09-20", "run from")],
)
def test_day_outside_of_purchases_is_rejected(history, text, message):
    with pytest.raises(ValueError, match=message):
        parse_day(text, history)


def test_history_without_purchases_raises(history):
    with pytest.raises(ValueError, match="no purchases"):
        build_history(history.articles, history.customers, history.purchases.clear())


def test_customer_ids_are_stable_when_customers_are_added():
    raw = pl.DataFrame(
        {
            "customer_id": ["m", "a"],
            "age": [30, None],
            "Active": [1, None],
            "fashion_news_frequency": ["NONE", None],
            "club_member_status": ["ACTIVE", "something new"],
            "postal_code": ["12345", None],
        }
    )
    initial = map_customers(raw)
    extended = map_customers(
        pl.concat([raw, raw.head(1).with_columns(customer_id=pl.lit("b"))]), initial
    )
    assert dict(extended.select("customer_id", "customer").rows()) == {"a": 0, "m": 1, "b": 2}
    assert extended.sort("customer")["club"].to_list() == [-1, 0, 0]


def test_predictions_are_independent_of_shards(trained_lake):
    recommender = load_model(trained_lake, find_target(trained_lake)).recommender
    single_shard, five_shards = (
        predict_all(recommender, shards).sort("customer", "rank") for shards in (1, 5)
    )
    assert single_shard.equals(five_shards)


def test_as_of_composes(history):
    day = history.day - timedelta(days=100)
    assert as_of(as_of(history, history.day), day).purchases.equals(as_of(history, day).purchases)
