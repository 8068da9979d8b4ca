"""The graph of stages as steps of a cluster, and the manifests made of them."""

import json
from collections.abc import Mapping
from pathlib import Path

from runner.backends.argo import NIGHTLY, Step, workflows
from runner.backends.kuberay import ray_job
from runner.graph import Stage, project_root
from runner.parameters import resolve

FILES = {
    "argo": Path("deploy/pipeline/base/workflow.yaml"),
    "ray": Path("deploy/ray/base/rayjob.yaml"),
}
OWN = ("lake", "run_id")  # parameters that a cluster's run sets itself


def as_words(values: Mapping[str, object]) -> dict[str, str]:
    """Values of parameters, as `-p` takes them."""
    given = {name: value for name, value in values.items() if name not in OWN}
    return {n: v if isinstance(v, str) else json.dumps(v) for n, v in given.items()}


def steps_of(stages: Mapping[str, Stage]) -> list[Step]:
    """The stages with their parameters in a whole run."""
    resolved = resolve(list(stages.values()))
    return [
        Step(
            name,
            stage.after,
            stage.image or name,
            as_words(resolved[name].values),
            stage.cpus,
            stage.memory,
            stage.gpu,
        )
        for name, stage in stages.items()
    ]


def manifests(stages: Mapping[str, Stage]) -> dict[str, str]:
    """The manifests for each kind of cluster, as YAML."""
    steps = steps_of(stages)
    return {"argo": workflows(steps, NIGHTLY), "ray": ray_job(steps)}


def write_manifest(name: str, text: str) -> Path:
    """Put a manifest into the checkout. Raises `LookupError` outside of one."""
    path = project_root() / FILES[name]
    if not path.parent.is_dir():
        raise LookupError(f"{path.parent}: no such folder; --write belongs into a checkout")
    path.write_text(text, encoding="utf-8")
    return path
