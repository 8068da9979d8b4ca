"""The data report: hand-computed figures, JSON against its schema, the HTML page."""

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
from hm_reco.reporting.data_sections import build_data_report
from hm_reco.reporting.purchases import compute_basket_sizes, compute_discounts
from hm_reco.reporting.quality import find_empty_days, quality_section
from hm_reco.reporting.repurchase import compute_repeat_shares
from hm_reco.reporting.section import Report, build_report_schema, dump_report
from hm_reco.stages.demo import demo_lake
from runner.cli import app

LAST = date(2020, 9, 22)


@pytest.fixture(scope="module")
def report(trained_lake: Lake) -> Report:
    return build_data_report(trained_lake, "r1", "", date(2020, 9, 24))


def build_purchases(*rows: tuple[object, ...], extra_columns: tuple[str, ...] = ()) -> pl.LazyFrame:
    return pl.LazyFrame(rows, schema=["customer", "article", "day", *extra_columns], orient="row")


def test_report_sections_agree_on_totals(report, trained_lake):
    figures = {section.name: section.figures for section in report.sections}
    purchases = scan(trained_lake, "processed/purchases")
    units = purchases.select(pl.col("units").sum()).collect().item()
    assert figures["overview"]["units"] == units
    assert aggregate_by_customer(purchases)["units"].sum() == units
    assert aggregate_by_article(purchases)["units"].sum() == units
    assert sum(row["customers"] for row in figures["customers"]["states"]) == 1_500
    assert sum(row["units"] for row in figures["articles"]["price_bands"]) == units
    assert sum(row["share"] for row in figures["purchases"]["weekdays"]) == pytest.approx(1)
    sources = {row["source"]: row["recall"] for row in figures["candidate_recall"]["sources"]}
    assert sources["all of them"] >= max(sources.values())
    assert figures["quality"]["days_since_last"] == 2
    assert all(section.findings for section in report.sections)


def test_report_json_matches_schema_without_nan(report):
    content = json.loads(dump_report(report), parse_constant=pytest.fail)
    jsonschema.validate(content, json.loads(build_report_schema()))
    assert Report.model_validate(content) == report
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            content | {"sections": [{"name": "x"}]}, json.loads(build_report_schema())
        )


def test_recency_and_concentration_example():
    customers = pl.DataFrame({"last": [LAST, LAST - timedelta(days=28), LAST - timedelta(days=91)]})
    states = compute_recency(customers, 4, LAST)
    assert dict(states.select("state", "customers").rows()) == dict.fromkeys(
        ("active", "lapsing", "lapsed", "cold"), 1
    )
    assert compute_concentration(pl.Series([1, 1, 1, 7]), (0.25, 1.0)) == {"0.25": 0.7, "1": 1.0}


def test_retention_example():
    days = (date(2020, 1, 31), date(2020, 2, 1), date(2020, 1, 1))
    rows = compute_retention(build_purchases((1, 1, days[0]), (1, 1, days[1]), (2, 1, days[2])))
    assert rows.rows() == [("2020-01", 0, 2, 1.0), ("2020-01", 1, 1, 0.5)]


def test_repeat_shares_example():
    previous_day = LAST - timedelta(days=30)
    purchases = build_purchases(
        (1, 1, LAST), (1, 1, previous_day), (1, 2, LAST), (2, 1, LAST), (2, 2, previous_day)
    )
    attributes = {"article": [1, 2], "product": [7, 7], "type": [3, 4], "department": [5, 5]}
    shares = dict(
        compute_repeat_shares(purchases, pl.LazyFrame(attributes), LAST)
        .select("attribute", "share")
        .rows()
    )
    assert shares == {"article": 1 / 3, "product": 1.0, "type": 1 / 3, "department": 1.0}


def test_life_curve_price_bands_and_mix_example():
    days = (date(2019, 1, 1), date(2020, 1, 1))
    first_day = date(2019, 3, 1)
    rows = [(1, 1, first_day + timedelta(weeks=n), 2 - n % 2, 0.1) for n in range(4)]
    purchases = build_purchases((2, 2, days[0], 9, 0.3), *rows, extra_columns=("units", "price"))
    article_sales = aggregate_by_article(purchases)
    curve = compute_life_curve(purchases, article_sales, days)  # article 2 began with the data
    assert curve["share"].to_list() == pytest.approx([2 / 6, 1 / 6, 2 / 6, 1 / 6])
    assert compute_price_bands(article_sales)["units"].sum() == 15
    articles = pl.DataFrame({"article": [1, 2, 3], "colour": ["Red", "Red", "Blue"]})
    assert compute_mix(article_sales, articles, "colour").rows() == [
        ("Red", 2 / 3, 1.0),
        ("Blue", 1 / 3, 0.0),
    ]


def test_baskets_and_discounts_example():
    rows = [
        (1, 1, LAST, 1, 10.0),
        (1, 2, LAST, 2, 5.0),
        (2, 1, LAST, 1, 8.9),
        (3, 1, LAST, 1, 10.0),
    ]
    purchases = build_purchases(*rows, extra_columns=("units", "price"))
    assert compute_basket_sizes(purchases).rows() == [
        (1, pytest.approx(2 / 3)),
        (3, pytest.approx(1 / 3)),
    ]
    assert compute_discounts(purchases)["share"].to_list() == [1 / 5]


def test_candidate_lists_ignore_evaluation_week(trained_lake):
    start = LAST - timedelta(days=6)
    purchases, customers, articles = (scan(trained_lake, name) for name in TABLES)
    sampled_customers = customers.head(50).select("customer", "age").collect()
    products = articles.select("article", "product").collect()
    day = pl.col("day")
    lists = build_candidate_lists(purchases.filter(day < start), sampled_customers, products, start)
    sampled_purchases = (
        purchases.filter(day < start).collect().join(sampled_customers, on="customer", how="semi")
    )
    repurchase_list = lists.filter(source="own history").select("customer", "article")
    assert repurchase_list.sort("customer", "article").equals(
        sampled_purchases.select("customer", "article").unique().sort("customer", "article")
    )
    expected = candidate_recall_section(purchases, customers, articles, LAST).figures
    noisy_purchases = purchases.with_columns(
        units=pl.when(day >= start).then(1_000).otherwise("units")
    )
    assert candidate_recall_section(noisy_purchases, customers, articles, LAST).figures == expected


def test_quality_section_reports_gaps_and_quarantined_rows():
    lake = demo_lake("processing", 300)
    purchases_with_gap = scan(lake, "processed/purchases").filter(
        pl.col("day") != LAST - timedelta(days=3)
    )
    quarantined = scan(lake, "raw/transactions").head(50).with_columns(rule=pl.lit("price|max"))
    write(lake, "quarantine/transactions", quarantined)
    section = quality_section(open_lake(lake.root), purchases_with_gap, LAST)
    assert LAST - timedelta(days=3) in find_empty_days(purchases_with_gap)
    errors = [alert.text for alert in section.alerts if alert.level == "error"]
    assert (
        len(errors) == 2
        and "were quarantined" in errors[0]
        and "Days without a purchase" in errors[1]
    )


def test_drift_section_reports_changed_price():
    lake = demo_lake("processing", 500)
    old_versions = {name: get_table_version(lake, name) for name in TABLES}
    rows = scan(lake, "processed/purchases").with_columns(price=2 * pl.col("price"))
    write(lake, "processed/purchases", rows.collect(), ("shard", "week"))
    lake = Lake(lake.root)  # reads the latest version
    new_versions = old_versions | {"processed/purchases": old_versions["processed/purchases"] + 1}
    section = drift_section(
        lake, new_versions, resolve_versions(lake, str(old_versions["processed/purchases"]))
    )
    errors = [alert.text for alert in section.alerts if alert.level == "error"]
    assert len(errors) == 1 and errors[0].startswith("price shows major drift")
    distances = {row["column"]: row["distance"] for row in section.figures["columns"]}
    assert distances["price"] > 0.5 and distances["units"] == 0
    with pytest.raises(ValueError, match="no version 99"):
        resolve_versions(lake, "99")
    with pytest.raises(ValueError, match="no run 'yesterday'"):
        resolve_versions(lake, "yesterday")


def test_eda_command_fails_on_alert_level():
    lake = demo_lake("processing", 2_000)
    result = CliRunner().invoke(app, ["eda", "--lake", lake.root, "--fail-on", "error"])
    assert result.exit_code == 0 and "warning" in result.output, result.output
    reports = Path(lake.root, "reports")
    for name in ("eda.html", "eda.json", "eda.schema.json"):
        assert len(list(reports.glob(f"*/{name}"))) == 1
    page = next(reports.glob("*/eda.html")).read_text()
    assert len(page) < 3e6 and "https://cdn" not in page and "<script" not in page
    warning_result = CliRunner().invoke(app, ["eda", "--lake", lake.root, "--fail-on", "warning"])
    assert warning_result.exit_code == 1, warning_result.output
    invalid_result = CliRunner().invoke(
        app, ["eda", "--lake", lake.root, "--fail-on", "everything"]
    )
    assert invalid_result.exit_code == 1 and "expected warning or error" in invalid_result.output
