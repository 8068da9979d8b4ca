"""Runs stages in their order, side by side where they can; cleans up after dead runs."""

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

from hm_reco.lake.published import take_back
from hm_reco.lake.runs import Entry, Outcome, enter, git_commit, read_ledger
from hm_reco.lake.storage import Lake, read_vouched, write_json
from runner.board import Board
from runner.cache import Decision, decide, key_of
from runner.hooks import Hooks
from runner.render import render_index, render_run
from runner.stage import TEMPORARY, Job, load_ballast, run_stage
from runner.watch import Watch

GOOD = ("succeeded", "reused")


class StageError(RuntimeError):
    """Stages that did not succeed; the message says why, and names the notebooks to look at."""

    def __init__(self, ended: Sequence[Entry], stop: Outcome | None, lake: Lake) -> None:
        """All entries of the run, and why it was stopped, if it was."""
        notes = [
            f"stage {e.stage!r} {e.state}: {e.error}"
            + (f"\nnotebook: {lake.path(e.notebook)}" if e.notebook else "")
            for e in ended
            if e.state not in GOOD
        ]
        super().__init__("\n".join(notes) or f"the run was stopped: {stop.cause if stop else ''}")
        self.ended = list(ended)
        self.exit_code = 128 + signal.SIGTERM if stop else 1


def _sweep_temporary() -> None:
    """Remove the temporary folders of runners that are no more."""
    for folder in Path(gettempdir()).glob(f"{TEMPORARY}*-*"):
        pid = folder.name.removeprefix(TEMPORARY).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def prepare(lake: Lake, stages: Sequence[str], board: Board) -> list[Entry]:
    """Close and clean up what dead runs left of these stages; returns the ledger's entries.

    Only while holding the stages' leases: whatever is half done then belongs to nobody.
    """
    _sweep_temporary()
    load_ballast(lake)
    entries = read_ledger(lake)
    lost = [e for e in entries if e.state == "running" and e.stage in stages]
    for entry in lost:
        entry.state = "lost"
        entry.error = f"the runner on {entry.host} ended before the stage: killed, or machine lost"
        entry.seconds = (datetime.now(UTC) - entry.started).total_seconds()
    if lost:
        enter(lake, *lost)
        for run_id in {entry.run_id for entry in lost}:
            render_run(lake, run_id)
    known = read_vouched(lake)
    for stage in dict.fromkeys(stages):
        last = next(
            (e for e in reversed(entries) if e.stage == stage and e.state != "reused"), None
        )
        if stage not in known or (last and last.state != "succeeded"):
            for name in take_back(lake, stage):
                board.say(f"{name}: took back what {last.run_id if last else 'a run'} left undone")
    return entries


def always(job: Job) -> Decision:
    """Run the stage, whatever there is."""
    return Decision("asked for", key_of(job.stage, job.parameters.values))


class Execution:
    """Jobs that run side by side, as far as their stages' order and `limit` allow."""

    def __init__(
        self,
        lake: Lake,
        jobs: Sequence[Job],
        board: Board,
        hooks: Hooks,
        limit: int,
        run_one: Any = run_stage,
    ) -> None:
        """Nothing runs yet; `run_one` runs a stage once, see `run_stage`."""
        self.run_one = run_one
        self.lake, self.board, self.hooks, self.limit = lake, board, hooks, limit
        self.waiting = list(jobs)
        self.running: dict[Future[Entry], tuple[Job, Watch]] = {}
        self.ended: list[Entry] = []
        self.noted: set[str] = set()  # runs whose note is written
        self.bad: set[str] = set()  # stages after which nothing can run
        self.stop: Outcome | None = None
        self.vouched = read_vouched(lake)

    def end(self, cause: str) -> None:
        """Start nothing more; what runs is ended at the next turn. A signal may call this."""
        self.stop = Outcome("stopped", cause)

    def run(self, decide_for: Callable[[Job], Decision] = always) -> list[Entry]:
        """Run all jobs that have to; raises `StageError` at the end when some did not succeed."""
        with ThreadPoolExecutor(self.limit) as pool, _signals(self.end), self.board:
            while (self.waiting and not self.stop) or self.running:
                self._start(pool, decide_for)
                for _, watch in self.running.values():
                    if self.stop:
                        watch.end(self.stop)
                done, _ = wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
                self.board.tick()
                for future in done:
                    self._ended(future)
        self._finish()
        if self.stop or any(e.state not in GOOD for e in self.ended):
            raise StageError(self.ended, self.stop, self.lake)
        return self.ended

    def _start(self, pool: ThreadPoolExecutor, decide_for: Callable[[Job], Decision]) -> None:
        for job in self._ready():
            if len(self.running) >= self.limit or self.stop:
                return
            self.waiting.remove(job)
            decision = decide_for(job)
            if decision.reuse:
                self._reuse(job, decision.reuse)
                continue
            if job.run_id not in self.noted:
                note = self.lake.path("runs", job.run_id, "run.json")
                if not note.exists():  # else the run goes on, and its tables before are noted
                    write_json(note, self._note(job))
                self.noted.add(job.run_id)
            watch = Watch(job.stage.name, job.run_id)
            self.running[pool.submit(self._attempts, job, decision.key, watch)] = (job, watch)
            self.board.started(watch, decision.reason)
            import nbconvert.exporters  # noqa: F401 - needed soon; the kernel is starting meanwhile

    def _ready(self) -> list[Job]:
        """Jobs that wait for no other; those after one that did not succeed are dropped."""
        self.bad |= {e.stage for e in self.ended if e.state not in GOOD}
        for job in list(self.waiting):
            if failed := self.bad & {*job.stage.after}:
                self.waiting.remove(job)
                self.bad.add(job.stage.name)
                self.board.say(f"{job.stage.name}: not run, since {', '.join(failed)} has not")
        pending = {j.stage.name for j in self.waiting}
        pending |= {j.stage.name for j, _ in self.running.values()}
        return [j for j in self.waiting if not pending & {*j.stage.after}]

    def _attempts(self, job: Job, key: dict[str, Any], watch: Watch) -> Entry:
        while True:
            entry = self.run_one(self.lake, job, key, watch, self.board)
            again = entry.state in ("failed", "killed", "timeout") and not self.stop
            if not again or watch.attempt > job.stage.retries:
                return entry
            self.board.say(
                f"{entry.stage}: {entry.state} ({entry.error}); trying again, as declared"
            )
            if sum(j.stage == job.stage for j, _ in self.running.values()) == 1:
                take_back(self.lake, entry.stage)
            watch.restart()

    def _reuse(self, job: Job, earlier: Entry) -> None:
        entry = replace(earlier, run_id=job.run_id, state="reused", started=datetime.now(UTC))
        entry.error, entry.seconds = f"unchanged since run {earlier.run_id}", 0.0
        self.ended.append(entry)
        self.board.ended(entry)

    def _ended(self, future: Future[Entry]) -> None:
        job, _ = self.running.pop(future)
        try:
            entry = future.result()
        except Exception as err:  # the next run will find the row open, and close it as lost
            cause = f"it could not be recorded: {type(err).__name__}: {err}"
            entry = Entry(job.run_id, job.stage.name, {}, "", "failed", error=cause)
        self.ended.append(entry)
        self.vouched = read_vouched(self.lake)
        self.board.ended(entry)
        if self.waiting or self.running:
            self._page(job.run_id)

    def _note(self, job: Job) -> dict[str, Any]:
        """What it takes to repeat the run: its code, and the tables as they were before it."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        commit = git_commit(job.root)
        return {"run_id": job.run_id, "started": started, "commit": commit, "vouched": self.vouched}

    def _finish(self) -> None:
        if not self.noted:
            return
        if reused := [e for e in self.ended if e.state == "reused"]:
            enter(self.lake, *reused)
        for run_id in {entry.run_id for entry in self.ended}:
            render_run(self.lake, run_id)
        render_index(self.lake, self.hooks)

    def _page(self, run_id: str) -> None:
        render_run(self.lake, run_id, [e for e in self.ended if e.run_id == run_id])


@contextmanager
def _signals(end: Callable[[str], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the run in order; only the main thread can be told."""

    def stop(number: int, _: Any) -> None:
        end(f"the runner got {signal.Signals(number).name}")

    before = {}
    with suppress(ValueError):
        before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_jobs(
    lake: Lake,
    jobs: Sequence[Job],
    board: Board,
    hooks: Hooks,
    limit: int = 2,
    force: bool = False,
) -> list[Entry]:
    """Run jobs whose stages' leases are held; what has not changed is taken from earlier runs.

    Raises `StageError` when stages did not succeed; those that do not depend on them ran.
    """
    entries = prepare(lake, [job.stage.name for job in jobs], board)
    execution = Execution(lake, jobs, board, hooks, limit)

    def decide_for(job: Job) -> Decision:
        values, vouched = job.parameters.values, execution.vouched
        return decide(vouched, job.stage, values, entries, hooks.fingerprint)

    return execution.run(always if force else decide_for)
