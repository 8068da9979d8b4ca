"""Watches the process of a stage's kernel: how far it is, what it costs, how it ended."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import psutil

from hm_reco.lake.runs import Outcome
from hm_reco.lake.settings import Settings

SAMPLE_SECONDS = 0.1


def _count_oom_kills() -> int:
    """How many processes Linux killed for lack of memory since the machine started; else 0."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


@dataclass
class Watch:
    """A stage that runs. The thread that runs it writes; the board and the time limit read."""

    stage: str
    run_id: str = ""
    attempt: int = 1
    cells: int = 0
    cell: int = 0
    heading: str = ""
    note: str = ""  # the newest line of progress
    started: float = field(default_factory=time.monotonic)
    process: Popen[bytes] | None = None
    ordered: Outcome | None = None  # why we ended the process, if we did
    peak_memory_mb: float = 0.0  # resident, the kernel with all its children
    cpu_seconds: float = 0.0
    oom_kills: int = field(default_factory=_count_oom_kills)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def restart(self) -> None:
        """Forget all of this attempt, for the next one."""
        fresh = Watch(self.stage, self.run_id, self.attempt + 1)
        self.__dict__.update(fresh.__dict__)

    def attach(self, process: Popen[bytes]) -> None:
        """The kernel's process is there."""
        self.process = process
        with contextlib.suppress(OSError):  # when memory runs out, the kernel goes, not the runner
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("500")
        if self.ordered:
            _kill(process.pid)

    def end(self, outcome: Outcome) -> None:
        """Kill the kernel and its children, for the reason given."""
        self.ordered = self.ordered or outcome
        if self.process and self.process.poll() is None:
            _kill(self.process.pid)

    def sample(self) -> None:
        """Note memory and CPU time of the kernel and its children as they are now."""
        with contextlib.suppress(psutil.Error):
            if self.process:
                kernel = psutil.Process(self.process.pid)
                family = [kernel, *kernel.children(recursive=True)]
                memory = sum(p.memory_info().rss for p in family) / 1e6
                cpu = sum(sum(p.cpu_times()[:4]) for p in family)
                self.peak_memory_mb = max(self.peak_memory_mb, memory)
                self.cpu_seconds = max(self.cpu_seconds, cpu)

    def verdict(self) -> Outcome | None:
        """How the kernel's process ended, if it did before it was asked to."""
        if self.ordered:
            return self.ordered
        code = self.process.poll() if self.process else None
        if code is None:
            return None
        if code >= 0:
            lost = "; so it ends when its Ray cluster is lost" if Settings().cluster else ""
            return Outcome("killed", f"the kernel ended by itself with exit code {code}{lost}")
        cause = f"the kernel was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            peak = f"its memory peaked at {self.peak_memory_mb:.0f} MB"
            if _count_oom_kills() > self.oom_kills:
                cause = f"out of memory: the system killed the kernel, {peak}"
            else:
                cause += f", {peak}"
        return Outcome("killed", cause)


def _kill(pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        kernel = psutil.Process(pid)
        for process in [*kernel.children(recursive=True), kernel]:
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.contextmanager
def watching(watch: Watch, timeout: float | None) -> Iterator[None]:
    """Sample a stage's cost until it ends, and end it when it takes longer than `timeout`."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(SAMPLE_SECONDS):
            watch.sample()
            if timeout and watch.seconds > timeout:
                watch.end(Outcome("timeout", f"the time limit of {timeout:g} s was reached"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
