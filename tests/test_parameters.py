"""Parameters: parsing of the cell, allowed values, errors for invalid ones."""

import json
import os
from datetime import date

import pytest
from typer.testing import CliRunner

from runner.cli import app
from runner.graph import PipelineError, list_upstream, load_pipeline, read_yaml, select_stages
from runner.parameters import (
    ParameterError,
    build_parameters_model,
    parse_assignments,
    read_parameter_file,
    read_parameters,
    resolve,
)
from tests.toy_pipeline import build_toy_stage

UNUSUAL_CELL = """text: str = '''two
lines # not a comment'''  # a text
maybe: str | None = None
table: dict[str, int] = {"a": 1}  # counts
model_name: str = "copy"  # names of pydantic methods
copy: bool = False  # a switch
"""


def test_parameters_cell_gives_names_types_defaults_and_help(tmp_path):
    parameters = {p.name: p for p in read_parameters(build_toy_stage(tmp_path).notebook)}
    assert parameters["article"].default == "0108775015" and parameters["article"].annotation is str
    assert parameters["article"].help == "an id, # and all"
    assert parameters["weeks"].annotation == int | None and parameters["start"].annotation is date
    assert parameters["names"].default == ["a # b", "c"] and parameters["names"].help == "the first"
    unusual = {
        p.name: p
        for p in read_parameters(build_toy_stage(tmp_path, parameters=UNUSUAL_CELL).notebook)
    }
    assert (
        unusual["text"].default == "two\nlines # not a comment" and unusual["text"].help == "a text"
    )
    assert unusual["maybe"].default is None and unusual["table"].default == {"a": 1}
    assert (
        build_parameters_model(build_toy_stage(tmp_path, parameters=UNUSUAL_CELL).notebook)(
            copy="true"
        ).model_name
        == "copy"
    )


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("weeks = 3", "expected `name: type = value`"),
        ("weeks: Int = 3", "use types from str, int"),
        ("weeks: int = 3 + len('x')", "a value must be a literal"),
    ],
)
def test_invalid_parameters_cell_is_rejected(tmp_path, cell, message):
    with pytest.raises(ParameterError, match=message):
        read_parameters(build_toy_stage(tmp_path, parameters=cell).notebook)


def test_missing_notebook_is_named(tmp_path):
    with pytest.raises(ParameterError, match="no such notebook"):
        read_parameters(tmp_path / "none.ipynb")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("article", "0108775015", "0108775015"),
        ("article", "0112404001", "0112404001"),
        ("article", "12e4567", "12e4567"),
        ("article", "null", "null"),
        ("rate", "12e4", 12e4),
        ("weeks", "3", 3),
        ("weeks", "None", None),
        ("kind", "lambdarank", "lambdarank"),
        ("article", "${HOME}", "${HOME}"),
        ("start", "2020-02-29", "2020-02-29"),
        ("names", "[0112404001, yes, 12e4567]", ["0112404001", "yes", "12e4567"]),
    ],
)
def test_parameter_value_keeps_its_type(tmp_path, name, text, value):
    stage = build_toy_stage(tmp_path)
    resolved = resolve([stage], ("-p", {name: text}))["toy"]
    assert resolved.values[name] == value and resolved.origins[name] == "-p"
    json.dumps(resolved.values)


def test_yaml_keeps_strings():
    text = "{a: 0112404001, b: 12e4567, c: 2020-09-16, d: no, e: 12:30, f: 0x10, g: 3, h: 1.5e3}"
    assert read_yaml(text) == {
        "a": "0112404001",
        "b": "12e4567",
        "c": "2020-09-16",
        "d": "no",
        "e": "12:30",
        "f": "0x10",
        "g": 3,
        "h": 1500.0,
    }


def test_invalid_parameters_are_reported_together(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    stage = build_toy_stage(tmp_path)
    stage = stage.model_copy(update={"parameters": {"articl": "1", "weeks": "${NOT_SET}"}})
    assignments = {
        "rat": "1",
        "rate": "12e4567",
        "start": "soon",
        "kind": "lambdarnk",
        "toi.rate": "1",
    }
    with pytest.raises(ParameterError) as error:
        resolve([stage], ("params.yaml", {"names": 3}), ("-p", assignments))
    lines = str(error.value).splitlines()
    for expected in (
        "rat (-p): no such parameter in toy; did you mean 'rate'?",
        "toi.rate (-p): no stage 'toi' in this run; did you mean 'toy'?",
        "weeks (toy, pipeline.yaml): the environment variable NOT_SET is not set",
        "articl (toy): no such parameter; did you mean 'article'?",
        "rate (toy): expected float, found '12e4567' (Input should be a finite number)",
        "start (toy): expected date, found 'soon'",
        "kind (toy): expected 'lambdarank' or 'binary', found 'lambdarnk'; did you mean",
        "names (toy): expected list[str], found 3",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)
    assert len(lines) == 8


def test_parameter_layers_override_in_order(tmp_path, monkeypatch):
    stage = build_toy_stage(tmp_path)
    pipeline_values = {
        "rate": 0.5,
        "weeks": "${HM_TEST_WEEKS:-2}",
        "article": "${HM_TEST_ARTICLE}",
        "names": [],
    }
    stage = stage.model_copy(update={"parameters": pipeline_values})
    monkeypatch.setenv("HM_TEST_ARTICLE", "0000000007")
    parameter_file = tmp_path / "params.yaml"
    parameter_file.write_text("rate: 0.6\nkind: lambdarank\ntoy: {names: [x]}\n")
    resolved = resolve(
        [stage], ("params.yaml", read_parameter_file(parameter_file)), ("-p", {"toy.rate": "0.7"})
    )["toy"]
    assert (resolved.values["rate"], resolved.origins["rate"]) == (0.7, "-p")
    assert (resolved.values["kind"], resolved.origins["kind"]) == ("lambdarank", "params.yaml")
    assert resolved.values["names"] == ["x"]
    assert (resolved.values["weeks"], resolved.origins["weeks"]) == (2, "pipeline.yaml")
    assert resolved.values["article"] == "0000000007"
    assert (resolved.values["start"], resolved.origins["start"]) == ("2020-09-16", "notebook")


def test_flat_parameter_name_applies_to_every_stage(tmp_path):
    first_stage = build_toy_stage(tmp_path)
    second_stage = build_toy_stage(
        tmp_path, parameters='lake: str = ""\nrate: float = 1.0\n', name="two"
    )
    resolved = resolve(
        [first_stage, second_stage], ("-p", {"rate": "2", "two.rate": "3", "weeks": "4"})
    )
    assert (resolved["toy"].values["rate"], resolved["two"].values["rate"]) == (2.0, 3.0)
    assert "weeks" not in resolved["two"].values


@pytest.mark.parametrize("text", ["rate", "=3", "a b=3", "a..b=3"])
def test_assignment_without_name_or_value_is_rejected(text):
    with pytest.raises(ParameterError, match="expected name=value"):
        parse_assignments([text])


@pytest.mark.parametrize("content", ["[1, 2]", "a: {", "3: x"])
def test_invalid_parameter_file_is_rejected(tmp_path, content):
    file = tmp_path / "p.yaml"
    file.write_text(content)
    with pytest.raises(ParameterError, match=r"p\.yaml"):
        read_parameter_file(file)
    with pytest.raises(ParameterError, match=r"none\.yaml"):
        read_parameter_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {a: {notebook: x, after: [b]}}", "'b' is in an `after`, but is not a stage"),
        ("stages: {a: {notebook: x, after: [a]}}", "a"),
        ("stages: {a: {notbook: x}}", "notbook"),
        ("stages: {a: {notebook: x, retries: 99}}", "retries"),
        ("nothing: {}", "stages"),
    ],
)
def test_invalid_pipeline_is_rejected(tmp_path, text, message):
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match=message):
        load_pipeline(path)


def test_unknown_stage_suggests_nearest_name():
    with pytest.raises(PipelineError, match="did you mean 'training'"):
        select_stages(load_pipeline(), ["trainig"])


def test_params_command_prints_table():
    cli_runner = CliRunner()
    rows = json.loads(cli_runner.invoke(app, ["params", "training", "--json"]).output)
    weeks = next(row for row in rows if row["parameter"] == "evaluation_weeks")
    assert (weeks["type"], weeks["default"], weeks["in a run"]) == (
        "int, above 0",
        "2",
        "4",
    )
    assert "compared" in weeks["meaning"]
    assert "learning_rate" in cli_runner.invoke(app, ["params", "training"]).output
    assert "HM_TEST_ARTICLE" not in os.environ


def test_upstream_includes_all_ancestors():
    stages = load_pipeline()
    assert list_upstream(stages, ["training"]) == ["ingestion", "processing", "training"]
    assert list_upstream(stages, ["eda", "ingestion"]) == ["ingestion", "processing", "eda"]


STAGES = {stage.name: stage for stage in load_pipeline().values()}


@pytest.mark.parametrize(
    ("stage", "assignment", "message"),
    [
        ("training", "evaluation_weeks=0", "expected int, above 0, found '0'"),
        ("training", "refit_every=0", "expected int, above 0"),
        ("training", "horizon_days=0", "expected int, above 0"),
        ("training", "seed=-1", "expected int, at least 0"),
        ("training", "learning_rate=0", "expected float, above 0, at most 1"),
        ("training", "objective=lambdarnk", "did you mean 'lambdarank'?"),
        ("training", "as_of=yesterday", "expected date or None, found 'yesterday'"),
        ("inference", "as_of=", "expected date or None"),
        ("inference", "shards=0", "expected int, above 0"),
        ("processing", "shards=-1", "expected int, above 0"),
        ("ingestion", "max_quarantined_share=5", "expected float, at least 0, at most 1"),
        ("ingestion", "customers=0", "expected int, above 0"),
        ("ingestion", 'sources=[{"url": "x"}]', "sources.0.uri (ingestion): Field required"),
        (
            "ingestion",
            'sources=[{"uri": "x", "name": "shop", "schedule": "0 25 * * *"}]',
            "sources.0 'shop' (ingestion): schedule '0 25 * * *'",
        ),
        ("ingestion", 'sources=[{"uri": "x"}, {"uri": "x"}]', "x declared twice"),
    ],
)
def test_value_out_of_bounds_is_refused(stage, assignment, message):
    with pytest.raises(ParameterError) as error:
        resolve([STAGES[stage]], ("-p", parse_assignments([assignment])))
    assert message in str(error.value)


def test_valid_date_and_sources_are_plain_json():
    values = {"as_of": "2020-09-16", "sources": '[{"uri": "shop", "columns": {"a": "b"}}]'}
    resolved = resolve([STAGES["training"], STAGES["ingestion"]], ("-p", values))
    assert resolved["training"].values["as_of"] == "2020-09-16"
    assert resolved["ingestion"].values["sources"] == [{"uri": "shop", "columns": {"a": "b"}}]
    assert resolve([STAGES["training"]])["training"].values["as_of"] is None


def test_name_or_key_given_twice_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="-p seed: given 2 times"):
        parse_assignments(["seed=1", "seed=2"])
    path = tmp_path / "twice.yaml"
    path.write_text("training:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ParameterError, match="duplicate key 'seed'"):
        read_parameter_file(path)
