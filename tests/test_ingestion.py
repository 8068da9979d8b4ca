"""Real files are dirty; each kind of dirt is repaired or set aside, and named."""

import gzip
import shutil
import zipfile
from pathlib import Path

import boto3
import polars as pl
import pytest

from hm_reco.data.contracts import cast_to_schema, get_columns, validate
from hm_reco.data.sources import Source, discover_parts
from hm_reco.lake.storage import open_lake
from hm_reco.lake.tables import get_table_version, scan
from hm_reco.stages.ingestion import ingest


@pytest.fixture
def files(sample: Path, tmp_path: Path) -> Path:
    """A copy of the synthetic data set that a test may spoil."""
    return Path(shutil.copytree(sample, tmp_path / "files"))


def edit(path: Path, change) -> None:
    """Rewrite a CSV, all columns as text, by a function of its frame."""
    change(pl.read_csv(path, infer_schema=False)).write_csv(path)


def ingested(lake, folder) -> dict:
    return {i.table: i for i in ingest(lake, str(folder))}


def test_a_clean_world_loses_nothing(lake, files):
    done = ingested(lake, files)
    for table, name in (("articles", "articles"), ("transactions", "transactions_train")):
        lines = sum(1 for _ in (files / f"{name}.csv").open()) - 1
        assert done[table].valid_rows == lines and done[table].violations == {}
    assert scan(lake, "raw/transactions").collect_schema()["t_dat"] == pl.Date


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda c: c.str.strip_chars_start("0"), id="zeros-lost"),
        pytest.param(lambda c: c.cast(pl.Int64).cast(pl.String) + ".0", id="floats"),
    ],
)
def test_article_ids_get_their_ten_digits_back(lake, files, spoil):
    before = pl.read_csv(files / "transactions_train.csv", infer_schema=False)["article_id"]
    for name in ("articles", "transactions_train"):
        edit(files / f"{name}.csv", lambda f: f.with_columns(spoil(pl.col("article_id"))))
    assert ingested(lake, files)["transactions"].violations == {}
    after = scan(lake, "raw/transactions").collect()["article_id"]
    assert after.sort().equals(before.sort())


def test_an_index_column_is_left_out(lake, files):
    edit(files / "articles.csv", lambda f: f.with_row_index("").select(*f.columns, ""))
    ingested(lake, files)
    names = scan(lake, "raw/articles").collect_schema().names()
    assert names == [*get_columns("articles"), "part", "load"]


def test_float_ids_of_a_parquet_copy(lake, files):
    frame = pl.read_csv(files / "articles.csv", infer_schema=False)
    frame.with_columns(pl.col("article_id").cast(pl.Float64)).write_parquet(
        files / "articles.parquet"
    )
    (files / "articles.csv").unlink()
    assert ingested(lake, files)["articles"].valid_rows == frame.height
    ids = scan(lake, "raw/articles").collect()["article_id"]
    assert set(ids) == set(frame["article_id"])


def test_csv_gz_and_zip_give_the_same_tables(lake, files, tmp_path):
    plain = ingested(lake, files)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as zipped:
        for path in files.iterdir():
            zipped.write(path, f"some/folder/{path.name}")
    for path in list(files.iterdir()):
        (files / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    for source in (files, tmp_path / "data.zip"):
        other = open_lake(str(tmp_path / f"lake-{source.suffix}"))
        assert {t: i.valid_rows for t, i in ingested(other, source).items()} == {
            t: i.valid_rows for t, i in plain.items()
        }


def test_an_s3_prefix_is_a_source(lake, files, s3):
    client = boto3.client("s3")
    for path in files.iterdir():
        client.upload_file(str(path), s3.removeprefix("s3://"), f"drop/{path.name}")
    assert ingested(lake, f"{s3}/drop")["customers"].valid_rows == 2_000


def test_empty_values_and_the_literal_none(lake, files):
    frequency = pl.Series(["None", "NONE", "Regularly", None, "Monthly"])
    flags = pl.Series(["1.0", None, "", "0", "1"])
    ages = pl.Series([None, "24.0", "24", "16", "99"])
    edit(
        files / "customers.csv",
        lambda f: pl.concat(
            [
                f.head(5).with_columns(FN=flags, age=ages, fashion_news_frequency=frequency),
                f.slice(5),
            ]
        ),
    )
    assert ingested(lake, files)["customers"].violations == {}
    ids = pl.read_csv(files / "customers.csv", infer_schema=False).head(5).select("customer_id")
    raw = scan(lake, "raw/customers").collect()
    first = ids.join(raw, on="customer_id", how="left", maintain_order="left")
    assert first["fashion_news_frequency"].to_list() == [
        "NONE",
        "NONE",
        "Regularly",
        None,
        "Monthly",
    ]
    assert first["FN"].to_list() == [1, None, None, 0, 1]
    assert first["age"].to_list() == [None, 24, 24, 16, 99]


def test_equal_rows_are_units_and_stay(lake, files):
    edit(files / "transactions_train.csv", lambda f: pl.concat([f, f.head(7)]))
    rows = sum(1 for _ in (files / "transactions_train.csv").open()) - 1
    assert ingested(lake, files)["transactions"].valid_rows == rows


def test_rows_that_break_a_rule_are_set_aside_with_its_name(lake, files):
    bad = {
        "t_dat": ["2020-13-01", "2020-09-01", "2020-09-01", "2020-09-01", "2020-09-01"],
        "price": ["0.02", "-0.02", "free", "0.02", "0.02"],
        "sales_channel_id": ["1", "1", "1", "7", "1"],
        "article_id": [None, None, None, None, "0999999999"],
    }
    edit(
        files / "transactions_train.csv",
        lambda f: pl.concat(
            [
                f.head(5).with_columns(
                    *(pl.Series(n, v).fill_null(f["article_id"][0]) for n, v in bad.items())
                ),
                f.slice(5),
            ]
        ),
    )
    done = ingested(lake, files)["transactions"]
    rows = sum(1 for _ in (files / "transactions_train.csv").open()) - 1
    assert sum(done.violations.values()) == 5 and done.valid_rows == rows - 5
    aside = scan(lake, "quarantine/transactions").collect()
    rules = " | ".join(aside["rule"])
    for named in ("t_dat", "price min_exclusive", "price nullability", "sales_channel_id max"):
        assert named in rules
    assert "article_id unknown" in rules
    assert "t_dat='2020-13-01'" in aside["parse_errors"].to_list()
    assert sorted(aside["row"]) == [1, 2, 3, 4, 5]
    assert set(aside["file"]) == {"transactions_train.csv"}


def test_rows_are_numbered_through_all_batches(lake, files, monkeypatch):
    monkeypatch.setattr("hm_reco.data.loading.BATCH_ROWS", 5_000)
    whole = ingested(lake, files)["transactions"].valid_rows
    before = scan(lake, "raw/transactions").collect()
    edit(
        files / "transactions_train.csv",
        lambda f: f.with_row_index().with_columns(
            price=pl.when(pl.col("index") == 12_345).then(pl.lit("x")).otherwise("price")
        ),
    )
    assert ingested(lake, files)["transactions"].valid_rows == whole - 1
    [aside] = scan(lake, "quarantine/transactions").collect().to_dicts()
    assert (aside["row"], aside["parse_errors"]) == (12_346, "price='x'")
    after = scan(lake, "raw/transactions").collect()
    assert (
        after.height == before.height - 1
        and after.join(before, on=get_columns("transactions"), how="anti").is_empty()
    )


def test_too_many_bad_rows_stop_the_load_and_commit_nothing(lake, files):
    ingest(lake, str(files))
    before = get_table_version(lake, "raw/transactions")
    edit(
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


def test_a_column_that_nobody_knows_is_named(lake, files):
    edit(files / "customers.csv", lambda f: f.with_columns(shoe_size=pl.lit("38")))
    with pytest.raises(ValueError, match=r"customers\.csv: .*unknown columns shoe_size"):
        ingest(lake, str(files))
    assert ingest(lake, str(files), allow_extra_columns=True)[1].valid_rows == 2_000
    edit(files / "articles.csv", lambda f: f.rename({"prod_name": "product_name"}))
    with pytest.raises(ValueError, match="prod_name may be 'product_name' here"):
        ingest(lake, str(files), allow_extra_columns=True)


def test_a_key_twice_is_set_aside(lake, files):
    edit(files / "customers.csv", lambda f: pl.concat([f, f.head(1)]))
    done = ingested(lake, files)["customers"]
    assert done.violations == {"primary_key": 2} and done.valid_rows == 1_999


def test_a_missing_column_is_named(lake, files):
    edit(files / "articles.csv", lambda f: f.drop("colour_group_code"))
    with pytest.raises(
        ValueError, match=r"articles.csv: articles: missing columns colour_group_code"
    ):
        ingest(lake, str(files))


def test_a_torn_csv_is_named_and_commits_nothing(lake, files):
    with (files / "articles.csv").open("a") as out:
        out.write('"0000000001,and so on\n')
    with pytest.raises(ValueError, match=r"articles\.csv"):
        ingest(lake, str(files))
    assert not lake.path("raw", "articles", "_delta_log").exists()


def test_a_source_without_files_says_what_was_expected(lake, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"expected files like articles.csv.*found notes.txt"):
        discover_parts(Source(uri=str(tmp_path)))
    (tmp_path / "articles.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"customers \(a file like c.*found articles"):
        ingest(lake, str(tmp_path))
    with pytest.raises(ValueError, match=r"nowhere: no such folder or file"):
        ingest(lake, str(tmp_path / "nowhere"))


def test_a_member_that_unpacks_beyond_reason_is_refused(lake, files, tmp_path, monkeypatch):
    archive = shutil.make_archive(str(tmp_path / "data"), "zip", files)
    monkeypatch.setattr("hm_reco.data.sources.MAX_BYTES", 1_000)
    with pytest.raises(ValueError, match=r"more than 1000 bytes"):
        ingest(lake, archive)


def test_age_out_of_bounds():
    row = {name: [None] for name in get_columns("customers")} | {
        "customer_id": ["a"],
        "age": ["900"],
    }
    checked = validate(
        "customers",
        cast_to_schema("customers", pl.DataFrame(row, schema=dict.fromkeys(row, pl.String))),
    )
    assert checked.invalid["rule"].to_list() == ["age max"]
