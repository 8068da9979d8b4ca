"""Typed parameters, read from the notebook cell tagged `parameters`."""

import ast
import io
import os
import re
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Optional, Union, get_args, get_origin

import nbformat
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from hm_reco.lake.settings import PASSWORD_PATTERN
from runner.graph import Stage, read_yaml

# types that an annotation in a parameters cell may use without an import
ALLOWED_TYPES: dict[str, Any] = {
    t.__name__: t for t in (str, int, float, bool, list, dict, date, datetime)
}
ALLOWED_TYPES |= {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union}
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
VARIABLE_PATTERN = re.compile(r"\$\{(\w+)(?::-(.*?))?\}")


class ParameterError(ValueError):
    """A parameter that the notebook does not have, or an invalid value."""


class Parameter(NamedTuple):
    """One assignment of the parameters cell."""

    name: str
    annotation: Any
    default: Any
    help: str


class ResolvedParameters(NamedTuple):
    """A stage's parameters as plain JSON values, and the layer of each value."""

    values: dict[str, Any]
    origins: dict[str, str]


def read_parameters_cell(notebook: Path) -> str:
    """Return the source of the cell tagged `parameters`; raises `ParameterError` if not unique."""
    if not notebook.is_file():
        raise ParameterError(f"{notebook}: no such notebook")
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook}: {len(tagged)} cells tagged 'parameters', expected one")
    return tagged[0]


def _read_comments(source: str) -> dict[int, str]:
    """Return the comments by line number; ignores a `#` inside a string."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def _import_types(tree: ast.Module, notebook: Path) -> dict[str, Any]:
    """Return the types that annotations may use: `ALLOWED_TYPES` and the cell's imports."""
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = dict(ALLOWED_TYPES)
    module = ast.Module(body=list(imports), type_ignores=[])
    exec(compile(module, str(notebook), "exec"), names)  # nosec B102 - our own notebook
    return names


def read_parameters(notebook: Path) -> list[Parameter]:
    """Read the parameters of a notebook: name, type, default, help text.

    The cell holds imports of types, and assignments `name: type = literal  # help`. Raises
    `ParameterError` for anything else.
    """
    source = read_parameters_cell(notebook)
    comments, tree = _read_comments(source), ast.parse(source)
    types, parameters = _import_types(tree, notebook), []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        line = ast.get_source_segment(source, node)
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            raise ParameterError(f"{notebook}: expected `name: type = value`, found {line!r}")
        code = compile(ast.Expression(node.annotation), str(notebook), "eval")
        try:
            annotation = eval(code, {"__builtins__": {}}, types)  # nosec B307 - our own notebook
            default = ast.literal_eval(node.value) if node.value else ...
        except (NameError, TypeError, ValueError) as err:
            known = ", ".join(ALLOWED_TYPES)
            raise ParameterError(
                f"{notebook}: {line!r}: {err}; use types from {known} or import them in the "
                "cell; a value must be a literal"
            ) from err
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        help_text = " ".join(comments[line] for line in lines if line in comments)
        parameters.append(Parameter(node.target.id, annotation, default, help_text))
    return parameters


def build_parameters_model(notebook: Path) -> type[BaseModel]:
    """Build a pydantic model of a notebook's parameters; rejects unknown names and infinity."""
    fields: dict[str, Any] = {
        p.name: (p.annotation, Field(p.default, description=p.help))
        for p in read_parameters(notebook)
    }
    config = ConfigDict(
        extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )
    with warnings.catch_warnings():  # a parameter may have the name of a model's method
        warnings.simplefilter("ignore", UserWarning)
        return create_model(notebook.stem, __config__=config, **fields)


def format_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Format an annotation as a user would write it, with its bounds: `int, at least 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return format_type(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        text = " or ".join(repr(value) for value in arguments)
    elif origin in (Union, UnionType):
        text = " or ".join("None" if a is NoneType else format_type(a) for a in arguments)
    elif isinstance(origin, type) and arguments:
        text = f"{origin.__name__}[{', '.join(map(format_type, arguments))}]"
    else:
        text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return ", ".join([text, *_format_bounds(metadata)])


def _format_bounds(metadata: Sequence[Any]) -> Iterator[str]:
    """Format the bounds in the metadata of `Annotated`: `at least 1`."""
    for item in metadata:
        yield from _format_bounds(item.metadata if isinstance(item, FieldInfo) else ())
        for name, label in BOUNDS.items():
            if (bound := getattr(item, name, None)) is not None:
                yield f"{label} {bound:g}"


def parse_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """Parse `name=value` texts; the name `stage.name` applies to one stage only.

    Raises `ParameterError` for texts without a name or `=`, and for duplicate names.
    """
    pairs, problems = [text.partition("=") for text in assignments], []
    for name, equals, value in pairs:
        if not (equals and all(part.isidentifier() for part in name.split("."))):
            problems.append(f"-p {name}{equals}{value}: expected name=value")
    for name, count in Counter(name for name, equals, _ in pairs if equals).items():
        if count > 1:
            problems.append(f"-p {name}: given {count} times, expected once")
    if problems:
        raise ParameterError("\n".join(problems))
    return {name: value for name, _, value in pairs}


def read_parameter_file(path: Path) -> dict[str, Any]:
    """Read parameters from a YAML or JSON file: `name: value`, or `stage: {name: value}`.

    Raises `ParameterError` with the file's name.
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
    """Resolve and validate the parameters of each stage.

    Each layer (its name, its values) overrides the one before; all layers override the notebook's
    defaults and the pipeline's values. A value applies to every stage that has the parameter.
    Raises one `ParameterError` with all problems.
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
            resolved[stage.name] = ResolvedParameters(_to_json(model(**values)), origins)
        except ValidationError as err:
            problems += [_format_error(stage.name, model, error) for error in err.errors()]
    if problems:
        raise ParameterError("\n".join(problems))
    return resolved


def _to_json(parameters: BaseModel) -> dict[str, Any]:
    """Convert all values to plain JSON; nested models keep only the fields that were set."""
    defaults = parameters.model_dump(mode="json")
    return defaults | parameters.model_dump(mode="json", exclude_unset=True)


def _split_by_stage(
    values: Mapping[str, Any], models: Mapping[str, Any]
) -> dict[tuple[str, str], Any]:
    """Convert `name`, `stage.name` and `stage: {name: ...}` to keys (stage or "", name)."""
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
    """Merge the layers; returns the values, the layer of each, and the problems."""
    values: dict[str, Any] = {}
    origins, problems = dict.fromkeys(model.model_fields, "notebook"), []
    for layer, content in (("pipeline.yaml", {stage.name: stage.parameters}), *layers):
        for (scope, name), value in _split_by_stage(content, {stage.name: model}).items():
            if scope == stage.name or (not scope and name in model.model_fields):
                try:
                    if PASSWORD_PATTERN.search(str(value)):
                        raise ValueError("a password in a URL, which the run would store")
                    # on the command line, the shell has expanded variables
                    expand = isinstance(value, str) and layer != "-p"
                    expanded = VARIABLE_PATTERN.sub(_expand_variable, value) if expand else value
                    values[name], origins[name] = _parse_value(expanded, model, name), layer
                except ValueError as err:
                    problems.append(f"{name} ({stage.name}, {layer}): {err}")
    return values, origins, problems


def _parse_value(value: Any, model: type[BaseModel], name: str) -> Any:
    """Parse a value; a text is read as YAML if the parameter may be a list or a mapping."""
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
            raise ValueError(f"{value!r} is not a list or mapping: {err}") from err
    return value


def _union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union without their metadata; another type is its only member."""
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(m for arg in get_args(annotation) for m in _union_members(arg))
    return (annotation,)


def accepts_collection(annotation: Any) -> bool:
    """Return whether a value may be a list or a mapping."""
    return bool({get_origin(m) or m for m in _union_members(annotation)} & {list, dict})


def _expand_variable(match: re.Match[str]) -> str:
    name, default = match.groups()
    value = os.environ.get(name) or default
    if value is None:
        raise ValueError(f"the environment variable {name} is not set and has no default")
    return value


def _suggest(name: str, known: Sequence[str] | set[str]) -> str:
    matches = get_close_matches(name, known, 1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _describe_unknown(
    layer: str, stage: str, name: str, models: Mapping[str, type[BaseModel]]
) -> str:
    """Describe an unknown stage or parameter; empty if the name is known."""
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
    if len(error["loc"]) > 1 and accepts_collection(field.annotation):
        path = ".".join(map(str, error["loc"]))
        label = f" {value['name']!r}" if isinstance(value, Mapping) and "name" in value else ""
        message = error["msg"].removeprefix("Value error, ")
        return f"{path}{label} ({stage}): {message}, found {value!r:.80}"
    choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
    hint = _suggest(str(value), choices) or f" ({error['msg']})"
    expected = format_type(field.annotation, field.metadata)
    return f"{name} ({stage}): expected {expected}, found {value!r:.80}{hint}"
