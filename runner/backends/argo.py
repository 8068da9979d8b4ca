"""The pipeline for Argo Workflows: a template built from the steps of the graph, and its schedule.

Each step has one container. Steps share tables through published versions in the lake, so no data
are passed between containers; executed notebooks and reports are in the lake, too. The parameters
of all steps are parameters of the workflow, which its form shows and changes.
"""

from collections.abc import Sequence
from typing import Any

from runner.backends.kubernetes import (
    CONTAINER_SECURITY,
    IMAGE_REPOSITORY,
    PIPELINE_NAME,
    POD_SECURITY,
    Step,
    build_resources,
    to_yaml,
)

# retry a step when its machine was lost or it was killed, not when its notebook failed
RETRY_EXPRESSION = "lastRetry.status == 'Error' or lastRetry.exitCode in ['137', '143']"


def _build_container(step: Step) -> dict[str, Any]:
    """Build the template of a step."""
    prefix = f"workflow.parameters.{step.slug}"
    assignments = [f"{name}={{{{{prefix}-{name}}}}}" for name in step.parameters]
    arguments = [argument for assignment in assignments for argument in ("-p", assignment)]
    return {
        "name": step.slug,
        "retryStrategy": {
            "limit": "2",
            "retryPolicy": "Always",
            "expression": RETRY_EXPRESSION,
            "backoff": {"duration": "1m", "factor": "2", "maxDuration": "15m"},
        },
        "container": {
            "name": "main",
            "image": f"{IMAGE_REPOSITORY}/{step.image}",
            "args": ["run", step.name, "--run-id", "{{workflow.name}}", *arguments],
            "envFrom": [{"configMapRef": {"name": PIPELINE_NAME}}],
            "resources": build_resources(step),
            "securityContext": CONTAINER_SECURITY,
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # nosec B108
        },
    }


def _build_template(steps: Sequence[Step]) -> dict[str, Any]:
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
        "serviceAccountName": PIPELINE_NAME,
        "arguments": {"parameters": parameters},
        "activeDeadlineSeconds": 21_600,
        "archiveLogs": True,
        "podGC": {"strategy": "OnPodSuccess"},
        "ttlStrategy": {"secondsAfterCompletion": 604_800},
        "synchronization": {"mutexes": [{"name": PIPELINE_NAME}]},
        "podMetadata": {"labels": {"app.kubernetes.io/name": PIPELINE_NAME}},
        "securityContext": POD_SECURITY,
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}}],
        "templates": [{"name": "pipeline", "dag": {"tasks": tasks}}, *map(_build_container, steps)],
    }


NIGHTLY_SCHEDULE = "0 3 * * *"


def build_workflows(steps: Sequence[Step], schedule: str = NIGHTLY_SCHEDULE) -> str:
    """Build the manifests of WorkflowTemplate and CronWorkflow, as YAML."""
    metadata = {"name": PIPELINE_NAME, "labels": {"app.kubernetes.io/name": PIPELINE_NAME}}
    specs = {
        "WorkflowTemplate": _build_template(steps),
        "CronWorkflow": {
            "schedules": [schedule],
            "timezone": "Etc/UTC",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3_600,
            "successfulJobsHistoryLimit": 7,
            "failedJobsHistoryLimit": 7,
            "workflowSpec": {"workflowTemplateRef": {"name": PIPELINE_NAME}},
        },
    }
    documents = [
        {"apiVersion": "argoproj.io/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}
        for kind, spec in specs.items()
    ]
    return to_yaml("argo", documents)
