"""What a cluster is given, held against what it knows: python -m deploy.manifests CHECK.

Kustomizations with a namespace are rendered as ArgoCD would, by kubectl. `kubernetes` takes every
field of every kind that Kubernetes has; `argo` those of Argo, by its types; `ray` those of KubeRay
that we know (its pods are Kubernetes'); `references` looks whether what templates name is there;
`checkov` for what is known to be unsafe.
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
BIN, NODE = ROOT / ".venv-delivery" / "bin", ROOT / "build" / "checks"
ARGO, RAY = "argoproj.io/", "ray.io/"
# KubeRay's types are in no package; these are the fields of https://ray-project.github.io/kuberay
# (ray.io/v1) that are ours to use, at each place
KUBERAY = {
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
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
NAME = re.compile(r"[a-zA-Z0-9][-a-zA-Z0-9]*")
VERSION = "1.34"  # of Kubernetes
VARIABLE = re.compile(r"\{\{(.*?)\}\}")
SKIPPED = (
    "CKV_K8S_11",  # a limit on CPU slows a service down while cores are idle; memory has one
)
# KubeRay gives the pods of a cluster their probes
PROBED = {f"checkov.io/skip{n}": f"CKV_K8S_{n}=set by KubeRay" for n in (8, 9)}
Document = dict[str, Any]


def rendered(root: Path = ROOT) -> dict[str, list[Document]]:
    """By kustomization that is deployed (it has a namespace), its documents."""
    found = {}
    for path in sorted((root / "deploy").rglob("kustomization.yaml")):
        if "namespace" in yaml.safe_load(path.read_text(encoding="utf-8")):
            command = [str(BIN / "kubectl"), "kustomize", str(path.parent)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{path.relative_to(root)}: {done.stderr.strip()}")
            found[str(path.parent.relative_to(root))] = list(yaml.safe_load_all(done.stdout))
    return found


def _of_argo(root: Path) -> list[Document]:
    files = sorted((root / "deploy" / "argocd").glob("*.yaml"))
    documents = [doc for path in files for doc in yaml.safe_load_all(path.read_text("utf-8"))]
    documents += [doc for docs in rendered(root).values() for doc in docs]
    return [doc for doc in documents if doc["apiVersion"].startswith(ARGO)]


def kubernetes(root: Path) -> Iterator[str]:
    """Faults in what is not Argo's; a kind that Kubernetes does not know is one."""
    from kubernetes_validate import utils  # of the tools' own environment

    for place, documents in rendered(root).items():
        for document in [*documents, *_pods(documents)]:
            if document["apiVersion"].startswith((ARGO, RAY)):
                continue
            try:
                utils.validate(document, VERSION, strict=True)
            except Exception as err:
                text = str(getattr(err, "message", err))
                yield f"{place}: {document['kind']}/{document['metadata']['name']}: {text}"


def argo(root: Path) -> Iterator[str]:
    """Faults in Argo's kinds: values of another type, fields that nobody knows."""
    command = ["node", str(NODE / "argo.mjs")]
    text = json.dumps(_of_argo(root))
    done = subprocess.run(command, input=text, check=False, capture_output=True, text=True)
    if done.returncode:
        yield done.stdout + done.stderr


def _pods(documents: list[Document]) -> Iterator[Document]:
    """The pods of KubeRay's clusters, as such."""
    for document in documents:
        if document["apiVersion"].startswith(RAY):
            cluster = document["spec"]["rayClusterSpec"]
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                template, name = group["template"], group.get("groupName", "head")
                meta = template["metadata"] | {"name": name, "annotations": PROBED}
                meta["namespace"] = document["metadata"]["namespace"]
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta}
                yield pod | {"spec": template["spec"]}


def ray(root: Path) -> Iterator[str]:
    """Fields of KubeRay's kinds that nobody knows; numbers of workers that do not go together."""
    for place, documents in rendered(root).items():
        for document in documents:
            if document["apiVersion"].startswith(RAY):
                for path, fields in KUBERAY.items():
                    for part in _at(document, path.split(".")):
                        for field in sorted({*part} - {*fields.split()}):
                            yield f"{place}: {document['kind']}: {path}.{field} is not known"
                for group in _at(document, ["spec", "rayClusterSpec", "workerGroupSpecs"]):
                    low, now, high = (group[f"{n}eplicas"] for n in ("minR", "r", "maxR"))
                    if not 0 <= low <= now <= high:
                        yield f"{place}: {group['groupName']}: {low} <= {now} <= {high} replicas?"


def _at(value: Any, path: list[str]) -> Iterator[Document]:
    """What stands at a path; each part, where that is a list."""
    for one in value if isinstance(value, list) else [value]:
        if path:
            yield from _at(one[path[0]], path[1:])
        else:
            yield one


def references(root: Path) -> Iterator[str]:
    """What is named and is not there: templates, tasks, parameters, accounts, settings, images."""
    for place, documents in rendered(root).items():
        for image in sorted({*_images(documents)}):
            if not DIGEST.search(image):
                yield f"{place}: image {image} has no digest; name it in the overlay's images"
        names = {(doc["kind"], doc["metadata"]["name"]) for doc in documents}
        for document in documents:
            where = f"{place}: {document['kind']}"
            if document["apiVersion"].startswith(RAY):
                yield from (f"{where}: {fault}" for fault in _unnamed(document, names))
            if document["kind"] == "WorkflowTemplate":
                yield from (f"{where}: {fault}" for fault in _dangling(document["spec"], names))
            if document["kind"] == "CronWorkflow":
                named = document["spec"]["workflowSpec"]["workflowTemplateRef"]["name"]
                if ("WorkflowTemplate", named) not in names:
                    yield f"{where}: no WorkflowTemplate {named!r}"


def _unnamed(document: Document, names: set[tuple[str, str]]) -> Iterator[str]:
    """Accounts and settings that the pods of a cluster name and that are not there."""
    for pod in _pods([document]):
        wanted = {("ServiceAccount", pod["spec"]["serviceAccountName"])}
        for container in pod["spec"]["containers"]:
            wanted |= {("ConfigMap", one["configMapRef"]["name"]) for one in container["envFrom"]}
        yield from (f"no {kind} {name!r}" for kind, name in sorted(wanted - names))


def _images(value: Any) -> Iterator[str]:
    """The images of all containers, wherever a kind has them."""
    if isinstance(value, dict):
        if isinstance(value.get("image"), str):
            yield value["image"]
        for part in value.values():
            yield from _images(part)
    elif isinstance(value, list):
        for part in value:
            yield from _images(part)


def _dangling(spec: Document, names: set[tuple[str, str]]) -> Iterator[str]:
    templates = {template["name"]: template for template in spec["templates"]}
    known = {f"workflow.parameters.{one['name']}" for one in spec["arguments"]["parameters"]}
    known.add("workflow.name")
    if spec["entrypoint"] not in templates:
        yield f"entrypoint {spec['entrypoint']!r} is no template"
    if ("ServiceAccount", spec["serviceAccountName"]) not in names:
        yield f"no service account {spec['serviceAccountName']!r}"
    for variable in VARIABLE.findall(json.dumps(spec)):
        if variable not in known:
            yield f"{variable!r} stands for nothing"
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for name, template in templates.items():
        if not NAME.fullmatch(name):
            yield f"template {name!r}: Argo takes letters, digits and hyphens"
        tasks = template.get("dag", {}).get("tasks", [])
        wanted = {task["template"] for task in tasks} - {*templates}
        after = {before for task in tasks for before in task.get("dependencies", [])}
        after -= {task["name"] for task in tasks}
        container = template.get("container", {})
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])} - volumes
        maps = {source["configMapRef"]["name"] for source in container.get("envFrom", [])}
        maps -= {named for kind, named in names if kind == "ConfigMap"}
        for kind, missing in zip(
            ("template", "task", "volume", "configuration"),
            (wanted, after, mounts, maps),
            strict=True,
        ):
            yield from (f"{name}: no {kind} {one!r}" for one in sorted(missing))


def checkov(root: Path) -> Iterator[str]:
    """What is known to be unsafe in what Kubernetes is given, and in the Dockerfile."""
    with TemporaryDirectory(prefix="manifests-") as folder:
        for place, documents in rendered(root).items():
            file = Path(folder) / f"{place.replace('/', '-')}.yaml"
            file.write_text(yaml.safe_dump_all([*documents, *_pods(documents)]))
        (Path(folder) / "Dockerfile").write_bytes((root / "Dockerfile").read_bytes())
        options = ["--framework", "kubernetes", "dockerfile", "--compact", "--quiet"]
        options += ["--skip-download", "--skip-check", ",".join(SKIPPED)]
        command = [str(BIN / "checkov"), "--directory", folder, *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            yield done.stdout + done.stderr


CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "kubernetes": kubernetes,
    "argo": argo,
    "ray": ray,
    "references": references,
    "checkov": checkov,
}


def main(words: list[str] | None = None) -> int:
    """Run one check; 1 when it finds a fault."""
    parser = argparse.ArgumentParser(prog="python -m deploy.manifests", description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--root", type=Path, default=ROOT)
    given = parser.parse_args(words)
    try:
        faults = list(CHECKS[given.check](given.root))
    except ValueError as err:
        faults = [str(err)]
    print(*faults, sep="\n", end="\n" if faults else "")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
