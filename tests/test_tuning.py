"""A study survives its process, and luck does not choose."""

from datetime import timedelta
from itertools import islice

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest

from hm_reco.data.history import generate_history
from hm_reco.lake.storage import Lake
from hm_reco.ranking import tuning
from hm_reco.ranking.backtest import evaluate
from hm_reco.ranking.features import build_training_matrix, build_week
from hm_reco.ranking.metrics import average_precision
from hm_reco.ranking.plan import BacktestPlan
from hm_reco.ranking.ranker import RankerSettings, downsample_negatives, rank_by_score, to_dataset
from hm_reco.ranking.tuning import (
    TrialData,
    build_validation_set,
    compute_learning_curve,
    concat_validation_sets,
    sample_customers,
    select_num_trees,
    smooth,
    tune,
)


@pytest.fixture(scope="module")
def shop():
    return generate_history(600)


@pytest.fixture(scope="module")
def weeks(shop):
    opened = [build_week(shop, shop.day - timedelta(days=28 * n), days=28) for n in (1, 2, 3)]
    return [(week, build_training_matrix(week)) for week in opened]


def test_a_study_goes_on_after_a_kill(lake: Lake, weeks, monkeypatch):
    exams = [build_validation_set(week, matrix) for week, matrix in weeks[:1]]
    learned = [downsample_negatives(matrix, 0.2, n) for n, (_, matrix) in enumerate(weeks[1:])]
    real, calls = tuning.train_segment, []

    def killed(lesson, begun):
        calls.append(begun.n_trees == 0)
        if sum(calls) == 3:  # the third trial
            raise KeyboardInterrupt
        return real(lesson, begun)

    monkeypatch.setattr(tuning, "train_segment", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(lake, "study", learned, exams, RankerSettings(), minutes=5)
    again = tune(lake, "study", learned, exams, RankerSettings(), minutes=0)
    done = again.trials.filter(state="complete")
    assert done["trial"].to_list()[:2] == [0, 1] and sum(calls) == 3
    assert again.settings.rounds in done["rounds"].to_list()


def test_a_lucky_trial_does_not_replace_the_usual_settings(lake: Lake, weeks, monkeypatch):
    usual = RankerSettings()
    exams = [build_validation_set(week, matrix) for week, matrix in weeks[:1]]
    count = exams[0].customers.size
    plain, lucky = np.full(count, 0.02), np.r_[np.full(count - 1, 0.02), 0.9]

    def marked(_lesson, begun):
        return begun, [plain if begun.settings == usual else lucky] * (tuning.PATIENCE_STEPS + 1)

    monkeypatch.setattr(tuning, "train_segment", marked)
    tuned = tune(lake, "luck", [m for _, m in weeks[1:]], exams, usual, minutes=0.002)
    assert tuned.trials.height > 1
    assert tuned.trials["value"].to_list()[1] > tuned.trials["value"].to_list()[0]
    assert tuned.settings.num_leaves == usual.num_leaves and tuned.value == pytest.approx(0.02)


def test_settings_are_chosen_on_weeks_before_the_judged_ones(shop):
    plan = BacktestPlan(shop.day, evaluation_weeks=2, tuning_weeks=3, training_weeks=6)
    asked = []

    def find(learned, exams):
        asked.append((len(learned), [set(exam.customers.tolist()) for exam in exams]))
        return RankerSettings(rounds=10)

    result = evaluate(shop, plan, tuner=find)
    days = [shop.day - timedelta(days=7 * back) for back in (5, 4, 3)]
    buyers = [set(build_week(shop, day).buyers["customer"]) for day in days]
    assert asked == [(6, buyers)] and result.settings.rounds == 10
    assert result.scores["day"].min() == shop.day - timedelta(days=14)


def test_a_segment_is_as_grown_in_one_go(weeks):
    exam = concat_validation_sets(
        [build_validation_set(week, matrix) for week, matrix in weeks[:1]]
    )
    learned = [downsample_negatives(matrix, 0.2, n) for n, (_, matrix) in enumerate(weeks[1:])]
    settings, trees = RankerSettings(), tuning.TREES_PER_STEP * tuning.STEPS_PER_SEGMENT
    marks = [
        *islice(
            compute_learning_curve(TrialData(learned, exam), settings), tuning.STEPS_PER_SEGMENT + 1
        )
    ]
    whole = lgb.Booster(settings.to_parameters(), to_dataset(learned))
    for _ in range(trees):
        whole.update()
    scores = whole.predict(exam.matrix.values, raw_score=True)
    assert np.allclose(marks[-2], exam.compute_average_precision(scores)) and not np.array_equal(
        marks[-1], marks[-2]
    )


def test_smoothing_by_hand():
    assert smooth([1.0] * 9 + [10.0])[0] == 1.0
    assert smooth([1.0] * 9 + [10.0])[-1] == pytest.approx((4 * 1.0 + 10.0) / 5)


def test_the_fewest_trees_that_are_no_clear_loss(monkeypatch):
    even = np.tile([0.2, 0.4], 50)
    steps = [0.5 * even, even - 0.001 * (np.arange(100) % 3), even]  # the middle is .001 behind

    monkeypatch.setattr(tuning, "SMOOTHING_STEPS", 0)
    assert (
        select_num_trees(steps)[0] == 3 * tuning.TREES_PER_STEP
    )  # behind for two of three customers: clear
    noisy = even + 0.05 * np.random.default_rng(0).standard_normal(100)
    noisy += (even - noisy).mean() - 0.001  # just as far behind, here more, there less
    trees, marks = select_num_trees([steps[0], noisy, even])
    assert trees == 2 * tuning.TREES_PER_STEP and np.allclose(marks, noisy)


def test_an_exam_marks_as_the_metric_does(weeks):
    (week, matrix), draw = weeks[0], np.random.default_rng(0)
    scores = draw.integers(0, 50, len(matrix.label)).astype(float)  # many ties
    lists = rank_by_score(matrix.pairs.with_columns(score=pl.Series(scores)), 12)
    expected = average_precision(lists, week.sold)["ap"].to_numpy()
    exam = build_validation_set(week, matrix)
    assert expected.any() and np.allclose(exam.compute_average_precision(scores), expected)
    few = sample_customers(exam, 5, 0)
    place = np.searchsorted(exam.customers, few.customers)
    rows = np.concatenate([np.arange(*matrix.start[n : n + 2]) for n in place])
    assert np.allclose(few.compute_average_precision(scores[rows]), expected[place])
    both = concat_validation_sets([exam, exam])
    assert np.allclose(
        both.compute_average_precision(np.r_[scores, scores]), np.r_[expected, expected]
    )
