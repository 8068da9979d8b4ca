"""Real faults on S3: killed kernels and runners, concurrent runs, a failing S3.

After each fault, a second run gives the tables of an undisturbed run.
"""

import os

from hm_reco.lake.runs import read_runs
from hm_reco.lake.storage import open_lake
from tests.fault_injection import (
    FAULTS,
    STAGES,
    FaultyProxy,
    assert_same_tables,
    kill_at_each_stage,
    run_two_concurrently,
    start_run,
)


def test_run_on_s3_recovers_from_sigkill_at_each_stage(small_data, reference_lake, s3):
    kill_at_each_stage(f"{s3}/killed", small_data, reference_lake)


def test_concurrent_runs_on_s3_do_not_mix(small_data, reference_lake, s3):
    run_two_concurrently(f"{s3}/two", small_data, reference_lake)


def test_run_on_failing_s3_equals_undisturbed_run(small_data, reference_lake, s3):
    proxy = FaultyProxy(os.environ["AWS_ENDPOINT_URL"], fault_share=0.05, seed=7)
    root = f"{s3}/faulty"
    for _ in range(4):
        process = start_run(root, small_data, AWS_ENDPOINT_URL=proxy.url)
        output, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            break
    assert process.returncode == 0, output
    assert all(proxy.fault_counts[fault] > 3 for fault in FAULTS), proxy.fault_counts
    proxy.shutdown()
    assert_same_tables(open_lake(root), reference_lake)
    succeeded = [e.stage for e in read_runs(open_lake(root)) if e.state == "succeeded"]
    assert sorted(succeeded) == sorted(STAGES)
