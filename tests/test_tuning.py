"""A study survives its process, and luck does not choose."""

from datetime import timedelta
from itertools import islice

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest

from hm_reco.data.history import sample_history
from hm_reco.lake.storage import Lake
from hm_reco.ranking import tuning
from hm_reco.ranking.backtest import evaluate
from hm_reco.ranking.features import labelled, open_week
from hm_reco.ranking.metrics import average_precision
from hm_reco.ranking.plan import Plan
from hm_reco.ranking.ranker import RankerSettings, in_order, pooled, thin
from hm_reco.ranking.tuning import (
    Lesson,
    course,
    enough_trees,
    exam_of,
    joined,
    smoothed,
    some_of,
    tune,
)


@pytest.fixture(scope="module")
def shop():
    return sample_history(600)


@pytest.fixture(scope="module")
def weeks(shop):
    opened = [open_week(shop, shop.day - timedelta(days=28 * n), days=28) for n in (1, 2, 3)]
    return [(week, labelled(week)) for week in opened]


def test_a_study_goes_on_after_a_kill(lake: Lake, weeks, monkeypatch):
    exams = [exam_of(week, matrix) for week, matrix in weeks[:1]]
    learned = [thin(matrix, 0.2, n) for n, (_, matrix) in enumerate(weeks[1:])]
    real, calls = tuning.segment, []

    def killed(lesson, begun):
        calls.append(begun.trees == 0)
        if sum(calls) == 3:  # the third trial
            raise KeyboardInterrupt
        return real(lesson, begun)

    monkeypatch.setattr(tuning, "segment", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(lake, "study", learned, exams, RankerSettings(), minutes=5)
    again = tune(lake, "study", learned, exams, RankerSettings(), minutes=0)
    done = again.trials.filter(state="complete")
    assert done["trial"].to_list()[:2] == [0, 1] and sum(calls) == 3
    assert again.settings.rounds in done["rounds"].to_list()


def test_a_lucky_trial_does_not_replace_the_usual_settings(lake: Lake, weeks, monkeypatch):
    usual = RankerSettings()
    exams = [exam_of(week, matrix) for week, matrix in weeks[:1]]
    count = exams[0].customers.size
    plain, lucky = np.full(count, 0.02), np.r_[np.full(count - 1, 0.02), 0.9]

    def marked(_lesson, begun):
        return begun, [plain if begun.settings == usual else lucky] * (tuning.PATIENCE + 1)

    monkeypatch.setattr(tuning, "segment", marked)
    tuned = tune(lake, "luck", [m for _, m in weeks[1:]], exams, usual, minutes=0.002)
    assert tuned.trials.height > 1
    assert tuned.trials["value"].to_list()[1] > tuned.trials["value"].to_list()[0]
    assert tuned.settings.num_leaves == usual.num_leaves and tuned.value == pytest.approx(0.02)


def test_settings_are_chosen_on_weeks_before_the_judged_ones(shop):
    plan = Plan(shop.day, evaluation_weeks=2, tuning_weeks=3, training_weeks=6)
    asked = []

    def find(learned, exams):
        asked.append((len(learned), [set(exam.customers.tolist()) for exam in exams]))
        return RankerSettings(rounds=10)

    result = evaluate(shop, plan, find=find)
    days = [shop.day - timedelta(days=7 * back) for back in (5, 4, 3)]
    buyers = [set(open_week(shop, day).who["customer"]) for day in days]
    assert asked == [(6, buyers)] and result.settings.rounds == 10
    assert result.scores["day"].min() == shop.day - timedelta(days=14)


def test_a_segment_is_as_grown_in_one_go(weeks):
    exam = joined([exam_of(week, matrix) for week, matrix in weeks[:1]])
    learned = [thin(matrix, 0.2, n) for n, (_, matrix) in enumerate(weeks[1:])]
    settings, trees = RankerSettings(), tuning.STEP * tuning.SEGMENT
    marks = [*islice(course(Lesson(learned, exam), settings), tuning.SEGMENT + 1)]
    whole = lgb.Booster(settings.parameters(), pooled(learned))
    for _ in range(trees):
        whole.update()
    scores = whole.predict(exam.week.values, raw_score=True)
    assert np.allclose(marks[-2], exam.mark(scores)) and not np.array_equal(marks[-1], marks[-2])


def test_smoothing_by_hand():
    assert smoothed([1.0] * 9 + [10.0])[0] == 1.0
    assert smoothed([1.0] * 9 + [10.0])[-1] == pytest.approx((4 * 1.0 + 10.0) / 5)


def test_the_fewest_trees_that_are_no_clear_loss(monkeypatch):
    even = np.tile([0.2, 0.4], 50)
    steps = [0.5 * even, even - 0.001 * (np.arange(100) % 3), even]  # the middle is .001 behind

    monkeypatch.setattr(tuning, "AROUND", 0)
    assert enough_trees(steps)[0] == 3 * tuning.STEP  # behind for two of three customers: clear
    noisy = even + 0.05 * np.random.default_rng(0).standard_normal(100)
    noisy += (even - noisy).mean() - 0.001  # just as far behind, here more, there less
    trees, marks = enough_trees([steps[0], noisy, even])
    assert trees == 2 * tuning.STEP and np.allclose(marks, noisy)


def test_an_exam_marks_as_the_metric_does(weeks):
    (week, matrix), draw = weeks[0], np.random.default_rng(0)
    scores = draw.integers(0, 50, len(matrix.label)).astype(float)  # many ties
    lists = in_order(matrix.pairs.with_columns(score=pl.Series(scores)), 12)
    expected = average_precision(lists, week.sold)["ap"].to_numpy()
    exam = exam_of(week, matrix)
    assert expected.any() and np.allclose(exam.mark(scores), expected)
    few = some_of(exam, 5, 0)
    place = np.searchsorted(exam.customers, few.customers)
    rows = np.concatenate([np.arange(*matrix.start[n : n + 2]) for n in place])
    assert np.allclose(few.mark(scores[rows]), expected[place])
    both = joined([exam, exam])
    assert np.allclose(both.mark(np.r_[scores, scores]), np.r_[expected, expected])
