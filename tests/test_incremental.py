"""Incremental loads and weeks, in any order, equal one load and a full refresh."""

import random
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from hm_reco.data.changes import detect_changes
from hm_reco.data.ingestion import ingest
from hm_reco.data.processing import PROCESSED_TABLES, process
from hm_reco.data.sources import Source
from hm_reco.lake.storage import Lake, open_lake
from hm_reco.lake.tables import get_table_version, scan

DATA_TABLES = [name for name in PROCESSED_TABLES if name != "processed/input_versions"]


def read_table(lake: Lake, name: str) -> pl.DataFrame:
    frame = scan(lake, name).collect()
    return frame.select(sorted(frame.columns)).sort(sorted(frame.columns))


def read_table_by_id(lake: Lake, name: str) -> pl.DataFrame:
    """A processed table with the original ids instead of the internal ones."""
    frame = scan(lake, name).drop("shard", strict=False)
    for entity in ("article", "customer"):
        ids = scan(lake, f"processed/{entity}s").select(entity, f"{entity}_id")
        if entity in frame.collect_schema().names():
            has_id = f"{entity}_id" in frame.collect_schema().names()
            frame = (frame if has_id else frame.join(ids, on=entity)).drop(entity)
    rows = frame.collect()
    return rows.select(sorted(rows.columns)).sort(sorted(rows.columns))


@pytest.fixture(scope="module")
def frames(small_files: Path) -> dict[str, pl.DataFrame]:
    names = {"articles": "articles", "customers": "customers", "transactions": "transactions_train"}
    return {t: pl.read_csv(small_files / f"{n}.csv", infer_schema=False) for t, n in names.items()}


@pytest.fixture(scope="module")
def small_files(tmp_path_factory) -> Path:
    from hm_reco.data.synthetic import write_synthetic

    folder = tmp_path_factory.mktemp("world")
    write_synthetic(folder, 300, seed=3)
    return folder


@pytest.fixture(scope="module")
def full_lake(small_files: Path, tmp_path_factory) -> Lake:
    lake = open_lake(str(tmp_path_factory.mktemp("whole")))
    ingest(lake, str(small_files))
    process(lake, 3)
    return lake


def split_rows(frame: pl.DataFrame, n_pieces: int, rng: random.Random) -> list[pl.DataFrame]:
    """Split rows at random, so that each piece has late rows of old weeks."""
    piece_numbers = pl.Series([rng.randrange(n_pieces) for _ in range(frame.height)])
    return [frame.filter(piece_numbers == piece) for piece in range(n_pieces)]


def split_into_loads(frames, folder: Path, rng: random.Random) -> list[list[Path]]:
    """Write the tables as several files each, and group the files into loads."""
    paths = []
    for name, frame in frames.items():
        pieces = split_rows(frame, rng.randint(1, 3), rng)
        if name == "transactions" and rng.random() < 0.5:  # also a piece of complete weeks
            is_late = frame["t_dat"] > "2020-09"
            pieces = [*split_rows(frame.filter(~is_late), 2, rng), frame.filter(is_late)]
        for number, piece in enumerate(pieces):
            paths.append(folder / f"{name}_{number}.csv")
            piece.write_csv(paths[-1])
    rng.shuffle(paths)
    boundaries = sorted(rng.sample(range(1, len(paths)), min(3, len(paths) - 1)))
    return [paths[a:b] for a, b in zip([0, *boundaries], [*boundaries, len(paths)], strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_incremental_loads_equal_full_refresh(frames, full_lake, lake, tmp_path, seed):
    rng = random.Random(seed)
    (tmp_path / "away").mkdir()
    (tmp_path / "drop").mkdir()
    for frame, name in (
        (frames["articles"].head(1), "articles"),
        (frames["customers"].head(1), "customers"),
    ):
        frame.write_csv(tmp_path / "drop" / f"{name}_seed.csv")
    no_transactions = frames["transactions"].head(0)
    no_transactions.write_csv(tmp_path / "drop" / "transactions_seed.csv")
    sources = [Source(uri=str(tmp_path / "drop"), name="drop")]
    is_processed = False
    for load in split_into_loads(frames, tmp_path / "away", rng):
        for path in load:
            path.rename(tmp_path / "drop" / path.name)
        ingest(lake, sources)
        if not scan(lake, "raw/transactions").head(1).collect().is_empty():
            process(lake, 3)
            is_processed = True
    assert is_processed
    for name in DATA_TABLES:
        assert read_table_by_id(lake, name).equals(read_table_by_id(full_lake, name)), name
    incremental = {name: read_table(lake, name) for name in DATA_TABLES}
    process(lake, 3, detect_changes(lake, 3, full_refresh=True))
    for name, frame in incremental.items():
        assert read_table(lake, name).equals(frame), name


def test_new_week_recomputes_that_week_only(frames, lake, tmp_path):
    (tmp_path / "in").mkdir()
    rows = frames["transactions"]
    in_last_week = (
        rows["t_dat"].str.to_date().dt.truncate("1w")
        == pl.Series([rows["t_dat"].str.to_date().max()]).dt.truncate("1w")[0]
    )
    for name in ("articles", "customers"):
        frames[name].write_csv(tmp_path / "in" / f"{name}.csv")
    rows.filter(~in_last_week).write_csv(tmp_path / "in" / "transactions_old.csv")
    ingest(lake, str(tmp_path / "in"))
    assert detect_changes(lake, 1).full_refresh
    process(lake)
    assert not detect_changes(lake).weeks and not detect_changes(lake).remap_tables
    versions_before = {name: get_table_version(lake, name) for name in DATA_TABLES}
    assert process(lake) == versions_before | {"processed/input_versions": 0}
    rows.filter(in_last_week).write_csv(tmp_path / "in" / "transactions_new.csv")
    ingest(lake, str(tmp_path / "in"))
    changes = detect_changes(lake)
    newest_day = rows["t_dat"].str.to_date().max()
    assert changes.weeks == [newest_day - timedelta(days=newest_day.weekday())]
    assert not changes.full_refresh and not changes.remap_tables
    process(lake, 1, changes)
    assert (
        scan(lake, "processed/purchases").select(pl.col("units").sum()).collect().item()
        == rows.height
    )


def test_removed_week_leaves_no_rows(frames, lake, tmp_path, full_lake):
    (tmp_path / "in").mkdir()
    for name in ("articles", "customers"):
        frames[name].write_csv(tmp_path / "in" / f"{name}.csv")
    frames["transactions"].write_csv(tmp_path / "in" / "transactions.csv")
    buyers = frames["transactions"]["customer_id"].unique()
    without_purchases = frames["customers"].filter(~pl.col("customer_id").is_in(buyers.implode()))[
        "customer_id"
    ]
    extra = frames["transactions"].head(50).with_columns(t_dat=pl.lit("2020-11-02"))
    first_purchase = extra.head(1).with_columns(customer_id=pl.lit(without_purchases[0]))
    extra = pl.concat([extra, first_purchase])
    extra.write_csv(tmp_path / "in" / "transactions_x.csv")
    ingest(lake, str(tmp_path / "in"))
    process(lake, 3)
    extra.head(0).write_csv(tmp_path / "in" / "transactions_x.csv")
    ingest(lake, str(tmp_path / "in"))
    process(lake, 3)
    for name in DATA_TABLES:
        assert read_table(lake, name).equals(read_table(full_lake, name)), name


def test_changed_shard_count_requires_full_refresh(full_lake):
    assert (
        "shards" in detect_changes(full_lake, 4).reason
        and detect_changes(full_lake, 4).full_refresh
    )


def test_vacuumed_input_version_requires_full_refresh(full_lake, frames, lake, tmp_path):
    from deltalake import DeltaTable

    (tmp_path / "in").mkdir()
    for name, frame in frames.items():
        frame.write_csv(tmp_path / "in" / f"{name}.csv")
    ingest(lake, str(tmp_path / "in"))
    process(lake, 3)
    frames["transactions"].head(1_000).write_csv(tmp_path / "in" / "transactions.csv")
    ingest(lake, str(tmp_path / "in"))
    DeltaTable(lake.uri("raw/transactions")).vacuum(0, False, False)
    changes = detect_changes(lake, 3)
    assert changes.full_refresh and "files are gone" in changes.reason
    process(lake, 3, changes)
    assert scan(lake, "processed/purchases").select(pl.col("units").sum()).collect().item() == 1_000
