"""The pipeline for Argo Workflows: a template made from the steps of the graph, and its schedule.

One container a step. Steps hand on tables through the lake, by published versions, so nothing is
passed between containers; executed notebooks and reports lie in the lake, too. The parameters of
all steps are the workflow's, seen and changed in its form.
"""

from collections.abc import Sequence
from typing import Any

from runner.backends.kubernetes import AS_USER, CONFINED, IMAGES, NAME, Step, as_yaml, resources_of

# a step runs again when its machine was lost or it was killed, not when its notebook failed
KILLED = "lastRetry.status == 'Error' or lastRetry.exitCode in ['137', '143']"


def _container(step: Step) -> dict[str, Any]:
    """The template of a step."""
    mine = f"workflow.parameters.{step.slug}"
    given = [f"{name}={{{{{mine}-{name}}}}}" for name in step.parameters]
    words = [word for one in given for word in ("-p", one)]
    return {
        "name": step.slug,
        "retryStrategy": {
            "limit": "2",
            "retryPolicy": "Always",
            "expression": KILLED,
            "backoff": {"duration": "1m", "factor": "2", "maxDuration": "15m"},
        },
        "container": {
            "name": "main",
            "image": f"{IMAGES}/{step.image}",
            "args": ["run", step.name, "--run-id", "{{workflow.name}}", *words],
            "envFrom": [{"configMapRef": {"name": NAME}}],
            "resources": resources_of(step),
            "securityContext": CONFINED,
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # nosec B108
        },
    }


def _template(steps: Sequence[Step]) -> dict[str, Any]:
    slugs = {step.name: step.slug for step in steps}
    parameters = [
        {"name": f"{step.slug}-{name}", "value": value}
        for step in steps
        for name, value in step.parameters.items()
    ]
    tasks: list[dict[str, Any]] = []
    for step in steps:
        tasks.append({"name": step.slug, "template": step.slug})
        if step.after:
            tasks[-1]["dependencies"] = [slugs[name] for name in step.after]
    return {
        "entrypoint": "pipeline",
        "serviceAccountName": NAME,
        "arguments": {"parameters": parameters},
        "activeDeadlineSeconds": 21_600,
        "archiveLogs": True,
        "podGC": {"strategy": "OnPodSuccess"},
        "ttlStrategy": {"secondsAfterCompletion": 604_800},
        "synchronization": {"mutexes": [{"name": NAME}]},
        "podMetadata": {"labels": {"app.kubernetes.io/name": NAME}},
        "securityContext": AS_USER,
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}}],
        "templates": [{"name": "pipeline", "dag": {"tasks": tasks}}, *map(_container, steps)],
    }


NIGHTLY = "0 3 * * *"


def workflows(steps: Sequence[Step], schedule: str = NIGHTLY) -> str:
    """The manifests of WorkflowTemplate and CronWorkflow, as YAML."""
    meta = {"name": NAME, "labels": {"app.kubernetes.io/name": NAME}}
    kinds = {
        "WorkflowTemplate": _template(steps),
        "CronWorkflow": {
            "schedules": [schedule],
            "timezone": "Etc/UTC",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3_600,
            "successfulJobsHistoryLimit": 7,
            "failedJobsHistoryLimit": 7,
            "workflowSpec": {"workflowTemplateRef": {"name": NAME}},
        },
    }
    documents = [
        {"apiVersion": "argoproj.io/v1alpha1", "kind": kind, "metadata": meta, "spec": spec}
        for kind, spec in kinds.items()
    ]
    return as_yaml("argo", documents)
