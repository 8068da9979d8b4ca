"""Real faults on S3: killed kernels and runners, two runs at once, an S3 that fails.

After each: run again, and the tables are those of a run that nobody disturbed.
"""

import os

from hm_reco.lake.runs import read_runs
from hm_reco.lake.storage import open_lake
from tests.faults import (
    STAGES,
    FaultyProxy,
    assert_same,
    kill_at_each_stage,
    run_two_at_once,
    start,
)


def test_kill_9_of_kernel_and_runner_at_each_stage(small_data, undisturbed, s3):
    kill_at_each_stage(f"{s3}/killed", small_data, undisturbed)


def test_two_runs_at_once_do_not_mix(small_data, undisturbed, s3):
    run_two_at_once(f"{s3}/two", small_data, undisturbed)


def test_a_failing_s3_delays_but_changes_nothing(small_data, undisturbed, s3):
    proxy = FaultyProxy(os.environ["AWS_ENDPOINT_URL"], share=0.05, seed=7)
    root = f"{s3}/faulty"
    for _ in range(4):
        process = start(root, small_data, AWS_ENDPOINT_URL=proxy.url)
        output, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            break
    assert process.returncode == 0, output
    assert all(proxy.met[fault] > 3 for fault in ("500", "503", "cut", "lost answer", "slow"))
    proxy.shutdown()
    assert_same(open_lake(root), undisturbed)
    done = [e.stage for e in read_runs(open_lake(root)) if e.state == "succeeded"]
    assert sorted(done) == sorted(STAGES)
