"""The pipeline for a Ray cluster on Kubernetes: one RayJob that starts its cluster and removes it.

KubeRay starts a head and workers, runs `hm run --on ray` on the head, and removes all of it when
that has ended. Each stage is then a job of that cluster (`ray_jobs`), on a worker that has what the
stage asks for; its shards go to all workers. The head coordinates, and runs no task. A worker has
the memory of the largest stage and half as much again: Ray keeps three tenths of a machine's memory
for its object store. https://docs.ray.io/en/latest/cluster/kubernetes/index.html
"""

from collections.abc import Sequence
from typing import Any

from runner.backends.kubernetes import AS_USER, CONFINED, IMAGES, NAME, Step, as_yaml

RAY = "hm-reco-ray"
IMAGE = f"{IMAGES}/cluster"  # the stages' image, with Ray
HEAD = {"requests": {"cpu": "1", "memory": "8Gi"}, "limits": {"memory": "8Gi"}}
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10_001}


def _pod(name: str, resources: dict[str, Any], ports: dict[str, int]) -> dict[str, Any]:
    """The pod of a node of the cluster."""
    container: dict[str, Any] = {
        "name": name,
        "image": IMAGE,
        "envFrom": [{"configMapRef": {"name": NAME}}],
        "env": [
            {"name": "HM_CLUSTER", "value": "auto"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        ],
        "resources": resources,
        "securityContext": CONFINED,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # nosec B108
    }
    if ports:
        container["ports"] = [{"name": n, "containerPort": p} for n, p in ports.items()]
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": RAY}},
        "spec": {
            "serviceAccountName": NAME,
            "automountServiceAccountToken": False,
            "securityContext": AS_USER,
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "50Gi"}}],
        },
    }


def worker_of(steps: Sequence[Step]) -> dict[str, Any]:
    """What a worker asks for: enough for each step, and a core for its shards beside it."""
    memory = max(_gibibytes(step.memory) for step in steps)
    gpus = max(step.gpu for step in steps)
    gpu = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    size = f"{-(-3 * memory // 2)}Gi"
    cpus = f"{max(step.cpus for step in steps) + 1:g}"
    return {
        "requests": {"cpu": cpus, "memory": size} | gpu,
        "limits": {"memory": size} | gpu,
    }


def _gibibytes(memory: str) -> int:
    """Whole Gi, at least."""
    return -(-int(memory[:-2]) // {"Gi": 1, "Mi": 1024}[memory[-2:]])


def ray_job(steps: Sequence[Step], workers: int = 2) -> str:
    """The RayJob that runs all steps on a cluster of its own with so many workers, as YAML."""
    group = {
        "groupName": "workers",
        "replicas": workers,
        "minReplicas": workers,
        "maxReplicas": workers,
        "rayStartParams": {},
        "template": _pod("ray-worker", worker_of(steps), {}),
    }
    head = {
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # nosec B104
        "template": _pod("ray-head", HEAD, PORTS),
    }
    job = {
        "entrypoint": "hm run --on ray",
        "submissionMode": "HTTPMode",  # the operator submits it; no pod of its own
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "activeDeadlineSeconds": 21_600,
        "backoffLimit": 0,  # stages are tried again as they declare
        "rayClusterSpec": {"headGroupSpec": head, "workerGroupSpecs": [group]},
    }
    meta = {"name": RAY, "labels": {"app.kubernetes.io/name": RAY}}
    document = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": meta, "spec": job}
    return as_yaml("ray", [document])
