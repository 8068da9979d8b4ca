"""The report on the data: its numbers by hand, its JSON by its schema, its page in a browser."""

import json
from datetime import date, timedelta
from pathlib import Path

import jsonschema
import polars as pl
import pytest
from typer.testing import CliRunner

from hm_reco.lake.storage import Lake, open_lake
from hm_reco.lake.tables import get_table_version, scan, write
from hm_reco.reporting.articles import (
    aggregate_by_article,
    compute_life_curve,
    compute_mix,
    compute_price_bands,
)
from hm_reco.reporting.candidate_recall import build_candidate_lists, candidate_recall_section
from hm_reco.reporting.customers import (
    aggregate_by_customer,
    compute_concentration,
    compute_recency,
    compute_retention,
)
from hm_reco.reporting.data_drift import TABLES, drift_section, resolve_versions
from hm_reco.reporting.purchases import compute_basket_sizes, compute_discounts
from hm_reco.reporting.quality import find_empty_days, quality_section
from hm_reco.reporting.repurchase import compute_repeat_shares
from hm_reco.reporting.section import Report, build_report_schema, dump_report
from hm_reco.stages.demo import demo_lake
from hm_reco.stages.eda import build_report
from runner.cli import app

LAST = date(2020, 9, 22)


@pytest.fixture(scope="module")
def report(trained_lake: Lake) -> Report:
    return build_report(trained_lake, "r1", "", date(2020, 9, 24))


def bought(*rows: tuple[object, ...], more: tuple[str, ...] = ()) -> pl.LazyFrame:
    return pl.LazyFrame(rows, schema=["customer", "article", "day", *more], orient="row")


def test_the_sections_agree_with_each_other(report, trained_lake):
    numbers = {section.name: section.figures for section in report.sections}
    purchases = scan(trained_lake, "processed/purchases")
    units = purchases.select(pl.col("units").sum()).collect().item()
    assert numbers["overview"]["units"] == units
    assert aggregate_by_customer(purchases)["units"].sum() == units
    assert aggregate_by_article(purchases)["units"].sum() == units
    assert sum(row["customers"] for row in numbers["customers"]["states"]) == 1_500
    assert sum(row["units"] for row in numbers["articles"]["price_bands"]) == units
    assert sum(row["share"] for row in numbers["purchases"]["weekdays"]) == pytest.approx(1)
    sources = {row["source"]: row["recall"] for row in numbers["candidate_recall"]["sources"]}
    assert sources["all of them"] >= max(sources.values())
    assert numbers["quality"]["days_since_last"] == 2
    assert all(section.findings for section in report.sections)


def test_the_json_fits_its_schema_and_knows_no_nan(report):
    content = json.loads(dump_report(report), parse_constant=pytest.fail)
    jsonschema.validate(content, json.loads(build_report_schema()))
    assert Report.model_validate(content) == report
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            content | {"sections": [{"name": "x"}]}, json.loads(build_report_schema())
        )


def test_warmth_and_concentration_by_hand():
    people = pl.DataFrame({"last": [LAST, LAST - timedelta(days=28), LAST - timedelta(days=91)]})
    states = compute_recency(people, 4, LAST)
    assert dict(states.select("state", "customers").rows()) == dict.fromkeys(
        ("active", "lapsing", "lapsed", "cold"), 1
    )
    assert compute_concentration(pl.Series([1, 1, 1, 7]), (0.25, 1.0)) == {"0.25": 0.7, "1": 1.0}


def test_cohorts_by_hand():
    days = (date(2020, 1, 31), date(2020, 2, 1), date(2020, 1, 1))
    rows = compute_retention(bought((1, 1, days[0]), (1, 1, days[1]), (2, 1, days[2])))
    assert rows.rows() == [("2020-01", 0, 2, 1.0), ("2020-01", 1, 1, 0.5)]


def test_rebuying_by_hand():
    before = LAST - timedelta(days=30)
    purchases = bought((1, 1, LAST), (1, 1, before), (1, 2, LAST), (2, 1, LAST), (2, 2, before))
    kinds = {"article": [1, 2], "product": [7, 7], "type": [3, 4], "department": [5, 5]}
    shares = dict(
        compute_repeat_shares(purchases, pl.LazyFrame(kinds), LAST)
        .select("attribute", "share")
        .rows()
    )
    assert shares == {"article": 1 / 3, "product": 1.0, "type": 1 / 3, "department": 1.0}


def test_lives_bands_and_mixes_by_hand():
    days = (date(2019, 1, 1), date(2020, 1, 1))
    begun = date(2019, 3, 1)
    rows = [(1, 1, begun + timedelta(weeks=n), 2 - n % 2, 0.1) for n in range(4)]
    purchases = bought((2, 2, days[0], 9, 0.3), *rows, more=("units", "price"))
    sold = aggregate_by_article(purchases)
    curve = compute_life_curve(purchases, sold, days)  # article 2 began with the data
    assert curve["share"].to_list() == pytest.approx([2 / 6, 1 / 6, 2 / 6, 1 / 6])
    assert compute_price_bands(sold)["units"].sum() == 15
    words = pl.DataFrame({"article": [1, 2, 3], "colour": ["Red", "Red", "Blue"]})
    assert compute_mix(sold, words, "colour").rows() == [("Red", 2 / 3, 1.0), ("Blue", 1 / 3, 0.0)]


def test_baskets_and_discounts_by_hand():
    rows = [
        (1, 1, LAST, 1, 10.0),
        (1, 2, LAST, 2, 5.0),
        (2, 1, LAST, 1, 8.9),
        (3, 1, LAST, 1, 10.0),
    ]
    purchases = bought(*rows, more=("units", "price"))
    assert compute_basket_sizes(purchases).rows() == [
        (1, pytest.approx(2 / 3)),
        (3, pytest.approx(1 / 3)),
    ]
    assert compute_discounts(purchases)["share"].to_list() == [1 / 5]


def test_lists_know_nothing_of_the_week_they_are_judged_on(trained_lake):
    start = LAST - timedelta(days=6)
    bought_, people, shop = (scan(trained_lake, name) for name in TABLES)
    who = people.head(50).select("customer", "age").collect()
    products = shop.select("article", "product").collect()
    day = pl.col("day")
    lists = build_candidate_lists(bought_.filter(day < start), who, products, start)
    mine = bought_.filter(day < start).collect().join(who, on="customer", how="semi")
    own = lists.filter(source="own history").select("customer", "article")
    assert own.sort("customer", "article").equals(
        mine.select("customer", "article").unique().sort("customer", "article")
    )
    whole = candidate_recall_section(bought_, people, shop, LAST).figures
    noise = bought_.with_columns(units=pl.when(day >= start).then(1_000).otherwise("units"))
    assert candidate_recall_section(noise, people, shop, LAST).figures == whole


def test_alarms_for_holes_and_rows_set_aside():
    lake = demo_lake("processing", 300)
    hole = scan(lake, "processed/purchases").filter(pl.col("day") != LAST - timedelta(days=3))
    aside = scan(lake, "raw/transactions").head(50).with_columns(rule=pl.lit("price|max"))
    write(lake, "quarantine/transactions", aside)
    section = quality_section(open_lake(lake.root), hole, LAST)
    assert LAST - timedelta(days=3) in find_empty_days(hole)
    alarms = [alert.text for alert in section.alerts if alert.level == "error"]
    assert len(alarms) == 2 and "were set aside" in alarms[0] and "No purchase on" in alarms[1]


def test_drift_between_versions():
    lake = demo_lake("processing", 500)
    before = {name: get_table_version(lake, name) for name in TABLES}
    rows = scan(lake, "processed/purchases").with_columns(price=2 * pl.col("price"))
    write(lake, "processed/purchases", rows.collect(), ("shard", "week"))
    lake = Lake(lake.root)  # sees the newest version
    now = before | {"processed/purchases": before["processed/purchases"] + 1}
    found = drift_section(lake, now, resolve_versions(lake, str(before["processed/purchases"])))
    alarms = [alert.text for alert in found.alerts if alert.level == "error"]
    assert len(alarms) == 1 and alarms[0].startswith("price shows major drift")
    distances = {row["column"]: row["distance"] for row in found.figures["columns"]}
    assert distances["price"] > 0.5 and distances["units"] == 0
    with pytest.raises(ValueError, match="no version 99"):
        resolve_versions(lake, "99")
    with pytest.raises(ValueError, match="no run 'yesterday'"):
        resolve_versions(lake, "yesterday")


def test_hm_eda_holds_a_threshold():
    lake = demo_lake("processing", 2_000)
    run = CliRunner().invoke(app, ["eda", "--lake", lake.root, "--fail-on", "error"])
    assert run.exit_code == 0 and "warning" in run.output, run.output
    reports = Path(lake.root, "reports")
    for name in ("eda.html", "eda.json", "eda.schema.json"):
        assert len(list(reports.glob(f"*/{name}"))) == 1
    page = next(reports.glob("*/eda.html")).read_text()
    assert len(page) < 3e6 and "https://cdn" not in page and "<script" not in page
    again_ = CliRunner().invoke(app, ["eda", "--lake", lake.root, "--fail-on", "warning"])
    assert again_.exit_code == 1, again_.output
    wrong = CliRunner().invoke(app, ["eda", "--lake", lake.root, "--fail-on", "everything"])
    assert wrong.exit_code == 1 and "expected notice or alarm" in wrong.output
