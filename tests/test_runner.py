"""Parameters, the graph, and what a stage leaves when it succeeds and when it fails."""

import json
from pathlib import Path

import nbformat
import pytest

from hm_reco.core.lake import Lake
from runner.execute import StageError, run_pipeline, run_stage
from runner.graph import PipelineError, Stage, choose, load_pipeline
from runner.ledger import Entry, enter, new_run_id, read_ledger
from runner.parameters import ParameterError, model_of, parse_assignments, read_parameters, resolve

PARAMETERS = """lake: str = ""  # root of the lake
run_id: str = "notebook"  # name of the run
article: str = "0108775015"  # an id, # and all
rate: float = 0.1  # a number
weeks: int | None = None  # how many
kind: Literal["a", "b"] = "a"  # which
"""
MANIFEST = """from hm_reco.core.lake import open_lake, write_manifest
write_manifest(open_lake(lake), run_id, "toy", {"raw/x": 3}, {}, {"article": article, "rate": rate})
"""


def toy(folder: Path, body: str = MANIFEST, parameters: str = PARAMETERS) -> Stage:
    """A small stage notebook."""
    cells = [
        nbformat.v4.new_markdown_cell("# Toy\n\n> A stage for tests."),
        nbformat.v4.new_code_cell("from typing import Literal"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell("## Run"),
        nbformat.v4.new_code_cell(body),
        nbformat.v4.new_code_cell("print('to the end')"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    path = folder / "toy.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return Stage(name="toy", notebook=path)


def test_parameters_are_read_with_type_default_and_help(tmp_path):
    found = {p.name: p for p in read_parameters(toy(tmp_path).notebook)}
    assert found["article"].default == "0108775015" and found["article"].annotation is str
    assert found["article"].help == "an id, # and all"
    assert found["weeks"].annotation == int | None
    with pytest.raises(ParameterError, match="expected `name: type = value`"):
        read_parameters(toy(tmp_path, parameters="weeks = 3").notebook)
    with pytest.raises(ParameterError, match="no such notebook"):
        read_parameters(tmp_path / "none.ipynb")


def test_values_keep_their_meaning(tmp_path):
    model = model_of(toy(tmp_path).notebook)
    values = model(article="0108775015", rate="12e4", weeks="3")
    assert (values.article, values.rate, values.weeks) == ("0108775015", 12e4, 3)


def test_everything_wrong_is_reported_at_once_before_anything_runs(tmp_path):
    given = {"rat": "1", "rate": "12e4567", "weeks": "many", "kind": "c"}
    with pytest.raises(ParameterError) as err:
        resolve([toy(tmp_path)], given)
    message = str(err.value)
    assert "rat: no such parameter in toy; did you mean 'rate'?" in message
    for name in ("rate (toy)", "weeks (toy)", "kind (toy)"):
        assert name in message


def test_given_values_are_stronger_than_the_pipelines(tmp_path):
    stage = toy(tmp_path).model_copy(update={"parameters": {"rate": 0.5, "weeks": 2}})
    resolved = resolve([stage], {"rate": "0.7"})["toy"]
    assert (resolved["rate"], resolved["weeks"], resolved["kind"]) == (0.7, 2, "a")


@pytest.mark.parametrize("text", ["rate", "=3", "a b=3"])
def test_an_assignment_needs_a_name_and_a_value(text):
    with pytest.raises(ParameterError, match="expected name=value"):
        parse_assignments([text])


def test_a_stage_leaves_notebook_report_manifest_and_ledger(tmp_path, lake: Lake):
    stage = toy(tmp_path)
    parameters = resolve([stage], {"rate": "0.7", "article": "0000000001"})
    [entry] = run_pipeline(lake, [stage], parameters, new_run_id())
    assert entry.state == "succeeded" and entry.inputs == {"raw/x": 3}
    assert entry.metrics == {"article": "0000000001", "rate": 0.7}
    assert entry.peak_memory_mb > 10 and entry.seconds > 0

    executed = nbformat.read(entry.notebook, as_version=4)
    injected = [c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert 'article = "0000000001"' in injected[0].source
    page = Path(entry.report).read_text()
    assert "to the end" in page and "A stage for tests." in page and "write_manifest" not in page
    assert entry.run_id in lake.path("reports", "index.html").read_text()

    [row] = read_ledger(lake).to_dicts()
    assert row["state"] == "succeeded" and json.loads(row["parameters"])["rate"] == 0.7
    assert json.loads(row["inputs"]) == {"raw/x": 3} and len(row["git_commit"]) >= 7


def test_a_failed_stage_leaves_its_notebook_and_its_row(tmp_path, lake: Lake):
    stage = toy(tmp_path, "raise ValueError('the milk is <b>sour</b>')")
    with pytest.raises(StageError, match=r"toy.*the milk is") as err:
        run_stage(lake, stage, resolve([stage], {})["toy"], "r1")
    notebook = Path(str(err.value).partition("notebook: ")[2])
    assert "Traceback" in notebook.read_text()
    [row] = read_ledger(lake).to_dicts()
    assert row["state"] == "failed" and row["error"].startswith("ValueError: the milk")
    page = lake.path("reports", "r1", "toy.html").read_text()
    assert "This stage failed." in page and "<b>sour</b>" not in page


def test_a_pipeline_stops_at_the_stage_that_fails(tmp_path, lake: Lake):
    bad, told = toy(tmp_path, "1 / 0"), []
    good = bad.model_copy(update={"name": "later"})
    parameters = resolve([bad, good], {})
    with pytest.raises(StageError, match="ZeroDivisionError"):
        run_pipeline(lake, [bad, good], parameters, "r1", lambda *event: told.append(event[0]))
    assert told == ["toy"] and read_ledger(lake)["stage"].to_list() == ["toy"]


def test_a_stage_without_a_manifest_has_not_succeeded(tmp_path, lake: Lake):
    stage = toy(tmp_path, "pass")
    with pytest.raises(StageError, match="never called write_manifest"):
        run_stage(lake, stage, resolve([stage], {})["toy"], "r1")


def test_the_ledger_shows_the_last_state(lake: Lake):
    assert read_ledger(lake).is_empty()
    entry = Entry("r1", "toy", {}, "abc")
    enter(lake, entry)
    assert read_ledger(lake)["state"].to_list() == ["running"]
    entry.state = "failed"
    enter(lake, entry)
    assert read_ledger(lake)["state"].to_list() == ["failed"]


def test_the_pipeline_is_in_order_and_its_parameters_fit():
    stages = load_pipeline()
    names = list(stages)
    assert set(names) == {"ingestion", "processing", "eda", "training", "inference"}
    for stage in stages.values():
        assert all(names.index(before) < names.index(stage.name) for before in stage.after)
    assert resolve(list(stages.values()), {})["ingestion"]["customers"] == 20_000
    assert [s.name for s in choose(stages, ["inference", "eda"])] == ["eda", "inference"]
    with pytest.raises(PipelineError, match="did you mean 'training'"):
        choose(stages, ["trainig"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {a: {notebook: a.ipynb, after: [b]}}", "'b' is in an `after`"),
        ("stages: {a: {notebook: a.ipynb, after: [a]}}", "cycle"),
        ("stages: {a: {notbook: a.ipynb}}", "notbook"),
        ("steps: {}", "stages"),
        ("stages: {", "pipeline.yaml"),
    ],
)
def test_a_pipeline_file_that_makes_no_sense_is_named(tmp_path, text, message):
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match=message):
        load_pipeline(path)
