"""Promotion: conditions, commands, records, rollback."""

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


def register_candidate(
    lake: Lake, version: str, improvement: float, as_of: str = "2020-09-23", first_day: int = 16
) -> None:
    """Register a ranker that beats the baseline by `improvement`, with noise per customer."""
    rng = np.random.default_rng(len(version) + ord(version[0]))
    baseline_ap = np.random.default_rng(0).exponential(0.02, CUSTOMERS)
    ap = {
        RANKER: baseline_ap + improvement + rng.normal(0, 0.005, CUSTOMERS),
        "own history": baseline_ap,
    }
    day = [date(2020, 9, first_day)] * CUSTOMERS
    frames = [
        pl.DataFrame({"day": day, "customer": range(CUSTOMERS), "method": method, "MAP@12": values})
        for method, values in ap.items()
    ]
    save_scores(lake, version, pl.concat(frames))
    metrics = {"scores": {method: float(values.mean()) for method, values in ap.items()}}
    register_model(
        lake, Model(version, "candidate", RANKER, as_of, "r1", "3f2a" * 10, metrics=metrics)
    )


def run_hm(*args: str):
    return CliRunner().invoke(app, list(args))


def test_promotion_requires_significant_improvement(lake: Lake):
    register_candidate(lake, "weak", 0.0)
    with pytest.raises(PromotionError, match="does not beat 'own history'"):
        promote(lake, "weak")
    with pytest.raises(NoModelError):
        get_champion(lake)
    register_candidate(lake, "good", 0.004)
    promote(lake, "good")
    register_candidate(lake, "equal", 0.004)
    with pytest.raises(PromotionError, match="does not beat the champion good"):
        promote(lake, "equal")
    register_candidate(lake, "better", 0.008)
    promote(lake, "better")
    assert get_champion(lake) == "better"


def test_promotion_of_newer_model_requires_no_loss(lake: Lake):
    register_candidate(lake, "old", 0.004)
    promote(lake, "old")
    register_candidate(lake, "new", 0.004, as_of="2020-09-30")
    assert "is not worse than the champion old" in str(promote(lake, "new"))
    register_candidate(lake, "late", 0.001, as_of="2020-10-07")
    with pytest.raises(PromotionError, match="is worse than the champion new"):
        promote(lake, "late")
    register_candidate(lake, "apart", 0.004, as_of="2020-10-07", first_day=23)
    with pytest.raises(PromotionError, match="shares no evaluated customer-week"):
        promote(lake, "apart")


def test_promote_and_rollback_commands(lake: Lake):
    lake_option = ["--lake", lake.root]
    register_candidate(lake, "first", 0.004)
    register_candidate(lake, "second", 0.0)
    assert run_hm("promote", "first", *lake_option).exit_code == 0
    rejected = run_hm("promote", "second", *lake_option)
    assert rejected.exit_code == 1 and "--force" in rejected.stderr
    assert "by force" in run_hm("promote", "second", "--force", *lake_option).output
    rows = json.loads(run_hm("models", "--json", *lake_option).output)
    assert [(row["version"], row["state"]) for row in rows] == [
        ("second", "champion (forced)"),
        ("first", "retired"),
    ]
    assert "first serves again" in run_hm("rollback", *lake_option).output
    assert get_champion(lake) == "first"
    no_rollback = run_hm("rollback", *lake_option)
    assert no_rollback.exit_code == 1 and "no champion before 'first'" in no_rollback.stderr
    unknown_model = run_hm("promote", "third", *lake_option)
    assert unknown_model.exit_code == 1 and "no model 'third'" in unknown_model.stderr


def test_registry_records_every_decision(lake: Lake):
    register_candidate(lake, "a", 0.004)
    promote(lake, "a")
    register_candidate(lake, "b", 0.008)
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


def test_promotion_is_published_immediately_and_kept(lake: Lake):
    """On a lake whose manifests publish table versions."""
    lake_option = ["--lake", lake.root]
    register_candidate(lake, "first", 0.004)
    promote(lake, "first")
    register_candidate(lake, "second", 0.0)
    training_version = get_latest_version(lake, REGISTRY)
    write_manifest(lake, "r1", "training", {}, {REGISTRY: training_version}, {})
    append(lake, REGISTRY, scan(lake, REGISTRY).head(1).collect())  # of a killed training
    assert run_hm("promote", "second", "--force", *lake_option).exit_code == 0
    assert get_champion(open_lake(lake.root)) == "second"
    assert len(read_models(open_lake(lake.root))) == 4, "an unpublished row is visible"
    restore_published(open_lake(lake.root), "training")  # as the next training does
    assert get_champion(open_lake(lake.root)) == "second"
    write_manifest(open_lake(lake.root), "r2", "training", {}, {REGISTRY: training_version}, {})
    assert get_champion(open_lake(lake.root)) == "second", "an earlier training overwrote it"
    with hold_leases(lake, ["training"]):  # a running training does not block a rollback
        assert run_hm("rollback", *lake_option).exit_code == 0
    assert get_champion(open_lake(lake.root)) == "first"
