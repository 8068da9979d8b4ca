"""The report on a model: its figures by hand, its alerts, its JSON."""

import json
from dataclasses import replace
from datetime import date

import jsonschema
import polars as pl
import pytest

from hm_reco.data.history import History, generate_history
from hm_reco.ranking.backtest import Evaluation, evaluate
from hm_reco.ranking.comparison import BaselineComparison, compare_with_baselines
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RANKER
from hm_reco.reporting.analysis import compare_segments
from hm_reco.reporting.error_analysis import (
    ARTICLE_KINDS,
    OUTCOMES,
    calibration_section,
    compute_outcomes,
    customer_examples_section,
    example_html,
    missed_purchases_section,
    sample_examples,
)
from hm_reco.reporting.model_report import (
    comparison_section,
    explanation_section,
    segments_section,
    source_recall_section,
)
from hm_reco.reporting.section import Report, build_report_schema, dump_report

DAY = date(2020, 9, 16)


@pytest.fixture(scope="module")
def shop() -> History:
    return generate_history(1_500)


@pytest.fixture(scope="module")
def result(shop: History) -> Evaluation:
    return evaluate(shop, BacktestPlan(shop.day, evaluation_weeks=2, training_weeks=4))


@pytest.fixture(scope="module")
def verdict(result: Evaluation) -> BaselineComparison:
    return compare_with_baselines(result.scores)


def with_ranker(result: Evaluation, ap: pl.Expr) -> Evaluation:
    """The same, but the ranker's average precision is another."""
    other = pl.when(pl.col("method") == RANKER).then(ap).otherwise("ap")
    return replace(result, scores=result.scores.with_columns(ap=other))


def test_the_json_of_all_sections_fits_its_schema(result, verdict, shop):
    found = [
        comparison_section(result, verdict, "champion"),
        segments_section(result, verdict),
        source_recall_section(result),
        explanation_section(result),
        calibration_section(result),
        missed_purchases_section(result, verdict, shop),
        customer_examples_section(result, shop),
    ]
    report = Report(run_id="r", last_day=DAY, tables={}, sections=found)
    content = json.loads(dump_report(report), parse_constant=pytest.fail)
    jsonschema.validate(content, json.loads(build_report_schema()))
    assert all(section.findings for section in found)


def test_weeks_and_groups_add_up_to_the_whole(result, verdict):
    numbers = comparison_section(result, verdict, "").figures
    mine = [row for row in numbers["weeks"] if row["method"] == RANKER]
    assert sum(row["customers"] for row in mine) == result.customers.height
    whole = sum(row["mean"] * row["customers"] for row in mine) / result.customers.height
    assert whole == pytest.approx(verdict.means[RANKER].mean, rel=1e-4)
    for by in ("activity", "age", "channel"):
        rows = [
            row
            for row in compare_segments(result, RANKER, verdict.baseline)
            if row["dimension"] == by
        ]
        assert sum(row["customer_weeks"] for row in rows) == result.customers.height
        lead = (
            sum(row["improvement"] * row["customer_weeks"] for row in rows)
            / result.customers.height
        )
        assert lead == pytest.approx(verdict.improvement.mean)


def test_a_ranker_that_is_not_surely_better_is_an_alarm(result, verdict):
    assert not comparison_section(result, verdict, "").alerts
    worse = with_ranker(result, pl.lit(0.0))
    section = comparison_section(worse, compare_with_baselines(worse.scores), "stays a candidate")
    assert [alert.level for alert in section.alerts] == ["error"]
    assert "leads in 0 of 2 weeks" in " ".join(section.findings)


def test_a_group_that_is_worse_off_is_an_alarm_though_the_mean_is_good(result, verdict):
    active = result.customers.filter(activity="active").select("day", "customer")
    kept = result.scores.join(active.with_columns(bad=True), on=["day", "customer"], how="left")
    ap = pl.when(pl.col("bad") & (pl.col("method") == RANKER)).then(0.0).otherwise("ap")
    section = segments_section(
        replace(result, scores=kept.with_columns(ap=ap).drop("bad")), verdict
    )
    assert "activity 'active'" in " ".join(alert.text for alert in section.alerts)
    assert not segments_section(result, verdict).alerts


def test_what_became_of_purchases_by_hand(result):
    wanted = [(1, False, True), (2, True, True), (3, False, False), (4, False, False)]
    days = {"day": [DAY] * 4, "customer": [7] * 4}
    shelf = {"day": [DAY] * 3, "article": [1, 2, 3], "type": [0] * 3, "sold_28": [5, 5, 0]}
    toy = replace(
        result,
        ground_truth=pl.DataFrame(
            wanted, ["article", "is_repurchase", "is_candidate"], orient="row"
        ).with_columns(**{name: pl.Series(values) for name, values in days.items()}),
        lists=result.lists.clear().vstack(
            pl.DataFrame(
                [(7, 1, 3, True, False, DAY, RANKER)],
                ["customer", "article", "rank", "hit", "is_repurchase", "day", "method"],
                orient="row",
            )
            .select(result.lists.columns)
            .cast(dict(result.lists.schema))
        ),
        article_stats=pl.DataFrame(shelf | {"last_sold": [1, 1, 40]}),
    )
    toy = replace(
        toy,
        ground_truth=toy.ground_truth.cast({"customer": pl.Int32, "article": pl.Int32}),
        article_stats=toy.article_stats.cast({"article": pl.Int32}),
    )
    found = dict(zip(*compute_outcomes(toy).sort("article").select("article", "kind"), strict=True))
    assert list(found.values()) == [
        ARTICLE_KINDS[1],
        ARTICLE_KINDS[0],
        ARTICLE_KINDS[2],
        ARTICLE_KINDS[3],
    ]
    fate = compute_outcomes(toy).sort("article")["outcome"].to_list()
    assert fate == [OUTCOMES[0], OUTCOMES[1], OUTCOMES[2], OUTCOMES[2]]


def test_scores_out_of_order_are_noticed(result):
    def scored(bought: list[int]) -> Evaluation:
        table = {"share": [0.1, 0.2, 1.0], "candidates": [1_000] * 3, "score": [300.0, 200.0, 50.0]}
        return replace(result, calibration=pl.DataFrame(table | {"purchases": bought}))

    good = calibration_section(scored([100, 50, 10]))
    assert not good.alerts and "3.4 times the chance" in good.findings[1]
    assert calibration_section(scored([10, 50, 100])).alerts
    ranked = replace(result, settings=replace(result.settings, objective="lambdarank"))
    assert "no chances" in calibration_section(ranked).findings[1]


def test_the_worst_cases_are_those_that_the_simple_method_served_better(result, verdict, shop):
    rows = missed_purchases_section(result, verdict, shop).figures["worst"]
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True) and all(loss > 0 for loss in losses)
    pleased = with_ranker(result, pl.lit(1.0))
    assert missed_purchases_section(pleased, verdict, shop).figures["worst"] == []


def test_stories_are_of_all_kinds_and_name_no_customer(result, shop):
    people = sample_examples(result)
    assert people.height == 10 == people["customer"].n_unique()
    assert people["day"].unique().to_list() == [result.customers["day"].max()]
    assert set(people["activity"]) == set(result.customers.filter(day=DAY)["activity"])
    assert people["hit"].any() and not people["hit"].all()
    assert sample_examples(result).equals(people)
    told = customer_examples_section(result, shop).figures["examples"]
    text = json.dumps(told)
    assert not any(name in text for name in shop.customers["customer_id"])
    for story in told:
        shown = sum(one["hit"] for one in story["recommended"])
        assert shown == sum(one["recommended"] for one in story["purchases"])
        assert (shown > 0) == (story["average_precision"] > 0)


def test_a_story_is_told_as_text():
    story = {
        "customer": "cold, age <b>",
        "n_past_articles": 0,
        "last_day": None,
        "recent": [],
        "recommended": [{"name": "A & B", "hit": True, "is_repurchase": False}],
        "purchases": [{"name": "A & B", "is_candidate": True, "recommended": True}],
        "week": "2020-09-16",
        "average_precision": 1.0,
    }
    html = example_html(story)
    assert "age &lt;b&gt;" in html and "<b>A &amp; B ✓ bought</b>" in html
    assert "never bought before" in html
