"""Runs stages: their notebooks through papermill, what they leave to the lake and the ledger."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import nbformat
import psutil

from hm_reco.core.lake import Lake, put_file, read_manifest, read_vouched, take_back
from reports.pages import add_banner, notebook_page
from runner.board import Board
from runner.cache import Decision, decide, key_of
from runner.graph import Stage, project_root
from runner.ledger import Entry, Outcome, enter, git_commit, read_ledger, write_json
from runner.parameters import Resolved
from runner.render import render_index, render_run
from runner.watch import Watch, watching

TEMPORARY = "hm-run-"  # and the runner's process id
BALLAST_BYTES = 8_000_000
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
        self.ended, self.stopped = list(ended), stop is not None


@dataclass(frozen=True)
class Job:
    """A stage that shall run, its parameters, and the name of the run it belongs to."""

    stage: Stage
    parameters: Resolved
    run_id: str
    root: Path = field(default_factory=project_root)  # the checkout that its code comes from


def _papermill(
    job: Job, output: Path, given: dict[str, Any], watch: Watch, board: Board
) -> Outcome:
    """Execute into `output`; the outcome is that of the kernel's process, not of the notebook."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    from runner.engine import ENGINE

    # an idle thread of LightGBM or Polars should not spin while another process works
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "TMPDIR": str(output.parent)}
    if job.root != project_root():
        env["PYTHONPATH"] = str(job.root)
    try:
        execute_notebook(
            job.stage.notebook,
            output,
            parameters=given,
            engine_name=ENGINE,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            watch=watch,
            listen=board.output,
            cwd_of_kernel=job.stage.notebook.parent,
            env=env,
        )
    except PapermillExecutionError as err:
        return watch.ordered or Outcome("failed", f"{err.ename}: {err.evalue}")
    except DeadKernelError as err:
        return watch.verdict() or Outcome("killed", str(err))
    except Exception as err:
        return watch.ordered or Outcome("failed", f"{type(err).__name__}: {err}")
    return watch.ordered or Outcome("succeeded")


def run_stage(lake: Lake, job: Job, key: dict[str, Any], watch: Watch, board: Board) -> Entry:
    """Run one stage once and keep what it left: notebook, report, manifest, ledger."""
    given = job.parameters.values | {"lake": lake.root, "run_id": job.run_id}
    entry = Entry(job.run_id, job.stage.name, given, git_commit(job.root), key=key)
    entry.origins, entry.attempt = job.parameters.origins, watch.attempt
    enter(lake, entry)
    with TemporaryDirectory(prefix=f"{TEMPORARY}{os.getpid()}-") as folder:
        output = Path(folder) / f"{entry.stage}.ipynb"
        with watching(watch, job.stage.timeout):
            outcome = _papermill(job, output, given, watch, board)
        if outcome.state == "succeeded":
            outcome = _take_manifest(lake, entry)
        entry.state, entry.error = outcome.state, outcome.cause[:4000]
        entry.seconds, entry.peak_memory_mb = watch.seconds, watch.peak_memory_mb
        entry.cpu_seconds = watch.cpu_seconds
        _make_room(lake)
        if output.is_file():
            _keep(lake, entry, nbformat.read(output, as_version=4))
    enter(lake, entry)
    return entry


def _keep(lake: Lake, entry: Entry, notebook: nbformat.NotebookNode) -> None:
    """Keep the executed notebook and its report; one that did not succeed says so on top."""
    if entry.state != "succeeded":
        add_banner(notebook, entry)
    entry.notebook = f"runs/{entry.run_id}/{entry.stage}.ipynb"
    entry.report = f"reports/{entry.run_id}/{entry.stage}.html"
    put_file(lake.path(entry.notebook), nbformat.writes(notebook))
    put_file(lake.path(entry.report), notebook_page(notebook, entry))


def _take_manifest(lake: Lake, entry: Entry) -> Outcome:
    """Take over what the notebook's manifest says, and add to it what the runner knows."""
    try:
        manifest = read_manifest(lake, entry.run_id, entry.stage)
    except FileNotFoundError:
        return Outcome("failed", "the notebook ended without calling write_manifest")
    for name in ("sources", "inputs", "outputs", "metrics"):
        setattr(entry, name, manifest.get(name, {}))
    known = {"parameters": entry.parameters, "key": entry.key, "commit": entry.git_commit}
    write_json(lake.path("runs", entry.run_id, f"{entry.stage}.json"), manifest | known)
    return Outcome("succeeded")


def _ballast(lake: Lake) -> Path | None:
    return None if lake.client else Path(lake.root) / "runs" / "ballast"


def _load_ballast(lake: Lake) -> None:
    """Keep some space of the lake's disk, so that a run that fills it can still be recorded."""
    path = _ballast(lake)
    if path and not path.is_file():
        put_file(path, bytes(BALLAST_BYTES))


def _make_room(lake: Lake) -> None:
    path = _ballast(lake)
    if path and path.is_file() and shutil.disk_usage(lake.root).free < BALLAST_BYTES:
        path.unlink()


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
    _load_ballast(lake)
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

    def __init__(self, lake: Lake, jobs: Sequence[Job], board: Board, limit: int) -> None:
        """Nothing runs yet."""
        self.lake, self.board, self.limit = lake, board, limit
        self.waiting = list(jobs)
        self.running: dict[Future[Entry], tuple[Job, Watch]] = {}
        self.ended: list[Entry] = []
        self.noted: set[str] = set()  # runs whose note is written
        self.bad: set[str] = set()  # stages after which nothing can run
        self.stop: Outcome | None = None

    def end(self, cause: str) -> None:
        """End what runs, and start nothing more."""
        self.stop = Outcome("stopped", cause)
        for _, watch in self.running.values():
            watch.end(self.stop)

    def run(self, decide_for: Callable[[Job], Decision] = always) -> list[Entry]:
        """Run all jobs that have to; raises `StageError` at the end when some did not succeed."""
        with ThreadPoolExecutor(self.limit) as pool, _signals(self.end), self.board:
            while (self.waiting and not self.stop) or self.running:
                self._start(pool, decide_for)
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
                write_json(self.lake.path("runs", job.run_id, "run.json"), self._note(job))
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
            entry = run_stage(self.lake, job, key, watch, self.board)
            again = entry.state in ("failed", "killed", "timeout") and not self.stop
            if not again or watch.attempt > job.stage.retries:
                return entry
            self.board.say(
                f"{entry.stage}: {entry.state} ({entry.error}); trying again, as declared"
            )
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
        self.board.ended(entry)
        if self.waiting or self.running:
            self._page(job.run_id)

    def _note(self, job: Job) -> dict[str, Any]:
        """What it takes to repeat the run: the stages, and the tables as they were before it."""
        stages = [j.stage.name for j in self.waiting if j.run_id == job.run_id]
        stages += [job.stage.name, *(e.stage for e in self.ended if e.run_id == job.run_id)]
        started = datetime.now(UTC).isoformat(timespec="seconds")
        return {"run_id": job.run_id, "started": started, "stages": stages} | {
            "commit": git_commit(job.root),
            "vouched": read_vouched(self.lake),
        }

    def _finish(self) -> None:
        if not self.noted:
            return
        if reused := [e for e in self.ended if e.state == "reused"]:
            enter(self.lake, *reused)
        for run_id in {entry.run_id for entry in self.ended}:
            self._page(run_id)
        render_index(self.lake)

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
    lake: Lake, jobs: Sequence[Job], board: Board, limit: int = 2, force: bool = False
) -> list[Entry]:
    """Run jobs whose stages' leases are held; what has not changed is taken from earlier runs.

    Raises `StageError` when stages did not succeed; those that do not depend on them ran.
    """
    entries = prepare(lake, [job.stage.name for job in jobs], board)

    def decide_for(job: Job) -> Decision:
        return decide(lake, job.stage, job.parameters.values, entries)

    return Execution(lake, jobs, board, limit).run(always if force else decide_for)
