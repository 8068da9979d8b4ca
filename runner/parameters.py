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

from hm_reco.lake.settings import PASSWORD_PATTERN
from runner.graph import Stage, read_yaml

# what an annotation in a parameters cell may name
ALLOWED_TYPES: dict[str, Any] = {
    t.__name__: t for t in (str, int, float, bool, list, dict, date, datetime)
}
ALLOWED_TYPES |= {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union}
VARIABLE_PATTERN = re.compile(r"\$\{(\w+)(?::-(.*?))?\}")


class ParameterError(ValueError):
    """Parameters that a notebook does not have, or values that do not fit them."""


class Parameter(NamedTuple):
    """One assignment of the parameters cell."""

    name: str
    annotation: Any
    default: Any
    help: str


class ResolvedParameters(NamedTuple):
    """A stage's parameters, as plain JSON values, and where each value came from."""

    values: dict[str, Any]
    origins: dict[str, str]


def read_parameters_cell(notebook: Path) -> str:
    """The source of the cell tagged `parameters`; raises `ParameterError` unless there is one."""
    if not notebook.is_file():
        raise ParameterError(f"{notebook}: no such notebook")
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook}: {len(tagged)} cells tagged 'parameters', expected one")
    return tagged[0]


def _read_comments(source: str) -> dict[int, str]:
    """Comments by the line they end; a `#` inside a string is none."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def read_parameters(notebook: Path) -> list[Parameter]:
    """The parameters of a notebook: name, type, default, help text.

    Raises `ParameterError` for a cell that holds anything but `name: type = literal`.
    """
    source = read_parameters_cell(notebook)
    comments = _read_comments(source)
    parameters = []
    for node in ast.parse(source).body:
        line = ast.get_source_segment(source, node)
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            raise ParameterError(f"{notebook}: expected `name: type = value`, found {line!r}")
        code = compile(ast.Expression(node.annotation), str(notebook), "eval")
        try:
            annotation = eval(code, {"__builtins__": {}}, ALLOWED_TYPES)  # nosec B307 - our own notebook
            default = ast.literal_eval(node.value) if node.value else ...
        except (NameError, TypeError, ValueError) as err:
            known = ", ".join(ALLOWED_TYPES)
            raise ParameterError(
                f"{notebook}: {line!r}: {err}; a type is made of {known}, a value is a literal"
            ) from err
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        help_text = " ".join(comments[line] for line in lines if line in comments)
        parameters.append(Parameter(node.target.id, annotation, default, help_text))
    return parameters


def build_parameters_model(notebook: Path) -> type[BaseModel]:
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


def format_type(annotation: Any) -> str:
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


def read_parameter_file(path: Path) -> dict[str, Any]:
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


def resolve(
    stages: Sequence[Stage], *layers: tuple[str, Mapping[str, Any]]
) -> dict[str, ResolvedParameters]:
    """The checked parameters of each stage.

    Each layer (its name, its values) is stronger than the one before; the notebook's defaults and
    the pipeline's values are weaker than all. A value goes to every stage that has the parameter.
    All that is wrong is reported at once, as one `ParameterError`.
    """
    models = {stage.name: build_parameters_model(stage.notebook) for stage in stages}
    problems = [
        problem
        for layer, values in layers
        for name in _split_by_stage(values, models)
        if (problem := _describe_unknown(layer, *name, models))
    ]
    resolved = {}
    for stage in stages:
        model = models[stage.name]
        values, origins, layer_problems = _merge_layers(stage, model, layers)
        problems += layer_problems
        try:
            resolved[stage.name] = ResolvedParameters(
                model(**values).model_dump(mode="json"), origins
            )
        except ValidationError as err:
            problems += [_format_error(stage.name, model, error) for error in err.errors()]
    if problems:
        raise ParameterError("\n".join(problems))
    return resolved


def _split_by_stage(
    values: Mapping[str, Any], models: Mapping[str, Any]
) -> dict[tuple[str, str], Any]:
    """`name`, `stage.name` and `stage: {name: ...}` as (stage or "", name)."""
    scoped: dict[tuple[str, str], Any] = {}
    for key, value in values.items():
        stage, dot, name = key.rpartition(".")
        if key in models and isinstance(value, Mapping):
            scoped |= {(key, parameter): content for parameter, content in value.items()}
        else:
            scoped[stage if dot else "", name] = value
    return scoped


def _merge_layers(
    stage: Stage, model: type[BaseModel], layers: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Values, the layer of each, and what is wrong with them."""
    values: dict[str, Any] = {}
    origins, problems = dict.fromkeys(model.model_fields, "notebook"), []
    for layer, content in (("pipeline.yaml", {stage.name: stage.parameters}), *layers):
        for (scope, name), value in _split_by_stage(content, {stage.name: model}).items():
            if scope == stage.name or (not scope and name in model.model_fields):
                try:
                    if PASSWORD_PATTERN.search(str(value)):
                        raise ValueError("a password in a URL, which would be kept with the run")
                    # on the command line, the shell has filled in its own
                    expand = isinstance(value, str) and layer != "-p"
                    expanded = VARIABLE_PATTERN.sub(_expand_variable, value) if expand else value
                    values[name], origins[name] = _parse_value(expanded, model, name), layer
                except ValueError as err:
                    problems.append(f"{name} ({stage.name}, {layer}): {err}")
    return values, origins, problems


def _parse_value(value: Any, model: type[BaseModel], name: str) -> Any:
    """A value; a text is read as YAML where the parameter may be a list or a mapping."""
    if not isinstance(value, str):
        return value
    field = model.model_fields.get(name)
    annotation = field.annotation if field else str
    if NoneType in _union_members(annotation) and value in ("None", "null"):
        return None
    if accepts_collection(annotation) and value[:1] in ("[", "{"):
        try:
            return read_yaml(value)
        except yaml.YAMLError as err:
            raise ValueError(f"{value!r} is no list or mapping: {err}") from err
    return value


def _union_members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of anything else, itself."""
    members = get_args(annotation)
    return members if NoneType in members or get_origin(annotation) is Union else (annotation,)


def accepts_collection(annotation: Any) -> bool:
    """May a value be a list or a mapping?"""
    return bool(
        {get_origin(member) or member for member in _union_members(annotation)} & {list, dict}
    )


def _expand_variable(match: re.Match[str]) -> str:
    name, default = match.groups()
    value = os.environ.get(name) or default
    if value is None:
        raise ValueError(f"the environment variable {name} is not set, and has no default")
    return value


def _suggest(name: str, known: Sequence[str] | set[str]) -> str:
    matches = get_close_matches(name, known, 1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _describe_unknown(
    layer: str, stage: str, name: str, models: Mapping[str, type[BaseModel]]
) -> str:
    """What is wrong with a name, or nothing."""
    if stage and stage not in models:
        return (
            f"{stage}.{name} ({layer}): no stage {stage!r} in this run{_suggest(stage, {*models})}"
        )
    stage_names = [stage] if stage else list(models)
    known = {field for stage_name in stage_names for field in models[stage_name].model_fields}
    if name in known:
        return ""
    return f"{name} ({layer}): no such parameter in {', '.join(stage_names)}{_suggest(name, known)}"


def _format_error(stage: str, model: type[BaseModel], error: Any) -> str:
    name, value = str(error["loc"][0]), error["input"]
    field = model.model_fields.get(name)
    if field is None:
        return f"{name} ({stage}): no such parameter{_suggest(name, {*model.model_fields})}"
    choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
    hint = _suggest(str(value), choices) or f" ({error['msg']})"
    return f"{name} ({stage}): expected {format_type(field.annotation)}, found {value!r}{hint}"
