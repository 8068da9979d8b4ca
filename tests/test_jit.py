"""Functions compiled by numba equal Python; without numba, coverage measures their lines."""

import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np

from hm_reco.data.history import as_of, generate_history
from hm_reco.ranking import features
from hm_reco.ranking.ranker import RankerSettings, rank
from hm_reco.ranking.rankers import train
from hm_reco.ranking.validation import build_validation_set
from hm_reco.ranking.weeks import build_training_matrix, build_week
from hm_reco.retrieval import candidates
from hm_reco.retrieval.tower_training import fit_until
from hm_reco.retrieval.two_tower import TwoTower, TwoTowerSettings, build_vocabulary


def write_results(file: Path) -> None:
    """Write candidates, features, top-K lists and AP of a few customers to a file."""
    history = generate_history(300)
    day = history.day - timedelta(days=28)
    two_tower = TwoTower(
        build_vocabulary(history.articles), TwoTowerSettings(max_examples=500, batch_size=256)
    )
    fit_until(two_tower, as_of(history, day))
    embedding_space = two_tower.build_space(as_of(history, day))
    week = build_week(history, day, days=28, max_customers=8, space=embedding_space)
    matrix = build_training_matrix(week)
    ranker = train([matrix], RankerSettings(rounds=5, min_data_in_leaf=5))
    top_k = rank(ranker, matrix, 100, week.aggregates.index.tables.top_overall.indices)
    ap = build_validation_set(week, matrix).score(ranker.predict(matrix.values))
    arrays = {"candidates": matrix.article, "values": matrix.values}
    np.savez(file, ap=ap, **arrays, **top_k._asdict())


def test_jit_functions_equal_python(tmp_path, coverage_environment):
    write_results(tmp_path / "compiled.npz")
    code = "from tests.test_jit import *; write_results(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, tmp_path / "python.npz"]
    subprocess.run(
        command, check=True, env={**os.environ, **coverage_environment, "NUMBA_DISABLE_JIT": "1"}
    )
    compiled, python = (np.load(tmp_path / f"{name}.npz") for name in ("compiled", "python"))
    assert len(compiled["candidates"]) > 500 and compiled["ap"].any()
    assert (~np.isnan(compiled["values"])).any(axis=0).mean() > 0.95  # nearly all features occur
    for name in compiled.files:
        np.testing.assert_allclose(compiled[name], python[name], rtol=1e-5, err_msg=name)


def test_jit_function_compiles_once_for_local_and_ray_arrays():
    """Arrays from Ray and from a frame's columns are read-only, others are writable."""
    functions = (candidates._generate, features._compute_features)
    history, signatures = generate_history(300), []
    for is_read_only in (False, True):
        week = build_week(history, history.day - timedelta(days=28), days=28, max_customers=8)
        if is_read_only:
            buffers: list[pickle.PickleBuffer] = []
            pickled = pickle.dumps(week, 5, buffer_callback=buffers.append)
            week = pickle.loads(pickled, buffers=[bytes(buffer) for buffer in buffers])
            assert not week.customers.days_ago.flags.writeable
        build_training_matrix(week)
        signatures.append([len(function.signatures) for function in functions])
    assert signatures[0] == signatures[1]  # other tests may have compiled more before
