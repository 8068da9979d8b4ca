"""Models that must not serve do not, and what the reports say is counted right."""

from dataclasses import replace
from datetime import date, timedelta

import polars as pl
import pytest
from fastapi.testclient import TestClient

from hm_reco.api.app import create_app
from hm_reco.api.model_manager import load, wanted
from hm_reco.data.history import (
    as_of,
    load_history,
    make_history,
    map_customers,
    parse_day,
    sample_history,
)
from hm_reco.lake.storage import Lake
from hm_reco.ranking.backtest import RANKER, evaluate
from hm_reco.ranking.comparison import judge
from hm_reco.ranking.features import Matrix, labelled, open_week
from hm_reco.ranking.metrics import Interval
from hm_reco.ranking.plan import Plan
from hm_reco.ranking.ranker import RankerSettings, score, train
from hm_reco.registry.bundle import MANIFEST, Bundle, BundleError, load_bundle, save_bundle
from hm_reco.registry.registration import Origin, bundles_of, publish
from hm_reco.registry.registry import NoModelError, champion, model_states, read_models
from hm_reco.serving.recommend import predict_all
from hm_reco.stages.demo import demo_lake
from hm_reco.stages.training import metrics_of, report_on, train_and_publish

BASELINE = "own history, half-life 28 days"


@pytest.fixture(scope="module")
def shop():
    return sample_history(600)


@pytest.fixture(scope="module")
def week(shop) -> Matrix:
    return labelled(open_week(shop, shop.day - timedelta(days=28), days=28))


def test_a_ranker_that_does_not_win_is_kept_but_the_baseline_serves():
    lake = demo_lake("processing", 300)
    history = load_history(lake)
    plan = Plan(history.day, evaluation_weeks=1, training_weeks=12)
    result = evaluate(history, plan, RankerSettings(rounds=3))
    verdict = replace(judge(result.scores), lead=Interval(0.001, -0.001, 0.003), baseline=BASELINE)
    origin = Origin("r1", {})
    told = publish(lake, bundles_of(result, verdict, origin), result.scores, origin)
    assert champion(lake) == "r1-baseline" and "champion" in told
    assert model_states(read_models(lake)) == {"r1-ranker": "candidate", "r1-baseline": "champion"}
    assert load_bundle(lake, "r1-ranker").booster.num_trees() == 3

    with TestClient(create_app(lake)) as client:
        assert client.get("/healthz").json()["method"] == BASELINE
        answer = client.post("/predict", json={"customer_ids": ["x"]}).json()
    assert answer["model_version"] == "r1-baseline"
    assert {a["source"] for a in answer["recommendations"][0]["articles"]} == {"popular"}


def test_a_training_run_publishes_and_reports(lake: Lake):
    history = sample_history(1_500)
    plan = Plan(history.day, evaluation_weeks=1, training_weeks=5)
    settings, tables = RankerSettings(rounds=40), {"processed/x": 1}
    trial = train_and_publish(lake, history, plan, settings, Origin("r0", tables), enter=False)
    assert load_bundle(lake, trial.bundles[-1].version).tables == tables
    with pytest.raises(NoModelError):
        champion(lake)
    trained = train_and_publish(lake, history, plan, settings, Origin("r1", tables))
    metrics = metrics_of(trained)
    assert champion(lake) == metrics["version"]
    assert metrics["map12"][RANKER][0] == pytest.approx(
        trained.verdict.means[RANKER].mean, abs=1e-6
    )
    assert load_bundle(lake, champion(lake)).tables == tables
    report = report_on(trained, history, "r1", tables)
    assert report.tables == tables and metrics["promotion"] in " ".join(report.sections[0].says)


def test_a_bundle_that_was_not_completely_written_is_refused(lake: Lake, week):
    bundle = Bundle(
        "v1", RANKER, date(2020, 9, 23), train([week], RankerSettings(rounds=2)), {}, {}
    )
    with pytest.raises(BundleError, match="never completely written"):
        load_bundle(lake, "v1")
    save_bundle(lake, bundle)
    lake.path("artifacts", "models", "v1", "ranker.txt").unlink()
    with pytest.raises(BundleError, match=r"'ranker.txt' is missing"):
        load_bundle(lake, "v1")
    save_bundle(lake, replace(bundle, method="magic"))
    with pytest.raises(BundleError, match="cannot serve method 'magic'"):
        load_bundle(lake, "v1")
    assert lake.path("artifacts", "models", "v1", MANIFEST).is_file()


def test_a_model_of_other_features_is_refused(week):
    booster = train([week], RankerSettings(rounds=2))
    fewer = replace(week, values=week.values[:, 1:], names=week.names[1:])
    with pytest.raises(ValueError, match="trained on other features"):
        score(booster, fewer)


def test_weeks_without_a_hit_teach_nothing(week):
    with pytest.raises(ValueError, match="nothing to learn"):
        train([replace(week, label=week.label * 0)])


def test_a_plan_longer_than_the_history_is_refused(shop):
    with pytest.raises(ValueError, match=r"100 \+ 0 \+ 30 weeks are asked for"):
        evaluate(shop, Plan(shop.day, evaluation_weeks=100, training_weeks=30))


def test_customers_per_week_bounds_a_week_by_lot(shop):
    day = shop.day - timedelta(days=28)
    whole, part = (open_week(shop, day, 28, customers) for customers in (0, 20))
    assert part.who.height == 20 < whole.who.height
    assert part.sold.join(part.who, on="customer", how="anti").is_empty()
    assert open_week(shop, day, 28, 20, seed=1).who.equals(part.who) is False


@pytest.mark.parametrize(
    ("text", "message"),
    [("16.9.2020", "expected a day like"), ("2031-01-01", "run from"), ("2018-09-20", "run from")],
)
def test_a_day_outside_of_the_purchases_is_refused(shop, text, message):
    with pytest.raises(ValueError, match=message):
        parse_day(text, shop)


def test_no_purchases_no_history(shop):
    with pytest.raises(ValueError, match="nothing to learn from"):
        make_history(shop.articles, shop.customers, shop.purchases.clear())


def test_numbers_stay_when_customers_come():
    raw = pl.DataFrame(
        {
            "customer_id": ["m", "a"],
            "age": [30, None],
            "Active": [1, None],
            "fashion_news_frequency": ["NONE", None],
            "club_member_status": ["ACTIVE", "something new"],
        }
    )
    first = map_customers(raw)
    more = map_customers(pl.concat([raw, raw.head(1).with_columns(customer_id=pl.lit("b"))]), first)
    assert dict(more.select("customer_id", "customer").rows()) == {"a": 0, "m": 1, "b": 2}
    assert more.sort("customer")["club"].to_list() == [-1, 0, 0]


def test_predictions_do_not_depend_on_the_number_of_shards(trained_lake):
    recommender = load(trained_lake, wanted(trained_lake)).recommender
    one, five = (predict_all(recommender, shards).sort("customer", "rank") for shards in (1, 5))
    assert one.equals(five)


def test_history_as_of_is_a_part_of_itself(shop):
    day = shop.day - timedelta(days=100)
    assert as_of(as_of(shop, shop.day), day).purchases.equals(as_of(shop, day).purchases)
