"""The graph of stages, read from `pipeline.yaml`."""

from collections.abc import Sequence
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from hm_reco.core.settings import find_settings_file

PIPELINE = Path(__file__).with_name("pipeline.yaml")


class PipelineError(ValueError):
    """A pipeline file, or a choice of stages, that makes no sense."""


class Stage(BaseModel):
    """One stage: a notebook, what it comes after, and its parameters in a whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    notebook: Path
    after: tuple[str, ...] = ()
    parameters: dict[str, Any] = {}


def project_root() -> Path:
    """The folder that holds `settings.ini` and `nbs/`: here or above, else beside this package."""
    settings = find_settings_file()
    return settings.parent if settings else Path(__file__).parents[1]


def load_pipeline(path: Path = PIPELINE, root: Path | None = None) -> dict[str, Stage]:
    """The stages of a pipeline file in an order that respects `after`.

    Raises `PipelineError` naming the file and what is wrong with it.
    """
    home = root or project_root()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = {name: Stage(name=name, **raw) for name, raw in content["stages"].items()}
        order = list(TopologicalSorter({s.name: s.after for s in stages.values()}).static_order())
    except (yaml.YAMLError, ValidationError, CycleError, KeyError, TypeError) as err:
        raise PipelineError(f"{path}: {err}") from err
    for name in order:
        if name not in stages:
            raise PipelineError(f"{path}: {name!r} is in an `after`, but is no stage")
    return {
        name: stages[name].model_copy(update={"notebook": home / stages[name].notebook})
        for name in order
    }


def choose(stages: dict[str, Stage], names: Sequence[str]) -> list[Stage]:
    """The named stages (none named: all), in the pipeline's order; raises `PipelineError`."""
    for name in names:
        if name not in stages:
            near = get_close_matches(name, stages, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PipelineError(f"no stage {name!r}: expected one of {', '.join(stages)}{hint}")
    return [stage for name, stage in stages.items() if not names or name in names]
