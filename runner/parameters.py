"""Typed parameters, read from the cell of a notebook that is tagged `parameters`."""

import ast
import io
import tokenize
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nbformat
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from runner.graph import Stage

TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "list": list,
    "dict": dict,
}
TYPES |= {"None": None, "Literal": Literal}


class ParameterError(ValueError):
    """Parameters that a notebook does not have, or values that do not fit them."""


class Parameter(NamedTuple):
    """One assignment of the parameters cell."""

    name: str
    annotation: Any
    default: Any
    help: str


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
    """The parameters of a notebook: name, type, default, help text."""
    source = parameters_cell(notebook)
    comments = _comments(source)
    found = []
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            line = ast.get_source_segment(source, node)
            raise ParameterError(f"{notebook}: expected `name: type = value`, found {line!r}")
        code = compile(ast.Expression(node.annotation), str(notebook), "eval")
        annotation = eval(code, {"__builtins__": {}}, TYPES)
        default = ast.literal_eval(node.value) if node.value else ...
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
    config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)
    return create_model(notebook.stem, __config__=config, **fields)


def parse_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """`name=value` texts as a dict; raises `ParameterError` for a text without a name or `=`."""
    pairs = [text.partition("=") for text in assignments]
    for name, equals, value in pairs:
        if not (name.isidentifier() and equals):
            raise ParameterError(f"-p {name}{equals}{value}: expected name=value")
    return {name: value for name, _, value in pairs}


def resolve(stages: Sequence[Stage], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The checked parameters of each stage: notebook's defaults, pipeline's, then `given`.

    A given parameter goes to every stage that has it. All that is wrong is reported at once, as
    one `ParameterError`: names that no stage has, and values that do not fit.
    """
    models = {stage.name: model_of(stage.notebook) for stage in stages}
    known = {name for model in models.values() for name in model.model_fields}
    problems = [_unknown(name, known, models) for name in given if name not in known]
    resolved = {}
    for stage in stages:
        model = models[stage.name]
        values = stage.parameters | {n: v for n, v in given.items() if n in model.model_fields}
        try:
            resolved[stage.name] = model(**values).model_dump(mode="json")
        except ValidationError as err:
            problems += [_misfit(stage.name, error) for error in err.errors()]
    if problems:
        raise ParameterError("\n".join(problems))
    return resolved


def _unknown(name: str, known: set[str], stages: Mapping[str, Any]) -> str:
    near = get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{name}: no such parameter in {', '.join(stages)}{hint}"


def _misfit(stage: str, error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    return f"{name} ({stage}): {error['msg']}, found {error['input']!r}"
