"""Ingestion and processing by other libraries, in a separate environment; see `data.py`.

    .venv-peers/bin/python bench/external_data.py parse|duckdb|pandas SOURCE OUT

`parse` only reads a CSV. The two others make the processed tables of the stage `processing` from
the parquet files of `raw/`, with hand-written DuckDB SQL and with pandas. Each prints a line of
JSON: its seconds, and figures that must agree with ours.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

SHARDS = 4

TABLES_SQL = """
CREATE TABLE articles AS SELECT row_number() OVER (ORDER BY article_id) - 1 AS article, article_id,
    prod_name AS name, product_code AS product, product_type_no AS type,
    graphical_appearance_no AS appearance, colour_group_code AS colour, department_no AS department,
    section_no AS section, garment_group_no AS garment, index_group_no AS "group", index_code
    FROM read_parquet('{raw}/articles/*/*.parquet');
CREATE TABLE customers AS SELECT row_number() OVER (ORDER BY customer_id) - 1 AS customer,
    customer_id, age, coalesce(Active, 0) AS active, fashion_news_frequency AS news,
    club_member_status AS club FROM read_parquet('{raw}/customers/*/*.parquet');
CREATE TABLE purchases AS
    SELECT customer::INT AS customer, article::INT AS article, t_dat AS day,
        sales_channel_id AS channel, price::FLOAT AS price, count(*)::INT AS units,
        (customer % {shards})::INT AS shard, date_trunc('week', t_dat)::DATE AS week
    FROM read_parquet('{raw}/transactions/*/*.parquet')
    JOIN articles USING (article_id) JOIN customers USING (customer_id) GROUP BY ALL;
CREATE TABLE weekly_articles AS
    SELECT week, article, sum(units)::INT AS units, count(DISTINCT customer)::INT AS buyers,
        sum(price::DOUBLE * units) / sum(units) AS price,
        sum(CASE channel WHEN 2 THEN units ELSE 0 END) / sum(units) AS online
    FROM purchases GROUP BY week, article;
CREATE TABLE weekly_customers AS
    SELECT week, customer, count(DISTINCT day)::SMALLINT AS visits, sum(units)::INT AS units,
        sum(CASE channel WHEN 2 THEN units ELSE 0 END)::INT AS online,
        sum(price::DOUBLE * units) AS spend, min(day) AS first_day, max(day) AS last_day
    FROM purchases GROUP BY week, customer;
CREATE TABLE customer_features AS
    SELECT customer, count(*)::INT AS weeks, sum(visits)::INT AS visits, sum(units)::INT AS units,
        sum(spend) AS spend, min(first_day) AS first_day, max(last_day) AS last_day,
        sum(units) / sum(visits) AS basket,
        date_diff('day', min(first_day), max(last_day)) / greatest(sum(visits) - 1, 1) AS visit_gap,
        sum(spend) / sum(units) AS usual_price, sum(online) / sum(units) AS online_share
    FROM weekly_customers GROUP BY customer;
"""
PARTITIONS = {
    "articles": "",
    "customers": "",
    "purchases": ", PARTITION_BY (shard, week)",
    "weekly_articles": ", PARTITION_BY (week)",
    "weekly_customers": ", PARTITION_BY (week)",
    "customer_features": "",
}


def parse_csv(source: str, out: str) -> dict[str, float]:
    """All columns of a CSV, parsed by all cores."""
    from pyarrow import csv

    return {"rows": csv.read_csv(source).num_rows}


def run_duckdb(source: str, out: str) -> dict[str, float]:
    """The processed tables in SQL."""
    import duckdb

    Path(out).mkdir(parents=True)
    database = duckdb.connect(f"{out}/work.db")
    database.execute("SET preserve_insertion_order = false")
    database.execute(TABLES_SQL.format(raw=source, shards=SHARDS))
    for name, partitions in PARTITIONS.items():
        database.execute(f"COPY {name} TO '{out}/{name}' (FORMAT parquet{partitions})")
    purchases, weeks, units, spend = (
        database.execute(query).fetchone()[0]
        for query in (
            "SELECT count(*) FROM purchases",
            "SELECT count(*) FROM weekly_customers",
            "SELECT sum(units) FROM customer_features",
            "SELECT sum(spend) FROM customer_features",
        )
    )
    return {"purchases": purchases, "weeks": weeks, "units": int(units), "spend": spend}


def run_pandas(source: str, out: str) -> dict[str, float]:
    """The processed tables in pandas."""
    import pandas as pd

    Path(out).mkdir(parents=True)
    articles = pd.read_parquet(f"{source}/articles").sort_values("article_id", ignore_index=True)
    customers = pd.read_parquet(f"{source}/customers").sort_values("customer_id", ignore_index=True)
    columns = ["t_dat", "customer_id", "article_id", "price", "sales_channel_id"]
    rows = pd.read_parquet(f"{source}/transactions", columns=columns)
    rows["customer"] = pd.Index(customers["customer_id"]).get_indexer(rows.pop("customer_id"))
    rows["article"] = pd.Index(articles["article_id"]).get_indexer(rows.pop("article_id"))
    rows = rows.astype({"customer": "int32", "article": "int32", "price": "float32"})
    rows["t_dat"] = rows["t_dat"].astype("datetime64[s]")
    rows = rows.rename(columns={"t_dat": "day", "sales_channel_id": "channel"})
    keys = ["customer", "article", "day", "channel", "price"]
    purchases = rows.groupby(keys, sort=False).size().rename("units").reset_index()
    del rows
    purchases["shard"] = purchases["customer"] % SHARDS
    purchases["week"] = purchases["day"] - pd.to_timedelta(
        purchases["day"].dt.day_of_week, unit="D"
    )
    purchases["spend"] = purchases["price"].astype("float64") * purchases["units"]
    purchases["online"] = purchases["units"].where(purchases["channel"] == 2, 0)
    weekly_articles = purchases.groupby(["week", "article"], sort=False).agg(
        units=("units", "sum"),
        buyers=("customer", "nunique"),
        spend=("spend", "sum"),
        online=("online", "sum"),
    )
    weekly_articles["price"] = weekly_articles.pop("spend") / weekly_articles["units"]
    weekly_articles["online"] /= weekly_articles["units"]
    weekly_customers = purchases.groupby(["week", "customer"], sort=False).agg(
        visits=("day", "nunique"),
        units=("units", "sum"),
        online=("online", "sum"),
        spend=("spend", "sum"),
        first_day=("day", "min"),
        last_day=("day", "max"),
    )
    features = weekly_customers.groupby("customer").agg(
        weeks=("units", "size"),
        visits=("visits", "sum"),
        units=("units", "sum"),
        online=("online", "sum"),
        spend=("spend", "sum"),
        first_day=("first_day", "min"),
        last_day=("last_day", "max"),
    )
    days_between = (features["last_day"] - features["first_day"]).dt.days
    features["basket"] = features["units"] / features["visits"]
    features["visit_gap"] = days_between / (features["visits"] - 1).clip(1)
    features["usual_price"] = features["spend"] / features["units"]
    features["online_share"] = features.pop("online") / features["units"]
    articles.to_parquet(f"{out}/articles.parquet")
    customers.to_parquet(f"{out}/customers.parquet")
    purchases = purchases.drop(columns=["spend", "online"])
    purchases.to_parquet(f"{out}/purchases", partition_cols=["shard", "week"])
    weekly_articles.reset_index().to_parquet(f"{out}/weekly_articles", partition_cols=["week"])
    weekly_customers.reset_index().to_parquet(f"{out}/weekly_customers", partition_cols=["week"])
    features.to_parquet(f"{out}/customer_features.parquet")
    return {
        "purchases": len(purchases),
        "weeks": len(weekly_customers),
        "units": int(features["units"].sum()),
        "spend": float(features["spend"].sum()),
    }


def get_peak_mb() -> float:
    """Peak resident memory of this process, excluding its parent's (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e3  # type: ignore[index]


WORKLOADS: dict[str, Callable[[str, str], dict[str, float]]] = {
    "parse": parse_csv,
    "duckdb": run_duckdb,
    "pandas": run_pandas,
}

LIBRARIES = {"parse": "pyarrow.csv", "duckdb": "duckdb", "pandas": "pandas"}

if __name__ == "__main__":
    import_module(LIBRARIES[sys.argv[1]])  # imports are not measured
    started = time.perf_counter()
    figures = WORKLOADS[sys.argv[1]](sys.argv[2], sys.argv[3])
    cost = {"seconds": time.perf_counter() - started, "peak_mb": get_peak_mb()}
    print(json.dumps(cost | figures))
