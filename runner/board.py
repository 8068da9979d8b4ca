"""What a person sees while stages run: a live table on a terminal, plain lines elsewhere."""

import threading
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hm_reco.lake.runs import Entry
from runner.watch import Watch

TELL_SECONDS = 30.0
COLOURS = {"succeeded": "green", "reused": "cyan", "running": "dim", "stopped": "yellow"}


class Board:
    """Told what happens; `quiet` shows nothing of it, `verbose` also what the kernels print."""

    def __init__(self, console: Console, verbose: bool = False, quiet: bool = False) -> None:
        """Nothing is shown before the `with` block."""
        self.console, self.verbose, self.quiet = console, verbose, quiet
        self.running: dict[tuple[str, str], Watch] = {}
        self.told: dict[str, float] = {}
        self.lock = threading.Lock()
        self.live: Live | None = None
        if console.is_terminal and not quiet:
            self.live = Live(console=console, get_renderable=self._table, transient=True)

    def __enter__(self) -> Self:
        """Show the table, on a terminal."""
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Take the table away; the lines above it stay."""
        if self.live:
            self.live.stop()

    def say(self, text: str, style: str = "") -> None:
        """Print a line of its own."""
        if not self.quiet:
            with self.lock:
                self.console.print(Text(text, style), highlight=False, soft_wrap=True)

    def started(self, watch: Watch, reason: str) -> None:
        """A stage starts, because of `reason`."""
        self.running[watch.run_id, watch.stage] = watch
        self.told[watch.stage] = 0.0
        if not self.live:
            self.say(f"{watch.stage:<11} started: {reason}", "dim")

    def tick(self) -> None:
        """Time passes; where no table is shown, a long stage tells now and then where it is."""
        for watch in list(self.running.values()):
            if not self.live and watch.seconds - self.told.get(watch.stage, 0.0) > TELL_SECONDS:
                self.told[watch.stage] = watch.seconds
                where = ", ".join(part for part in (watch.heading, watch.note) if part)
                cells = f"cell {watch.cell}/{watch.cells}"
                self.say(f"{watch.stage:<11} {cells}, {watch.seconds:.0f} s: {where}", "dim")

    def output(self, stage: str, text: str) -> None:
        """A stage's kernel printed something."""
        if self.verbose:
            for line in text.replace("\r", "\n").splitlines():
                if line.strip():
                    self.say(f"{stage} | {line}", "dim")

    def ended(self, entry: Entry) -> None:
        """A stage has ended."""
        self.running.pop((entry.run_id, entry.stage), None)
        cost = f"{entry.seconds:6.1f} s, peak {entry.peak_memory_mb:5.0f} MB"
        line = f"{entry.stage:<11} {entry.state:<9} "
        line += entry.error if entry.state == "reused" else cost
        self.say(line, COLOURS.get(entry.state, "red"))

    def _table(self) -> Table:
        """The stages that run: how far, where, for how long."""
        table = Table(box=None, pad_edge=False, show_header=False)
        for watch in list(self.running.values()):
            retry = f" (try {watch.attempt})" if watch.attempt > 1 else ""
            where = f"{watch.heading}  [{watch.note}]" if watch.note else watch.heading
            table.add_row(
                Text(f"{watch.stage:<11}{retry}", "bold"),
                _bar(watch.cell, watch.cells),
                Text(f"cell {watch.cell}/{watch.cells}" if watch.cells else "starting", "dim"),
                Text(f"{watch.seconds:6.1f} s"),
                Text(f"{watch.peak_memory_mb:5.0f} MB", "dim"),
                Text(where, "dim", overflow="ellipsis", no_wrap=True),
            )
        return table


def _bar(done: int, total: int, width: int = 16) -> Text:
    full = width * done // total if total else 0
    return Text("━" * full, "green") + Text("─" * (width - full), "dim")
