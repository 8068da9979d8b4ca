"""The model report: hand-computed figures, alerts, JSON."""

import json
from dataclasses import replace
from datetime import date

import jsonschema
import polars as pl
import pytest

from hm_reco.data.history import History, generate_history
from hm_reco.ranking.backtest import evaluate
from hm_reco.ranking.comparison import BaselineComparison, compare_with_baselines
from hm_reco.ranking.evaluation import Evaluation
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
def history() -> History:
    return generate_history(1_500)


@pytest.fixture(scope="module")
def result(history: History) -> Evaluation:
    return evaluate(history, BacktestPlan(history.day, evaluation_weeks=2, training_weeks=4))


@pytest.fixture(scope="module")
def comparison(result: Evaluation) -> BaselineComparison:
    return compare_with_baselines(result.scores)


def replace_ranker_ap(result: Evaluation, ap: pl.Expr) -> Evaluation:
    """The same result with another average precision of the ranker."""
    new_ap = pl.when(pl.col("method") == RANKER).then(ap).otherwise("value")
    return replace(result, scores=result.scores.with_columns(value=new_ap))


def test_model_report_json_matches_schema(result, comparison, history):
    sections = [
        comparison_section(result, comparison, "champion"),
        segments_section(result, comparison),
        source_recall_section(result),
        explanation_section(result),
        calibration_section(result),
        missed_purchases_section(result, comparison, history),
        customer_examples_section(result, history),
    ]
    report = Report(run_id="r", last_day=DAY, tables={}, sections=sections)
    content = json.loads(dump_report(report), parse_constant=pytest.fail)
    jsonschema.validate(content, json.loads(build_report_schema()))
    assert all(section.findings for section in sections)


def test_weeks_and_segments_add_up_to_overall_mean(result, comparison):
    figures = comparison_section(result, comparison, "").figures
    ranker_rows = [row for row in figures["weeks"] if row["method"] == RANKER]
    assert sum(row["customers"] for row in ranker_rows) == result.customers.height
    overall = sum(row["mean"] * row["customers"] for row in ranker_rows) / result.customers.height
    assert overall == pytest.approx(comparison.means[RANKER].mean, rel=1e-4)
    for dimension in ("activity", "age", "channel"):
        rows = [
            row
            for row in compare_segments(result, RANKER, comparison.baseline)
            if row["dimension"] == dimension
        ]
        assert sum(row["customer_weeks"] for row in rows) == result.customers.height
        improvement = (
            sum(row["improvement"] * row["customer_weeks"] for row in rows)
            / result.customers.height
        )
        assert improvement == pytest.approx(comparison.improvement.mean)


def test_ranker_without_significant_improvement_is_error(result, comparison):
    assert not comparison_section(result, comparison, "").alerts
    worse = replace_ranker_ap(result, pl.lit(0.0))
    section = comparison_section(worse, compare_with_baselines(worse.scores), "stays a candidate")
    assert [alert.level for alert in section.alerts] == ["error"]
    assert "is better in 0 of 2 weeks" in " ".join(section.findings)


def test_worse_segment_is_error_despite_better_mean(result, comparison):
    active = result.customers.filter(activity="active").select("day", "customer")
    flagged = result.scores.join(active.with_columns(bad=True), on=["day", "customer"], how="left")
    ap = pl.when(pl.col("bad") & (pl.col("method") == RANKER)).then(0.0).otherwise("value")
    section = segments_section(
        replace(result, scores=flagged.with_columns(value=ap).drop("bad")), comparison
    )
    texts = " ".join(alert.text for alert in section.alerts)
    assert "activity 'active' the ranker is worse than" in texts
    assert not segments_section(result, comparison).alerts


def test_purchase_outcomes_example(result):
    ground_truth = [(1, False, True), (2, True, True), (3, False, False), (4, False, False)]
    days = {"day": [DAY] * 4, "customer": [7] * 4}
    article_stats = {"day": [DAY] * 3, "article": [1, 2, 3], "type": [0] * 3, "sold_28": [5, 5, 0]}
    small_result = replace(
        result,
        ground_truth=pl.DataFrame(
            ground_truth, ["article", "is_repurchase", "is_candidate"], orient="row"
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
        article_stats=pl.DataFrame(article_stats | {"last_sold": [1, 1, 40]}),
    )
    small_result = replace(
        small_result,
        ground_truth=small_result.ground_truth.cast({"customer": pl.Int32, "article": pl.Int32}),
        article_stats=small_result.article_stats.cast({"article": pl.Int32}),
    )
    kinds = dict(
        zip(*compute_outcomes(small_result).sort("article").select("article", "kind"), strict=True)
    )
    assert list(kinds.values()) == [
        ARTICLE_KINDS[1],
        ARTICLE_KINDS[0],
        ARTICLE_KINDS[2],
        ARTICLE_KINDS[3],
    ]
    outcomes = compute_outcomes(small_result).sort("article")["outcome"].to_list()
    assert outcomes == [OUTCOMES[0], OUTCOMES[1], OUTCOMES[2], OUTCOMES[2]]


def test_calibration_section_reports_scores_out_of_order(result):
    def with_calibration(purchases: list[int]) -> Evaluation:
        table = {"share": [0.1, 0.2, 1.0], "candidates": [1_000] * 3, "score": [300.0, 200.0, 50.0]}
        return replace(result, calibration=pl.DataFrame(table | {"purchases": purchases}))

    calibrated = calibration_section(with_calibration([100, 50, 10]))
    assert not calibrated.alerts and "3.4 times the probability" in calibrated.findings[1]
    assert calibration_section(with_calibration([10, 50, 100])).alerts
    ranked = replace(result, settings=replace(result.settings, objective="lambdarank"))
    assert "not probabilities" in calibration_section(ranked).findings[1]


def test_missed_purchases_list_cases_where_baseline_is_better(result, comparison, history):
    rows = missed_purchases_section(result, comparison, history).figures["worst"]
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True) and all(loss > 0 for loss in losses)
    perfect = replace_ranker_ap(result, pl.lit(1.0))
    assert missed_purchases_section(perfect, comparison, history).figures["worst"] == []


def test_customer_examples_are_diverse_and_anonymous(result, history):
    customers = sample_examples(result)
    assert customers.height == 10 == customers["customer"].n_unique()
    assert customers["day"].unique().to_list() == [result.customers["day"].max()]
    assert set(customers["activity"]) == set(result.customers.filter(day=DAY)["activity"])
    assert customers["hit"].any() and not customers["hit"].all()
    assert sample_examples(result).equals(customers)
    examples = customer_examples_section(result, history).figures["examples"]
    text = json.dumps(examples)
    assert not any(name in text for name in history.customers["customer_id"])
    for example in examples:
        n_hits = sum(article["hit"] for article in example["recommended"])
        assert n_hits == sum(article["recommended"] for article in example["purchases"])
        assert (n_hits > 0) == (example["score"] > 0)


def test_customer_example_html():
    example = {
        "customer": "cold, age <b>",
        "n_past_articles": 0,
        "last_day": None,
        "recent": [],
        "recommended": [{"name": "A & B", "hit": True, "is_repurchase": False}],
        "purchases": [{"name": "A & B", "is_candidate": True, "recommended": True}],
        "week": "2020-09-16",
        "metric": "MAP@12",
        "score": 1.0,
    }
    html = example_html(example)
    assert "age &lt;b&gt;" in html and "<b>A &amp; B ✓ bought</b>" in html
    assert "never bought before" in html
