"""The report on a model: its figures by hand, its alerts, its JSON."""

import json
from dataclasses import replace
from datetime import date

import jsonschema
import polars as pl
import pytest

from hm_reco.data.history import History, sample_history
from hm_reco.ranking.backtest import Evaluation, evaluate
from hm_reco.ranking.comparison import Verdict, judge
from hm_reco.ranking.plan import Plan
from hm_reco.ranking.ranker import RANKER
from hm_reco.reporting.analysis import slice_table
from hm_reco.reporting.error_analysis import (
    FATES,
    KINDS,
    calibration,
    chosen,
    fates,
    misses,
    stories,
    tell,
)
from hm_reco.reporting.model_report import groups, ladder, sources, workings
from hm_reco.reporting.section import Report, as_json, schema

DAY = date(2020, 9, 16)


@pytest.fixture(scope="module")
def shop() -> History:
    return sample_history(1_500)


@pytest.fixture(scope="module")
def result(shop: History) -> Evaluation:
    return evaluate(shop, Plan(shop.day, evaluation_weeks=2, training_weeks=4))


@pytest.fixture(scope="module")
def verdict(result: Evaluation) -> Verdict:
    return judge(result.scores)


def with_ranker(result: Evaluation, ap: pl.Expr) -> Evaluation:
    """The same, but the ranker's average precision is another."""
    other = pl.when(pl.col("method") == RANKER).then(ap).otherwise("ap")
    return replace(result, scores=result.scores.with_columns(ap=other))


def test_the_json_of_all_sections_fits_its_schema(result, verdict, shop):
    found = [
        ladder(result, verdict, "champion"),
        groups(result, verdict),
        sources(result),
        workings(result),
        calibration(result),
        misses(result, verdict, shop),
        stories(result, shop),
    ]
    report = Report(run_id="r", last_day=DAY, tables={}, sections=found)
    content = json.loads(as_json(report), parse_constant=pytest.fail)
    jsonschema.validate(content, json.loads(schema()))
    assert all(section.says for section in found)


def test_weeks_and_groups_add_up_to_the_whole(result, verdict):
    numbers = ladder(result, verdict, "").numbers
    mine = [row for row in numbers["weeks"] if row["method"] == RANKER]
    assert sum(row["customers"] for row in mine) == result.people.height
    whole = sum(row["mean"] * row["customers"] for row in mine) / result.people.height
    assert whole == pytest.approx(verdict.means[RANKER].mean, rel=1e-4)
    for by in ("activity", "age", "channel"):
        rows = [row for row in slice_table(result, RANKER, verdict.baseline) if row["by"] == by]
        assert sum(row["cases"] for row in rows) == result.people.height
        lead = sum(row["lead"] * row["cases"] for row in rows) / result.people.height
        assert lead == pytest.approx(verdict.lead.mean)


def test_a_ranker_that_is_not_surely_better_is_an_alarm(result, verdict):
    assert not ladder(result, verdict, "").alerts
    worse = with_ranker(result, pl.lit(0.0))
    section = ladder(worse, judge(worse.scores), "stays a candidate")
    assert [alert.level for alert in section.alerts] == ["alarm"]
    assert "leads in 0 of 2 weeks" in " ".join(section.says)


def test_a_group_that_is_worse_off_is_an_alarm_though_the_mean_is_good(result, verdict):
    active = result.people.filter(activity="active").select("day", "customer")
    kept = result.scores.join(active.with_columns(bad=True), on=["day", "customer"], how="left")
    ap = pl.when(pl.col("bad") & (pl.col("method") == RANKER)).then(0.0).otherwise("ap")
    section = groups(replace(result, scores=kept.with_columns(ap=ap).drop("bad")), verdict)
    assert "activity 'active'" in " ".join(alert.text for alert in section.alerts)
    assert not groups(result, verdict).alerts


def test_what_became_of_purchases_by_hand(result):
    wanted = [(1, False, True), (2, True, True), (3, False, False), (4, False, False)]
    days = {"day": [DAY] * 4, "customer": [7] * 4}
    shelf = {"day": [DAY] * 3, "article": [1, 2, 3], "type": [0] * 3, "sold_28": [5, 5, 0]}
    toy = replace(
        result,
        wanted=pl.DataFrame(wanted, ["article", "again", "proposed"], orient="row").with_columns(
            **{name: pl.Series(values) for name, values in days.items()}
        ),
        lists=result.lists.clear().vstack(
            pl.DataFrame(
                [(7, 1, 3, True, False, DAY, RANKER)],
                ["customer", "article", "rank", "hit", "again", "day", "method"],
                orient="row",
            )
            .select(result.lists.columns)
            .cast(dict(result.lists.schema))
        ),
        shelf=pl.DataFrame(shelf | {"last_sold": [1, 1, 40]}),
    )
    toy = replace(
        toy,
        wanted=toy.wanted.cast({"customer": pl.Int32, "article": pl.Int32}),
        shelf=toy.shelf.cast({"article": pl.Int32}),
    )
    found = dict(zip(*fates(toy).sort("article").select("article", "kind"), strict=True))
    assert list(found.values()) == [KINDS[1], KINDS[0], KINDS[2], KINDS[3]]
    fate = fates(toy).sort("article")["fate"].to_list()
    assert fate == [FATES[0], FATES[1], FATES[2], FATES[2]]


def test_scores_out_of_order_are_noticed(result):
    def scored(bought: list[int]) -> Evaluation:
        table = {"share": [0.1, 0.2, 1.0], "candidates": [1_000] * 3, "score": [300.0, 200.0, 50.0]}
        return replace(result, scored=pl.DataFrame(table | {"bought": bought}))

    good = calibration(scored([100, 50, 10]))
    assert not good.alerts and "3.4 times the chance" in good.says[1]
    assert calibration(scored([10, 50, 100])).alerts
    ranked = replace(result, settings=replace(result.settings, objective="lambdarank"))
    assert "no chances" in calibration(ranked).says[1]


def test_the_worst_cases_are_those_that_the_simple_method_served_better(result, verdict, shop):
    rows = misses(result, verdict, shop).numbers["worst"]
    losses = [row["lost"] for row in rows]
    assert losses == sorted(losses, reverse=True) and all(loss > 0 for loss in losses)
    pleased = with_ranker(result, pl.lit(1.0))
    assert misses(pleased, verdict, shop).numbers["worst"] == []


def test_stories_are_of_all_kinds_and_name_no_customer(result, shop):
    people = chosen(result)
    assert people.height == 10 == people["customer"].n_unique()
    assert people["day"].unique().to_list() == [result.people["day"].max()]
    assert set(people["activity"]) == set(result.people.filter(day=DAY)["activity"])
    assert people["hit"].any() and not people["hit"].all()
    assert chosen(result).equals(people)
    told = stories(result, shop).numbers["stories"]
    text = json.dumps(told)
    assert not any(name in text for name in shop.customers["customer_id"])
    for story in told:
        shown = sum(one["hit"] for one in story["shown"])
        assert shown == sum(one["shown"] for one in story["bought"])
        assert (shown > 0) == (story["average_precision"] > 0)


def test_a_story_is_told_as_text():
    story = {
        "who": "cold, age <b>",
        "before": 0,
        "last_day": None,
        "last": [],
        "shown": [{"name": "A & B", "hit": True, "again": False}],
        "bought": [{"name": "A & B", "proposed": True, "shown": True}],
        "week": "2020-09-16",
        "average_precision": 1.0,
    }
    html = tell(story)
    assert "age &lt;b&gt;" in html and "<b>A &amp; B ✓ bought</b>" in html
    assert "never bought before" in html
