"""The pipeline for a Ray cluster on Kubernetes: one RayJob that starts its cluster and removes it.

KubeRay starts a head and workers, runs `hm run --backend ray` on the head, and removes all of them
when it has ended. Each stage is a job of that cluster (`ray_jobs`), on a worker with the resources
that the stage requests; its shards go to all workers. The head coordinates and runs no task. A
worker has 1.5 times the memory of the largest stage, because Ray uses three tenths of a machine's
memory for its object store. https://docs.ray.io/en/latest/cluster/kubernetes/index.html
"""

from collections.abc import Sequence
from typing import Any

from runner.backends.kubernetes import (
    CONTAINER_SECURITY,
    IMAGE_REPOSITORY,
    PIPELINE_NAME,
    POD_SECURITY,
    Step,
    to_yaml,
)

RAY_NAME = "hm-reco-ray"
CLUSTER_IMAGE = f"{IMAGE_REPOSITORY}/cluster"  # the stages' image, with Ray
HEAD_RESOURCES = {"requests": {"cpu": "1", "memory": "8Gi"}, "limits": {"memory": "8Gi"}}
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10_001}


def _build_pod(name: str, resources: dict[str, Any], ports: dict[str, int]) -> dict[str, Any]:
    """Build the pod of a node of the cluster."""
    container: dict[str, Any] = {
        "name": name,
        "image": CLUSTER_IMAGE,
        "envFrom": [{"configMapRef": {"name": PIPELINE_NAME}}],
        "env": [
            {"name": "HM_RAY_ADDRESS", "value": "auto"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        ],
        "resources": resources,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # nosec B108
    }
    if ports:
        container["ports"] = [{"name": n, "containerPort": p} for n, p in ports.items()]
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": RAY_NAME}},
        "spec": {
            "serviceAccountName": PIPELINE_NAME,
            "automountServiceAccountToken": False,
            "securityContext": POD_SECURITY,
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "50Gi"}}],
        },
    }


def build_worker_resources(steps: Sequence[Step]) -> dict[str, Any]:
    """Compute a worker's resources: enough for each step, and one more core for its shards."""
    memory = max(_to_gibibytes(step.memory) for step in steps)
    gpus = max(step.gpu for step in steps)
    gpu = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    memory_limit = f"{-(-3 * memory // 2)}Gi"
    cpus = f"{max(step.cpus for step in steps) + 1:g}"
    return {
        "requests": {"cpu": cpus, "memory": memory_limit} | gpu,
        "limits": {"memory": memory_limit} | gpu,
    }


def _to_gibibytes(memory: str) -> int:
    """Convert a memory size to Gi, rounded up."""
    return -(-int(memory[:-2]) // {"Gi": 1, "Mi": 1024}[memory[-2:]])


def build_ray_job(steps: Sequence[Step], workers: int = 2) -> str:
    """Build the RayJob that runs all steps on its own cluster of `workers`, as YAML."""
    group = {
        "groupName": "workers",
        "replicas": workers,
        "minReplicas": workers,
        "maxReplicas": workers,
        "rayStartParams": {},
        "template": _build_pod("ray-worker", build_worker_resources(steps), {}),
    }
    head = {
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # nosec B104
        "template": _build_pod("ray-head", HEAD_RESOURCES, HEAD_PORTS),
    }
    job = {
        "entrypoint": "hm run --backend ray",
        "submissionMode": "HTTPMode",  # the operator submits the job without a pod
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "activeDeadlineSeconds": 21_600,
        "backoffLimit": 0,  # each stage declares its retries
        "rayClusterSpec": {"headGroupSpec": head, "workerGroupSpecs": [group]},
    }
    metadata = {"name": RAY_NAME, "labels": {"app.kubernetes.io/name": RAY_NAME}}
    document = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": job}
    return to_yaml("ray", [document])
