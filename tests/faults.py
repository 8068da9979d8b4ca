"""Disturbed runs of the whole pipeline, and a proxy before S3 that misbehaves."""

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
QUICK = ["evaluation_weeks=1", "training_weeks=2", "rounds=20", "tower_examples=0"]
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BROKEN = b"<Error><Code>InternalError</Code><Message>We had a problem. Try again.</Message></Error>"
FAULTS = ("503", "500", "cut", "lost answer", "slow")


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to `target`; a share of them, by lot, meets one of `FAULTS`."""

    daemon_threads = True

    def __init__(self, target: str, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.share, self.lot = urlsplit(target).netloc, share, random.Random(seed)
        self.met: Counter[str] = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> str:
        fault = self.lot.choice(FAULTS) if self.lot.random() < self.share else ""
        self.met[fault or "none"] += 1
        return fault

    def handle_error(self, request, client_address) -> None:
        """A connection that we cut is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.draw()
        if fault in ("500", "503"):
            return self._answer(int(fault), {}, BROKEN if fault == "500" else BUSY)
        if fault == "cut":
            return self._cut()
        if fault == "slow":
            time.sleep(1)
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return (
            self._cut()
            if fault == "lost answer"
            else self._answer(answer.status, dict(answer.getheaders()), content)
        )

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        size = headers.get("Content-Length", headers.get("content-length"))
        head = self.command == "HEAD" and size
        self.send_header("Content-Length", size if head else str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815

    def log_message(self, format, *args) -> None:
        """Say nothing."""


def start(lake: str, data: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    whole = "training" in words or not {*words} & {*STAGES}
    parameters = [word for text in QUICK for word in ("-p", text)] if whole else []
    command = [str(HM), "run", "--lake", lake, "--data", str(data), "--jobs", "1", *parameters]
    return subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ENVIRONMENT, **environment},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def contents(lake: Lake) -> dict[str, pl.DataFrame]:
    """What readers see of each table, without the names and times of runs."""
    found = {}
    now = open_lake(lake.root)
    for name in list_table_names(now):
        told = name.startswith("runs/") or name in (
            INGEST_LOG,
            "processed/input_versions",
        )  # of times, versions
        if told or not has_table(now, name):
            continue
        rows = scan(now, name).collect()
        rows = rows.drop("version", "created", "run_id", "tables", "notebook", strict=False)
        found[name] = rows.sort(rows.columns) if rows.height else rows
    return found


def assert_same(lake: Lake, other: Lake) -> None:
    one, two = contents(lake), contents(other)
    assert one.keys() == two.keys()
    for name, rows in one.items():
        assert rows.equals(two[name]), (name, rows.height, two[name].height)


def wait_until(true: Callable[[], object], process: subprocess.Popen[str], what: str) -> None:
    end = time.monotonic() + 120
    while not true():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


def kernels(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if "ipykernel_launcher" in " ".join(child.cmdline()):
                found.append(child)
    return found


def files_of(lake: Lake, stage: str) -> set[str]:
    return {
        str(path) for folder in list_owned_folders(stage) for path in lake.path(folder).rglob("*.*")
    }


def run_until_it_writes(lake: Lake, data: Path, stage: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run up to a stage, and go on once the stage's kernel has left its first file."""
    before, begun = files_of(lake, stage), len(read_runs(lake))
    process = start(lake.root, data, *STAGES[: STAGES.index(stage) + 1])

    def running() -> bool:
        return any(e.stage == stage and e.state == "running" for e in read_runs(lake)[begun:])

    wait_until(running, process, f"{stage} to start")
    wait_until(lambda: kernels(process), process, f"{stage}'s kernel")
    if stage in TABLE_OWNERS.values():
        wait_until(lambda: files_of(lake, stage) - before, process, f"{stage} to write")
    else:
        time.sleep(1.5)
    yield process


def kill_at_each_stage(root: str, data: Path, undisturbed: Lake) -> None:
    """Kill kernel and runner, one after the other, at each stage; then all is as if undisturbed."""
    lake = open_lake(root)
    for stage in STAGES:
        before = contents(lake)
        for process in run_until_it_writes(lake, data, stage):
            [kernel] = kernels(process)
            kernel.kill()
            output = finish(process, 1)
            assert f"stage {stage!r} killed: the kernel was killed by SIGKILL" in output
        for process in run_until_it_writes(lake, data, stage):
            [kernel] = kernels(process)
            process.kill()
            process.communicate()
            psutil.wait_procs([kernel], timeout=20)
            assert not kernel.is_running(), "a kernel goes on that nobody watches"
        last = [e.state for e in read_runs(lake) if e.stage == stage]
        assert last == ["killed", "running"]  # nobody was left to enter more
        own = [name for name, owner in TABLE_OWNERS.items() if owner == stage]
        seen = {n: rows for n, rows in contents(lake).items() if n.split("/")[0] in own}
        assert seen.keys() == {n for n in before if n.split("/")[0] in own}  # invisible
    finish(start(lake.root, data))
    assert_same(lake, undisturbed)
    states = {stage: [e.state for e in read_runs(lake) if e.stage == stage] for stage in STAGES}
    for stage in STAGES:
        real = [state for state in states[stage] if state != "cached"]
        assert real == ["killed", "lost", "succeeded"], (stage, states[stage])
    assert not list(lake.path().rglob("*.part"))


def kill_a_kernel_that_starts(root: str, data: Path) -> None:
    """Kill a kernel that has hardly begun."""
    process = start(root, data, "ingestion")
    wait_until(lambda: kernels(process), process, "a kernel")
    kernels(process)[0].kill()
    output = finish(process, 1)
    assert "stage 'ingestion' killed: the kernel was killed by SIGKILL" in output


def run_two_at_once(root: str, data: Path, undisturbed: Lake) -> None:
    """Start two runs; one waits, and finds nothing to do."""
    both = [start(root, data) for _ in range(2)]
    wait_until(lambda: any(kernels(process) for process in both), both[0], "a kernel")
    refused = start(root, data, "--wait", "0")
    assert "of this lake is in use by process" in finish(refused, 1)
    outputs = [finish(process) for process in both]
    assert sum("is in use by process" in output for output in outputs) == 1
    assert sum("nothing to do" in output for output in outputs) == 1
    lake = open_lake(root)
    assert [entry.state for entry in read_runs(lake)] == ["succeeded"] * 5
    assert_same(lake, undisturbed)
