"""Real faults on a local lake: killed kernels and runners, concurrent runs, SIGTERM, full disk.

After each fault, a second run gives the tables of an undisturbed run.
"""

import signal

import psutil

from hm_reco.lake.runs import read_runs
from hm_reco.lake.storage import open_lake
from tests.fault_injection import (
    assert_same_tables,
    finish_run,
    kill_at_each_stage,
    kill_starting_kernel,
    read_tables,
    run_two_concurrently,
    run_until_first_write,
    start_run,
)


def test_run_recovers_from_sigkill_at_each_stage(small_data, reference_lake, tmp_path):
    kill_at_each_stage(str(tmp_path / "lake"), small_data, reference_lake)


def test_kernel_killed_at_start_is_reported_as_killed(small_data, tmp_path):
    kill_starting_kernel(str(tmp_path / "lake"), small_data)


def test_concurrent_runs_do_not_mix(small_data, reference_lake, tmp_path):
    run_two_concurrently(str(tmp_path / "lake"), small_data, reference_lake)


def test_run_on_sigterm_stops_cleanly(small_data, reference_lake, tmp_path):
    lake = open_lake(str(tmp_path / "lake"))
    for process in run_until_first_write(lake, small_data, "processing"):
        process.send_signal(signal.SIGTERM)
        output = finish_run(process, 128 + signal.SIGTERM)
        assert "the runner got SIGTERM" in output
    [*_, stage_run] = read_runs(lake)
    assert (stage_run.stage, stage_run.state) == ("processing", "stopped")
    assert "did not succeed: stopped" in lake.path(stage_run.notebook).read_text()
    finish_run(start_run(lake.root, small_data))
    assert_same_tables(lake, reference_lake)


def test_full_disk_fails_stage_without_data_loss(small_data, reference_lake, small_disk):
    lake = open_lake(str(small_disk / "lake"))
    finish_run(start_run(lake.root, small_data, "--force"))
    before = read_tables(lake)
    free_bytes = psutil.disk_usage(str(small_disk)).free
    (small_disk / "fill").write_bytes(bytes(max(free_bytes - 60_000, 0)))
    output = finish_run(start_run(lake.root, small_data, "--force", "-p", "reload=true"), 1)
    assert "No space left on device" in output
    failed_runs = [e for e in read_runs(lake) if e.state == "failed"]
    assert failed_runs and "No space left on device" in failed_runs[-1].error
    after = read_tables(lake)
    assert all(rows.equals(after[name]) for name, rows in before.items())
    (small_disk / "fill").unlink()
    finish_run(start_run(lake.root, small_data))
    actual, expected = read_tables(lake), read_tables(reference_lake)
    for name in expected.keys() - {"artifacts/registry"}:
        assert actual[name].equals(expected[name]), name
