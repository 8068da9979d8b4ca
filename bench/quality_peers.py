"""What well-known libraries recommend, in an environment of their own; see `quality.py`.

    .venv-rivals/bin/python bench/quality_peers.py FOLDER

FOLDER holds `purchases.parquet`, `judged.parquet`, `plan.json`; `lists.parquet` comes to them.
Each model is tuned over a small grid on the newest tuning week, is refitted as often as ours, and
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

Lists = pd.DataFrame  # customer, article, rank; article missing where nothing is known
K = 12
FADES = (30, 120, 0)  # half-lives in days of a purchase's weight; 0: none


def grid(**values: list[Any]) -> Iterator[dict[str, Any]]:
    """All combinations."""
    for combination in product(*values.values()):
        yield dict(zip(values, combination, strict=True))


MODELS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "implicit ALS": (
        AlternatingLeastSquares,
        list(grid(factors=[64, 128], regularization=[0.05], alpha=[1.0, 20.0], random_state=[0])),
    ),
    "implicit BPR": (
        BayesianPersonalizedRanking,
        list(grid(factors=[64], learning_rate=[0.01, 0.05], iterations=[100], random_state=[0])),
    ),
    "implicit BM25": (BM25Recommender, list(grid(K=[20, 100], K1=[1.2, 100.0], B=[0.2, 0.5]))),
    "implicit cosine": (CosineRecommender, list(grid(K=[20, 100]))),
}


def matrix(past: pd.DataFrame, day: date, fade: float, shape: tuple[int, int]) -> csr_matrix:
    """Customers x articles with (faded) times bought."""
    ago = (pd.Timestamp(day) - past["day"]).dt.days.to_numpy()
    weight = 0.5 ** (ago / fade) if fade else np.ones(len(past))
    place = (past["customer"].to_numpy(), past["article"].to_numpy())
    return csr_matrix((weight.astype(np.float32), place), shape=shape)


def as_lists(customers: np.ndarray, articles: np.ndarray) -> Lists:
    """Rows of articles, -1 where there is none, as a table."""
    rank = np.tile(np.arange(1, articles.shape[1] + 1), len(customers))
    table = pd.DataFrame({"customer": np.repeat(customers, articles.shape[1]), "rank": rank})
    table["article"] = pd.array(articles.ravel(), dtype="Int32")
    return table[(table["rank"] == 1) | (table["article"] >= 0)].replace({"article": {-1: pd.NA}})


class Implicit:
    """A model of `implicit` with a fading of old purchases."""

    def __init__(
        self, kind: Callable[..., Any], shape: tuple[int, int], fade: float, **settings: Any
    ) -> None:
        """With the library's own settings."""
        self.model, self.shape, self.fade = kind(**settings), shape, fade

    def fit(self, past: pd.DataFrame, day: date) -> None:
        """Learn the articles' side."""
        self.model.fit(matrix(past, day, self.fade, self.shape), show_progress=False)

    def recommend(self, past: pd.DataFrame, day: date, customers: np.ndarray) -> Lists:
        """Lists from all purchases before `day`."""
        bought = matrix(past, day, self.fade, self.shape)[customers]
        # of the factor models only ALS can place a customer anew, without a fit
        fresh = "recalculate_user" in type(self.model).__dict__
        more = {"recalculate_user": True} if fresh else {}
        articles, scores = self.model.recommend(
            customers, bought, K, filter_already_liked_items=False, **more
        )
        unknown = np.asarray(bought.sum(axis=1)).ravel() == 0
        articles = np.where((scores > 0) & ~unknown[:, None], articles, -1)
        return as_lists(customers, articles)


class SASRec:
    """RecTools' SASRec."""

    def __init__(self, **settings: Any) -> None:
        """With the library's own settings."""
        self.settings = settings

    def _dataset(self, past: pd.DataFrame) -> Dataset:
        names = {"customer": Columns.User, "article": Columns.Item, "day": Columns.Datetime}
        return Dataset.construct(past.rename(columns=names).assign(**{Columns.Weight: 1.0}))

    def fit(self, past: pd.DataFrame, day: date) -> None:
        """Learn from scratch."""
        self.model = SASRecModel(
            loss="sampled_softmax", n_negatives=64, batch_size=128, verbose=0, **self.settings
        )
        self.model.fit(self._dataset(past))

    def recommend(self, past: pd.DataFrame, day: date, customers: np.ndarray) -> Lists:
        """Lists from all purchases before `day`."""
        known = past[past["article"].isin(self.model.data_preparator.get_known_item_ids())]
        served = np.intersect1d(customers, known["customer"].unique())
        found = self.model.recommend(served, self._dataset(known), K, filter_viewed=False)
        table = found.rename(columns={Columns.User: "customer", Columns.Item: "article"})
        table = table[["customer", "rank", "article"]].astype({"article": "Int32"})
        rest = np.setdiff1d(customers, table["customer"])
        return pd.concat([table, as_lists(rest, np.full((len(rest), 1), -1))])


def mark(lists: Lists, sold: pd.DataFrame) -> float:
    """MAP@12, as Kaggle defines it."""
    hit = lists.dropna().merge(sold, on=["customer", "article"]).sort_values(["customer", "rank"])
    precision = (hit.groupby("customer").cumcount() + 1) / hit["rank"]
    size = sold.groupby("customer").size().clip(upper=K)
    return float((precision.groupby(hit["customer"]).sum() / size).fillna(0).mean())


class Bench:
    """The purchases and the plan."""

    def __init__(self, folder: Path) -> None:
        """Read what `quality.py` wrote."""
        self.rows = pd.read_parquet(folder / "purchases.parquet").sort_values("day")
        self.rows["day"] = pd.to_datetime(self.rows["day"])
        self.judged = pd.read_parquet(folder / "judged.parquet")
        self.plan = json.loads((folder / "plan.json").read_text())
        self.shape = tuple(int(self.rows[c].max()) + 1 for c in ("customer", "article"))
        self.shape = (max(self.shape[0], int(self.judged["customer"].max()) + 1), self.shape[1])

    def past(self, day: date) -> pd.DataFrame:
        """Purchases before a day."""
        return self.rows[self.rows["day"] < pd.Timestamp(day)]

    def sold(self, day: date) -> pd.DataFrame:
        """The distinct purchases of the week from a day on."""
        end = pd.Timestamp(day) + timedelta(days=self.plan["horizon"])
        week = self.rows[self.rows["day"].between(pd.Timestamp(day), end, inclusive="left")]
        return week[["customer", "article"]].drop_duplicates()

    def tuned(self, makers: list[Callable[[], Any]]) -> Callable[[], Any]:
        """The maker whose model does best on the newest tuning week."""
        days = [date.fromisoformat(text) for text in self.plan["tuning"]]
        fit_on, weeks, values = self.past(days[0]), days[-8:], []
        for make in makers:
            model = make()
            model.fit(fit_on, days[0])
            marks = [
                mark(model.recommend(self.past(day), day, np.sort(sold["customer"].unique())), sold)
                for day in weeks
                if len(sold := self.sold(day))
            ]
            values.append(float(np.mean(marks)))
        return makers[int(np.argmax(values))]

    def lists(self, make: Callable[[], Any]) -> pd.DataFrame:
        """Lists for all judged weeks, the model refitted as often as ours."""
        parts, model = [], make()
        for n, (day, people) in enumerate(self.judged.groupby("day")):
            past = self.past(day)
            if n % self.plan["refit"] == 0:
                model.fit(past, day)
            customers = np.sort(people["customer"].to_numpy())
            parts.append(model.recommend(past, day, customers).assign(day=day))
        return pd.concat(parts)


def makers(bench: Bench) -> dict[str, list[Callable[[], Any]]]:
    """By method, ways to make a model of it."""

    def implicit(
        kind: Callable[..., Any], settings: dict[str, Any], fade: float
    ) -> Callable[[], Any]:
        return lambda: Implicit(kind, bench.shape, fade, **settings)

    found = {
        name: [implicit(kind, settings, fade) for settings in grid_ for fade in FADES]
        for name, (kind, grid_) in MODELS.items()
    }
    sasrec = grid(n_factors=[64], n_blocks=[2], session_max_len=[50], epochs=[5, 20])
    found["RecTools SASRec"] = [lambda s=settings: SASRec(**s) for settings in sasrec]
    return found


def main(folder: Path) -> None:
    """Tune, refit and recommend with every model."""
    warnings.simplefilter("ignore")  # of the libraries about their own older parts
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    bench, parts = Bench(folder), []
    for name, ways in makers(bench).items():
        started = time.monotonic()
        parts.append(bench.lists(bench.tuned(ways)).assign(method=name))
        print(f"{name}: {len(ways)} settings tried, {time.monotonic() - started:.0f} s", flush=True)
    table = pd.concat(parts).astype({"customer": "int32", "rank": "int64"})
    table["day"] = pd.to_datetime(table["day"]).dt.date
    table.to_parquet(folder / "lists.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
