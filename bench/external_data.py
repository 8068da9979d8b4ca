"""Ingestion and processing by other libraries, in a separate environment; see `data.py`.

    .venv-bench-data/bin/python bench/external_data.py parse|duckdb|pandas SOURCE OUT

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
"""
PARTITIONS = {
    "articles": "",
    "customers": "",
    "purchases": ", PARTITION_BY (shard, week)",
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
    totals = database.execute(
        "SELECT count(*), count(DISTINCT week), sum(units), sum(price::DOUBLE * units)"
        " FROM purchases"
    ).fetchone()
    return dict(zip(("purchases", "weeks", "units", "spend"), map(float, totals), strict=True))


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
    articles.to_parquet(f"{out}/articles.parquet")
    customers.to_parquet(f"{out}/customers.parquet")
    purchases.to_parquet(f"{out}/purchases", partition_cols=["shard", "week"])
    spend = purchases["price"].astype("float64") * purchases["units"]
    return {
        "purchases": len(purchases),
        "weeks": purchases["week"].nunique(),
        "units": int(purchases["units"].sum()),
        "spend": float(spend.sum()),
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
