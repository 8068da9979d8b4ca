"""Monitor the process of a stage's kernel: its progress, its cost, and how it ended."""

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
    """Return the number of processes that Linux killed for lack of memory since boot, or 0."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


@dataclass
class StageMonitor:
    """A running stage. Its thread writes the fields; the display and the time limit read them."""

    stage: str
    run_id: str = ""
    attempt: int = 1
    n_cells: int = 0
    cell: int = 0
    heading: str = ""
    progress: str = ""  # the latest line of progress
    started_at: float = field(default_factory=time.monotonic)
    process: Popen[bytes] | None = None
    stop_reason: Outcome | None = None  # why the runner killed the process, if it did
    peak_memory_mb: float = 0.0  # resident, of the kernel and all its children
    cpu_seconds: float = 0.0
    oom_kills: int = field(default_factory=_count_oom_kills)

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.monotonic() - self.started_at

    def restart(self) -> None:
        """Reset all fields for the next attempt."""
        fresh = StageMonitor(self.stage, self.run_id, self.attempt + 1)
        self.__dict__.update(fresh.__dict__)

    def attach(self, process: Popen[bytes]) -> None:
        """Attach the kernel's process after its start."""
        self.process = process
        with contextlib.suppress(OSError):  # out of memory: Linux kills the kernel, not the runner
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("500")
        if self.stop_reason:
            _kill_process_tree(process.pid)

    def stop(self, outcome: Outcome) -> None:
        """Kill the kernel and its children, and record the reason."""
        self.stop_reason = self.stop_reason or outcome
        if self.process and self.process.poll() is None:
            _kill_process_tree(self.process.pid)

    def sample(self) -> None:
        """Record the current memory and CPU time of the kernel and its children."""
        with contextlib.suppress(psutil.Error):
            if self.process:
                kernel = psutil.Process(self.process.pid)
                processes = [kernel, *kernel.children(recursive=True)]
                memory = sum(p.memory_info().rss for p in processes) / 1e6
                cpu = sum(sum(p.cpu_times()[:4]) for p in processes)
                self.peak_memory_mb = max(self.peak_memory_mb, memory)
                self.cpu_seconds = max(self.cpu_seconds, cpu)

    def get_exit_outcome(self) -> Outcome | None:
        """Return how the kernel's process ended, or None while it runs."""
        if self.stop_reason:
            return self.stop_reason
        code = self.process.poll() if self.process else None
        if code is None:
            return None
        if code >= 0:
            hint = "; this happens when it loses its Ray cluster" if Settings().ray_address else ""
            return Outcome("killed", f"the kernel ended by itself with exit code {code}{hint}")
        cause = f"the kernel was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            peak = f"its memory peaked at {self.peak_memory_mb:.0f} MB"
            if _count_oom_kills() > self.oom_kills:
                cause = f"out of memory: the system killed the kernel, {peak}"
            else:
                cause += f", {peak}"
        return Outcome("killed", cause)


def _kill_process_tree(pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        kernel = psutil.Process(pid)
        for process in [*kernel.children(recursive=True), kernel]:
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.contextmanager
def monitoring(monitor: StageMonitor, timeout: float | None) -> Iterator[None]:
    """Sample a stage's cost until it ends; stop it when it takes longer than `timeout` seconds."""
    finished = threading.Event()

    def poll() -> None:
        while not finished.wait(SAMPLE_SECONDS):
            monitor.sample()
            if timeout and monitor.seconds > timeout:
                monitor.stop(Outcome("timeout", f"the time limit of {timeout:g} s was reached"))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
