"""Real faults on a folder: killed kernels and runners, two runs at once, SIGTERM, a full disk.

After each: run again, and the tables are those of a run that nobody disturbed.
"""

import signal

import psutil

from hm_reco.lake.runs import read_runs
from hm_reco.lake.storage import open_lake
from tests.faults import (
    assert_same,
    contents,
    finish,
    kill_a_kernel_that_starts,
    kill_at_each_stage,
    run_two_at_once,
    run_until_it_writes,
    start,
)


def test_kill_9_of_kernel_and_runner_at_each_stage(small_data, undisturbed, tmp_path):
    kill_at_each_stage(str(tmp_path / "lake"), small_data, undisturbed)


def test_a_kernel_killed_while_it_starts_is_told_as_killed(small_data, tmp_path):
    kill_a_kernel_that_starts(str(tmp_path / "lake"), small_data)


def test_two_runs_at_once_do_not_mix(small_data, undisturbed, tmp_path):
    run_two_at_once(str(tmp_path / "lake"), small_data, undisturbed)


def test_sigterm_ends_a_run_in_order(small_data, undisturbed, tmp_path):
    lake = open_lake(str(tmp_path / "lake"))
    for process in run_until_it_writes(lake, small_data, "processing"):
        process.send_signal(signal.SIGTERM)
        output = finish(process, 128 + signal.SIGTERM)
        assert "the runner got SIGTERM" in output
    [*_, entry] = read_runs(lake)
    assert (entry.stage, entry.state) == ("processing", "stopped")
    assert "did not succeed: stopped" in lake.path(entry.notebook).read_text()
    finish(start(lake.root, small_data))
    assert_same(lake, undisturbed)


def test_a_full_disk_fails_the_stage_and_loses_nothing(small_data, undisturbed, small_disk):
    lake = open_lake(str(small_disk / "lake"))
    finish(start(lake.root, small_data, "--force"))
    before = contents(lake)
    free = psutil.disk_usage(str(small_disk)).free
    (small_disk / "fill").write_bytes(bytes(max(free - 60_000, 0)))
    output = finish(start(lake.root, small_data, "--force", "-p", "reload=true"), 1)
    assert "No space left on device" in output
    failed = [e for e in read_runs(lake) if e.state == "failed"]
    assert failed and "No space left on device" in failed[-1].error
    after = contents(lake)
    assert all(rows.equals(after[name]) for name, rows in before.items())
    (small_disk / "fill").unlink()
    finish(start(lake.root, small_data))
    one, two = contents(lake), contents(undisturbed)
    for name in two.keys() - {"artifacts/registry"}:
        assert one[name].equals(two[name]), name
