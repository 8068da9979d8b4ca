"""Disturbed runs of the whole pipeline, and a faulty proxy in front of S3."""

import http.client
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import polars as pl
import psutil

from hm_reco.data.ingest_log import INGEST_LOG
from hm_reco.lake.runs import read_runs
from hm_reco.lake.storage import TABLE_OWNERS, Lake, list_owned_folders, open_lake
from hm_reco.lake.tables import has_table, list_table_names, scan
from runner.graph import load_pipeline

HM = Path(sys.executable).with_name("hm")
STAGES = [*load_pipeline()]
QUICK_PARAMETERS = ["evaluation_weeks=1", "training_weeks=2", "rounds=20", "tower_examples=0"]
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
INTERNAL_ERROR = (
    b"<Error><Code>InternalError</Code><Message>We had a problem. Try again.</Message></Error>"
)
FAULTS = ("503", "500", "cut", "lost response", "slow")


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to `target`; a random share of them gets one of `FAULTS`."""

    daemon_threads = True

    def __init__(self, target: str, fault_share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.fault_share, self.rng = (
            urlsplit(target).netloc,
            fault_share,
            random.Random(seed),
        )
        self.fault_counts: Counter[str] = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw_fault(self) -> str:
        fault = self.rng.choice(FAULTS) if self.rng.random() < self.fault_share else ""
        self.fault_counts[fault or "none"] += 1
        return fault

    def handle_error(self, request, client_address) -> None:
        """Ignore connections that the proxy dropped."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.draw_fault()
        if fault in ("500", "503"):
            return self._send_response(
                int(fault), {}, INTERNAL_ERROR if fault == "500" else SLOW_DOWN
            )
        if fault == "cut":
            return self._drop_connection()
        if fault == "slow":
            time.sleep(1)
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return (
            self._drop_connection()
            if fault == "lost response"
            else self._send_response(response.status, dict(response.getheaders()), content)
        )

    def _send_response(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        original_size = headers.get("Content-Length", headers.get("content-length"))
        is_head = self.command == "HEAD" and original_size
        self.send_header("Content-Length", original_size if is_head else str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _drop_connection(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815

    def log_message(self, format, *args) -> None:
        """Log nothing."""


def start_run(lake: str, data: Path, *args: str, **environment: str) -> subprocess.Popen[str]:
    includes_training = "training" in args or not {*args} & {*STAGES}
    parameters = (
        [arg for assignment in QUICK_PARAMETERS for arg in ("-p", assignment)]
        if includes_training
        else []
    )
    command = [str(HM), "run", "--lake", lake, "--data", str(data), "--jobs", "1", *parameters]
    return subprocess.Popen(
        [*command, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ENVIRONMENT, **environment},
    )


def finish_run(process: subprocess.Popen[str], exit_code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == exit_code, output
    return output


def read_tables(lake: Lake) -> dict[str, pl.DataFrame]:
    """The published rows of each table, without run names and times."""
    tables = {}
    reopened = open_lake(lake.root)
    for name in list_table_names(reopened):
        is_metadata = name.startswith("runs/") or name in (
            INGEST_LOG,
            "processed/input_versions",
        )  # of times, versions
        if is_metadata or not has_table(reopened, name):
            continue
        rows = scan(reopened, name).collect()
        rows = rows.drop("version", "created", "run_id", "tables", "notebook", strict=False)
        tables[name] = rows.sort(rows.columns) if rows.height else rows
    return tables


def assert_same_tables(lake: Lake, expected_lake: Lake) -> None:
    actual, expected = read_tables(lake), read_tables(expected_lake)
    assert actual.keys() == expected.keys()
    for name, rows in actual.items():
        assert rows.equals(expected[name]), (name, rows.height, expected[name].height)


def wait_during_run(
    condition: Callable[[], object], process: subprocess.Popen[str], description: str
) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before {description}: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"timed out waiting for {description}"
        time.sleep(0.1)


def list_kernels(process: subprocess.Popen[str]) -> list[psutil.Process]:
    kernels = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # the process has ended
            if "ipykernel_launcher" in " ".join(child.cmdline()):
                kernels.append(child)
    return kernels


def list_files(lake: Lake, stage: str) -> set[str]:
    return {
        str(path) for folder in list_owned_folders(stage) for path in lake.path(folder).rglob("*.*")
    }


def run_until_first_write(lake: Lake, data: Path, stage: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run up to `stage`; yield it when the stage's kernel has written a first file."""
    files_before, n_runs = list_files(lake, stage), len(read_runs(lake))
    process = start_run(lake.root, data, *STAGES[: STAGES.index(stage) + 1])

    def is_running() -> bool:
        return any(e.stage == stage and e.state == "running" for e in read_runs(lake)[n_runs:])

    wait_during_run(is_running, process, f"{stage} to start")
    wait_during_run(lambda: list_kernels(process), process, f"{stage}'s kernel")
    if stage in TABLE_OWNERS.values():
        wait_during_run(
            lambda: list_files(lake, stage) - files_before, process, f"{stage} to write"
        )
    else:
        time.sleep(1.5)
    yield process


def kill_at_each_stage(root: str, data: Path, reference_lake: Lake) -> None:
    """Kill the kernel, then the runner, at each stage; the final tables equal the reference."""
    lake = open_lake(root)
    for stage in STAGES:
        before = read_tables(lake)
        for process in run_until_first_write(lake, data, stage):
            [kernel] = list_kernels(process)
            kernel.kill()
            output = finish_run(process, 1)
            assert f"stage {stage!r} killed: the kernel was killed by SIGKILL" in output
        for process in run_until_first_write(lake, data, stage):
            [kernel] = list_kernels(process)
            process.kill()
            process.communicate()
            psutil.wait_procs([kernel], timeout=20)
            assert not kernel.is_running(), "a kernel outlives its runner"
        last_states = [e.state for e in read_runs(lake) if e.stage == stage]
        assert last_states == ["killed", "running"]  # the killed runner recorded no end
        own_folders = [name for name, owner in TABLE_OWNERS.items() if owner == stage]
        visible_tables = {
            n: rows for n, rows in read_tables(lake).items() if n.split("/")[0] in own_folders
        }
        assert visible_tables.keys() == {
            n for n in before if n.split("/")[0] in own_folders
        }  # not published
    finish_run(start_run(lake.root, data))
    assert_same_tables(lake, reference_lake)
    states = {stage: [e.state for e in read_runs(lake) if e.stage == stage] for stage in STAGES}
    for stage in STAGES:
        executed_states = [state for state in states[stage] if state != "cached"]
        assert executed_states == ["killed", "lost", "succeeded"], (stage, states[stage])
    assert not list(lake.path().rglob("*.part"))


def kill_starting_kernel(root: str, data: Path) -> None:
    """Kill a kernel while it starts."""
    process = start_run(root, data, "ingestion")
    wait_during_run(lambda: list_kernels(process), process, "a kernel")
    list_kernels(process)[0].kill()
    output = finish_run(process, 1)
    assert "stage 'ingestion' killed: the kernel was killed by SIGKILL" in output


def run_two_concurrently(root: str, data: Path, reference_lake: Lake) -> None:
    """Start two runs: one waits, then finds all stages cached."""
    processes = [start_run(root, data) for _ in range(2)]
    wait_during_run(
        lambda: any(list_kernels(process) for process in processes), processes[0], "a kernel"
    )
    third_run = start_run(root, data, "--wait", "0")
    assert "of this lake is in use by process" in finish_run(third_run, 1)
    outputs = [finish_run(process) for process in processes]
    assert sum("is in use by process" in output for output in outputs) == 1
    assert sum("nothing to do" in output for output in outputs) == 1
    lake = open_lake(root)
    assert [stage_run.state for stage_run in read_runs(lake)] == ["succeeded"] * 5
    assert_same_tables(lake, reference_lake)
