"""Real faults: killed kernels and runners, a failing S3, two runs at once, SIGTERM, a full disk.

After each: run again, and the tables are those of a run that nobody disturbed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import psutil
import pytest

from hm_reco.core.lake import STAGE_OF, Lake, has_table, open_lake, scan, table_names
from hm_reco.core.sample import write_sample
from runner.ledger import read_ledger
from tests.faults import FaultyProxy

HM = Path(sys.executable).with_name("hm")
STAGES = ["ingestion", "processing", "eda", "training", "inference"]
QUICK = ["evaluation_weeks=1", "training_weeks=2", "rounds=20"]
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_sample(folder, 500)
    return folder


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
    for name in table_names(now):
        if name.startswith("runs/") or not has_table(now, name):
            continue
        rows = scan(now, name).collect()
        rows = rows.drop("version", "created", "run_id", "tables", strict=False)
        found[name] = rows.sort(rows.columns) if rows.height else rows
    return found


def assert_same(lake: Lake, other: Lake) -> None:
    one, two = contents(lake), contents(other)
    assert one.keys() == two.keys()
    for name, rows in one.items():
        assert rows.equals(two[name]), (name, rows.height, two[name].height)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = str(tmp_path_factory.mktemp("undisturbed") / "lake")
    finish(start(lake, data))
    return open_lake(lake)


def wait_until(true: Callable[[], object], process: subprocess.Popen[str], what: str) -> None:
    end = time.monotonic() + 120
    while not true():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


def kernels(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "ipykernel_launcher" in " ".join(child.cmdline())]


def files_of(lake: Lake, stage: str) -> set[str]:
    folders = [folder for folder, owner in STAGE_OF.items() if owner == stage]
    return {str(path) for folder in folders for path in lake.path(folder).rglob("*.*")}


def run_until_it_writes(lake: Lake, data: Path, stage: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run up to a stage, and go on once the stage's kernel has left its first file."""
    before, begun = files_of(lake, stage), len(read_ledger(lake))
    process = start(lake.root, data, *STAGES[: STAGES.index(stage) + 1])

    def running() -> bool:
        return any(e.stage == stage and e.state == "running" for e in read_ledger(lake)[begun:])

    wait_until(running, process, f"{stage} to start")
    wait_until(lambda: kernels(process), process, f"{stage}'s kernel")
    if stage in STAGE_OF.values():
        wait_until(lambda: files_of(lake, stage) - before, process, f"{stage} to write")
    else:
        time.sleep(1.5)
    yield process


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_kill_9_of_kernel_and_runner_at_each_stage(kind, data, undisturbed, tmp_path, request):
    root = request.getfixturevalue("s3") + "/killed" if kind == "s3" else str(tmp_path / "lake")
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
        last = [e.state for e in read_ledger(lake) if e.stage == stage]
        assert last == ["killed", "running"]  # nobody was left to enter more
        own = [name for name, owner in STAGE_OF.items() if owner == stage]
        seen = {n: rows for n, rows in contents(lake).items() if n.split("/")[0] in own}
        assert seen.keys() == {n for n in before if n.split("/")[0] in own}  # invisible
    finish(start(lake.root, data))
    assert_same(lake, undisturbed)
    states = {stage: [e.state for e in read_ledger(lake) if e.stage == stage] for stage in STAGES}
    for stage in STAGES:
        real = [state for state in states[stage] if state != "reused"]
        assert real == ["killed", "lost", "succeeded"], (stage, states[stage])
    assert not list(lake.path().rglob("*.part"))


def test_sigterm_ends_a_run_in_order(data, undisturbed, tmp_path):
    lake = open_lake(str(tmp_path / "lake"))
    for process in run_until_it_writes(lake, data, "processing"):
        process.send_signal(signal.SIGTERM)
        output = finish(process, 128 + signal.SIGTERM)
        assert "the runner got SIGTERM" in output
    [*_, entry] = read_ledger(lake)
    assert (entry.stage, entry.state) == ("processing", "stopped")
    assert "did not succeed: stopped" in lake.path(entry.notebook).read_text()
    finish(start(lake.root, data))
    assert_same(lake, undisturbed)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_two_runs_at_once_do_not_mix(kind, data, undisturbed, tmp_path, request):
    root = request.getfixturevalue("s3") + "/two" if kind == "s3" else str(tmp_path / "lake")
    both = [start(root, data) for _ in range(2)]
    wait_until(lambda: any(kernels(process) for process in both), both[0], "a kernel")
    refused = start(root, data, "--wait", "0")
    assert "of this lake is in use by process" in finish(refused, 1)
    outputs = [finish(process) for process in both]
    assert sum("is in use by process" in output for output in outputs) == 1
    assert sum("nothing to do" in output for output in outputs) == 1
    lake = open_lake(root)
    assert [entry.state for entry in read_ledger(lake)] == ["succeeded"] * 5
    assert_same(lake, undisturbed)


def test_a_failing_s3_delays_but_changes_nothing(data, undisturbed, s3):
    proxy = FaultyProxy(os.environ["AWS_ENDPOINT_URL"], share=0.05, seed=7)
    root = f"{s3}/faulty"
    for _ in range(4):
        process = start(root, data, AWS_ENDPOINT_URL=proxy.url)
        output, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            break
    assert process.returncode == 0, output
    assert all(proxy.met[fault] > 3 for fault in ("500", "503", "cut", "lost answer", "slow"))
    proxy.shutdown()
    assert_same(open_lake(root), undisturbed)
    done = [e.stage for e in read_ledger(open_lake(root)) if e.state == "succeeded"]
    assert sorted(done) == sorted(STAGES)


def test_a_full_disk_fails_the_stage_and_loses_nothing(data, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        lake = open_lake(str(disk / "lake"))
        finish(start(lake.root, data, "--force"))
        before = contents(lake)
        free = psutil.disk_usage(str(disk)).free
        (disk / "fill").write_bytes(bytes(max(free - 60_000, 0)))
        output = finish(start(lake.root, data, "--force"), 1)
        assert "No space left on device" in output
        failed = [e for e in read_ledger(lake) if e.state == "failed"]
        assert failed and "No space left on device" in failed[-1].error
        after = contents(lake)
        assert all(rows.equals(after[name]) for name, rows in before.items())
        (disk / "fill").unlink()
        finish(start(lake.root, data))
        one, two = contents(lake), contents(undisturbed)
        for name in two.keys() - {"artifacts/registry"}:
            assert one[name].equals(two[name]), name
    finally:
        subprocess.run(["umount", str(disk)], check=True)
