"""Recommendations of well-known libraries, in a separate environment; see `quality.py`.

    .venv-rivals/bin/python bench/external_models.py FOLDER

FOLDER holds `purchases.parquet`, `evaluation.parquet`, `plan.json`; `lists.parquet` is the result.
Each model is tuned over a small grid on the latest tuning weeks, is refitted as often as ours, and
always recommends from all purchases before the week.
"""

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.nearest_neighbours import BM25Recommender, CosineRecommender
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from scipy.sparse import csr_matrix

Lists = pd.DataFrame  # customer, article, rank; article missing for unknown customers
K = 12
HALF_LIVES_DAYS = (30, 120, 0)  # of the weight of a purchase; 0: no decay


def build_grid(**values: list[Any]) -> Iterator[dict[str, Any]]:
    """All combinations."""
    for combination in product(*values.values()):
        yield dict(zip(values, combination, strict=True))


MODELS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "implicit ALS": (
        AlternatingLeastSquares,
        list(
            build_grid(
                factors=[64, 128], regularization=[0.05], alpha=[1.0, 20.0], random_state=[0]
            )
        ),
    ),
    "implicit BPR": (
        BayesianPersonalizedRanking,
        list(
            build_grid(factors=[64], learning_rate=[0.01, 0.05], iterations=[100], random_state=[0])
        ),
    ),
    "implicit BM25": (
        BM25Recommender,
        list(build_grid(K=[20, 100], K1=[1.2, 100.0], B=[0.2, 0.5])),
    ),
    "implicit cosine": (CosineRecommender, list(build_grid(K=[20, 100]))),
}


def build_matrix(
    purchases: pd.DataFrame, day: date, half_life: float, shape: tuple[int, int]
) -> csr_matrix:
    """Customers x articles: number of purchases, with time decay."""
    days_ago = (pd.Timestamp(day) - purchases["day"]).dt.days.to_numpy()
    weight = 0.5 ** (days_ago / half_life) if half_life else np.ones(len(purchases))
    indices = (purchases["customer"].to_numpy(), purchases["article"].to_numpy())
    return csr_matrix((weight.astype(np.float32), indices), shape=shape)


def to_lists(customers: np.ndarray, articles: np.ndarray) -> Lists:
    """Rows of articles, -1 where there is none, as a table."""
    rank = np.tile(np.arange(1, articles.shape[1] + 1), len(customers))
    table = pd.DataFrame({"customer": np.repeat(customers, articles.shape[1]), "rank": rank})
    table["article"] = pd.array(articles.ravel(), dtype="Int32")
    return table[(table["rank"] == 1) | (table["article"] >= 0)].replace({"article": {-1: pd.NA}})


class Implicit:
    """A model of `implicit` with time-decayed purchases."""

    def __init__(
        self, kind: Callable[..., Any], shape: tuple[int, int], half_life: float, **settings: Any
    ) -> None:
        """Use the library's own settings."""
        self.model, self.shape, self.half_life = kind(**settings), shape, half_life

    def fit(self, past: pd.DataFrame, day: date) -> None:
        """Fit the model on purchases before `day`."""
        self.model.fit(build_matrix(past, day, self.half_life, self.shape), show_progress=False)

    def recommend(self, past: pd.DataFrame, day: date, customers: np.ndarray) -> Lists:
        """Lists from all purchases before `day`."""
        purchased = build_matrix(past, day, self.half_life, self.shape)[customers]
        # of the factor models, only ALS can embed a customer without a new fit
        can_recalculate = "recalculate_user" in type(self.model).__dict__
        options = {"recalculate_user": True} if can_recalculate else {}
        articles, scores = self.model.recommend(
            customers, purchased, K, filter_already_liked_items=False, **options
        )
        unknown = np.asarray(purchased.sum(axis=1)).ravel() == 0
        articles = np.where((scores > 0) & ~unknown[:, None], articles, -1)
        return to_lists(customers, articles)


class SASRec:
    """RecTools' SASRec."""

    def __init__(self, **settings: Any) -> None:
        """Use the library's own settings."""
        self.settings = settings

    def _dataset(self, past: pd.DataFrame) -> Dataset:
        names = {"customer": Columns.User, "article": Columns.Item, "day": Columns.Datetime}
        return Dataset.construct(past.rename(columns=names).assign(**{Columns.Weight: 1.0}))

    def fit(self, past: pd.DataFrame, day: date) -> None:
        """Fit a new model."""
        self.model = SASRecModel(
            loss="sampled_softmax", n_negatives=64, batch_size=128, verbose=0, **self.settings
        )
        self.model.fit(self._dataset(past))

    def recommend(self, past: pd.DataFrame, day: date, customers: np.ndarray) -> Lists:
        """Lists from all purchases before `day`."""
        known_purchases = past[
            past["article"].isin(self.model.data_preparator.get_known_item_ids())
        ]
        known_customers = np.intersect1d(customers, known_purchases["customer"].unique())
        recommended = self.model.recommend(
            known_customers, self._dataset(known_purchases), K, filter_viewed=False
        )
        table = recommended.rename(columns={Columns.User: "customer", Columns.Item: "article"})
        table = table[["customer", "rank", "article"]].astype({"article": "Int32"})
        unknown_customers = np.setdiff1d(customers, table["customer"])
        return pd.concat(
            [table, to_lists(unknown_customers, np.full((len(unknown_customers), 1), -1))]
        )


def compute_map12(lists: Lists, ground_truth: pd.DataFrame) -> float:
    """MAP@12, as Kaggle defines it."""
    hits = (
        lists.dropna()
        .merge(ground_truth, on=["customer", "article"])
        .sort_values(["customer", "rank"])
    )
    precision = (hits.groupby("customer").cumcount() + 1) / hits["rank"]
    n_purchases = ground_truth.groupby("customer").size().clip(upper=K)
    return float((precision.groupby(hits["customer"]).sum() / n_purchases).fillna(0).mean())


class Bench:
    """The purchases and the plan."""

    def __init__(self, folder: Path) -> None:
        """Read what `quality.py` wrote."""
        self.purchases = pd.read_parquet(folder / "purchases.parquet").sort_values("day")
        self.purchases["day"] = pd.to_datetime(self.purchases["day"])
        self.buyers = pd.read_parquet(folder / "evaluation.parquet")
        self.plan = json.loads((folder / "plan.json").read_text())
        self.shape = tuple(int(self.purchases[c].max()) + 1 for c in ("customer", "article"))
        self.shape = (max(self.shape[0], int(self.buyers["customer"].max()) + 1), self.shape[1])

    def get_past(self, day: date) -> pd.DataFrame:
        """Purchases before a day."""
        return self.purchases[self.purchases["day"] < pd.Timestamp(day)]

    def get_ground_truth(self, day: date) -> pd.DataFrame:
        """The distinct purchases of the week from a day on."""
        end = pd.Timestamp(day) + timedelta(days=self.plan["horizon"])
        week = self.purchases[
            self.purchases["day"].between(pd.Timestamp(day), end, inclusive="left")
        ]
        return week[["customer", "article"]].drop_duplicates()

    def tune(self, factories: list[Callable[[], Any]]) -> Callable[[], Any]:
        """The factory whose model is best on the latest tuning weeks."""
        days = [date.fromisoformat(text) for text in self.plan["tuning"]]
        training_purchases, weeks, values = self.get_past(days[0]), days[-8:], []
        for factory in factories:
            model = factory()
            model.fit(training_purchases, days[0])
            scores = [
                compute_map12(
                    model.recommend(
                        self.get_past(day), day, np.sort(ground_truth["customer"].unique())
                    ),
                    ground_truth,
                )
                for day in weeks
                if len(ground_truth := self.get_ground_truth(day))
            ]
            values.append(float(np.mean(scores)))
        return factories[int(np.argmax(values))]

    def recommend_weeks(self, factory: Callable[[], Any]) -> pd.DataFrame:
        """Lists for all evaluation weeks; the model is refitted as often as ours."""
        parts, model = [], factory()
        for n, (day, customers_of_day) in enumerate(self.buyers.groupby("day")):
            past = self.get_past(day)
            if n % self.plan["refit"] == 0:
                model.fit(past, day)
            customers = np.sort(customers_of_day["customer"].to_numpy())
            parts.append(model.recommend(past, day, customers).assign(day=day))
        return pd.concat(parts)


def build_factories(bench: Bench) -> dict[str, list[Callable[[], Any]]]:
    """By method: a factory for each setting of its grid."""

    def implicit(
        kind: Callable[..., Any], settings: dict[str, Any], half_life: float
    ) -> Callable[[], Any]:
        return lambda: Implicit(kind, bench.shape, half_life, **settings)

    factories = {
        name: [
            implicit(kind, settings, fade) for settings in settings_grid for fade in HALF_LIVES_DAYS
        ]
        for name, (kind, settings_grid) in MODELS.items()
    }
    sasrec = build_grid(n_factors=[64], n_blocks=[2], session_max_len=[50], epochs=[5, 20])
    factories["RecTools SASRec"] = [lambda s=settings: SASRec(**s) for settings in sasrec]
    return factories


def main(folder: Path) -> None:
    """Tune, refit and recommend with every model."""
    warnings.simplefilter("ignore")  # deprecations inside of the libraries
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    bench, parts = Bench(folder), []
    for name, factories in build_factories(bench).items():
        started = time.monotonic()
        parts.append(bench.recommend_weeks(bench.tune(factories)).assign(method=name))
        print(
            f"{name}: {len(factories)} settings tried, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    table = pd.concat(parts).astype({"customer": "int32", "rank": "int64"})
    table["day"] = pd.to_datetime(table["day"]).dt.date
    table.to_parquet(folder / "lists.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
