"""Typed parameters, read from the cell of a notebook that is tagged `parameters`."""

import ast
import io
import os
import re
import tokenize
import warnings
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, Optional, Union, get_args, get_origin

import nbformat
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from hm_reco.lake.settings import PASSWORD
from runner.graph import Stage, read_yaml

# what an annotation in a parameters cell may name
TYPES: dict[str, Any] = {t.__name__: t for t in (str, int, float, bool, list, dict, date, datetime)}
TYPES |= {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union}
VARIABLE = re.compile(r"\$\{(\w+)(?::-(.*?))?\}")


class ParameterError(ValueError):
    """Parameters that a notebook does not have, or values that do not fit them."""


class Parameter(NamedTuple):
    """One assignment of the parameters cell."""

    name: str
    annotation: Any
    default: Any
    help: str


class Resolved(NamedTuple):
    """A stage's parameters, as plain JSON values, and where each value came from."""

    values: dict[str, Any]
    origins: dict[str, str]


def parameters_cell(notebook: Path) -> str:
    """The source of the cell tagged `parameters`; raises `ParameterError` unless there is one."""
    if not notebook.is_file():
        raise ParameterError(f"{notebook}: no such notebook")
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook}: {len(tagged)} cells tagged 'parameters', expected one")
    return tagged[0]


def _comments(source: str) -> dict[int, str]:
    """Comments by the line they end; a `#` inside a string is none."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def read_parameters(notebook: Path) -> list[Parameter]:
    """The parameters of a notebook: name, type, default, help text.

    Raises `ParameterError` for a cell that holds anything but `name: type = literal`.
    """
    source = parameters_cell(notebook)
    comments = _comments(source)
    found = []
    for node in ast.parse(source).body:
        line = ast.get_source_segment(source, node)
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            raise ParameterError(f"{notebook}: expected `name: type = value`, found {line!r}")
        code = compile(ast.Expression(node.annotation), str(notebook), "eval")
        try:
            annotation = eval(code, {"__builtins__": {}}, TYPES)  # nosec B307 - our own notebook
            default = ast.literal_eval(node.value) if node.value else ...
        except (NameError, TypeError, ValueError) as err:
            known = ", ".join(TYPES)
            raise ParameterError(
                f"{notebook}: {line!r}: {err}; a type is made of {known}, a value is a literal"
            ) from err
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        text = " ".join(comments[line] for line in lines if line in comments)
        found.append(Parameter(node.target.id, annotation, default, text))
    return found


def model_of(notebook: Path) -> type[BaseModel]:
    """A pydantic model of a notebook's parameters: unknown names and infinite numbers refused."""
    fields: dict[str, Any] = {
        p.name: (p.annotation, Field(p.default, description=p.help))
        for p in read_parameters(notebook)
    }
    config = ConfigDict(
        extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )
    with warnings.catch_warnings():  # a parameter may have any name, also that of a model's method
        warnings.simplefilter("ignore", UserWarning)
        return create_model(notebook.stem, __config__=config, **fields)


def type_name(annotation: Any) -> str:
    """An annotation as a user would write it."""
    if get_origin(annotation) is Literal:
        return " or ".join(repr(value) for value in get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def parse_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """`name=value` texts as a dict; raises `ParameterError` for a text without a name or `=`.

    A name may be `stage.name`, which concerns one stage only.
    """
    pairs = [text.partition("=") for text in assignments]
    for name, equals, value in pairs:
        if not (equals and all(part.isidentifier() for part in name.split("."))):
            raise ParameterError(f"-p {name}{equals}{value}: expected name=value")
    return {name: value for name, _, value in pairs}


def read_file(path: Path) -> dict[str, Any]:
    """Parameters from a YAML or JSON file: `name: value`, or `stage: {name: value}`.

    Raises `ParameterError` naming the file.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ParameterError(f"{path}: {err}") from err
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ParameterError(f"{path}: expected lines of `name: value`, found {content!r:.80}")
    return content


def resolve(stages: Sequence[Stage], *layers: tuple[str, Mapping[str, Any]]) -> dict[str, Resolved]:
    """The checked parameters of each stage.

    Each layer (its name, its values) is stronger than the one before; the notebook's defaults and
    the pipeline's values are weaker than all. A value goes to every stage that has the parameter.
    All that is wrong is reported at once, as one `ParameterError`.
    """
    models = {stage.name: model_of(stage.notebook) for stage in stages}
    problems = [
        problem
        for layer, values in layers
        for name in _split(values, models)
        if (problem := _unknown(layer, *name, models))
    ]
    resolved = {}
    for stage in stages:
        model = models[stage.name]
        values, origins, wrong = _layered(stage, model, layers)
        problems += wrong
        try:
            resolved[stage.name] = Resolved(model(**values).model_dump(mode="json"), origins)
        except ValidationError as err:
            problems += [_misfit(stage.name, model, error) for error in err.errors()]
    if problems:
        raise ParameterError("\n".join(problems))
    return resolved


def _split(values: Mapping[str, Any], models: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """`name`, `stage.name` and `stage: {name: ...}` as (stage or "", name)."""
    found: dict[tuple[str, str], Any] = {}
    for key, value in values.items():
        stage, dot, name = key.rpartition(".")
        if key in models and isinstance(value, Mapping):
            found |= {(key, inner): content for inner, content in value.items()}
        else:
            found[stage if dot else "", name] = value
    return found


def _layered(
    stage: Stage, model: type[BaseModel], layers: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Values, the layer of each, and what is wrong with them."""
    values: dict[str, Any] = {}
    origins, wrong = dict.fromkeys(model.model_fields, "notebook"), []
    for layer, content in (("pipeline.yaml", {stage.name: stage.parameters}), *layers):
        for (only, name), value in _split(content, {stage.name: model}).items():
            if only == stage.name or (not only and name in model.model_fields):
                try:
                    if PASSWORD.search(str(value)):
                        raise ValueError("a password in a URL, which would be kept with the run")
                    # on the command line, the shell has filled in its own
                    fill = isinstance(value, str) and layer != "-p"
                    filled = VARIABLE.sub(_variable, value) if fill else value
                    values[name], origins[name] = _value(filled, model, name), layer
                except ValueError as err:
                    wrong.append(f"{name} ({stage.name}, {layer}): {err}")
    return values, origins, wrong


def _value(value: Any, model: type[BaseModel], name: str) -> Any:
    """A value; a text is read as YAML where the parameter may be a list or a mapping."""
    if not isinstance(value, str):
        return value
    field = model.model_fields.get(name)
    annotation = field.annotation if field else str
    if NoneType in _parts(annotation) and value in ("None", "null"):
        return None
    if is_list(annotation) and value[:1] in ("[", "{"):
        try:
            return read_yaml(value)
        except yaml.YAMLError as err:
            raise ValueError(f"{value!r} is no list or mapping: {err}") from err
    return value


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of anything else, itself."""
    parts = get_args(annotation)
    return parts if NoneType in parts or get_origin(annotation) is Union else (annotation,)


def is_list(annotation: Any) -> bool:
    """May a value be a list or a mapping?"""
    return bool({get_origin(part) or part for part in _parts(annotation)} & {list, dict})


def _variable(found: re.Match[str]) -> str:
    name, default = found.groups()
    value = os.environ.get(name) or default
    if value is None:
        raise ValueError(f"the environment variable {name} is not set, and has no default")
    return value


def _near(name: str, known: Sequence[str] | set[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _unknown(layer: str, stage: str, name: str, models: Mapping[str, type[BaseModel]]) -> str:
    """What is wrong with a name, or nothing."""
    if stage and stage not in models:
        return f"{stage}.{name} ({layer}): no stage {stage!r} in this run{_near(stage, {*models})}"
    asked = [stage] if stage else list(models)
    known = {field for asked_stage in asked for field in models[asked_stage].model_fields}
    if name in known:
        return ""
    return f"{name} ({layer}): no such parameter in {', '.join(asked)}{_near(name, known)}"


def _misfit(stage: str, model: type[BaseModel], error: Any) -> str:
    name, found = str(error["loc"][0]), error["input"]
    field = model.model_fields.get(name)
    if field is None:
        return f"{name} ({stage}): no such parameter{_near(name, {*model.model_fields})}"
    choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
    hint = _near(str(found), choices) or f" ({error['msg']})"
    return f"{name} ({stage}): expected {type_name(field.annotation)}, found {found!r}{hint}"
