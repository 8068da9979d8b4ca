"""Run stages as jobs of a Ray cluster: each is `hm run STAGE` on one of its machines."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hm_reco.lake.runs import StageRun, read_runs
from hm_reco.lake.settings import Settings
from hm_reco.lake.storage import Lake
from runner.backends.ray_jobs import (
    BackendError,
    Resources,
    get_dashboard_url,
    get_job_client,
    run_job,
)
from runner.deployment import to_cli_args
from runner.display import RunDisplay
from runner.hooks import Hooks
from runner.monitor import StageMonitor
from runner.scheduler import Scheduler
from runner.stage import Job


def _run_on_ray(
    client: Any,
    force: bool,
    lake: Lake,
    job: Job,
    _key: Any,
    monitor: StageMonitor,
    display: RunDisplay,
) -> StageRun:
    """Run a stage on Ray with the same run id; returns the stage run that the job recorded."""
    stage, parameters = job.stage, to_cli_args(job.parameters.values)
    args = ["hm", "run", stage.name, "--run-id", job.run_id, "--lake", lake.root]
    args += ["--force"] * force + [
        argument for n, v in parameters.items() for argument in ("-p", f"{n}={v}")
    ]

    def on_output(text: str) -> None:
        monitor.progress = text.strip().rpartition("\n")[2][:80]
        display.on_output(stage.name, text)

    status, cause = run_job(
        client,
        f"{job.run_id}-{stage.name}",
        args,
        Resources(stage.cpus, stage.memory, stage.gpu),
        on_output,
        lambda: monitor.stop_reason is None,
    )
    monitor.attempt = stage.retries + 1  # the job has done the declared retries
    stage_runs = [e for e in read_runs(lake) if e.stage == stage.name and e.state != "running"]
    if recorded := [e for e in stage_runs if e.run_id == job.run_id]:
        return recorded[-1]
    if status == "SUCCEEDED":  # a job whose stage was cached records no stage run
        cached_run = next(e for e in reversed(stage_runs) if e.state == "succeeded")
        cause = f"unchanged since run {cached_run.run_id}"
        return replace(cached_run, run_id=job.run_id, state="cached", seconds=0.0, error=cause)
    stage_run = StageRun(job.run_id, stage.name, parameters, "", error=f"Ray job {status}: {cause}")
    stage_run.state = "stopped" if monitor.stop_reason else "failed"
    return stage_run


def run_on_ray(
    lake: Lake, jobs: Sequence[Job], display: RunDisplay, hooks: Hooks, limit: int, force: bool
) -> list[StageRun]:
    """Run jobs on the cluster; each Ray job acquires the lease and decides whether to run.

    Raises `BackendError` when there is no cluster, `StageError` when stages did not succeed.
    """
    settings = Settings()
    if not settings.ray_address:
        raise BackendError(
            "--backend ray: HM_RAY_ADDRESS is empty; expected auto or ray://head:10001"
        )
    client = get_job_client(get_dashboard_url(settings))
    return Scheduler(lake, jobs, display, hooks, limit, partial(_run_on_ray, client, force)).run()
