"""Common parts of the Kubernetes manifests: steps, security, resources, YAML."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

PIPELINE_NAME = "hm-reco-pipeline"
IMAGE_REPOSITORY = "ml-fashion-recommender"  # overlays replace it with a registry and digests
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
    """A stage as a step of a cluster's workflow."""

    name: str
    after: tuple[str, ...]
    image: str  # component whose image it runs in
    parameters: dict[str, str]  # of a whole run, as texts for `hm run -p`
    cpus: float = 1
    memory: str = "8Gi"
    gpu: int = 0

    @property
    def slug(self) -> str:
        """The name in Kubernetes' format."""
        return self.name.replace("_", "-")


def build_resources(step: Step) -> dict[str, Any]:
    """Build the resource requests and limits of a step's container."""
    gpu = {"nvidia.com/gpu": str(step.gpu)} if step.gpu else {}
    requests = {"cpu": f"{step.cpus:g}", "memory": step.memory}
    return {"requests": requests | gpu, "limits": {"memory": step.memory} | gpu}


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that writes repeated values in full, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Disable aliases."""
        return True


HEADER = "# Written by `hm manifests {name} --write` from runner/pipeline.yaml and the notebooks.\n"


def to_yaml(name: str, documents: Sequence[dict[str, Any]]) -> str:
    """Format manifests as YAML with the header of `hm manifests`."""
    options: dict[str, Any] = {"sort_keys": False, "width": 100, "explicit_start": True}
    return HEADER.format(name=name) + yaml.dump_all(documents, Dumper=_Dumper, **options)
