"""Dirty input files: each fault is repaired, or the row is quarantined with its rule."""

import gzip
import shutil
import zipfile
from pathlib import Path

import boto3
import polars as pl
import pytest

from hm_reco.data.contracts import cast_to_schema, get_columns, validate
from hm_reco.data.ingestion import ingest
from hm_reco.data.sources import Source, discover_parts
from hm_reco.lake.storage import open_lake
from hm_reco.lake.tables import get_table_version, scan


@pytest.fixture
def files(synthetic_files: Path, tmp_path: Path) -> Path:
    """A copy of the synthetic data set that a test may change."""
    return Path(shutil.copytree(synthetic_files, tmp_path / "files"))


def edit_csv(path: Path, change) -> None:
    """Apply a function to the frame of a CSV (all columns text) and write it back."""
    change(pl.read_csv(path, infer_schema=False)).write_csv(path)


def ingest_by_table(lake, folder) -> dict:
    return {i.table: i for i in ingest(lake, str(folder))}


def test_clean_data_loads_every_row(lake, files):
    loads = ingest_by_table(lake, files)
    for table, name in (("articles", "articles"), ("transactions", "transactions_train")):
        n_rows = sum(1 for _ in (files / f"{name}.csv").open()) - 1
        assert loads[table].valid_rows == n_rows and loads[table].violations == {}
    assert scan(lake, "raw/transactions").collect_schema()["t_dat"] == pl.Date


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda c: c.str.strip_chars_start("0"), id="zeros-lost"),
        pytest.param(lambda c: c.cast(pl.Int64).cast(pl.String) + ".0", id="floats"),
    ],
)
def test_article_ids_are_padded_to_ten_digits(lake, files, corrupt):
    before = pl.read_csv(files / "transactions_train.csv", infer_schema=False)["article_id"]
    for name in ("articles", "transactions_train"):
        edit_csv(files / f"{name}.csv", lambda f: f.with_columns(corrupt(pl.col("article_id"))))
    assert ingest_by_table(lake, files)["transactions"].violations == {}
    after = scan(lake, "raw/transactions").collect()["article_id"]
    assert after.sort().equals(before.sort())


def test_index_column_is_dropped(lake, files):
    edit_csv(files / "articles.csv", lambda f: f.with_row_index("").select(*f.columns, ""))
    ingest_by_table(lake, files)
    names = scan(lake, "raw/articles").collect_schema().names()
    assert names == [*get_columns("articles"), "part", "load"]


def test_parquet_float_ids_are_restored(lake, files):
    frame = pl.read_csv(files / "articles.csv", infer_schema=False)
    frame.with_columns(pl.col("article_id").cast(pl.Float64)).write_parquet(
        files / "articles.parquet"
    )
    (files / "articles.csv").unlink()
    assert ingest_by_table(lake, files)["articles"].valid_rows == frame.height
    ids = scan(lake, "raw/articles").collect()["article_id"]
    assert set(ids) == set(frame["article_id"])


def test_csv_gz_and_zip_load_same_rows(lake, files, tmp_path):
    expected = ingest_by_table(lake, files)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as zipped:
        for path in files.iterdir():
            zipped.write(path, f"some/folder/{path.name}")
    for path in list(files.iterdir()):
        (files / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    for source in (files, tmp_path / "data.zip"):
        source_lake = open_lake(str(tmp_path / f"lake-{source.suffix}"))
        assert {t: i.valid_rows for t, i in ingest_by_table(source_lake, source).items()} == {
            t: i.valid_rows for t, i in expected.items()
        }


def test_s3_prefix_is_ingested(lake, files, s3):
    client = boto3.client("s3")
    for path in files.iterdir():
        client.upload_file(str(path), s3.removeprefix("s3://"), f"drop/{path.name}")
    assert ingest_by_table(lake, f"{s3}/drop")["customers"].valid_rows == 2_000


def test_empty_values_and_none_literal_are_parsed(lake, files):
    frequency = pl.Series(["None", "NONE", "Regularly", None, "Monthly"])
    flags = pl.Series(["1.0", None, "", "0", "1"])
    ages = pl.Series([None, "24.0", "24", "16", "99"])
    edit_csv(
        files / "customers.csv",
        lambda f: pl.concat(
            [
                f.head(5).with_columns(FN=flags, age=ages, fashion_news_frequency=frequency),
                f.slice(5),
            ]
        ),
    )
    assert ingest_by_table(lake, files)["customers"].violations == {}
    ids = pl.read_csv(files / "customers.csv", infer_schema=False).head(5).select("customer_id")
    raw = scan(lake, "raw/customers").collect()
    first_rows = ids.join(raw, on="customer_id", how="left", maintain_order="left")
    assert first_rows["fashion_news_frequency"].to_list() == [
        "NONE",
        "NONE",
        "Regularly",
        None,
        "Monthly",
    ]
    assert first_rows["FN"].to_list() == [1, None, None, 0, 1]
    assert first_rows["age"].to_list() == [None, 24, 24, 16, 99]


def test_duplicate_transactions_are_kept_as_units(lake, files):
    edit_csv(files / "transactions_train.csv", lambda f: pl.concat([f, f.head(7)]))
    n_rows = sum(1 for _ in (files / "transactions_train.csv").open()) - 1
    assert ingest_by_table(lake, files)["transactions"].valid_rows == n_rows


def test_invalid_rows_are_quarantined_with_rule(lake, files):
    invalid_values = {
        "t_dat": ["2020-13-01", "2020-09-01", "2020-09-01", "2020-09-01", "2020-09-01"],
        "price": ["0.02", "-0.02", "free", "0.02", "0.02"],
        "sales_channel_id": ["1", "1", "1", "7", "1"],
        "article_id": [None, None, None, None, "0999999999"],
    }
    edit_csv(
        files / "transactions_train.csv",
        lambda f: pl.concat(
            [
                f.head(5).with_columns(
                    *(
                        pl.Series(n, v).fill_null(f["article_id"][0])
                        for n, v in invalid_values.items()
                    )
                ),
                f.slice(5),
            ]
        ),
    )
    loads = ingest_by_table(lake, files)["transactions"]
    n_rows = sum(1 for _ in (files / "transactions_train.csv").open()) - 1
    assert sum(loads.violations.values()) == 5 and loads.valid_rows == n_rows - 5
    quarantined = scan(lake, "quarantine/transactions").collect()
    rules = " | ".join(quarantined["rule"])
    for expected in ("t_dat", "price min_exclusive", "price nullability", "sales_channel_id max"):
        assert expected in rules
    assert "article_id unknown" in rules
    assert "t_dat='2020-13-01'" in quarantined["parse_errors"].to_list()
    assert sorted(quarantined["row"]) == [1, 2, 3, 4, 5]
    assert set(quarantined["file"]) == {"transactions_train.csv"}


def test_quarantine_row_numbers_continue_across_batches(lake, files, monkeypatch):
    monkeypatch.setattr("hm_reco.data.loading.BATCH_ROWS", 5_000)
    n_rows = ingest_by_table(lake, files)["transactions"].valid_rows
    before = scan(lake, "raw/transactions").collect()
    edit_csv(
        files / "transactions_train.csv",
        lambda f: f.with_row_index().with_columns(
            price=pl.when(pl.col("index") == 12_345).then(pl.lit("x")).otherwise("price")
        ),
    )
    assert ingest_by_table(lake, files)["transactions"].valid_rows == n_rows - 1
    [quarantined] = scan(lake, "quarantine/transactions").collect().to_dicts()
    assert (quarantined["row"], quarantined["parse_errors"]) == (12_346, "price='x'")
    after = scan(lake, "raw/transactions").collect()
    assert (
        after.height == before.height - 1
        and after.join(before, on=get_columns("transactions"), how="anti").is_empty()
    )


def test_load_with_too_many_invalid_rows_commits_nothing(lake, files):
    ingest(lake, str(files))
    before = get_table_version(lake, "raw/transactions")
    edit_csv(
        files / "transactions_train.csv",
        lambda f: f.with_row_index().with_columns(
            t_dat=pl.when(pl.col("index") % 10 == 0).then(pl.lit("soon")).otherwise("t_dat")
        ),
    )
    with pytest.raises(ValueError, match=r"transactions_train\.csv: \d+ of \d+ rows, more than"):
        ingest(lake, str(files), max_quarantined_share=0.05)
    assert get_table_version(lake, "raw/transactions") == before
    assert ingest(lake, str(files), max_quarantined_share=0.2)[2].violations[
        "parse_errors check, t_dat nullability"
    ]


def test_unknown_column_is_named(lake, files):
    edit_csv(files / "customers.csv", lambda f: f.with_columns(shoe_size=pl.lit("38")))
    with pytest.raises(ValueError, match=r"customers\.csv: .*unknown columns shoe_size"):
        ingest(lake, str(files))
    assert ingest(lake, str(files), allow_extra_columns=True)[1].valid_rows == 2_000
    edit_csv(files / "articles.csv", lambda f: f.rename({"prod_name": "product_name"}))
    with pytest.raises(ValueError, match="prod_name may be named 'product_name'"):
        ingest(lake, str(files), allow_extra_columns=True)


def test_duplicate_key_is_quarantined(lake, files):
    edit_csv(files / "customers.csv", lambda f: pl.concat([f, f.head(1)]))
    loads = ingest_by_table(lake, files)["customers"]
    assert loads.violations == {"primary_key": 2} and loads.valid_rows == 1_999


def test_missing_column_is_named(lake, files):
    edit_csv(files / "articles.csv", lambda f: f.drop("colour_group_code"))
    with pytest.raises(
        ValueError, match=r"articles.csv: articles: missing columns colour_group_code"
    ):
        ingest(lake, str(files))


def test_truncated_csv_is_named_and_commits_nothing(lake, files):
    with (files / "articles.csv").open("a") as out:
        out.write('"0000000001,and so on\n')
    with pytest.raises(ValueError, match=r"articles\.csv"):
        ingest(lake, str(files))
    assert not lake.path("raw", "articles", "_delta_log").exists()


def test_source_without_files_names_expected_files(lake, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"expected files like articles.csv.*found notes.txt"):
        discover_parts(Source(uri=str(tmp_path)))
    (tmp_path / "articles.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"customers \(a file like c.*found articles"):
        ingest(lake, str(tmp_path))
    with pytest.raises(ValueError, match=r"nowhere: no such folder or file"):
        ingest(lake, str(tmp_path / "nowhere"))


def test_archive_beyond_size_limit_is_rejected(lake, files, tmp_path, monkeypatch):
    archive = shutil.make_archive(str(tmp_path / "data"), "zip", files)
    monkeypatch.setattr("hm_reco.data.sources.MAX_BYTES", 1_000)
    with pytest.raises(ValueError, match=r"more than 1000 bytes"):
        ingest(lake, archive)


def test_age_out_of_bounds_is_invalid():
    row = {name: [None] for name in get_columns("customers")} | {
        "customer_id": ["a"],
        "age": ["900"],
    }
    result = validate(
        "customers",
        cast_to_schema("customers", pl.DataFrame(row, schema=dict.fromkeys(row, pl.String))),
    )
    assert result.invalid["rule"].to_list() == ["age max"]
