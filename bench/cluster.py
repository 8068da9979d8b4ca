"""What a Ray cluster costs and what it saves, beside one process with one core.

    python bench/cluster.py                          at 10 % of H&M's size: some minutes
    python bench/cluster.py --customers 13720        at 1 %: a first look

The nodes are processes of this machine, one core each; every driver is a process of its own. All
is warm before it is measured: what is loaded and compiled once is told apart. Look at the ratios:
the seconds are this machine's, on which others may work as well. Bytes are those that went through
the loopback device, memory is what a node's processes hold for themselves, and the largest part
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
from peers import peak_mb

from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import open_lake
from hm_reco.stages import ingestion, processing

SHARDS, WEEKS = 4, 6
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS"), "1")


def build(root: Path, customers: int) -> str:
    """A lake with a synthetic data set, ingested."""
    write_synthetic(root / "source", customers)
    ingestion.ingest(open_lake(str(root / "lake")), str(root / "source"))
    return str(root / "lake")


def process(root: str, _: int) -> float:
    """Raw tables to processed ones; seconds."""
    lake = open_lake(root)
    change = processing.detect_changes(lake, SHARDS, full_refresh=True)
    started = time.perf_counter()
    processing.process(lake, SHARDS, change)
    return time.perf_counter() - started


def weeks(root: str, buyers: int) -> float:
    """Candidates and features of some weeks, of so many buyers each; seconds."""
    from hm_reco.data.history import load_history
    from hm_reco.ranking.backtest import WalkForward, WeekJob
    from hm_reco.ranking.plan import BacktestPlan
    from hm_reco.retrieval.aggregates import aggregate_sales
    from hm_reco.retrieval.candidates import SOURCE_LIMITS

    history = aggregate_sales(load_history(open_lake(root)))
    plan = BacktestPlan(history.day, customers_per_week=buyers, pooled_weeks=WEEKS)
    walk = WalkForward(history, plan)
    started = time.perf_counter()
    walk.run(range(WEEKS, 0, -1), WeekJob(history, plan, SOURCE_LIMITS, lambda *_: None))
    return time.perf_counter() - started


WORKS: dict[str, Callable[[str, int], float]] = {"process": process, "weeks": weeks}


def work(name: str, small: str, root: str, buyers: int) -> None:
    """Do a work on a small lake to be warm, then on the one that counts; print what it took."""
    cold = WORKS[name](small, 20)
    before = sum(counters.bytes_sent for counters in psutil.net_io_counters(pernic=True).values())
    seconds = WORKS[name](root, buyers)
    moved = sum(counters.bytes_sent for counters in psutil.net_io_counters(pernic=True).values())
    figures = {"warm_up": cold, "seconds": seconds, "peak_mb": peak_mb()}
    print(json.dumps(figures | {"moved_mb": (moved - before) / 1e6}))


def measure(address: str, *words: str) -> dict[str, float]:
    """A driver's figures: on the cluster at `address`, or alone with one core."""
    env = os.environ | ONE_THREAD | {"HM_RAY_ADDRESS": address}
    alone = {} if address else {"preexec_fn": lambda: os.sched_setaffinity(0, [0])}
    command = [sys.executable, __file__, "--work", *words]
    done = run_command(command, env=env, stdout=PIPE, text=True, check=False, **alone)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def cluster(nodes: int) -> Iterator[tuple[str, list[float]]]:
    """A cluster of so many nodes with one core each: its address, and the peak MB of each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "object_store_memory": 1_000_000_000}
    made = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    for _ in range(nodes - 1):
        made.add_node(**node)
    raylets = [n.all_processes["raylet"][0].process.pid for n in made.list_all_nodes()]
    peaks, done = [0.0] * nodes, threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            for at, pid in enumerate(raylets):
                peaks[at] = max(peaks[at], held_mb(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield made.address, peaks
    done.set()
    thread.join()
    made.shutdown()


def held_mb(pid: int) -> float:
    """What a process and its children hold for themselves, and the largest part they share."""
    own, shared = 0.0, 0.0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for one in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.Error):
                memory: Any = one.memory_full_info()
                own, shared = own + memory.uss / 1e6, max(shared, memory.shared / 1e6)
    return own + shared


def tell(name: str, figures: dict[str, float], alone: float, peaks: list[float]) -> None:
    """A line about a work in some place."""
    nodes = ", ".join(f"{peak:,.0f}" for peak in peaks) or "-"
    print(
        f"{name:<34} {figures['seconds']:7.1f} s  {alone / figures['seconds']:5.2f} x"
        f"  warm-up {figures['warm_up']:5.1f} s  moved {figures['moved_mb']:7,.0f} MB"
        f"  driver {figures['peak_mb']:6,.0f} MB  nodes {nodes} MB",
        flush=True,
    )


def main() -> None:
    """Each work alone, on one node and on two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--customers", type=int, default=137_198)
    parser.add_argument("--buyers", type=int, default=3_000, help="in each week")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        name, small, root, buyers = asked.work
        return work(name, small, root, int(buyers))
    with TemporaryDirectory() as folder:
        small, root = (
            build(Path(folder, "small"), 1_000),
            build(Path(folder, "all"), asked.customers),
        )
        print(f"{asked.customers:,} customers, {WEEKS} weeks of {asked.buyers:,} buyers")
        for name in WORKS:
            words = (name, small, root, str(asked.buyers))
            alone = measure("", *words)
            tell(f"{name}, one process, one core", alone, alone["seconds"], [])
            for nodes in (1, 2):
                with cluster(nodes) as (address, peaks):
                    figures = measure(address, *words)
                tell(f"{name}, {nodes} node(s) of one core", figures, alone["seconds"], peaks)
    return None


if __name__ == "__main__":
    main()
