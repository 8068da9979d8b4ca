"""The pipeline for Argo Workflows: a template made from the graph of stages, and its schedule.

One container a stage. Stages hand on tables through the lake, by versions that manifests vouch for,
so nothing is passed between containers; executed notebooks and reports lie in the lake, too. The
parameters of all stages are the workflow's, seen and changed in its form.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from runner.graph import Stage, project_root
from runner.parameters import resolve

NAME = "hm-reco-pipeline"
IMAGES = "ml-fashion-recommender"  # overlays put a registry and digests in its place
MANIFEST = Path("deploy/pipeline/base/workflow.yaml")
OWN = ("lake", "run_id")  # parameters that the workflow sets itself
KILLED = "lastRetry.status == 'Error' or lastRetry.exitCode in ['137', '143']"
NIGHTLY = "0 3 * * *"
USER = 10001  # of the image
HEADER = "# Written by `hm deploy argo --write` from runner/pipeline.yaml and the notebooks.\n"


class _Dumper(yaml.SafeDumper):
    """Writes out what stands in several places, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never an alias."""
        return True


def _slug(stage: Stage) -> str:
    """A stage's name as Argo wants names."""
    return stage.name.replace("_", "-")


def _texts(stages: Mapping[str, Stage]) -> dict[str, dict[str, str]]:
    """By stage each parameter in a whole run, as `-p` takes it."""
    resolved = resolve(list(stages.values()))
    return {
        name: {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in resolved[name].values.items()
            if key not in OWN
        }
        for name in stages
    }


def _container(stage: Stage, parameters: Mapping[str, str]) -> dict[str, Any]:
    """The template of a stage: it runs again when its machine was lost or it was killed."""
    mine = f"workflow.parameters.{_slug(stage)}"
    given = [f"{name}={{{{{mine}-{name}}}}}" for name in parameters]
    words = [word for one in given for word in ("-p", one)]
    return {
        "name": _slug(stage),
        "retryStrategy": {
            "limit": "2",
            "retryPolicy": "Always",
            "expression": KILLED,
            "backoff": {"duration": "1m", "factor": "2", "maxDuration": "15m"},
        },
        "container": {
            "name": "main",
            "image": f"{IMAGES}/{stage.image or stage.name}",
            "args": ["run", stage.name, "--run-id", "{{workflow.name}}", *words],
            "envFrom": [{"configMapRef": {"name": NAME}}],
            "resources": {
                "requests": {"cpu": "1", "memory": stage.memory},
                "limits": {"memory": stage.memory},
            },
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # nosec B108
        },
    }


def _template(stages: Mapping[str, Stage]) -> dict[str, Any]:
    texts = _texts(stages)
    parameters = [
        {"name": f"{_slug(stages[stage])}-{name}", "value": value}
        for stage, given in texts.items()
        for name, value in given.items()
    ]
    tasks: list[dict[str, Any]] = []
    for stage in stages.values():
        tasks.append({"name": _slug(stage), "template": _slug(stage)})
        if stage.after:
            tasks[-1]["dependencies"] = [_slug(stages[name]) for name in stage.after]
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
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}}],
        "templates": [
            {"name": "pipeline", "dag": {"tasks": tasks}},
            *(_container(stage, texts[name]) for name, stage in stages.items()),
        ],
    }


def workflows(stages: Mapping[str, Stage], schedule: str = NIGHTLY) -> str:
    """The manifests of WorkflowTemplate and CronWorkflow, as YAML."""
    meta = {"name": NAME, "labels": {"app.kubernetes.io/name": NAME}}
    kinds = {
        "WorkflowTemplate": _template(stages),
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
    options: dict[str, Any] = {"sort_keys": False, "width": 100, "explicit_start": True}
    return HEADER + yaml.dump_all(documents, Dumper=_Dumper, **options)


def write_workflows(stages: Mapping[str, Stage], schedule: str = NIGHTLY) -> Path:
    """Bring the manifest of the checkout up to date. Raises `LookupError` outside of one."""
    path = project_root() / MANIFEST
    if not path.parent.is_dir():
        raise LookupError(f"{path.parent}: no such folder; --write belongs into a checkout")
    path.write_text(workflows(stages, schedule), encoding="utf-8")
    return path
