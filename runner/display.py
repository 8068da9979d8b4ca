"""Show running stages: a live table on a terminal, plain lines elsewhere."""

import threading
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hm_reco.lake.runs import StageRun
from runner.monitor import StageMonitor

LOG_INTERVAL_SECONDS = 30.0
STATE_COLOURS = {"succeeded": "green", "cached": "cyan", "running": "dim", "stopped": "yellow"}


class RunDisplay:
    """Display the progress of a run; `quiet`: show nothing, `verbose`: also kernel output."""

    def __init__(self, console: Console, verbose: bool = False, quiet: bool = False) -> None:
        """Prepare the display; the `with` block starts it."""
        self.console, self.verbose, self.quiet = console, verbose, quiet
        self.running: dict[tuple[str, str], StageMonitor] = {}
        self.logged_at: dict[str, float] = {}
        self.lock = threading.Lock()
        self.live: Live | None = None
        if console.is_terminal and not quiet:
            self.live = Live(console=console, get_renderable=self._build_table, transient=True)

    def __enter__(self) -> Self:
        """Show the table on a terminal."""
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Remove the table; the lines above it stay."""
        if self.live:
            self.live.stop()

    def log(self, text: str, style: str = "") -> None:
        """Print a line."""
        if not self.quiet:
            with self.lock:
                self.console.print(Text(text, style), highlight=False, soft_wrap=True)

    def on_started(self, monitor: StageMonitor, reason: str) -> None:
        """Show that a stage starts, and why."""
        self.running[monitor.run_id, monitor.stage] = monitor
        self.logged_at[monitor.stage] = 0.0
        if not self.live:
            self.log(f"{monitor.stage:<11} started: {reason}", "dim")

    def refresh(self) -> None:
        """Without a table, log the progress of long stages every `LOG_INTERVAL_SECONDS`."""
        for monitor in list(self.running.values()):
            if (
                not self.live
                and monitor.seconds - self.logged_at.get(monitor.stage, 0.0) > LOG_INTERVAL_SECONDS
            ):
                self.logged_at[monitor.stage] = monitor.seconds
                location = ", ".join(part for part in (monitor.heading, monitor.progress) if part)
                progress = f"cell {monitor.cell}/{monitor.n_cells}"
                self.log(
                    f"{monitor.stage:<11} {progress}, {monitor.seconds:.0f} s: {location}", "dim"
                )

    def on_output(self, stage: str, text: str) -> None:
        """Log a kernel's output if `verbose`."""
        if self.verbose:
            for line in text.replace("\r", "\n").splitlines():
                if line.strip():
                    self.log(f"{stage} | {line}", "dim")

    def on_finished(self, stage_run: StageRun) -> None:
        """Show the end of a stage: its state and cost."""
        self.running.pop((stage_run.run_id, stage_run.stage), None)
        cost = f"{stage_run.seconds:6.1f} s, peak {stage_run.peak_memory_mb:5.0f} MB"
        line = f"{stage_run.stage:<11} {stage_run.state:<9} "
        line += stage_run.error if stage_run.state == "cached" else cost
        self.log(line, STATE_COLOURS.get(stage_run.state, "red"))

    def _build_table(self) -> Table:
        """Build the table of running stages: progress, time, memory, current heading."""
        table = Table(box=None, pad_edge=False, show_header=False)
        for monitor in list(self.running.values()):
            retry = f" (try {monitor.attempt})" if monitor.attempt > 1 else ""
            location = (
                f"{monitor.heading}  [{monitor.progress}]" if monitor.progress else monitor.heading
            )
            table.add_row(
                Text(f"{monitor.stage:<11}{retry}", "bold"),
                _format_bar(monitor.cell, monitor.n_cells),
                Text(
                    f"cell {monitor.cell}/{monitor.n_cells}" if monitor.n_cells else "starting",
                    "dim",
                ),
                Text(f"{monitor.seconds:6.1f} s"),
                Text(f"{monitor.peak_memory_mb:5.0f} MB", "dim"),
                Text(location, "dim", overflow="ellipsis", no_wrap=True),
            )
        return table


def _format_bar(done: int, total: int, width: int = 16) -> Text:
    filled = width * done // total if total else 0
    return Text("━" * filled, "green") + Text("─" * (width - filled), "dim")
