"""Who may become champion, who decides, and how it is taken back."""

import json
from datetime import date

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from hm_reco.lake.lease import hold_leases
from hm_reco.lake.published import restore_published, write_manifest
from hm_reco.lake.storage import REGISTRY, Lake, open_lake
from hm_reco.lake.tables import append, get_latest_version, scan
from hm_reco.ranking.ranker import RANKER
from hm_reco.registry.registry import (
    Model,
    NoModelError,
    PromotionError,
    get_champion,
    list_champions,
    promote,
    read_models,
    register_model,
    rollback,
    save_scores,
)
from runner.cli import app

CUSTOMERS = 400


def enter(lake: Lake, version: str, lead: float, as_of: str = "2020-09-23", week: int = 16) -> None:
    """A ranker that is `lead` better than the baseline, for each customer with some noise."""
    rng = np.random.default_rng(len(version) + ord(version[0]))
    simple = np.random.default_rng(0).exponential(0.02, CUSTOMERS)
    ap = {RANKER: simple + lead + rng.normal(0, 0.005, CUSTOMERS), "own history": simple}
    day = [date(2020, 9, week)] * CUSTOMERS
    frames = [
        pl.DataFrame({"day": day, "customer": range(CUSTOMERS), "method": method, "ap": values})
        for method, values in ap.items()
    ]
    save_scores(lake, version, pl.concat(frames))
    metrics = {"map12": {method: float(values.mean()) for method, values in ap.items()}}
    register_model(
        lake, Model(version, "candidate", RANKER, as_of, "r1", "3f2a" * 10, metrics=metrics)
    )


def hm(*words: str):
    return CliRunner().invoke(app, list(words))


def test_promotion_asks_for_more_than_chance(lake: Lake):
    enter(lake, "weak", 0.0)
    with pytest.raises(PromotionError, match="does not beat 'own history'"):
        promote(lake, "weak")
    with pytest.raises(NoModelError):
        get_champion(lake)
    enter(lake, "good", 0.004)
    promote(lake, "good")
    enter(lake, "equal", 0.004)
    with pytest.raises(PromotionError, match="does not beat the champion good"):
        promote(lake, "equal")
    enter(lake, "better", 0.008)
    promote(lake, "better")
    assert get_champion(lake) == "better"


def test_newer_days_need_only_hold_their_own(lake: Lake):
    enter(lake, "old", 0.004)
    promote(lake, "old")
    enter(lake, "new", 0.004, as_of="2020-09-30")
    assert "is not worse than the champion old" in str(promote(lake, "new"))
    enter(lake, "late", 0.001, as_of="2020-10-07")
    with pytest.raises(PromotionError, match="is worse than the champion new"):
        promote(lake, "late")
    enter(lake, "apart", 0.004, as_of="2020-10-07", week=23)
    with pytest.raises(PromotionError, match="shares no judged customer-week"):
        promote(lake, "apart")


def test_the_commands_promote_force_and_roll_back(lake: Lake):
    place = ["--lake", lake.root]
    enter(lake, "first", 0.004)
    enter(lake, "second", 0.0)
    assert hm("promote", "first", *place).exit_code == 0
    refused = hm("promote", "second", *place)
    assert refused.exit_code == 1 and "--force" in refused.stderr
    assert "by force" in hm("promote", "second", "--force", *place).output
    rows = json.loads(hm("models", "--json", *place).output)
    assert [(row["version"], row["state"]) for row in rows] == [
        ("second", "champion (forced)"),
        ("first", "retired"),
    ]
    assert "first serves again" in hm("rollback", *place).output
    assert get_champion(lake) == "first"
    nothing = hm("rollback", *place)
    assert nothing.exit_code == 1 and "no champion before 'first'" in nothing.stderr
    unknown = hm("promote", "third", *place)
    assert unknown.exit_code == 1 and "no model 'third'" in unknown.stderr


def test_every_decision_stays_on_record(lake: Lake):
    enter(lake, "a", 0.004)
    promote(lake, "a")
    enter(lake, "b", 0.008)
    promote(lake, "b")
    rollback(lake)
    events = read_models(lake)
    assert [(m.version, m.event) for m in events] == [
        ("a", "candidate"),
        ("a", "champion"),
        ("b", "candidate"),
        ("b", "champion"),
        ("b", "rollback"),
    ]
    assert list_champions(events) == ["a"] and "beats 'own history'" in events[1].reason


def test_a_promotion_is_seen_at_once_and_stays(lake: Lake):
    """On a lake whose tables are seen as the stages' manifests vouch for them."""
    place = ["--lake", lake.root]
    enter(lake, "first", 0.004)
    promote(lake, "first")
    enter(lake, "second", 0.0)
    trained = get_latest_version(lake, REGISTRY)
    write_manifest(lake, "r1", "training", {}, {REGISTRY: trained}, {})
    append(lake, REGISTRY, scan(lake, REGISTRY).head(1).collect())  # of a training that was killed
    assert hm("promote", "second", "--force", *place).exit_code == 0
    assert get_champion(open_lake(lake.root)) == "second"
    assert len(read_models(open_lake(lake.root))) == 4, "what nobody vouched for came to light"
    restore_published(open_lake(lake.root), "training")  # as the next training begins
    assert get_champion(open_lake(lake.root)) == "second"
    write_manifest(open_lake(lake.root), "r2", "training", {}, {REGISTRY: trained}, {})
    assert get_champion(open_lake(lake.root)) == "second", "a training that began before hid it"
    with hold_leases(lake, ["training"]):  # one that runs does not hold a rollback up
        assert hm("rollback", *place).exit_code == 0
    assert get_champion(open_lake(lake.root)) == "first"
