"""Stages as jobs of a Ray cluster: each is `hm run STAGE` on one of its machines."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hm_reco.lake.runs import Entry, read_ledger
from hm_reco.lake.settings import Settings
from hm_reco.lake.storage import Lake
from runner.backends.ray_jobs import BackendError, Needs, dashboard_of, follow_job, job_client
from runner.board import Board
from runner.deployment import as_words
from runner.execute import Execution
from runner.hooks import Hooks
from runner.stage import Job
from runner.watch import Watch


def _run_there(
    client: Any, force: bool, lake: Lake, job: Job, _key: Any, watch: Watch, board: Board
) -> Entry:
    """Run a stage there, under the same run; what it entered into the ledger."""
    stage, given = job.stage, as_words(job.parameters.values)
    words = ["hm", "run", stage.name, "--run-id", job.run_id, "--lake", lake.root]
    words += ["--force"] * force + [w for n, v in given.items() for w in ("-p", f"{n}={v}")]

    def hear(text: str) -> None:
        watch.note = text.strip().rpartition("\n")[2][:80]
        board.output(stage.name, text)

    ended, cause = follow_job(
        client,
        f"{job.run_id}-{stage.name}",
        words,
        Needs(stage.cpus, stage.memory, stage.gpu),
        hear,
        lambda: watch.ordered is None,
    )
    watch.attempt = stage.retries + 1  # it has tried again there, as declared
    entries = [e for e in read_ledger(lake) if e.stage == stage.name and e.state != "running"]
    if own := [e for e in entries if e.run_id == job.run_id]:
        return own[-1]
    if ended == "SUCCEEDED":  # a run in which nothing is run enters nothing
        earlier = next(e for e in reversed(entries) if e.state == "succeeded")
        cause = f"unchanged since run {earlier.run_id}"
        return replace(earlier, run_id=job.run_id, state="reused", seconds=0.0, error=cause)
    entry = Entry(job.run_id, stage.name, given, "", error=f"Ray job {ended}: {cause}")
    entry.state = "stopped" if watch.ordered else "failed"
    return entry


def run_on_ray(
    lake: Lake, jobs: Sequence[Job], board: Board, hooks: Hooks, limit: int, force: bool
) -> list[Entry]:
    """Run jobs on the cluster, which decides there what has to run, and takes the leases.

    Raises `BackendError` when there is no cluster, `StageError` when stages did not succeed.
    """
    settings = Settings()
    if not settings.cluster:
        raise BackendError("--on ray: HM_CLUSTER is empty; expected auto or ray://head:10001")
    client = job_client(dashboard_of(settings))
    return Execution(lake, jobs, board, hooks, limit, partial(_run_there, client, force)).run()
