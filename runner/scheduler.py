"""Run stages in order, in parallel where possible, and recover from dead runs."""

import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import psutil

from hm_reco.lake.published import restore_published
from hm_reco.lake.runs import Outcome, StageRun, get_git_commit, read_runs, record
from hm_reco.lake.storage import Lake, read_published, write_json
from runner.cache import Decision, compute_cache_key, decide
from runner.display import RunDisplay
from runner.hooks import Hooks
from runner.monitor import StageMonitor
from runner.render import render_index, render_run
from runner.stage import TEMP_PREFIX, Job, reserve_space, run_stage

SUCCESS_STATES = ("succeeded", "cached")


class StageError(RuntimeError):
    """Stages did not succeed; the message has their causes and notebooks."""

    def __init__(
        self, stage_runs: Sequence[StageRun], stop_reason: Outcome | None, lake: Lake
    ) -> None:
        """Build the message from all stage runs and the reason of a stop, if any."""
        messages = [
            f"stage {e.stage!r} {e.state}: {e.error}"
            + (f"\nnotebook: {lake.path(e.notebook)}" if e.notebook else "")
            for e in stage_runs
            if e.state not in SUCCESS_STATES
        ]
        super().__init__(
            "\n".join(messages)
            or f"the run was stopped: {stop_reason.cause if stop_reason else ''}"
        )
        self.stage_runs = list(stage_runs)
        self.exit_code = 128 + signal.SIGTERM if stop_reason else 1


def _remove_stale_temp_dirs() -> None:
    """Remove the temporary folders of dead runners."""
    for folder in Path(gettempdir()).glob(f"{TEMP_PREFIX}*-*"):
        pid = folder.name.removeprefix(TEMP_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def recover(lake: Lake, stages: Sequence[str], display: RunDisplay) -> list[StageRun]:
    """Record dead runs of these stages as lost and restore their tables; returns all stage runs.

    The caller must hold the stages' leases, so that no live run owns incomplete writes.
    """
    _remove_stale_temp_dirs()
    reserve_space(lake)
    stage_runs = read_runs(lake)
    lost_runs = [e for e in stage_runs if e.state == "running" and e.stage in stages]
    for lost_run in lost_runs:
        lost_run.state = "lost"
        lost_run.error = (
            f"the runner on {lost_run.host} ended before the stage: killed, or machine lost"
        )
        lost_run.seconds = (datetime.now(UTC) - lost_run.started).total_seconds()
    if lost_runs:
        record(lake, *lost_runs)
        for run_id in {lost_run.run_id for lost_run in lost_runs}:
            render_run(lake, run_id)
    published = read_published(lake)
    for stage in dict.fromkeys(stages):
        last = next(
            (e for e in reversed(stage_runs) if e.stage == stage and e.state != "cached"), None
        )
        if stage not in published or (last and last.state != "succeeded"):
            for name in restore_published(lake, stage):
                run_label = f"run {last.run_id}" if last else "a run"
                display.log(f"{name}: restored the published version after {run_label}")
    return stage_runs


def always_run(job: Job) -> Decision:
    """Run the stage regardless of earlier runs."""
    return Decision("requested", compute_cache_key(job.stage, job.parameters.values))


class Scheduler:
    """Run jobs in parallel, as far as their stages' order and `limit` allow."""

    def __init__(
        self,
        lake: Lake,
        jobs: Sequence[Job],
        display: RunDisplay,
        hooks: Hooks,
        limit: int,
        stage_runner: Any = run_stage,
    ) -> None:
        """Prepare the jobs; `stage_runner` runs a stage once, see `run_stage`."""
        self.stage_runner = stage_runner
        self.lake, self.display, self.hooks, self.limit = lake, display, hooks, limit
        self.waiting = list(jobs)
        self.running: dict[Future[StageRun], tuple[Job, StageMonitor]] = {}
        self.finished: list[StageRun] = []
        self.recorded: set[str] = set()  # runs whose run.json is written
        self.failed_stages: set[str] = set()  # stages whose downstream stages cannot run
        self.stop_reason: Outcome | None = None
        self.published = read_published(lake)

    def stop(self, cause: str) -> None:
        """Start no further stages and stop the running ones. A signal handler may call this."""
        self.stop_reason = Outcome("stopped", cause)

    def run(self, decide_job: Callable[[Job], Decision] = always_run) -> list[StageRun]:
        """Run all jobs that must run; raises `StageError` at the end if any did not succeed."""
        with ThreadPoolExecutor(self.limit) as pool, _handle_signals(self.stop), self.display:
            while (self.waiting and not self.stop_reason) or self.running:
                self._start_ready(pool, decide_job)
                for _, monitor in self.running.values():
                    if self.stop_reason:
                        monitor.stop(self.stop_reason)
                done, _ = wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
                self.display.refresh()
                for future in done:
                    self._on_finished(future)
        self._finish()
        if self.stop_reason or any(e.state not in SUCCESS_STATES for e in self.finished):
            raise StageError(self.finished, self.stop_reason, self.lake)
        return self.finished

    def _start_ready(self, pool: ThreadPoolExecutor, decide_job: Callable[[Job], Decision]) -> None:
        for job in self._get_ready_jobs():
            if len(self.running) >= self.limit or self.stop_reason:
                return
            self.waiting.remove(job)
            decision = decide_job(job)
            if decision.cached_run:
                self._record_cached(job, decision.cached_run)
                continue
            if job.run_id not in self.recorded:
                record_path = self.lake.path("runs", job.run_id, "run.json")
                if not record_path.exists():  # it exists when an earlier run is continued
                    write_json(record_path, self._build_run_record(job))
                self.recorded.add(job.run_id)
            monitor = StageMonitor(job.stage.name, job.run_id)
            self.running[pool.submit(self._run_with_retries, job, decision.cache_key, monitor)] = (
                job,
                monitor,
            )
            self.display.on_started(monitor, decision.reason)
            import nbconvert.exporters  # noqa: F401 - preloaded while the kernel starts

    def _get_ready_jobs(self) -> list[Job]:
        """Return the jobs with no pending upstream stage; drop those with a failed one."""
        self.failed_stages |= {e.stage for e in self.finished if e.state not in SUCCESS_STATES}
        for job in list(self.waiting):
            if failed := self.failed_stages & {*job.stage.after}:
                self.waiting.remove(job)
                self.failed_stages.add(job.stage.name)
                self.display.log(f"{job.stage.name}: not run, because {', '.join(failed)} failed")
        pending = {j.stage.name for j in self.waiting}
        pending |= {j.stage.name for j, _ in self.running.values()}
        return [j for j in self.waiting if not pending & {*j.stage.after}]

    def _run_with_retries(
        self, job: Job, cache_key: dict[str, Any], monitor: StageMonitor
    ) -> StageRun:
        while True:
            stage_run = self.stage_runner(self.lake, job, cache_key, monitor, self.display)
            should_retry = (
                stage_run.state in ("failed", "killed", "timeout") and not self.stop_reason
            )
            if not should_retry or monitor.attempt > job.stage.retries:
                return stage_run
            self.display.log(f"{stage_run.stage}: {stage_run.state} ({stage_run.error}); retrying")
            if sum(j.stage == job.stage for j, _ in self.running.values()) == 1:
                restore_published(self.lake, stage_run.stage)
            monitor.restart()

    def _record_cached(self, job: Job, cached_run: StageRun) -> None:
        stage_run = replace(
            cached_run, run_id=job.run_id, state="cached", started=datetime.now(UTC)
        )
        stage_run.error, stage_run.seconds = f"unchanged since run {cached_run.run_id}", 0.0
        self.finished.append(stage_run)
        self.display.on_finished(stage_run)

    def _on_finished(self, future: Future[StageRun]) -> None:
        job, _ = self.running.pop(future)
        try:
            stage_run = future.result()
        except Exception as err:  # the next run will record the open row as lost
            cause = f"it could not be recorded: {type(err).__name__}: {err}"
            stage_run = StageRun(job.run_id, job.stage.name, {}, "", "failed", error=cause)
        self.finished.append(stage_run)
        self.published = read_published(self.lake)
        self.display.on_finished(stage_run)
        if self.waiting or self.running:
            self._render_page(job.run_id)

    def _build_run_record(self, job: Job) -> dict[str, Any]:
        """Build the data needed to reproduce the run: its commit and the table versions before."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        commit = get_git_commit(job.root)
        return {
            "run_id": job.run_id,
            "started": started,
            "commit": commit,
            "published": self.published,
        }

    def _finish(self) -> None:
        if not self.recorded:
            return
        if cached := [e for e in self.finished if e.state == "cached"]:
            record(self.lake, *cached)
        for run_id in {stage_run.run_id for stage_run in self.finished}:
            render_run(self.lake, run_id)
        render_index(self.lake, self.hooks)

    def _render_page(self, run_id: str) -> None:
        render_run(self.lake, run_id, [e for e in self.finished if e.run_id == run_id])


@contextmanager
def _handle_signals(on_signal: Callable[[str], None]) -> Iterator[None]:
    """Stop the run in order at SIGTERM and Ctrl-C; handlers work in the main thread only."""

    def handle(signal_number: int, _: Any) -> None:
        on_signal(f"the runner got {signal.Signals(signal_number).name}")

    previous = {}
    with suppress(ValueError):
        previous = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)


def run_jobs(
    lake: Lake,
    jobs: Sequence[Job],
    display: RunDisplay,
    hooks: Hooks,
    limit: int = 2,
    force: bool = False,
) -> list[StageRun]:
    """Run jobs while holding their stages' leases; unchanged stages are cached.

    Raises `StageError` when stages did not succeed; stages that do not depend on them have run.
    """
    stage_runs = recover(lake, [job.stage.name for job in jobs], display)
    scheduler = Scheduler(lake, jobs, display, hooks, limit)

    def decide_job(job: Job) -> Decision:
        values, published = job.parameters.values, scheduler.published
        return decide(published, job.stage, values, stage_runs, hooks.fingerprint)

    return scheduler.run(always_run if force else decide_job)
