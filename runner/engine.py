"""A papermill engine that monitors the kernel: its process, its cells, its output."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from traitlets import Any as AnyTrait

from runner.monitor import StageMonitor

ENGINE = "hm"
KERNEL_ARGUMENTS = [
    "--IPKernelApp.log_level=ERROR",
    "--ZMQInteractiveShell.system_raise_on_error=True",  # a failing `!command` fails its cell
]
if sys.platform == "linux":  # PR_SET_PDEATHSIG: the kernel dies with the runner
    KERNEL_ARGUMENTS.append("--IPKernelApp.exec_lines=import ctypes; ctypes.CDLL(None).prctl(1, 9)")


class StageClient(PapermillNotebookClient):
    """Report the running cell to a `StageMonitor` and the kernel's output to `on_output`."""

    monitor: Any = AnyTrait()  # a StageMonitor
    on_output: Any = AnyTrait()  # called with stage and text

    def start_new_kernel_client(self, **kwargs: Any) -> Any:
        """Attach the started kernel to the monitor and wait until it answers."""
        self.monitor.attach(self.km.provisioner.process)
        return super().start_new_kernel_client(**kwargs)

    def papermill_execute_cells(self) -> None:
        """Run all cells."""
        self.monitor.n_cells = len(self.nb.cells)
        super().papermill_execute_cells()
        self.monitor.sample()

    def execute_cell(self, cell: Any, cell_index: int, *args: Any, **kwargs: Any) -> Any:
        """Run one cell."""
        self.monitor.cell = cell_index + 1
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            self.monitor.heading = cell.source.splitlines()[0].lstrip("# ")
            self.monitor.progress = ""
        return super().execute_cell(cell, cell_index, *args, **kwargs)

    def process_message(self, msg: Any, *args: Any, **kwargs: Any) -> Any:
        """Process one message of the kernel: record progress and forward output."""
        if msg["header"]["msg_type"] == "stream":
            text = msg["content"]["text"]
            lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
            if lines and text.startswith("\r"):
                self.monitor.progress = lines[-1].strip()
            self.on_output(self.monitor.stage, text)
        return super().process_message(msg, *args, **kwargs)


class StageEngine(NBClientEngine):
    """Run the cells with `StageClient`."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        *,
        monitor: StageMonitor,
        on_output: Callable[[str, str], None],
        cwd_of_kernel: Path,
        env: dict[str, str],
        **_: Any,
    ) -> Any:
        """Execute a notebook; papermill calls this."""
        client = StageClient(
            nb_man,
            kernel_name=kernel_name,
            startup_timeout=60,
            shutdown_kernel="immediate",  # all cells have run; a graceful shutdown takes 0.6 s
            extra_arguments=KERNEL_ARGUMENTS,
            monitor=monitor,
            on_output=on_output,
        )
        return client.execute(cwd=str(cwd_of_kernel), env=env)


papermill_engines.register(ENGINE, StageEngine)
