"""What numba compiles gives what Python gives; run uncompiled, its lines are seen by coverage."""

import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np

from hm_reco.data.history import as_of, sample_history
from hm_reco.ranking import features
from hm_reco.ranking.features import labelled, open_week
from hm_reco.ranking.forest import open_forest
from hm_reco.ranking.ranker import RankerSettings, rank, train
from hm_reco.ranking.tuning import exam_of
from hm_reco.retrieval import candidates
from hm_reco.retrieval.two_tower import Tower, TowerSettings, advance, learn_vocabulary


def compute(file: Path) -> None:
    """Candidates, features, lists and marks of a few customers of a small shop, into a file."""
    history = sample_history(300)
    day = history.day - timedelta(days=28)
    tower = Tower(learn_vocabulary(history.articles), TowerSettings(examples=500, batch=256))
    advance(tower, as_of(history, day))
    space = tower.space(as_of(history, day))
    week = open_week(history, day, days=28, customers=8, space=space)
    matrix = labelled(week)
    booster = train([matrix], RankerSettings(rounds=5, min_data_in_leaf=5))
    lists = rank(open_forest(booster), matrix, 100, week.shop.popular.item)
    marks = exam_of(week, matrix).mark(np.asarray(booster.predict(matrix.values)))
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
    history = sample_history(300)
    for loose in (False, True):
        week = open_week(history, history.day - timedelta(days=28), days=28, customers=8)
        if loose:
            buffers: list[pickle.PickleBuffer] = []
            text = pickle.dumps(week, 5, buffer_callback=buffers.append)
            week = pickle.loads(text, buffers=[bytes(buffer) for buffer in buffers])
            assert not week.people.ago.flags.writeable
        labelled(week)
    for function in (candidates._propose, features._features):
        assert len(function.signatures) == 1
