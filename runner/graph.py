"""The graph of stages, read from `pipeline.yaml`."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hm_reco.lake.settings import find_settings_file

PIPELINE_FILE = Path(__file__).with_name("pipeline.yaml")


class _Loader(yaml.SafeLoader):
    """A YAML loader that keeps texts: no octal numbers, no dates, no `yes`, no `12e4567`."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as the base class declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Reject a duplicate key: the second would silently replace the first."""
        keys = set[str]()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value!r}", key.start_mark
                )
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first_characters in (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("null", r"^(?:~|null|Null|None|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"^[-+]?[0-9]*\.[0-9]+(?:[eE][-+]?[0-9]{1,3})?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first_characters)
    )


def read_yaml(text: str) -> Any:
    """Parse a YAML text, in which an id with leading zeros stays a text.

    Raises `yaml.YAMLError`.
    """
    return yaml.load(text, _Loader)  # nosec B506 - a SafeLoader


class PipelineError(ValueError):
    """An invalid pipeline file or selection of stages."""


class Stage(BaseModel):
    """One stage: its notebook, its upstream stages, and how it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    notebook: Path
    after: tuple[str, ...] = ()
    parameters: dict[str, Any] = {}  # of a whole run, if different from the notebook's defaults
    sweep: dict[str, Any] = {}  # parameters of a sweep's trials
    timeout: float | None = Field(None, gt=0)  # seconds
    image: str = ""  # component whose image it runs in; empty: its own
    cpus: float = Field(1, gt=0)  # in a cluster, like memory (for the full data set) and gpu
    memory: str = Field("8Gi", pattern=r"^[1-9]\d*[MG]i$")
    gpu: int = Field(0, ge=0)
    retries: int = Field(0, ge=0, le=10)  # after a failure
    headline: dict[str, str] = {}  # label: path of a figure in the manifest's metrics


def find_project_root() -> Path:
    """Find the folder with `settings.ini` and `nbs/`, or else the parent of this package."""
    settings = find_settings_file()
    return settings.parent if settings else Path(__file__).parents[1]


def load_pipeline(path: Path = PIPELINE_FILE, root: Path | None = None) -> dict[str, Stage]:
    """Load the stages of a pipeline file in an order that respects `after`.

    Raises `PipelineError` with the file's name and the problem.
    """
    project = root or find_project_root()
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
        stages = {name: Stage(name=name, **raw) for name, raw in content["stages"].items()}
        order = list(TopologicalSorter({s.name: s.after for s in stages.values()}).static_order())
    except (yaml.YAMLError, ValidationError, CycleError, KeyError, TypeError) as err:
        raise PipelineError(f"{path}: {err}") from err
    for name in order:
        if name not in stages:
            raise PipelineError(f"{path}: {name!r} is in an `after`, but is not a stage")
    return {
        name: stages[name].model_copy(update={"notebook": project / stages[name].notebook})
        for name in order
    }


def select_stages(stages: dict[str, Stage], names: Sequence[str]) -> list[Stage]:
    """Return the named stages (no names: all) in the pipeline's order; raises `PipelineError`."""
    for name in names:
        if name not in stages:
            suggestions = get_close_matches(name, stages, 1)
            hint = f"; did you mean {suggestions[0]!r}?" if suggestions else ""
            raise PipelineError(f"no stage {name!r}: expected one of {', '.join(stages)}{hint}")
    return [stage for name, stage in stages.items() if not names or name in names]


def list_upstream(stages: dict[str, Stage], names: Sequence[str]) -> list[str]:
    """Return the named stages and all their upstream stages, in the pipeline's order."""
    needed = set(names)
    for name in reversed(stages):
        if name in needed:
            needed |= {*stages[name].after}
    return [name for name in stages if name in needed]
