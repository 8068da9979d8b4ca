"""Work by shards on a real Ray cluster of two nodes: the same results, whatever goes wrong."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import polars as pl
import psutil
import pytest

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster

from hm_reco.api.model_manager import find_target, load_model
from hm_reco.compute.cluster import ClusterError, ray_map, ray_reduce
from hm_reco.data.history import History, generate_history, load_history
from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import open_lake
from hm_reco.lake.tables import scan
from hm_reco.ranking import tuning
from hm_reco.ranking.backtest import TrainingBackend, evaluate
from hm_reco.ranking.distributed import RayTrainer
from hm_reco.ranking.features import FeatureMatrix, build_training_matrix, build_week
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RankerSettings, downsample_negatives, train
from hm_reco.ranking.tuning import ValidationSet, build_validation_set
from hm_reco.retrieval.aggregates import aggregate_sales
from hm_reco.retrieval.two_tower import (
    TwoTower,
    TwoTowerSettings,
    build_vocabulary,
    fit_until,
    to_bytes,
)
from hm_reco.serving.recommend import Recommender, predict_all
from hm_reco.stages import processing
from hm_reco.stages.ingestion import ingest
from hm_reco.stages.processing import PROCESSED_TABLES, process
from hm_reco.stages.training import build_training_backend
from tests.conftest import free_port

CLIENT = free_port()  # where who is not of the cluster connects


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and a worker, one core each, as processes of this machine."""
    node = {"num_cpus": 1, "object_store_memory": 200_000_000}
    full = {"local_fs_capacity_threshold": 0.999}  # what spills is little, however full the disk
    head = {"include_dashboard": False, "ray_client_server_port": CLIENT, "_system_config": full}
    cluster = Cluster(initialize_head=True, head_node_args=node | head)
    cluster.add_node(**node)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def recommender(trained_lake) -> Recommender:
    return load_model(trained_lake, find_target(trained_lake)).recommender


@pytest.mark.parametrize("shards", [1, 5])
def test_predictions_are_those_of_one_process(cluster, recommender, monkeypatch, shards):
    here = predict_all(recommender, shards)
    monkeypatch.setenv("HM_RAY_ADDRESS", cluster.address)
    assert predict_all(recommender, shards).equals(here)


def processed(lake) -> dict[str, pl.DataFrame]:
    """All rows of the processed tables, in one order, without the shards' numbers."""
    names = [name for name in PROCESSED_TABLES if name != "processed/input_versions"]
    frames = {name: scan(lake, name).drop("shard", strict=False).collect() for name in names}
    return {name: frame.sort(frame.columns) for name, frame in frames.items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_processed_tables_are_those_of_one_process(cluster, monkeypatch, tmp_path, shards):
    write_synthetic(tmp_path / "source", 300, seed=3)
    late = tmp_path / "source" / "transactions_train.csv"
    rows = pl.read_csv(late, infer_schema=False)
    lakes = [open_lake(str(tmp_path / name)) for name in ("here", "there")]
    for part in (rows.gather_every(2), rows):  # all weeks anew, then what changed in them
        part.write_csv(late)
        for lake, address in zip(lakes, ("", cluster.address), strict=True):
            monkeypatch.setenv("HM_RAY_ADDRESS", address)
            ingest(lake, str(tmp_path / "source"))
            process(lake, shards)
        here, there = (processed(lake) for lake in lakes)
        for name, frame in here.items():
            assert there[name].equals(frame), name
        assert here["processed/purchases"]["units"].sum() == part.height


@pytest.fixture(scope="module")
def real() -> History | None:
    """Purchases of H&M's customers, where they are at hand; they are no part of this project."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "hm-1364-customers"
    if not folder.is_dir():
        return None
    lake = open_lake(mkdtemp())
    ingest(lake, str(folder))
    process(lake)
    return load_history(lake)


@pytest.mark.parametrize("world", ["sample", "real"])
def test_an_evaluation_is_that_of_one_process(cluster, monkeypatch, real, world):
    history = generate_history(400) if world == "sample" else real
    if history is None:
        pytest.skip("the data of H&M's customers are not here")
    plan = BacktestPlan(history.day, evaluation_weeks=3, training_weeks=4, refit_every=2)
    results = []
    for address in ("", cluster.address):
        monkeypatch.setenv("HM_RAY_ADDRESS", address)
        tower = TwoTower(
            build_vocabulary(history.articles), TwoTowerSettings(max_examples=2_000, batch_size=256)
        )
        results.append(evaluate(history, plan, RankerSettings(rounds=20), tower))
    here, there = results
    for name in ("lists", "scores", "customers", "article_stats", "ground_truth", "calibration"):
        assert getattr(here, name).equals(getattr(there, name)), name
    assert here.booster.model_to_string() == there.booster.model_to_string()
    assert (
        to_bytes(here.two_tower) == to_bytes(there.two_tower)
        and here.source_recall.budget == there.source_recall.budget
    )
    assert np.array_equal(here.sample.values, there.sample.values, equal_nan=True)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_sales_are_counted_on_the_cluster_as_here(cluster, monkeypatch, shards):
    shop = generate_history(500)
    here = aggregate_sales(shop, 1).sales
    monkeypatch.setenv("HM_RAY_ADDRESS", cluster.address)
    there = aggregate_sales(shop, shards).sales
    assert here.daily.equals(there.daily) and here.repurchase_gaps.equals(there.repurchase_gaps)


@pytest.fixture(scope="module")
def lesson() -> tuple[list[FeatureMatrix], list[ValidationSet]]:
    shop = generate_history(500)
    weeks = [build_week(shop, shop.day - timedelta(days=28 * n), days=28) for n in (1, 2, 3)]
    matrices = [build_training_matrix(week) for week in weeks]
    thinned = [downsample_negatives(matrix, 0.2, n) for n, matrix in enumerate(matrices[1:])]
    return thinned, [build_validation_set(weeks[0], matrices[0])]


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(
    cluster, lesson, lake, monkeypatch, tmp_path
):
    mark, real = tmp_path / "killed", tuning.train_segment

    def killed_once(told, begun):
        if begun.n_trees and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with (tmp_path / "segments").open("a") as file:
            file.write(f"{begun.n_trees}\n")
        return real(told, begun)

    here = tuning.tune(lake, "here", *lesson, RankerSettings())
    monkeypatch.setattr(tuning, "train_segment", killed_once)
    monkeypatch.setenv("HM_RAY_ADDRESS", cluster.address)
    there = tuning.tune(lake, "there", *lesson, RankerSettings())
    assert mark.exists() and there.settings == here.settings and there.value == here.value
    begun = [int(line) for line in (tmp_path / "segments").read_text().split()]
    assert begun == sorted(set(begun)) and len(begun) > 1  # no segment was done twice


def test_trials_go_on_side_by_side(cluster, lesson, lake, monkeypatch):
    monkeypatch.setenv("HM_RAY_ADDRESS", cluster.address)
    tuned = tuning.tune(lake, "study", *lesson, RankerSettings(), minutes=0.1)
    trials = tuned.trials.filter(pl.col("state") != "interrupted")
    assert trials.height > 2 and trials["trial"].is_duplicated().sum() == 0
    assert trials["seconds"].sum() > 6  # more than there was time for one after the other


@pytest.fixture(scope="module")
def crew(cluster, tmp_path_factory) -> RayTrainer:
    return RayTrainer(cluster.address, 2, str(tmp_path_factory.mktemp("training")))


def small_tower(shop: History) -> TwoTower:
    settings = TwoTowerSettings(max_examples=20_000, batch_size=256)
    return TwoTower(build_vocabulary(shop.articles), settings)


@pytest.mark.parametrize("seconds", [0, 4])  # as it begins, and as it learns
def test_two_workers_lose_what_one_loses_also_when_one_is_killed(crew, seconds):
    shop = generate_history(300)
    alone, shared = small_tower(shop), small_tower(shop)
    killed, learned = [], threading.Event()

    def kill() -> None:
        while not learned.is_set():
            for one in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "RayTrainWorker.run_train_fn" in " ".join(one.cmdline()):
                        time.sleep(seconds)
                        one.kill()
                        return killed.append(one.pid)
            time.sleep(0.1)
        return None

    thread = threading.Thread(target=kill)
    thread.start()
    one, two = (
        fit_until(alone, shop),
        crew.fit_until(shared, shop),
    )  # two: since the last checkpoint
    learned.set()
    thread.join()
    assert killed and len(one) > 20 and one[-1] < one[0] and one[-len(two) :] != two
    assert np.allclose(one[-len(two) :], two, atol=0.01)
    assert shared.trained_until == alone.trained_until and shared.steps == alone.steps
    assert not list(Path(crew.storage).iterdir())


def test_two_workers_rank_as_well_as_one(crew, lesson):
    learned, [exam] = lesson
    settings = RankerSettings(rounds=60)
    one, two = (
        exam.compute_average_precision(np.asarray(booster.predict(exam.matrix.values)))
        for booster in (train(learned, settings), crew.train(learned, settings))
    )
    assert one.mean() > 0.01 and abs(one.mean() - two.mean()) < 0.2 * one.mean()
    with pytest.raises(ValueError, match="2 weeks for 3 workers"):
        replace(crew, workers=3).train(learned, settings)


def test_workers_need_a_cluster(lake):
    assert build_training_backend(lake) == TrainingBackend()
    with pytest.raises(ValueError, match="HM_RAY_ADDRESS is empty"):
        build_training_backend(lake, 2)


def test_what_is_added_up_on_the_cluster_is_complete(cluster):
    def one(n: int) -> dict[int, int]:
        return {n: 1}

    def add(left: dict[int, int], right: dict[int, int]) -> dict[int, int]:
        return {key: left.get(key, 0) + right.get(key, 0) for key in left | right}

    for many in (1, 2, 7):
        assert ray_reduce(cluster.address, one, add, range(many)) == dict.fromkeys(range(many), 1)
    with pytest.raises(ZeroDivisionError):
        ray_reduce(cluster.address, lambda n: {n: 1 // n}, add, [1, 0, 2])


def test_tasks_run_on_both_nodes_and_results_keep_their_order(cluster, tmp_path):
    def meet(n: int) -> int:
        """Wait for a task on the other node; there is one core on each."""
        (tmp_path / ray.get_runtime_context().get_node_id()).touch()
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline, "no task on the other node"
            time.sleep(0.05)
        return n

    assert ray_map(cluster.address, meet, range(8)) == [*range(8)]


def test_a_killed_process_loses_nothing(cluster, tmp_path):
    def once(n: int) -> int:
        mark = Path(tmp_path) / str(n)
        if n == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return n * n

    assert ray_map(cluster.address, once, range(6)) == [n * n for n in range(6)]
    assert (tmp_path / "3").exists()


WORK = """
import sys, time
from hm_reco.lake.storage import open_lake
from hm_reco.stages import processing
if sys.argv[2] == "slow":
    real = processing.process_block
    def slow(*words):
        moved = real(*words)
        time.sleep(60)  # some weeks are written, but the run is not over
        return moved
    processing.process_block = slow
processing.WEEKS_AT_ONCE = 40
processing.process(open_lake(sys.argv[1]), 2)
"""


def test_a_driver_that_is_killed_leaves_nothing_behind(cluster, tmp_path):
    write_synthetic(tmp_path / "source", 300, seed=3)
    here, there = (open_lake(str(tmp_path / name)) for name in ("here", "there"))
    for lake in (here, there):
        ingest(lake, str(tmp_path / "source"))
    process(here, 2)
    words = [sys.executable, "-c", WORK, there.root]
    env = os.environ | {"HM_RAY_ADDRESS": cluster.address}
    with subprocess.Popen([*words, "slow"], env=env, start_new_session=True) as driver:
        deadline = time.monotonic() + 60
        while not there.path("processed", "weekly_customers").exists():
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.2)
        time.sleep(2)
        driver.kill()
    subprocess.run([*words, "again"], env=env, check=True, timeout=120)
    for name, frame in processed(here).items():
        assert processed(there)[name].equals(frame), name


FULL = """
import numpy as np, ray
from hm_reco.compute.cluster import ClusterError, map_on, reduce_on
small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
disk = {"local_fs_capacity_threshold": 0.0001}  # to Ray the disk is full, too
ray.init("local", logging_level="ERROR", log_to_driver=False, _system_config=disk, **small)
large = np.zeros(30_000_000)
for call in (
    lambda: map_on("auto", lambda n: large.sum() + n, [1]),
    lambda: reduce_on("auto", lambda n: np.full(5_000_000, n), np.add, range(6)),
):
    try:
        call()
    except ClusterError as err:
        print(err)
"""


def test_who_is_not_of_the_cluster_connects_as_a_client(cluster):
    end = time.monotonic() + 60
    with socket.socket() as knock:
        while knock.connect_ex(("127.0.0.1", CLIENT)) and time.monotonic() < end:
            time.sleep(0.5)
    work = "from hm_reco.compute.cluster import map_on, reduce_on\n"
    work += "print(map_on({0!r}, lambda n: 2 * n, range(4)), end=' ')\n"
    work += "print(reduce_on({0!r}, lambda n: n, int.__add__, range(4)))"
    words = [sys.executable, "-c", work.format(f"ray://127.0.0.1:{CLIENT}")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip().endswith("[0, 2, 4, 6] 6"), done.stderr


def test_an_object_store_that_is_full_is_told():
    words = [sys.executable, "-c", FULL]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "what all tasks need does not fit into the cluster: Local disk is full" in done.stdout
    assert "a task's result found no place: Local disk is full" in done.stdout


def test_results_larger_than_the_object_store_spill_and_come_back(cluster):
    def large(n: int) -> np.ndarray:
        return np.full(10_000_000, n)  # 80 MB; a node's store has 200

    sums = ray_reduce(cluster.address, large, np.add, range(8))
    assert sums[0] == sum(range(8)) and (sums == sums[0]).all()


def test_a_process_that_always_dies_is_told(cluster):
    with pytest.raises(ClusterError, match="a task was lost 4 times"):
        ray_map(cluster.address, lambda n: os.kill(os.getpid(), signal.SIGKILL), [0])


def test_a_node_that_goes_takes_nothing_along(cluster, monkeypatch, tmp_path):
    write_synthetic(tmp_path / "source", 300, seed=3)
    here, there = (open_lake(str(tmp_path / name)) for name in ("here", "there"))
    for lake in (here, there):
        ingest(lake, str(tmp_path / "source"))
    process(here, 2)
    real = processing.process_block

    def slow(*words):
        with (tmp_path / ray.get_runtime_context().get_node_id()).open("a") as file:
            file.write("x")
        moved = real(*words)
        time.sleep(1)  # all is written, and is still to be told
        return moved

    more = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    cluster.wait_for_nodes()
    monkeypatch.setattr(processing, "process_block", slow)
    monkeypatch.setenv("HM_RAY_ADDRESS", cluster.address)

    def remove() -> None:
        while not (tmp_path / more.node_id).exists():
            time.sleep(0.05)
        time.sleep(0.5)
        cluster.remove_node(more, allow_graceful=False)

    thread = threading.Thread(target=remove, daemon=True)
    thread.start()
    process(there, 2)
    thread.join(60)
    assert not thread.is_alive()
    for name, frame in processed(here).items():
        assert processed(there)[name].equals(frame), name


def test_the_functions_own_error_is_the_callers(cluster):
    with pytest.raises(ZeroDivisionError):
        ray_map(cluster.address, lambda n: 1 // n, [1, 0])


def test_tables_go_along_once(cluster, tmp_path):
    class Heavy:
        """Counts in a file how often it is taken apart."""

        def __init__(self, path: Path) -> None:
            self.path, self.content = path, bytes(5_000_000)

        def __reduce__(self):
            with self.path.open("a") as file:
                file.write("x")
            return len, (b"abc",)

    heavy = Heavy(tmp_path / "times")
    assert ray_map(cluster.address, lambda n: (n, heavy)[0], range(12)) == [*range(12)]
    assert heavy.path.read_text() == "x"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nonsense"])
def test_a_cluster_that_is_not_there_is_named(address):
    ray.shutdown()
    with pytest.raises(ClusterError, match=f"no Ray cluster at {address!r}"):
        ray_map(address, len, ["a"])
