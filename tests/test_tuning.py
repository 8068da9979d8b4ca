"""Tuning: resumed studies, robust choice of settings and trees."""

from datetime import timedelta
from itertools import islice

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest

from hm_reco.data.history import generate_history
from hm_reco.lake.storage import Lake
from hm_reco.ranking import learning_curve, tuning
from hm_reco.ranking.backtest import evaluate
from hm_reco.ranking.learning_curve import (
    TrialData,
    compute_learning_curve,
    select_num_trees,
    smooth,
)
from hm_reco.ranking.lightgbm import to_dataset, to_lightgbm_parameters
from hm_reco.ranking.metrics import METRICS
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RankerSettings, downsample_negatives, rank_by_score
from hm_reco.ranking.scoring import score_lists
from hm_reco.ranking.tuning import tune
from hm_reco.ranking.validation import (
    build_validation_set,
    concat_validation_sets,
    sample_customers,
)
from hm_reco.ranking.weeks import build_training_matrix, build_week


@pytest.fixture(scope="module")
def history():
    return generate_history(600)


@pytest.fixture(scope="module")
def weeks(history):
    opened = [build_week(history, history.day - timedelta(days=28 * n), days=28) for n in (1, 2, 3)]
    return [(week, build_training_matrix(week)) for week in opened]


def test_study_resumes_after_interrupt(lake: Lake, weeks, monkeypatch):
    validation_sets = [build_validation_set(week, matrix) for week, matrix in weeks[:1]]
    matrices = [downsample_negatives(matrix, 0.2, n) for n, (_, matrix) in enumerate(weeks[1:])]
    original_segment, calls = tuning.train_segment, []

    def interrupt_third_trial(trial_data, checkpoint):
        calls.append(checkpoint.n_trees == 0)
        if sum(calls) == 3:  # the third trial
            raise KeyboardInterrupt
        return original_segment(trial_data, checkpoint)

    monkeypatch.setattr(tuning, "train_segment", interrupt_third_trial)
    with pytest.raises(KeyboardInterrupt):
        tune(lake, "study", matrices, validation_sets, RankerSettings(), minutes=5)
    resumed = tune(lake, "study", matrices, validation_sets, RankerSettings(), minutes=0)
    completed = resumed.trials.filter(state="complete")
    assert completed["trial"].to_list()[:2] == [0, 1] and sum(calls) == 3
    assert resumed.settings.rounds in completed["rounds"].to_list()


def test_lucky_trial_does_not_replace_defaults(lake: Lake, weeks, monkeypatch):
    defaults = RankerSettings()
    validation_sets = [build_validation_set(week, matrix) for week, matrix in weeks[:1]]
    count = validation_sets[0].customers.size
    default_ap, lucky_ap = np.full(count, 0.02), np.r_[np.full(count - 1, 0.02), 0.9]

    def score_segment(_trial_data, checkpoint):
        return checkpoint, [default_ap if checkpoint.settings == defaults else lucky_ap] * (
            tuning.PATIENCE_STEPS + 1
        )

    monkeypatch.setattr(tuning, "train_segment", score_segment)
    tuned = tune(lake, "luck", [m for _, m in weeks[1:]], validation_sets, defaults, minutes=0.002)
    assert tuned.trials.height > 1
    assert tuned.trials["value"].to_list()[1] > tuned.trials["value"].to_list()[0]
    assert tuned.settings.num_leaves == defaults.num_leaves and tuned.value == pytest.approx(0.02)


def test_tuning_weeks_precede_evaluation_weeks(history):
    plan = BacktestPlan(history.day, evaluation_weeks=2, tuning_weeks=3, training_weeks=6)
    calls = []

    def tuner(matrices, validation_sets):
        calls.append(
            (
                len(matrices),
                [set(validation_set.customers.tolist()) for validation_set in validation_sets],
            )
        )
        return RankerSettings(rounds=10)

    result = evaluate(history, plan, tuner=tuner)
    days = [history.day - timedelta(days=7 * weeks_back) for weeks_back in (5, 4, 3)]
    buyers = [set(build_week(history, day).buyers["customer"]) for day in days]
    assert calls == [(6, buyers)] and result.settings.rounds == 10
    assert result.scores["day"].min() == history.day - timedelta(days=14)


def test_train_segments_equal_single_training(weeks):
    validation_set = concat_validation_sets(
        [build_validation_set(week, matrix) for week, matrix in weeks[:1]]
    )
    matrices = [downsample_negatives(matrix, 0.2, n) for n, (_, matrix) in enumerate(weeks[1:])]
    settings, trees = (
        RankerSettings(),
        learning_curve.TREES_PER_STEP * learning_curve.STEPS_PER_SEGMENT,
    )
    ap_by_step = [
        *islice(
            compute_learning_curve(TrialData(matrices, validation_set), settings),
            learning_curve.STEPS_PER_SEGMENT + 1,
        )
    ]
    booster = lgb.Booster(to_lightgbm_parameters(settings), to_dataset(matrices))
    for _ in range(trees):
        booster.update()
    scores = booster.predict(validation_set.matrix.values, raw_score=True)
    assert np.allclose(ap_by_step[-2], validation_set.score(scores)) and not np.array_equal(
        ap_by_step[-1], ap_by_step[-2]
    )


def test_smoothing_example():
    assert smooth([1.0] * 9 + [10.0])[0] == 1.0
    assert smooth([1.0] * 9 + [10.0])[-1] == pytest.approx((4 * 1.0 + 10.0) / 5)


def test_select_num_trees_within_one_standard_error(monkeypatch):
    full_ap = np.tile([0.2, 0.4], 50)
    steps = [
        0.5 * full_ap,
        full_ap - 0.001 * (np.arange(100) % 3),
        full_ap,
    ]  # the middle step is .001 worse

    monkeypatch.setattr(learning_curve, "SMOOTHING_STEPS", 0)
    assert (
        select_num_trees(steps)[0] == 3 * learning_curve.TREES_PER_STEP
    )  # worse for two of three customers: significant
    noisy = full_ap + 0.05 * np.random.default_rng(0).standard_normal(100)
    noisy += (full_ap - noisy).mean() - 0.001  # the same mean loss, but noisy
    trees, ap = select_num_trees([steps[0], noisy, full_ap])
    assert trees == 2 * learning_curve.TREES_PER_STEP and np.allclose(ap, noisy)


def test_validation_set_ap_equals_metric(weeks):
    (week, matrix), rng = weeks[0], np.random.default_rng(0)
    scores = rng.integers(0, 50, len(matrix.label)).astype(float)  # many ties
    lists = rank_by_score(matrix.pairs.with_columns(score=pl.Series(scores)), 12)
    expected = score_lists(lists, week.ground_truth, METRICS[:1])["MAP@12"].to_numpy()
    validation_set = build_validation_set(week, matrix)
    assert expected.any() and np.allclose(validation_set.score(scores), expected)
    sampled = sample_customers(validation_set, 5, 0)
    positions = np.searchsorted(validation_set.customers, sampled.customers)
    rows = np.concatenate([np.arange(*matrix.start[n : n + 2]) for n in positions])
    assert np.allclose(sampled.score(scores[rows]), expected[positions])
    combined = concat_validation_sets([validation_set, validation_set])
    assert np.allclose(combined.score(np.r_[scores, scores]), np.r_[expected, expected])
