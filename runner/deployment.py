"""Convert the graph of stages to steps of a cluster, and build manifests from them."""

import json
from collections.abc import Mapping
from pathlib import Path

from runner.backends import MANIFEST_BACKENDS
from runner.backends.kubernetes import Step
from runner.cache import LOCATION_PARAMETERS
from runner.graph import Stage, find_project_root
from runner.parameters import resolve


def to_cli_args(values: Mapping[str, object]) -> dict[str, str]:
    """Convert the values of parameters to texts for `-p`."""
    selected = {name: value for name, value in values.items() if name not in LOCATION_PARAMETERS}
    return {n: v if isinstance(v, str) else json.dumps(v) for n, v in selected.items()}


def build_steps(stages: Mapping[str, Stage]) -> list[Step]:
    """Build the steps of all stages with their parameters in a whole run."""
    resolved = resolve(list(stages.values()))
    return [
        Step(
            name,
            stage.after,
            stage.image or name,
            to_cli_args(resolved[name].values),
            stage.cpus,
            stage.memory,
            stage.gpu,
        )
        for name, stage in stages.items()
    ]


def build_manifests(stages: Mapping[str, Stage]) -> dict[str, str]:
    """Build the manifests for each kind of cluster, as YAML."""
    steps = build_steps(stages)
    return {name: backend.build(steps) for name, backend in MANIFEST_BACKENDS.items()}


def write_manifest_file(name: str, text: str) -> Path:
    """Write a manifest into the checkout. Raises `LookupError` outside of a checkout."""
    path = find_project_root() / MANIFEST_BACKENDS[name].path
    if not path.parent.is_dir():
        raise LookupError(f"{path.parent}: no such folder; --write needs a checkout")
    path.write_text(text, encoding="utf-8")
    return path
