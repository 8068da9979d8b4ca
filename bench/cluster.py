"""Costs and savings of a Ray cluster, compared with one process on one core.

    python bench/cluster.py                          at 10 % of H&M's size: some minutes
    python bench/cluster.py --customers 13720        at 1 %: a quick look

The nodes are local processes with one core each; every driver is a separate process. A warm-up run,
which loads and compiles, comes first and is printed separately. Compare the ratios: the seconds
depend on this machine and its load. Bytes are those sent through the loopback device; memory is
the unique memory of a node's processes, plus the largest part that they share.
that they share.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from subprocess import run as run_command
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from external_data import get_peak_mb

from hm_reco.data import ingestion, processing
from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import open_lake

SHARDS, WEEKS = 4, 6
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS"), "1")


def build_lake(root: Path, customers: int) -> str:
    """A lake with a synthetic data set, ingested."""
    write_synthetic(root / "source", customers)
    ingestion.ingest(open_lake(str(root / "lake")), str(root / "source"))
    return str(root / "lake")


def process_tables(root: str, _: int) -> float:
    """Raw tables to processed ones; seconds."""
    lake = open_lake(root)
    change = processing.detect_changes(lake, SHARDS, full_refresh=True)
    started = time.perf_counter()
    processing.process(lake, SHARDS, change)
    return time.perf_counter() - started


def process_weeks(root: str, buyers: int) -> float:
    """Candidates and features of some weeks with `buyers` buyers each; seconds."""
    from hm_reco.data.history import load_history
    from hm_reco.ranking.backtest import WalkForward, WeekJob
    from hm_reco.ranking.plan import BacktestPlan
    from hm_reco.retrieval.article_stats import aggregate_sales
    from hm_reco.retrieval.candidate_sources import SOURCE_LIMITS

    history = aggregate_sales(load_history(open_lake(root)))
    plan = BacktestPlan(history.day, customers_per_week=buyers, pooled_weeks=WEEKS)
    walk_forward = WalkForward(history, plan)
    started = time.perf_counter()
    walk_forward.run(range(WEEKS, 0, -1), WeekJob(history, plan, SOURCE_LIMITS, lambda *_: None))
    return time.perf_counter() - started


WORKLOADS: dict[str, Callable[[str, int], float]] = {
    "process": process_tables,
    "weeks": process_weeks,
}


def run_workload(name: str, small_root: str, root: str, buyers: int) -> None:
    """Run a workload on a small lake to warm up, then on the measured one; print the figures."""
    warm_up_seconds = WORKLOADS[name](small_root, 20)
    bytes_before = sum(
        counters.bytes_sent for counters in psutil.net_io_counters(pernic=True).values()
    )
    seconds = WORKLOADS[name](root, buyers)
    bytes_after = sum(
        counters.bytes_sent for counters in psutil.net_io_counters(pernic=True).values()
    )
    figures = {"warm_up": warm_up_seconds, "seconds": seconds, "peak_mb": get_peak_mb()}
    print(json.dumps(figures | {"moved_mb": (bytes_after - bytes_before) / 1e6}))


def measure_driver(address: str, *args: str) -> dict[str, float]:
    """Figures of a driver on the cluster at `address`, or, without one, on one core."""
    environment = os.environ | ONE_THREAD | {"HM_RAY_ADDRESS": address}
    popen_options = {} if address else {"preexec_fn": lambda: os.sched_setaffinity(0, [0])}
    command = [sys.executable, __file__, "--work", *args]
    result = run_command(
        command, env=environment, stdout=PIPE, text=True, check=False, **popen_options
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return dict(json.loads(result.stdout.splitlines()[-1]))


@contextmanager
def start_cluster(nodes: int) -> Iterator[tuple[str, list[float]]]:
    """Start a cluster of nodes with one core each; yields its address and the peak MB by node."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "object_store_memory": 1_000_000_000}
    ray_cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    for _ in range(nodes - 1):
        ray_cluster.add_node(**node)
    raylets = [n.all_processes["raylet"][0].process.pid for n in ray_cluster.list_all_nodes()]
    peaks, finished = [0.0] * nodes, threading.Event()

    def watch_memory() -> None:
        while not finished.wait(0.5):
            for i, pid in enumerate(raylets):
                peaks[i] = max(peaks[i], measure_memory_mb(pid))

    thread = threading.Thread(target=watch_memory, daemon=True)
    thread.start()
    yield ray_cluster.address, peaks
    finished.set()
    thread.join()
    ray_cluster.shutdown()


def measure_memory_mb(pid: int) -> float:
    """Unique memory of a process and its children, plus the largest part that they share."""
    unique, shared = 0.0, 0.0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.Error):
                memory: Any = process.memory_full_info()
                unique, shared = unique + memory.uss / 1e6, max(shared, memory.shared / 1e6)
    return unique + shared


def print_figures(
    name: str, figures: dict[str, float], baseline_seconds: float, peaks: list[float]
) -> None:
    """Print one line about a workload."""
    nodes = ", ".join(f"{peak:,.0f}" for peak in peaks) or "-"
    print(
        f"{name:<34} {figures['seconds']:7.1f} s  {baseline_seconds / figures['seconds']:5.2f} x"
        f"  warm-up {figures['warm_up']:5.1f} s  moved {figures['moved_mb']:7,.0f} MB"
        f"  driver {figures['peak_mb']:6,.0f} MB  nodes {nodes} MB",
        flush=True,
    )


def main() -> None:
    """Run each workload without a cluster, on one node and on two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--customers", type=int, default=137_198)
    parser.add_argument("--buyers", type=int, default=3_000, help="in each week")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, small_root, root, buyers = options.work
        return run_workload(name, small_root, root, int(buyers))
    with TemporaryDirectory() as folder:
        small_root, root = (
            build_lake(Path(folder, "small"), 1_000),
            build_lake(Path(folder, "all"), options.customers),
        )
        print(f"{options.customers:,} customers, {WEEKS} weeks of {options.buyers:,} buyers")
        for name in WORKLOADS:
            args = (name, small_root, root, str(options.buyers))
            baseline = measure_driver("", *args)
            print_figures(f"{name}, one process, one core", baseline, baseline["seconds"], [])
            for nodes in (1, 2):
                with start_cluster(nodes) as (address, peaks):
                    figures = measure_driver(address, *args)
                print_figures(
                    f"{name}, {nodes} node(s) of one core", figures, baseline["seconds"], peaks
                )
    return None


if __name__ == "__main__":
    main()
