"""What numba compiles gives what Python gives; run uncompiled, its lines are seen by coverage."""

import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np

from hm_reco.data.history import as_of, generate_history
from hm_reco.ranking import features
from hm_reco.ranking.features import build_training_matrix, build_week
from hm_reco.ranking.forest import build_forest
from hm_reco.ranking.ranker import RankerSettings, rank, train
from hm_reco.ranking.tuning import build_validation_set
from hm_reco.retrieval import candidates
from hm_reco.retrieval.two_tower import TwoTower, TwoTowerSettings, build_vocabulary, fit_until


def compute(file: Path) -> None:
    """Candidates, features, lists and marks of a few customers of a small shop, into a file."""
    history = generate_history(300)
    day = history.day - timedelta(days=28)
    tower = TwoTower(
        build_vocabulary(history.articles), TwoTowerSettings(max_examples=500, batch_size=256)
    )
    fit_until(tower, as_of(history, day))
    space = tower.build_space(as_of(history, day))
    week = build_week(history, day, days=28, max_customers=8, space=space)
    matrix = build_training_matrix(week)
    booster = train([matrix], RankerSettings(rounds=5, min_data_in_leaf=5))
    lists = rank(build_forest(booster), matrix, 100, week.index.top_overall.indices)
    marks = build_validation_set(week, matrix).compute_average_precision(
        np.asarray(booster.predict(matrix.values))
    )
    found = {"candidates": matrix.article, "values": matrix.values}
    np.savez(file, marks=marks, **found, **lists._asdict())


def test_compiled_functions_give_what_python_gives(tmp_path, watched):
    compute(tmp_path / "compiled.npz")
    words = "from tests.test_compiled import *; compute(Path(sys.argv[1]))"
    command = [sys.executable, "-c", words, tmp_path / "python.npz"]
    subprocess.run(command, check=True, env={**os.environ, **watched, "NUMBA_DISABLE_JIT": "1"})
    compiled, python = (np.load(tmp_path / f"{name}.npz") for name in ("compiled", "python"))
    assert len(compiled["candidates"]) > 500 and compiled["marks"].any()
    assert (~np.isnan(compiled["values"])).any(axis=0).mean() > 0.95  # nearly all features occur
    for name in compiled.files:
        np.testing.assert_allclose(compiled[name], python[name], rtol=1e-5, err_msg=name)


def test_a_compiled_function_is_compiled_once_for_here_and_for_elsewhere():
    """What a cluster passes on, and columns of a frame, cannot be written to; other arrays can."""
    history = generate_history(300)
    for loose in (False, True):
        week = build_week(history, history.day - timedelta(days=28), days=28, max_customers=8)
        if loose:
            buffers: list[pickle.PickleBuffer] = []
            text = pickle.dumps(week, 5, buffer_callback=buffers.append)
            week = pickle.loads(text, buffers=[bytes(buffer) for buffer in buffers])
            assert not week.customers.days_ago.flags.writeable
        build_training_matrix(week)
    for function in (candidates._generate, features._compute_features):
        assert len(function.signatures) == 1
