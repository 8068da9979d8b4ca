"""The ledger: one Delta table that says what ran, with what, how it ended and what it cost."""

import json
import os
import secrets
import subprocess
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_origin

import polars as pl

from hm_reco.core.lake import Lake, LakePath, append, has_table, put_file, scan

LEDGER = "runs/ledger"
State = Literal[
    "running",
    "succeeded",
    "reused",  # nothing it depends on had changed: an earlier run's outputs stand
    "failed",  # the notebook raised an error
    "killed",  # the kernel's process died: by a signal, for lack of memory, by its own exit
    "timeout",
    "stopped",  # somebody asked the runner to end
    "lost",  # the runner itself died; entered by the next run
]


class Outcome(NamedTuple):
    """How a stage ended, and why."""

    state: State
    cause: str = ""


@dataclass
class Entry:
    """A stage of a run. It is entered when it starts and again when it has ended."""

    run_id: str
    stage: str
    parameters: dict[str, Any]
    git_commit: str
    state: State = "running"
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    cpu_seconds: float = 0.0
    attempt: int = 1
    host: str = field(default_factory=lambda: os.uname().nodename)
    origins: dict[str, str] = field(default_factory=dict)  # where each parameter came from
    key: dict[str, Any] = field(default_factory=dict)  # what the outputs depend on
    sources: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    notebook: str = ""  # path below the lake's root, as is `report`
    report: str = ""
    error: str = ""


# dictionaries are kept as JSON
TYPES: dict[Any, Any] = {int: pl.Int64, float: pl.Float64, datetime: pl.Datetime("us", "UTC")}
SCHEMA: dict[str, Any] = {f.name: TYPES.get(f.type, pl.String) for f in fields(Entry)}
TEXTS = [f.name for f in fields(Entry) if get_origin(f.type) is dict]


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


def write_json(path: LakePath, content: Any) -> None:
    """Write a JSON file of a run."""
    put_file(path, json.dumps(content, indent=2, default=str))


def enter(lake: Lake, *entries: Entry) -> None:
    """Append entries to the ledger, in one commit."""
    rows = [
        {name: json.dumps(v) if name in TEXTS else v for name, v in asdict(entry).items()}
        for entry in entries
    ]
    append(lake, LEDGER, pl.DataFrame(rows, schema=SCHEMA), extend=True)


def read_ledger(lake: Lake) -> list[Entry]:
    """The latest entry of every stage of every run, oldest first."""
    if not has_table(lake, LEDGER):
        return []
    rows = scan(lake, LEDGER).with_columns(ended=pl.col("state") != "running")
    last = rows.sort("attempt", "ended", maintain_order=True, nulls_last=False)
    last = last.group_by("run_id", "stage", maintain_order=True).last().sort("started", "stage")
    return [_entry(row) for row in last.drop("ended").collect().to_dicts()]


def _entry(row: dict[str, Any]) -> Entry:
    known = {name: value for name, value in row.items() if value is not None and name in SCHEMA}
    return Entry(**{n: json.loads(v) if n in TEXTS else v for n, v in known.items()})
