"""Work by shards on a real Ray cluster of two nodes: same results, also after failures."""

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
from hm_reco.data import processing
from hm_reco.data.history import History, generate_history, load_history
from hm_reco.data.ingestion import ingest
from hm_reco.data.processing import PROCESSED_TABLES, process
from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import open_lake
from hm_reco.lake.tables import scan
from hm_reco.ranking import tuning
from hm_reco.ranking.backtest import TrainingBackend, evaluate
from hm_reco.ranking.distributed import RayTrainer
from hm_reco.ranking.features import FeatureMatrix
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RankerSettings, downsample_negatives
from hm_reco.ranking.rankers import train
from hm_reco.ranking.validation import ValidationSet, build_validation_set
from hm_reco.ranking.weeks import build_training_matrix, build_week
from hm_reco.registry.training_run import build_training_backend
from hm_reco.retrieval.article_stats import aggregate_sales
from hm_reco.retrieval.tower_training import fit_until
from hm_reco.retrieval.two_tower import TwoTower, TwoTowerSettings, build_vocabulary, to_bytes
from hm_reco.serving.batch import predict_all
from hm_reco.serving.recommender import Recommender
from tests.conftest import find_free_port

CLIENT_PORT = find_free_port()  # for drivers outside of the cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and a worker node, one core each, as local processes."""
    node = {"num_cpus": 1, "object_store_memory": 200_000_000}
    spill_config = {"local_fs_capacity_threshold": 0.999}  # spill little, however full the disk is
    head_options = {
        "include_dashboard": False,
        "ray_client_server_port": CLIENT_PORT,
        "_system_config": spill_config,
    }
    cluster = Cluster(initialize_head=True, head_node_args=node | head_options)
    cluster.add_node(**node)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def recommender(trained_lake) -> Recommender:
    return load_model(trained_lake, find_target(trained_lake)).recommender


@pytest.mark.parametrize("shards", [1, 5])
def test_ray_predictions_equal_single_process(cluster, recommender, monkeypatch, shards):
    expected = predict_all(recommender, shards)
    monkeypatch.setenv("HM_RAY_ADDRESS", cluster.address)
    assert predict_all(recommender, shards).equals(expected)


def read_processed_tables(lake) -> dict[str, pl.DataFrame]:
    """All rows of the processed tables, sorted, without the shard column."""
    names = [name for name in PROCESSED_TABLES if name != "processed/input_versions"]
    frames = {name: scan(lake, name).drop("shard", strict=False).collect() for name in names}
    return {name: frame.sort(frame.columns) for name, frame in frames.items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_ray_processed_tables_equal_single_process(cluster, monkeypatch, tmp_path, shards):
    write_synthetic(tmp_path / "source", 300, seed=3)
    transactions_file = tmp_path / "source" / "transactions_train.csv"
    rows = pl.read_csv(transactions_file, infer_schema=False)
    lakes = [open_lake(str(tmp_path / name)) for name in ("local", "ray")]
    for subset in (rows.gather_every(2), rows):  # all weeks, then the changed ones
        subset.write_csv(transactions_file)
        for lake, address in zip(lakes, ("", cluster.address), strict=True):
            monkeypatch.setenv("HM_RAY_ADDRESS", address)
            ingest(lake, str(tmp_path / "source"))
            process(lake, shards)
        local_tables, ray_tables = (read_processed_tables(lake) for lake in lakes)
        for name, frame in local_tables.items():
            assert ray_tables[name].equals(frame), name
        assert local_tables["processed/purchases"]["units"].sum() == subset.height


@pytest.fixture(scope="module")
def hm_history() -> History | None:
    """Purchases of H&M's customers, if available; they are not part of this project."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "hm-1364-customers"
    if not folder.is_dir():
        return None
    lake = open_lake(mkdtemp())
    ingest(lake, str(folder))
    process(lake)
    return load_history(lake)


@pytest.mark.parametrize("dataset", ["synthetic", "hm"])
def test_ray_backtest_equals_single_process(cluster, monkeypatch, hm_history, dataset):
    history = generate_history(400) if dataset == "synthetic" else hm_history
    if history is None:
        pytest.skip("the data of H&M's customers are not available")
    plan = BacktestPlan(history.day, evaluation_weeks=3, training_weeks=4, refit_every=2)
    results = []
    for address in ("", cluster.address):
        monkeypatch.setenv("HM_RAY_ADDRESS", address)
        two_tower = TwoTower(
            build_vocabulary(history.articles), TwoTowerSettings(max_examples=2_000, batch_size=256)
        )
        results.append(evaluate(history, plan, RankerSettings(rounds=20), two_tower))
    local_result, ray_result = results
    for name in ("lists", "scores", "customers", "article_stats", "ground_truth", "calibration"):
        assert getattr(local_result, name).equals(getattr(ray_result, name)), name
    assert local_result.ranker.to_bytes() == ray_result.ranker.to_bytes()
    assert (
        to_bytes(local_result.two_tower) == to_bytes(ray_result.two_tower)
        and local_result.source_recall.budget == ray_result.source_recall.budget
    )
    assert np.array_equal(local_result.sample.values, ray_result.sample.values, equal_nan=True)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_ray_sales_aggregation_equals_single_process(cluster, monkeypatch, shards):
    history = generate_history(500)
    local_sales = aggregate_sales(history, 1).sales
    monkeypatch.setenv("HM_RAY_ADDRESS", cluster.address)
    ray_sales = aggregate_sales(history, shards).sales
    assert local_sales.daily.equals(ray_sales.daily) and local_sales.repurchase_gaps.equals(
        ray_sales.repurchase_gaps
    )


@pytest.fixture(scope="module")
def trial_data() -> tuple[list[FeatureMatrix], list[ValidationSet]]:
    history = generate_history(500)
    weeks = [build_week(history, history.day - timedelta(days=28 * n), days=28) for n in (1, 2, 3)]
    matrices = [build_training_matrix(week) for week in weeks]
    downsampled = [downsample_negatives(matrix, 0.2, n) for n, matrix in enumerate(matrices[1:])]
    return downsampled, [build_validation_set(weeks[0], matrices[0])]


def test_ray_killed_trial_resumes_from_checkpoint(cluster, trial_data, lake, monkeypatch, tmp_path):
    kill_marker, original_segment = tmp_path / "killed", tuning.train_segment

    def killed_once(trial, checkpoint):
        if checkpoint.n_trees and not kill_marker.exists():
            kill_marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with (tmp_path / "segments").open("a") as file:
            file.write(f"{checkpoint.n_trees}\n")
        return original_segment(trial, checkpoint)

    local_result = tuning.tune(lake, "local", *trial_data, RankerSettings())
    monkeypatch.setattr(tuning, "train_segment", killed_once)
    monkeypatch.setenv("HM_RAY_ADDRESS", cluster.address)
    ray_result = tuning.tune(lake, "ray", *trial_data, RankerSettings())
    assert (
        kill_marker.exists()
        and ray_result.settings == local_result.settings
        and ray_result.value == local_result.value
    )
    first_trees = [int(line) for line in (tmp_path / "segments").read_text().split()]
    assert first_trees == sorted(set(first_trees)) and len(first_trees) > 1  # no segment ran twice


def test_ray_trials_run_in_parallel(cluster, trial_data, lake, monkeypatch):
    monkeypatch.setenv("HM_RAY_ADDRESS", cluster.address)
    tuned = tuning.tune(lake, "study", *trial_data, RankerSettings(), minutes=0.1)
    trials = tuned.trials.filter(pl.col("state") != "interrupted")
    assert trials.height > 2 and trials["trial"].is_duplicated().sum() == 0
    assert trials["seconds"].sum() > 6  # more than fits in the time one after another


@pytest.fixture(scope="module")
def ray_trainer(cluster, tmp_path_factory) -> RayTrainer:
    return RayTrainer(cluster.address, 2, str(tmp_path_factory.mktemp("training")))


def build_small_two_tower(history: History) -> TwoTower:
    settings = TwoTowerSettings(max_examples=20_000, batch_size=256)
    return TwoTower(build_vocabulary(history.articles), settings)


@pytest.mark.parametrize("seconds", [0, 4])  # at the start, and during training
def test_ray_two_tower_loss_equals_single_worker_after_kill(ray_trainer, seconds):
    history = generate_history(300)
    single_model, shared_model = build_small_two_tower(history), build_small_two_tower(history)
    killed_pids, finished = [], threading.Event()

    def kill_worker() -> None:
        while not finished.is_set():
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "RayTrainWorker.run_train_fn" in " ".join(child.cmdline()):
                        time.sleep(seconds)
                        child.kill()
                        return killed_pids.append(child.pid)
            time.sleep(0.1)
        return None

    thread = threading.Thread(target=kill_worker)
    thread.start()
    single_losses, shared_losses = (
        fit_until(single_model, history),
        ray_trainer.fit_until(shared_model, history),
    )  # since the last checkpoint
    finished.set()
    thread.join()
    assert (
        killed_pids
        and len(single_losses) > 20
        and single_losses[-1] < single_losses[0]
        and single_losses[-len(shared_losses) :] != shared_losses
    )
    assert np.allclose(single_losses[-len(shared_losses) :], shared_losses, atol=0.01)
    assert (
        shared_model.trained_until == single_model.trained_until
        and shared_model.steps == single_model.steps
    )
    assert not list(Path(ray_trainer.storage).iterdir())


def test_ray_ranker_matches_single_worker(ray_trainer, trial_data):
    matrices, [validation_set] = trial_data
    settings = RankerSettings(rounds=60)
    single_ap, shared_ap = (
        validation_set.score(ranker.predict(validation_set.matrix.values))
        for ranker in (train(matrices, settings), ray_trainer.train(matrices, settings))
    )
    assert (
        single_ap.mean() > 0.01
        and abs(single_ap.mean() - shared_ap.mean()) < 0.2 * single_ap.mean()
    )
    with pytest.raises(ValueError, match="2 weeks for 3 workers"):
        replace(ray_trainer, workers=3).train(matrices, settings)


def test_training_workers_require_ray_address(lake):
    assert build_training_backend(lake) == TrainingBackend()
    with pytest.raises(ValueError, match="HM_RAY_ADDRESS is empty"):
        build_training_backend(lake, 2)


def test_ray_reduce_includes_every_item(cluster):
    def count_item(n: int) -> dict[int, int]:
        return {n: 1}

    def add_counts(left: dict[int, int], right: dict[int, int]) -> dict[int, int]:
        return {key: left.get(key, 0) + right.get(key, 0) for key in left | right}

    for n_items in (1, 2, 7):
        assert ray_reduce(cluster.address, count_item, add_counts, range(n_items)) == dict.fromkeys(
            range(n_items), 1
        )
    with pytest.raises(ZeroDivisionError):
        ray_reduce(cluster.address, lambda n: {n: 1 // n}, add_counts, [1, 0, 2])


def test_ray_map_uses_both_nodes_and_keeps_order(cluster, tmp_path):
    def wait_for_other_node(n: int) -> int:
        """Wait for a task on the other node; each node has one core."""
        (tmp_path / ray.get_runtime_context().get_node_id()).touch()
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline, "no task on the other node"
            time.sleep(0.05)
        return n

    assert ray_map(cluster.address, wait_for_other_node, range(8)) == [*range(8)]


def test_ray_map_retries_killed_task(cluster, tmp_path):
    def square_after_kill(n: int) -> int:
        kill_marker = Path(tmp_path) / str(n)
        if n == 3 and not kill_marker.exists():
            kill_marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return n * n

    assert ray_map(cluster.address, square_after_kill, range(6)) == [n * n for n in range(6)]
    assert (tmp_path / "3").exists()


DRIVER_SCRIPT = """
import sys, time
from hm_reco.lake.storage import open_lake
from hm_reco.data import processing
if sys.argv[2] == "slow":
    real = processing.process_block
    def slow(*words):
        moved = real(*words)
        time.sleep(60)  # some weeks are written, the run has not finished
        return moved
    processing.process_block = slow
processing.MAX_WEEKS_PER_BLOCK = 40
processing.process(open_lake(sys.argv[1]), 2)
"""


def test_ray_killed_driver_leaves_no_partial_tables(cluster, tmp_path):
    write_synthetic(tmp_path / "source", 300, seed=3)
    local_lake, ray_lake = (open_lake(str(tmp_path / name)) for name in ("local", "ray"))
    for lake in (local_lake, ray_lake):
        ingest(lake, str(tmp_path / "source"))
    process(local_lake, 2)
    command = [sys.executable, "-c", DRIVER_SCRIPT, ray_lake.root]
    env = os.environ | {"HM_RAY_ADDRESS": cluster.address}
    with subprocess.Popen([*command, "slow"], env=env, start_new_session=True) as driver:
        deadline = time.monotonic() + 60
        while not ray_lake.path("processed", "purchases").exists():
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.2)
        time.sleep(2)
        driver.kill()
    subprocess.run([*command, "rerun"], env=env, check=True, timeout=120)
    for name, frame in read_processed_tables(local_lake).items():
        assert read_processed_tables(ray_lake)[name].equals(frame), name


FULL_STORE_SCRIPT = """
import numpy as np, ray
from hm_reco.compute.cluster import ClusterError, ray_map, ray_reduce
small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
disk = {"local_fs_capacity_threshold": 0.0001}  # Ray treats the disk as full
ray.init("local", logging_level="ERROR", log_to_driver=False, _system_config=disk, **small)
large = np.zeros(30_000_000)
for call in (
    lambda: ray_map("auto", lambda n: large.sum() + n, [1]),
    lambda: ray_reduce("auto", lambda n: np.full(5_000_000, n), np.add, range(6)),
):
    try:
        call()
    except ClusterError as err:
        print(err)
"""


def test_ray_driver_outside_cluster_connects_as_client(cluster):
    deadline = time.monotonic() + 60
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", CLIENT_PORT)) and time.monotonic() < deadline:
            time.sleep(0.5)
    script = "from hm_reco.compute.cluster import ray_map, ray_reduce\n"
    script += "print(ray_map({0!r}, lambda n: 2 * n, range(4)), end=' ')\n"
    script += "print(ray_reduce({0!r}, lambda n: n, int.__add__, range(4)))"
    command = [sys.executable, "-c", script.format(f"ray://127.0.0.1:{CLIENT_PORT}")]
    # Ray forks while gRPC threads run, so a server may hang; the next client gets another one
    for _ in range(3):
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if "Starting Ray client server failed" not in result.stderr:
            break
    assert result.stdout.strip().endswith("[0, 2, 4, 6] 6"), result.stderr


def test_ray_full_object_store_is_reported():
    command = [sys.executable, "-c", FULL_STORE_SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "the tasks' data do not fit into the object store: Local disk is full" in result.stdout
    assert "a task's result does not fit into the object store: Local disk is full" in result.stdout


def test_ray_results_larger_than_object_store_spill(cluster):
    def fill_array(n: int) -> np.ndarray:
        return np.full(10_000_000, n)  # 80 MB; a node's store has 200

    sums = ray_reduce(cluster.address, fill_array, np.add, range(8))
    assert sums[0] == sum(range(8)) and (sums == sums[0]).all()


def test_ray_task_that_always_dies_raises_cluster_error(cluster):
    with pytest.raises(ClusterError, match="a task was lost 4 times"):
        ray_map(cluster.address, lambda n: os.kill(os.getpid(), signal.SIGKILL), [0])


def test_ray_removed_node_loses_no_results(cluster, monkeypatch, tmp_path):
    write_synthetic(tmp_path / "source", 300, seed=3)
    local_lake, ray_lake = (open_lake(str(tmp_path / name)) for name in ("local", "ray"))
    for lake in (local_lake, ray_lake):
        ingest(lake, str(tmp_path / "source"))
    process(local_lake, 2)
    process_block = processing.process_block

    def slow_process_block(*command):
        with (tmp_path / ray.get_runtime_context().get_node_id()).open("a") as file:
            file.write("x")
        result = process_block(*command)
        time.sleep(1)  # written, but not yet reported
        return result

    added_node = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    cluster.wait_for_nodes()
    monkeypatch.setattr(processing, "process_block", slow_process_block)
    monkeypatch.setenv("HM_RAY_ADDRESS", cluster.address)

    def remove_node() -> None:
        while not (tmp_path / added_node.node_id).exists():
            time.sleep(0.05)
        time.sleep(0.5)
        cluster.remove_node(added_node, allow_graceful=False)

    thread = threading.Thread(target=remove_node, daemon=True)
    thread.start()
    process(ray_lake, 2)
    thread.join(60)
    assert not thread.is_alive()
    for name, frame in read_processed_tables(local_lake).items():
        assert read_processed_tables(ray_lake)[name].equals(frame), name


def test_ray_map_raises_function_error(cluster):
    with pytest.raises(ZeroDivisionError):
        ray_map(cluster.address, lambda n: 1 // n, [1, 0])


def test_ray_map_sends_captured_objects_once(cluster, tmp_path):
    class Heavy:
        """Counts in a file how often it is pickled."""

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
def test_ray_unreachable_address_is_named(address):
    ray.shutdown()
    with pytest.raises(ClusterError, match=f"no Ray cluster at {address!r}"):
        ray_map(address, len, ["a"])
