"""The ledger: one Delta table that says what ran, with what, how it ended and what it cost."""

import json
import os
import secrets
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl

from hm_reco.core.lake import Lake, append, has_table, scan

LEDGER = "runs/ledger"
SCHEMA: dict[str, Any] = {
    "run_id": pl.String,
    "stage": pl.String,
    "state": pl.String,
    "started": pl.Datetime("us", "UTC"),
    "seconds": pl.Float64,
    "peak_memory_mb": pl.Float64,
    "parameters": pl.String,
    "inputs": pl.String,
    "outputs": pl.String,
    "metrics": pl.String,
    "git_commit": pl.String,
    "notebook": pl.String,
    "report": pl.String,
    "error": pl.String,
}


@dataclass
class Entry:
    """A stage of a run. It is entered when it starts and again when it has ended."""

    run_id: str
    stage: str
    parameters: dict[str, Any]
    git_commit: str
    state: Literal["running", "succeeded", "failed"] = "running"
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    notebook: str = ""
    report: str = ""
    error: str = ""


def new_run_id() -> str:
    """A name for a run that sorts by time: `20201124-090501-3f2a`."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def git_commit(root: Path) -> str:
    """The commit of the checkout (`GIT_SHA` in an image), `+changes` when it is not clean."""
    if sha := os.environ.get("GIT_SHA"):
        return sha
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*"]
    done = subprocess.run([*command, "--dirty=+changes"], capture_output=True, check=False)
    return done.stdout.decode().strip() or "unknown"


def enter(lake: Lake, entry: Entry) -> None:
    """Append an entry to the ledger."""
    row = {
        name: json.dumps(value) if isinstance(value, dict) else value
        for name, value in asdict(entry).items()
    }
    append(lake, LEDGER, pl.DataFrame([row], schema=SCHEMA))


def read_ledger(lake: Lake) -> pl.DataFrame:
    """The latest entry of every stage of every run, oldest run first."""
    if not has_table(lake, LEDGER):
        return pl.DataFrame(schema=SCHEMA)
    rows = scan(lake, LEDGER).with_columns(ended=pl.col("state") != "running")
    last = rows.sort("ended").group_by("run_id", "stage", maintain_order=True).last()
    return last.sort("started").drop("ended").collect()
