"""Follow the table "where to add what" of CONTRIBUTING in a copy of the project."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
COPIED_PATHS = ("nbs", "hm_reco", "runner", "reports", "config", "pyproject.toml", "settings.ini")
BIN = Path(sys.executable).parent

SOURCE = '''#| export
import numpy as np
import polars as pl

from hm_reco.compute.jit import jit
from hm_reco.data.decay import decay, exact_sum, to_days_ago
from hm_reco.retrieval.arrays import ArticleIndex, to_csr, to_int32
from hm_reco.retrieval.article_stats import select_best_sellers
from hm_reco.retrieval.best_sellers import take_list
from hm_reco.retrieval.source import (
    Array,
    CandidateBuffer,
    CandidateSource,
    CustomerView,
    Lists,
    TableInputs,
)


def build_postal(inputs: TableInputs) -> dict[str, object]:
    """Build the best sellers of each postal code, and the code of each customer."""
    history = inputs.history
    customers = history.customers.sort("customer").select("customer", pl.col("postal") + 1)
    rows = history.purchases.join(customers, on="customer")
    dated = rows.with_columns(days_ago=to_days_ago(history.day))
    sales = dated.group_by("postal", "article").agg(sold=exact_sum(decay(28)))
    top = select_best_sellers(sales, "sold", 20, ["postal"])
    n_codes = int(customers["postal"].max()) + 1
    return {
        "top_by_postal": to_csr(top, "postal", "article", "sold", n_codes),
        "postal_of": to_int32(customers["postal"]),
    }


@jit
def popular_nearby(index: ArticleIndex, customer: CustomerView, out: CandidateBuffer) -> int:
    """Return best sellers of the customer's postal code; 0 for an unknown customer."""
    if customer.internal_id < 0:
        return 0
    code = index.tables.postal_of[customer.internal_id]
    return take_list(index.tables.top_by_postal, code, out)


NEARBY = CandidateSource(
    "nearby",
    popular_nearby,
    build_postal,
    {
        "postal_of": Array("i4", ("known customers",), "postal codes"),
        "top_by_postal": Lists("postal codes"),
    },
    "sells well",
)
'''
SECTION = """#| export
import polars as pl

from hm_reco.reporting.section import DataReportInputs, Section, SectionBuilder, Table, to_records


def _build(data: DataReportInputs) -> Section:
    units = data.purchases.group_by("channel").agg(pl.col("units").sum()).sort("channel").collect()
    findings = [f"{units['units'].sum()} units in {units.height} channels."]
    figures = {"units": to_records(units)}
    return Section(name="channels", title="Channels", findings=findings, figures=figures)


CHANNELS = SectionBuilder("channels", _build, [Table("units", "Units by channel")])
"""
CHECK = """
import json, sys
from datetime import timedelta

from hm_reco.data.history import generate_history
from hm_reco.lake.storage import open_lake
from hm_reco.ranking.features import FEATURE_NAMES
from hm_reco.ranking.metrics import get_metric
from hm_reco.ranking.ranker import RANKER, RankerSettings
from hm_reco.ranking.rankers import train
from hm_reco.ranking.scoring import score_lists
from hm_reco.ranking.weeks import build_training_matrix, build_week
from hm_reco.registry.bundle import Bundle
from hm_reco.retrieval.budget import build_ranked_hits
from hm_reco.retrieval.candidates import generate_candidates
from hm_reco.serving.recommend import recommend
from hm_reco.serving.recommender import build_recommender
from hm_reco.serving.snapshot import load_snapshot, save_snapshot

history = generate_history(150)
week = build_week(history, history.day - timedelta(days=28), days=28, max_customers=8)
matrix = build_training_matrix(week)
candidates = generate_candidates(week.aggregates.index, week.customers)
ranker = train([matrix], RankerSettings(rounds=3, min_data_in_leaf=5))
bundle = Bundle("v1", RANKER, history.day, ranker, {}, {})
lake, recommender = open_lake(sys.argv[1]), build_recommender(history, bundle)
loaded = load_snapshot(lake, bundle, save_snapshot(lake, recommender, {}))
some = recommender.customer_ids.text[0].decode()
lists = week.ground_truth.with_columns(rank=1)
print(json.dumps({
    "sources": build_ranked_hits(candidates, week.ground_truth)["source"].unique().to_list(),
    "recent_price": float(matrix.column("recent_price").max()),
    "features": len(FEATURE_NAMES),
    "loaded": recommend(loaded, [some]) == recommend(recommender, [some]),
    "tables": [name for name in loaded.index.tables._fields if "postal" in name],
    "precision": score_lists(lists, week.ground_truth, [get_metric("precision@4")]).columns,
}))
"""


CHECK_REPORT_AND_FILTER = """
import json
from datetime import date

import numpy as np

from hm_reco.api.catalogue import FILTERS, load_catalogue
from hm_reco.api.schemas import Filters
from hm_reco.data.history import load_history
from hm_reco.registry.bundle import Bundle
from hm_reco.reporting.data_sections import DATA_SECTIONS, build_data_report
from hm_reco.reporting.section import render_section
from hm_reco.serving.recommender import build_recommender
from hm_reco.stages.demo import demo_lake

lake = demo_lake("processing", 100)
report = build_data_report(lake, "r1", "", date(2020, 9, 24))
section = next(section for section in report.sections if section.name == "channels")
history = load_history(lake)
bundle = Bundle("v1", "popular, 28 days", history.day, None, {}, {})
recommender = build_recommender(history, bundle)
catalogue = load_catalogue(lake, recommender)
kind = catalogue.articles["kind"].drop_nulls()[0]
by_kind = next(item for item in FILTERS if item.field == "kinds")
mask = by_kind.match(catalogue, recommender, Filters(kinds=[kind]).kinds)
print(json.dumps({
    "names": [item.name for item in DATA_SECTIONS],
    "html": render_section(DATA_SECTIONS[-1], section).data,
    "kinds": catalogue.articles["kind"].filter(mask).unique().to_list() == [kind],
    "restricts": bool(0 < mask.sum() < np.size(mask)),
}))
"""


CHECK_TABLE = """
import json, sys
from pathlib import Path

import polars as pl

from hm_reco.data.ingestion import ingest
from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import open_lake
from hm_reco.lake.tables import scan

shop, lake = Path(sys.argv[1]) / "shop", open_lake(sys.argv[1] + "/lake")
write_synthetic(shop, 50)
ingest(lake, str(shop))  # `returns` is not required
sold = pl.read_csv(shop / "transactions_train.csv", infer_schema=False).head(20)
rows = sold.select("t_dat", "customer_id", "article_id").with_row_index("row")
bad_date = pl.when(pl.col("row") == 3).then(pl.lit("soon")).otherwise("t_dat")
rows.with_columns(t_dat=bad_date).drop("row").write_csv(shop / "returns.csv")
loads = ingest(lake, str(shop))
print(json.dumps({
    "states": {load.table: load.state for load in loads},
    "returned": scan(lake, "raw/returns").collect().height,
    "quarantined": scan(lake, "quarantine/returns").collect()["rule"].to_list(),
}))
"""


def edit_notebook(path: Path, changes: dict[str, str]) -> None:
    """Replace texts in the code cells of a notebook; each occurs."""
    notebook = nbformat.read(path, as_version=4)
    for old, new in changes.items():
        cells = [cell for cell in notebook.cells if old in cell.source]
        assert cells, f"{path.name}: no {old!r}"
        cells[0].source = cells[0].source.replace(old, new, 1)
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def extended_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with one more of each."""
    root = tmp_path_factory.mktemp("extended")
    for name in COPIED_PATHS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    add_source(root / "nbs/retrieval")
    add_feature(root / "nbs/ranking/03_customer_features.ipynb")
    add_metric(root / "nbs/ranking/00_metrics.ipynb")
    add_section(root / "nbs/reporting")
    add_filter(root / "nbs/api")
    add_table(root / "nbs/data/00_contracts.ipynb")
    run_in(root, str(BIN / "nbdev-export"))
    return root


def write_notebook(path: Path, module: str, code: str) -> None:
    """Write a notebook that exports one cell to a module."""
    cells = [
        nbformat.v4.new_markdown_cell(f"# {path.stem}\n\n> Adds an object to a list."),
        nbformat.v4.new_code_cell(f"#| default_exp {module}"),
        nbformat.v4.new_code_cell(code),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def add_source(folder: Path) -> None:
    """Two files: a notebook of its own, and the list."""
    write_notebook(folder / "10_nearby.ipynb", "retrieval.nearby", SOURCE)
    edit_notebook(
        folder / "11_candidate_sources.ipynb",
        {
            "import USER_KNN": "import USER_KNN\nfrom hm_reco.retrieval.nearby import NEARBY",
            "    TWO_TOWER,\n)": "    TWO_TOWER,\n    NEARBY,\n)",
        },
    )


def add_feature(notebook: Path) -> None:
    """One file: the description and the value in the block."""
    edit_notebook(
        notebook,
        {
            '    Feature("online", "share of the purchases online"': '    Feature("recent_price", '
            '"price of the newest purchase", "price", "last visit", PRICE),\n'
            '    Feature("online", "share of the purchases online"',
            "    online = (customers.channel": "    out[:, COLUMN.recent_price] = "
            "customers.price[start]\n    online = (customers.channel",
        },
    )


def add_metric(notebook: Path) -> None:
    """One file: the function and its entry in the list."""
    edit_notebook(
        notebook,
        {
            "METRICS: tuple[Metric, ...] = (": "def precision(hits: np.ndarray, purchased: int) -> "
            'float:\n    """Return the share of hits."""\n    return hits.sum() / hits.size\n\n\n'
            'METRICS: tuple[Metric, ...] = (\n    Metric("precision", precision),'
        },
    )


def add_section(folder: Path) -> None:
    """Two files: a notebook of its own, and the list."""
    write_notebook(folder / "08_channels.ipynb", "reporting.channels", SECTION)
    edit_notebook(
        folder / "12_data_sections.ipynb",
        {
            "import CUSTOMERS": "import CUSTOMERS\nfrom hm_reco.reporting.channels import CHANNELS",
            "    DRIFT,\n)": "    DRIFT,\n    CHANNELS,\n)",
        },
    )


def add_filter(folder: Path) -> None:
    """Two files: the field of the request, and the list."""
    edit_notebook(
        folder / "00_schemas.ipynb",
        {
            "    price: Price | None = None": "    kinds: list[Term] = "
            "Field(default_factory=list, max_length=50)\n    price: Price | None = None"
        },
    )
    edit_notebook(
        folder / "01_catalogue.ipynb",
        {
            '    TermFilter("colours", "colour"),': '    TermFilter("colours", "colour"),\n'
            '    TermFilter("kinds", "kind"),'
        },
    )


def add_table(notebook: Path) -> None:
    """One file: the contract and its entry in the list."""
    edit_notebook(
        notebook,
        {
            "CONTRACTS = {": "class Returns(SourceSchema):\n"
            '    """One article that a customer sent back."""\n\n'
            "    t_dat = dy.Date(nullable=False)\n"
            "    customer_id = dy.String(nullable=False)\n"
            "    article_id = dy.String(nullable=False, regex=ARTICLE_ID)\n\n\n"
            'CONTRACTS = {\n    "returns": Contract(Returns, required=False),'
        },
    )


def run_in(root: Path, *command: str) -> str:
    """Run a command with the copy's code, without compiling, and return its output."""
    result = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "NUMBA_DISABLE_JIT": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_source_feature_and_metric_follow_from_their_lists(extended_project, tmp_path):
    result = json.loads(run_in(extended_project, sys.executable, "-c", CHECK, str(tmp_path)))
    assert "nearby" in result["sources"] and result["recent_price"] > 0
    assert result["loaded"] and result["tables"] == ["postal_of", "top_by_postal"]
    assert result["precision"] == ["customer", "precision@4"]
    catalogue = json.loads(run_in(extended_project, str(BIN / "hm"), "features", "--json"))
    names = {row["name"] for row in catalogue}
    assert len(names) == result["features"]
    assert {"recent_price", "nearby_score", "nearby_rank"} <= names


def test_new_metric_is_a_value_of_the_training_parameter(extended_project):
    command = [str(BIN / "hm"), "plan", "training", "-p", "metric=precision@4"]
    assert "training" in run_in(extended_project, *command)


def test_section_and_filter_follow_from_their_lists(extended_project):
    result = json.loads(run_in(extended_project, sys.executable, "-c", CHECK_REPORT_AND_FILTER))
    assert result["names"][-1] == "channels"
    assert "<h3>Channels</h3>" in result["html"] and "Units by channel" in result["html"]
    assert result["kinds"] and result["restricts"]


def test_optional_table_follows_from_its_contract(extended_project, tmp_path):
    result = json.loads(run_in(extended_project, sys.executable, "-c", CHECK_TABLE, str(tmp_path)))
    assert result["states"]["returns"] == "loaded" and result["returned"] == 19
    assert len(result["quarantined"]) == 1
