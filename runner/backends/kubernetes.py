"""What manifests for Kubernetes share: steps, security, resources, YAML."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

PIPELINE_NAME = "hm-reco-pipeline"
IMAGE_REPOSITORY = "ml-fashion-recommender"  # overlays put a registry and digests in its place
USER_ID = 10001  # of the image
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True)
class Step:
    """A stage as a cluster sees it."""

    name: str
    after: tuple[str, ...]
    image: str  # the component whose image it runs in
    parameters: dict[str, str]  # in a whole run, as `hm run -p` takes them
    cpus: float = 1
    memory: str = "8Gi"
    gpu: int = 0

    @property
    def slug(self) -> str:
        """Its name as Kubernetes wants names."""
        return self.name.replace("_", "-")


def build_resources(step: Step) -> dict[str, Any]:
    """What its container asks for, and the most it may have."""
    gpu = {"nvidia.com/gpu": str(step.gpu)} if step.gpu else {}
    requests = {"cpu": f"{step.cpus:g}", "memory": step.memory}
    return {"requests": requests | gpu, "limits": {"memory": step.memory} | gpu}


class _Dumper(yaml.SafeDumper):
    """Writes out what stands in several places, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never an alias."""
        return True


HEADER = "# Written by `hm manifests {name} --write` from runner/pipeline.yaml and the notebooks.\n"


def to_yaml(name: str, documents: Sequence[dict[str, Any]]) -> str:
    """Manifests as `hm manifests` writes them."""
    options: dict[str, Any] = {"sort_keys": False, "width": 100, "explicit_start": True}
    return HEADER.format(name=name) + yaml.dump_all(documents, Dumper=_Dumper, **options)
