"""Validate the manifests that are deployed to a cluster: python -m deploy.manifests CHECK.

kubectl renders the kustomizations with a namespace, as ArgoCD does. `kubernetes` validates the
fields of all Kubernetes kinds; `argo` those of Argo, by its types; `ray` those of KubeRay that are
listed here (and its pods as Kubernetes pods); `references` checks that the objects that templates
name exist; `checkov` finds known unsafe settings.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BIN_FOLDER, NODE_FOLDER = ROOT / ".venv-delivery" / "bin", ROOT / "build" / "checks"
ARGO_API, RAY_API = "argoproj.io/", "ray.io/"
# KubeRay's types are in no package; these are the fields of https://ray-project.github.io/kuberay
# (ray.io/v1) that our manifests may use, by path
KUBERAY_FIELDS = {
    "spec": (
        "entrypoint submissionMode shutdownAfterJobFinishes ttlSecondsAfterFinished backoffLimit"
        " activeDeadlineSeconds rayClusterSpec runtimeEnvYAML suspend"
    ),
    "spec.rayClusterSpec": (
        "headGroupSpec workerGroupSpecs rayVersion enableInTreeAutoscaling autoscalerOptions"
    ),
    "spec.rayClusterSpec.headGroupSpec": "rayStartParams template serviceType",
    "spec.rayClusterSpec.workerGroupSpecs": (
        "groupName replicas minReplicas maxReplicas rayStartParams template numOfHosts"
    ),
}
DIGEST_PATTERN = re.compile(r"@sha256:[0-9a-f]{64}$")
NAME_PATTERN = re.compile(r"[a-zA-Z0-9][-a-zA-Z0-9]*")
KUBERNETES_VERSION = "1.34"
VARIABLE_PATTERN = re.compile(r"\{\{(.*?)\}\}")
SKIPPED_CHECKS = (
    "CKV_K8S_11",  # a limit on CPU slows a service down while cores are idle; memory has one
)
# KubeRay adds the probes to the pods of a cluster
PROBE_SKIPS = {f"checkov.io/skip{n}": f"CKV_K8S_{n}=set by KubeRay" for n in (8, 9)}
Document = dict[str, Any]


def render_overlays(root: Path = ROOT) -> dict[str, list[Document]]:
    """Render each deployed kustomization (with a namespace); returns its documents by path."""
    overlays = {}
    for path in sorted((root / "deploy").rglob("kustomization.yaml")):
        if "namespace" in yaml.safe_load(path.read_text(encoding="utf-8")):
            command = [str(BIN_FOLDER / "kubectl"), "kustomize", str(path.parent)]
            result = subprocess.run(command, check=False, capture_output=True, text=True)
            if result.returncode:
                raise ValueError(f"{path.relative_to(root)}: {result.stderr.strip()}")
            overlays[str(path.parent.relative_to(root))] = list(yaml.safe_load_all(result.stdout))
    return overlays


def _list_argo_documents(root: Path) -> list[Document]:
    files = sorted((root / "deploy" / "argocd").glob("*.yaml"))
    documents = [doc for path in files for doc in yaml.safe_load_all(path.read_text("utf-8"))]
    documents += [doc for docs in render_overlays(root).values() for doc in docs]
    return [doc for doc in documents if doc["apiVersion"].startswith(ARGO_API)]


def check_kubernetes(root: Path) -> Iterator[str]:
    """Find faults in all kinds but Argo's and KubeRay's; an unknown kind is a fault."""
    from kubernetes_validate import utils  # of the tools' own environment

    for overlay, documents in render_overlays(root).items():
        for document in [*documents, *_iter_pods(documents)]:
            if document["apiVersion"].startswith((ARGO_API, RAY_API)):
                continue
            try:
                utils.validate(document, KUBERNETES_VERSION, strict=True)
            except Exception as err:
                text = str(getattr(err, "message", err))
                yield f"{overlay}: {document['kind']}/{document['metadata']['name']}: {text}"


def check_argo(root: Path) -> Iterator[str]:
    """Find faults in Argo's kinds: values of a wrong type, unknown fields."""
    command = ["node", str(NODE_FOLDER / "argo.mjs")]
    text = json.dumps(_list_argo_documents(root))
    result = subprocess.run(command, input=text, check=False, capture_output=True, text=True)
    if result.returncode:
        yield result.stdout + result.stderr


def _iter_pods(documents: list[Document]) -> Iterator[Document]:
    """Iterate over the pods of KubeRay's clusters as pod documents."""
    for document in documents:
        if document["apiVersion"].startswith(RAY_API):
            cluster = document["spec"]["rayClusterSpec"]
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                template, name = group["template"], group.get("groupName", "head")
                metadata = template["metadata"] | {"name": name, "annotations": PROBE_SKIPS}
                metadata["namespace"] = document["metadata"]["namespace"]
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
                yield pod | {"spec": template["spec"]}


def check_ray(root: Path) -> Iterator[str]:
    """Find unknown fields of KubeRay's kinds and inconsistent numbers of workers."""
    for overlay, documents in render_overlays(root).items():
        for document in documents:
            if document["apiVersion"].startswith(RAY_API):
                for path, fields in KUBERAY_FIELDS.items():
                    for value in _iter_values(document, path.split(".")):
                        for field in sorted({*value} - {*fields.split()}):
                            yield f"{overlay}: {document['kind']}: {path}.{field} is not known"
                for group in _iter_values(document, ["spec", "rayClusterSpec", "workerGroupSpecs"]):
                    minimum, replicas, maximum = (
                        group[f"{n}eplicas"] for n in ("minR", "r", "maxR")
                    )
                    if not 0 <= minimum <= replicas <= maximum:
                        bounds = f"{minimum} <= {replicas} <= {maximum}"
                        yield f"{overlay}: {group['groupName']}: {bounds} replicas?"


def _iter_values(value: Any, path: list[str]) -> Iterator[Document]:
    """Iterate over the values at a path; expands lists."""
    for item in value if isinstance(value, list) else [value]:
        if path:
            yield from _iter_values(item[path[0]], path[1:])
        else:
            yield item


def check_references(root: Path) -> Iterator[str]:
    """Find missing objects: templates, tasks, parameters, accounts, config maps, images."""
    for overlay, documents in render_overlays(root).items():
        for image in sorted({*_iter_images(documents)}):
            if not DIGEST_PATTERN.search(image):
                yield f"{overlay}: image {image} has no digest; name it in the overlay's images"
        names = {(doc["kind"], doc["metadata"]["name"]) for doc in documents}
        for document in documents:
            location = f"{overlay}: {document['kind']}"
            if document["apiVersion"].startswith(RAY_API):
                yield from (
                    f"{location}: {fault}" for fault in _find_missing_references(document, names)
                )
            if document["kind"] == "WorkflowTemplate":
                yield from (
                    f"{location}: {fault}" for fault in _find_dangling(document["spec"], names)
                )
            if document["kind"] == "CronWorkflow":
                template_name = document["spec"]["workflowSpec"]["workflowTemplateRef"]["name"]
                if ("WorkflowTemplate", template_name) not in names:
                    yield f"{location}: no WorkflowTemplate {template_name!r}"


def _find_missing_references(document: Document, names: set[tuple[str, str]]) -> Iterator[str]:
    """Find missing service accounts and config maps that a cluster's pods refer to."""
    for pod in _iter_pods([document]):
        referenced = {("ServiceAccount", pod["spec"]["serviceAccountName"])}
        for container in pod["spec"]["containers"]:
            referenced |= {
                ("ConfigMap", source["configMapRef"]["name"]) for source in container["envFrom"]
            }
        yield from (f"no {kind} {name!r}" for kind, name in sorted(referenced - names))


def _iter_images(value: Any) -> Iterator[str]:
    """Iterate over the images of all containers in a document."""
    if isinstance(value, dict):
        if isinstance(value.get("image"), str):
            yield value["image"]
        for part in value.values():
            yield from _iter_images(part)
    elif isinstance(value, list):
        for part in value:
            yield from _iter_images(part)


def _find_dangling(spec: Document, names: set[tuple[str, str]]) -> Iterator[str]:
    templates = {template["name"]: template for template in spec["templates"]}
    known_variables = {
        f"workflow.parameters.{parameter['name']}" for parameter in spec["arguments"]["parameters"]
    }
    known_variables.add("workflow.name")
    if spec["entrypoint"] not in templates:
        yield f"entrypoint {spec['entrypoint']!r} is not a template"
    if ("ServiceAccount", spec["serviceAccountName"]) not in names:
        yield f"no service account {spec['serviceAccountName']!r}"
    for variable in VARIABLE_PATTERN.findall(json.dumps(spec)):
        if variable not in known_variables:
            yield f"{variable!r} is not defined"
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for name, template in templates.items():
        if not NAME_PATTERN.fullmatch(name):
            yield f"template {name!r}: Argo allows only letters, digits and hyphens"
        tasks = template.get("dag", {}).get("tasks", [])
        missing_templates = {task["template"] for task in tasks} - {*templates}
        missing_tasks = {
            dependency for task in tasks for dependency in task.get("dependencies", [])
        }
        missing_tasks -= {task["name"] for task in tasks}
        container = template.get("container", {})
        missing_volumes = {mount["name"] for mount in container.get("volumeMounts", [])} - volumes
        missing_maps = {source["configMapRef"]["name"] for source in container.get("envFrom", [])}
        missing_maps -= {object_name for kind, object_name in names if kind == "ConfigMap"}
        for kind, missing in zip(
            ("template", "task", "volume", "configuration"),
            (missing_templates, missing_tasks, missing_volumes, missing_maps),
            strict=True,
        ):
            yield from (f"{name}: no {kind} {reference!r}" for reference in sorted(missing))


def check_unsafe(root: Path) -> Iterator[str]:
    """Find known unsafe settings in the manifests and in the Dockerfile."""
    with TemporaryDirectory(prefix="manifests-") as folder:
        for overlay, documents in render_overlays(root).items():
            file = Path(folder) / f"{overlay.replace('/', '-')}.yaml"
            file.write_text(yaml.safe_dump_all([*documents, *_iter_pods(documents)]))
        (Path(folder) / "Dockerfile").write_bytes((root / "Dockerfile").read_bytes())
        options = ["--framework", "kubernetes", "dockerfile", "--compact", "--quiet"]
        options += ["--skip-download", "--skip-check", ",".join(SKIPPED_CHECKS)]
        command = [str(BIN_FOLDER / "checkov"), "--directory", folder, *options]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            yield result.stdout + result.stderr


CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "kubernetes": check_kubernetes,
    "argo": check_argo,
    "ray": check_ray,
    "references": check_references,
    "checkov": check_unsafe,
}


def main(argv: list[str] | None = None) -> int:
    """Run one check; returns 1 when it finds a fault."""
    parser = argparse.ArgumentParser(prog="python -m deploy.manifests", description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(argv)
    try:
        faults = list(CHECKS[args.check](args.root))
    except ValueError as err:
        faults = [str(err)]
    print(*faults, sep="\n", end="\n" if faults else "")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
