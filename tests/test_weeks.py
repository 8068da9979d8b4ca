"""Loads in any order, and weeks computed one by one, give what one load and a full build give."""

import random
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from hm_reco.data.changes import detect_changes, to_week_start
from hm_reco.data.sources import Source
from hm_reco.data.weekly import FEATURES
from hm_reco.lake.storage import Lake, open_lake
from hm_reco.lake.tables import get_table_version, scan
from hm_reco.stages.ingestion import ingest
from hm_reco.stages.processing import PROCESSED_TABLES, process

WITH_ROWS = [name for name in PROCESSED_TABLES if name != "processed/input_versions"]


def table(lake: Lake, name: str) -> pl.DataFrame:
    frame = scan(lake, name).collect()
    return frame.select(sorted(frame.columns)).sort(sorted(frame.columns))


def by_id(lake: Lake, name: str) -> pl.DataFrame:
    """A processed table with ids in the place of the numbers that were given to them."""
    frame = scan(lake, name).drop("shard", strict=False)
    for what in ("article", "customer"):
        numbers = scan(lake, f"processed/{what}s").select(what, f"{what}_id")
        if what in frame.collect_schema().names():
            keep = f"{what}_id" in frame.collect_schema().names()
            frame = (frame if keep else frame.join(numbers, on=what)).drop(what)
    whole = frame.collect()
    return whole.select(sorted(whole.columns)).sort(sorted(whole.columns))


@pytest.fixture(scope="module")
def world(small_files: Path) -> dict[str, pl.DataFrame]:
    names = {"articles": "articles", "customers": "customers", "transactions": "transactions_train"}
    return {t: pl.read_csv(small_files / f"{n}.csv", infer_schema=False) for t, n in names.items()}


@pytest.fixture(scope="module")
def small_files(tmp_path_factory) -> Path:
    from hm_reco.data.synthetic import write_synthetic

    folder = tmp_path_factory.mktemp("world")
    write_synthetic(folder, 300, seed=3)
    return folder


@pytest.fixture(scope="module")
def whole(small_files: Path, tmp_path_factory) -> Lake:
    lake = open_lake(str(tmp_path_factory.mktemp("whole")))
    ingest(lake, str(small_files))
    process(lake, 3)
    return lake


def split(frame: pl.DataFrame, pieces: int, dice: random.Random) -> list[pl.DataFrame]:
    """Rows dealt out at random, so that each piece has late rows of old weeks."""
    hand = pl.Series([dice.randrange(pieces) for _ in range(frame.height)])
    return [frame.filter(hand == piece) for piece in range(pieces)]


def deal(world, folder: Path, dice: random.Random) -> list[list[Path]]:
    """The world in files, and the files in loads; each table in pieces of its own."""
    paths = []
    for name, frame in world.items():
        pieces = split(frame, dice.randint(1, 3), dice)
        if name == "transactions" and dice.random() < 0.5:  # whole weeks, besides
            late = frame["t_dat"] > "2020-09"
            pieces = [*split(frame.filter(~late), 2, dice), frame.filter(late)]
        for number, piece in enumerate(pieces):
            paths.append(folder / f"{name}_{number}.csv")
            piece.write_csv(paths[-1])
    dice.shuffle(paths)
    cut = sorted(dice.sample(range(1, len(paths)), min(3, len(paths) - 1)))
    return [paths[a:b] for a, b in zip([0, *cut], [*cut, len(paths)], strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_loads_in_any_order_equal_one_load_and_a_full_build(world, whole, lake, tmp_path, seed):
    dice = random.Random(seed)
    (tmp_path / "away").mkdir()
    (tmp_path / "drop").mkdir()
    for frame, name in (
        (world["articles"].head(1), "articles"),
        (world["customers"].head(1), "customers"),
    ):
        frame.write_csv(tmp_path / "drop" / f"{name}_seed.csv")
    first = world["transactions"].head(0)
    first.write_csv(tmp_path / "drop" / "transactions_seed.csv")
    drop = [Source(uri=str(tmp_path / "drop"), name="drop")]
    processed = False
    for load in deal(world, tmp_path / "away", dice):
        for path in load:
            path.rename(tmp_path / "drop" / path.name)
        ingest(lake, drop)
        if not scan(lake, "raw/transactions").head(1).collect().is_empty():
            process(lake, 3)
            processed = True
    assert processed
    for name in WITH_ROWS:
        assert by_id(lake, name).equals(by_id(whole, name)), name
    step_by_step = {name: table(lake, name) for name in WITH_ROWS}
    process(lake, 3, detect_changes(lake, 3, full_refresh=True))
    for name, frame in step_by_step.items():
        assert table(lake, name).equals(frame), name


def test_a_new_week_computes_that_week_only(world, lake, tmp_path):
    (tmp_path / "in").mkdir()
    rows = world["transactions"]
    last = (
        rows["t_dat"].str.to_date().dt.truncate("1w")
        == pl.Series([rows["t_dat"].str.to_date().max()]).dt.truncate("1w")[0]
    )
    for name in ("articles", "customers"):
        world[name].write_csv(tmp_path / "in" / f"{name}.csv")
    rows.filter(~last).write_csv(tmp_path / "in" / "transactions_old.csv")
    ingest(lake, str(tmp_path / "in"))
    assert detect_changes(lake, 1).full_refresh
    process(lake)
    assert not detect_changes(lake).weeks and not detect_changes(lake).remap_tables
    before = {name: get_table_version(lake, name) for name in WITH_ROWS}
    assert process(lake) == before | {"processed/input_versions": 0}
    rows.filter(last).write_csv(tmp_path / "in" / "transactions_new.csv")
    ingest(lake, str(tmp_path / "in"))
    change = detect_changes(lake)
    newest_day = rows["t_dat"].str.to_date().max()
    assert change.weeks == [newest_day - timedelta(days=newest_day.weekday())]
    assert not change.full_refresh and not change.remap_tables
    process(lake, 1, change)
    assert (
        scan(lake, "processed/purchases").select(pl.col("units").sum()).collect().item()
        == rows.height
    )


def test_a_withdrawn_week_leaves_no_trace(world, lake, tmp_path, whole):
    (tmp_path / "in").mkdir()
    for name in ("articles", "customers"):
        world[name].write_csv(tmp_path / "in" / f"{name}.csv")
    world["transactions"].write_csv(tmp_path / "in" / "transactions.csv")
    buyers = world["transactions"]["customer_id"].unique()
    never = world["customers"].filter(~pl.col("customer_id").is_in(buyers.implode()))["customer_id"]
    extra = world["transactions"].head(50).with_columns(t_dat=pl.lit("2020-11-02"))
    once = extra.head(1).with_columns(customer_id=pl.lit(never[0]))
    extra = pl.concat([extra, once])
    extra.write_csv(tmp_path / "in" / "transactions_x.csv")
    ingest(lake, str(tmp_path / "in"))
    process(lake, 3)
    extra.head(0).write_csv(tmp_path / "in" / "transactions_x.csv")
    ingest(lake, str(tmp_path / "in"))
    process(lake, 3)
    for name in WITH_ROWS:
        assert table(lake, name).equals(table(whole, name)), name


def test_other_shards_are_a_full_build(whole):
    assert "shards" in detect_changes(whole, 4).reason and detect_changes(whole, 4).full_refresh


def test_the_files_of_the_earlier_version_may_be_gone(whole, world, lake, tmp_path):
    from deltalake import DeltaTable

    (tmp_path / "in").mkdir()
    for name, frame in world.items():
        frame.write_csv(tmp_path / "in" / f"{name}.csv")
    ingest(lake, str(tmp_path / "in"))
    process(lake, 3)
    world["transactions"].head(1_000).write_csv(tmp_path / "in" / "transactions.csv")
    ingest(lake, str(tmp_path / "in"))
    DeltaTable(lake.uri("raw/transactions")).vacuum(0, False, False)
    change = detect_changes(lake, 3)
    assert change.full_refresh and "files are gone" in change.reason
    process(lake, 3, change)
    assert scan(lake, "processed/purchases").select(pl.col("units").sum()).collect().item() == 1_000


def test_every_feature_is_documented_and_exact(whole):
    documented = {(f"processed/{f.table}", f.name) for f in FEATURES}
    found = {
        (name, column)
        for name in {table for table, _ in documented}
        for column in scan(whole, name).collect_schema().names()
    }
    keys = {"shard", "week", "article", "customer"}
    assert {pair for pair in found if pair[1] not in keys} == documented
    assert all(all(feature) for feature in FEATURES)
    bought = scan(whole, "processed/purchases").collect()
    customer = bought["customer"].mode()[0]
    own = bought.filter(customer=customer)
    row = (
        scan(whole, "processed/customer_features").filter(customer=customer).collect().to_dicts()[0]
    )
    days = own["day"].unique().sort()
    assert row["visits"] == days.len() and row["units"] == own["units"].sum()
    assert row["weeks"] == own.select(to_week_start(pl.col("day"))).n_unique()
    assert (row["first_day"], row["last_day"]) == (days[0], days[-1])
    assert row["basket"] == pytest.approx(own["units"].sum() / days.len())
    assert row["spend"] == pytest.approx((own["price"].cast(pl.Float64) * own["units"]).sum())
    assert row["visit_gap"] == pytest.approx(days.diff().dt.total_days().mean())
    online = own.filter(channel=2)["units"].sum() / own["units"].sum()
    assert row["online_share"] == pytest.approx(online)
