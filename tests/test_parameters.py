"""Parameters: what a cell says, what a value may be, and what is said about a wrong one."""

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
from tests.toys import toy

ODD = """text: str = '''two
lines # not a comment'''  # a text
maybe: str | None = None
table: dict[str, int] = {"a": 1}  # counts
model_name: str = "copy"  # pydantic has methods of such names
copy: bool = False  # a switch
"""


def test_a_cell_gives_names_types_defaults_and_help(tmp_path):
    found = {p.name: p for p in read_parameters(toy(tmp_path).notebook)}
    assert found["article"].default == "0108775015" and found["article"].annotation is str
    assert found["article"].help == "an id, # and all"
    assert found["weeks"].annotation == int | None and found["start"].annotation is date
    assert found["names"].default == ["a # b", "c"] and found["names"].help == "the first"
    odd = {p.name: p for p in read_parameters(toy(tmp_path, parameters=ODD).notebook)}
    assert odd["text"].default == "two\nlines # not a comment" and odd["text"].help == "a text"
    assert odd["maybe"].default is None and odd["table"].default == {"a": 1}
    assert (
        build_parameters_model(toy(tmp_path, parameters=ODD).notebook)(copy="true").model_name
        == "copy"
    )


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("weeks = 3", "expected `name: type = value`"),
        ("weeks: Int = 3", "a type is made of str, int"),
        ("weeks: int = 3 + len('x')", "a value is a literal"),
    ],
)
def test_a_cell_that_is_no_parameters_cell_is_refused(tmp_path, cell, message):
    with pytest.raises(ParameterError, match=message):
        read_parameters(toy(tmp_path, parameters=cell).notebook)


def test_a_missing_notebook_is_named(tmp_path):
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
def test_a_value_keeps_its_meaning(tmp_path, name, text, value):
    stage = toy(tmp_path)
    found = resolve([stage], ("-p", {name: text}))["toy"]
    assert found.values[name] == value and found.origins[name] == "-p"
    json.dumps(found.values)


def test_yaml_keeps_texts():
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


def test_everything_wrong_is_said_at_once_with_what_was_expected(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    stage = toy(tmp_path)
    stage = stage.model_copy(update={"parameters": {"articl": "1", "weeks": "${NOT_SET}"}})
    given = {"rat": "1", "rate": "12e4567", "start": "soon", "kind": "lambdarnk", "toi.rate": "1"}
    with pytest.raises(ParameterError) as err:
        resolve([stage], ("params.yaml", {"names": 3}), ("-p", given))
    lines = str(err.value).splitlines()
    for part in (
        "rat (-p): no such parameter in toy; did you mean 'rate'?",
        "toi.rate (-p): no stage 'toi' in this run; did you mean 'toy'?",
        "weeks (toy, pipeline.yaml): the environment variable NOT_SET is not set",
        "articl (toy): no such parameter; did you mean 'article'?",
        "rate (toy): expected float, found '12e4567' (Input should be a finite number)",
        "start (toy): expected date, found 'soon'",
        "kind (toy): expected 'lambdarank' or 'binary', found 'lambdarnk'; did you mean",
        "names (toy): expected list[str], found 3",
    ):
        assert any(line.startswith(part) for line in lines), (part, lines)
    assert len(lines) == 8


def test_layers_rise_from_notebook_to_command_line(tmp_path, monkeypatch):
    stage = toy(tmp_path)
    own = {
        "rate": 0.5,
        "weeks": "${HM_TEST_WEEKS:-2}",
        "article": "${HM_TEST_ARTICLE}",
        "names": [],
    }
    stage = stage.model_copy(update={"parameters": own})
    monkeypatch.setenv("HM_TEST_ARTICLE", "0000000007")
    file = tmp_path / "params.yaml"
    file.write_text("rate: 0.6\nkind: lambdarank\ntoy: {names: [x]}\n")
    found = resolve(
        [stage], ("params.yaml", read_parameter_file(file)), ("-p", {"toy.rate": "0.7"})
    )["toy"]
    assert (found.values["rate"], found.origins["rate"]) == (0.7, "-p")
    assert (found.values["kind"], found.origins["kind"]) == ("lambdarank", "params.yaml")
    assert found.values["names"] == ["x"]
    assert (found.values["weeks"], found.origins["weeks"]) == (2, "pipeline.yaml")
    assert found.values["article"] == "0000000007"
    assert (found.values["start"], found.origins["start"]) == ("2020-09-16", "notebook")


def test_a_flat_name_goes_to_every_stage_that_has_it(tmp_path):
    one = toy(tmp_path)
    two = toy(tmp_path, parameters='lake: str = ""\nrate: float = 1.0\n', name="two")
    found = resolve([one, two], ("-p", {"rate": "2", "two.rate": "3", "weeks": "4"}))
    assert (found["toy"].values["rate"], found["two"].values["rate"]) == (2.0, 3.0)
    assert "weeks" not in found["two"].values


@pytest.mark.parametrize("text", ["rate", "=3", "a b=3", "a..b=3"])
def test_an_assignment_needs_a_name_and_a_value(text):
    with pytest.raises(ParameterError, match="expected name=value"):
        parse_assignments([text])


@pytest.mark.parametrize("content", ["[1, 2]", "a: {", "3: x"])
def test_a_parameter_file_must_hold_names_and_values(tmp_path, content):
    file = tmp_path / "p.yaml"
    file.write_text(content)
    with pytest.raises(ParameterError, match=r"p\.yaml"):
        read_parameter_file(file)
    with pytest.raises(ParameterError, match=r"none\.yaml"):
        read_parameter_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {a: {notebook: x, after: [b]}}", "'b' is in an `after`, but is no stage"),
        ("stages: {a: {notebook: x, after: [a]}}", "a"),
        ("stages: {a: {notbook: x}}", "notbook"),
        ("stages: {a: {notebook: x, retries: 99}}", "retries"),
        ("nothing: {}", "stages"),
    ],
)
def test_a_pipeline_that_makes_no_sense_is_refused(tmp_path, text, message):
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match=message):
        load_pipeline(path)


def test_the_nearest_stage_is_named():
    with pytest.raises(PipelineError, match="did you mean 'training'"):
        select_stages(load_pipeline(), ["trainig"])


def test_params_prints_a_table():
    hm = CliRunner()
    rows = json.loads(hm.invoke(app, ["params", "training", "--json"]).output)
    weeks = next(row for row in rows if row["parameter"] == "evaluation_weeks")
    assert (weeks["type"], weeks["default"], weeks["in a run"]) == ("int", "2", "4")
    assert "judged" in weeks["meaning"]
    assert "learning_rate" in hm.invoke(app, ["params", "training"]).output
    assert "HM_TEST_ARTICLE" not in os.environ


def test_upstream_is_all_that_a_stage_comes_after():
    stages = load_pipeline()
    assert list_upstream(stages, ["training"]) == ["ingestion", "processing", "training"]
    assert list_upstream(stages, ["eda", "ingestion"]) == ["ingestion", "processing", "eda"]
