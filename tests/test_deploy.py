"""What the workflows call: image tags, change detection, updates of a GitOps repository."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ruamel.yaml import YAML
from typer.testing import CliRunner

from deploy import gitops
from deploy.changed_components import (
    NO_BASE,
    DetectionError,
    find_affected,
    list_changed_files,
    list_components,
)
from deploy.changed_components import main as run_detection
from deploy.gitops import MAX_ATTEMPTS, GitOpsError, publish_change, set_image
from deploy.gitops import main as run_gitops
from deploy.tag import build_tags, to_tag_part
from deploy.tag import main as run_tag
from runner.backends import MANIFEST_BACKENDS
from runner.cli import app
from runner.deployment import build_manifests
from runner.graph import load_pipeline

SHA = "0123456789abcdef0123456789abcdef01234567"  # pragma: allowlist secret
DIGEST, OTHER_DIGEST = ("sha256:" + digit * 64 for digit in "ab")
APP = "apps/ml-recommendation-inference"
IMAGE = "123456789012.dkr.ecr.eu-north-1.amazonaws.com/ml-fashion-recommender/inference"
ALL_STAGES = list(load_pipeline())


@pytest.mark.parametrize(
    ("ref", "number", "expected"),
    [
        ("refs/heads/main", None, [f"main-{SHA}", "main-0123456", "main-latest"]),
        ("refs/heads/develop", None, [f"develop-{SHA}", "develop-0123456", "develop-latest"]),
        ("refs/heads/feat/Größe #7", None, [f"feat-Gr-e-7-{SHA}", "feat-Gr-e-7-0123456"]),
        ("refs/pull/12/merge", 12, [f"pr-12-{SHA}", "pr-12-0123456", "pr-12"]),
    ],
)
def test_image_tags_by_ref(ref, number, expected):
    assert build_tags(ref, SHA, number, moving=True) == expected
    immutable_tags = build_tags(ref, SHA, number)
    assert immutable_tags == expected[:2] and not any(t.endswith("latest") for t in immutable_tags)


def test_image_tag_is_truncated_to_registry_limit():
    assert len(build_tags("refs/heads/" + "x" * 300, SHA)[0]) <= 128
    assert to_tag_part("-.a.-") == "a"
    with pytest.raises(ValueError, match="no character is valid"):
        to_tag_part("äöü")


@pytest.mark.parametrize(
    "args",
    [
        ["--ref", "refs/heads/main", "--sha", "0123"],
        ["--ref", "refs/tags/v1", "--sha", SHA],
        ["--ref", "refs/heads/main", "--sha", SHA.upper()],
    ],
)
def test_tag_with_invalid_ref_or_sha_is_rejected(args, capsys):
    assert run_tag(args) == 1
    assert "expected" in capsys.readouterr().err


def test_files_copied_into_image_affect_all_components():
    lines = Path("Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--" not in line]
    for name in (name for names in copied for name in names if Path(name).is_file()):
        if not name.endswith(("README.md", "LICENSE")):
            assert find_affected([name]) == ALL_STAGES, name


def test_dockerignore_excludes_secrets():
    lines = Path(".dockerignore").read_text().split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"  # exclude everything first
    allowed_paths = {rule[1:].split("/")[0] for rule in rules if rule.startswith("!")}
    assert not allowed_paths & {"config", ".env", ".git", "secrets", "lake", ".aws"}
    allowed_folders = [name for name in allowed_paths if Path(name).is_dir() and name != "deploy"]
    assert set(allowed_folders) == {"hm_reco", "nbs", "reports", "runner"}


def test_argo_workflow_file_equals_pipeline_graph():
    rendered = build_manifests(load_pipeline())
    assert {name: b.path.read_text() for name, b in MANIFEST_BACKENDS.items()} == rendered


def test_argo_manifest_has_requested_schedule():
    result = CliRunner().invoke(app, ["manifests", "argo", "--schedule", "15 4 * * 1"])
    template, cron = yaml.safe_load_all(result.stdout)
    assert cron["spec"]["schedules"] == ["15 4 * * 1"]
    assert (
        cron["spec"]["workflowSpec"]["workflowTemplateRef"]["name"] == template["metadata"]["name"]
    )
    dependencies = {task["name"]: task.get("dependencies", []) for task in get_dag_tasks(template)}
    assert dependencies == {name: [*stage.after] for name, stage in load_pipeline().items()}


def get_dag_tasks(template):
    return template["spec"]["templates"][0]["dag"]["tasks"]


def test_aws_policies_have_no_wildcards():
    for path in sorted(Path("deploy/aws").glob("*-policy.json")):
        for statement in json.loads(path.read_text())["Statement"]:
            if statement["Effect"] == "Allow":
                actions = statement["Action"]
                assert not any(
                    "*" in a for a in ([actions] if isinstance(actions, str) else actions)
                )
                assert statement["Resource"] != "*" or actions == "ecr:GetAuthorizationToken"


def test_components_equal_stages():
    assert list(list_components()) == ALL_STAGES


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nbs/lake/01_storage.ipynb", ALL_STAGES),
        ("hm_reco/lake/storage.py", ALL_STAGES),
        ("nbs/ranking/07_forest.ipynb", ["training", "inference"]),
        ("hm_reco/reporting/data_drift.py", ["eda"]),
        ("nbs/api/03_model_manager.ipynb", ["inference"]),
        ("nbs/stages/10_ingestion.ipynb", ["ingestion"]),
        ("runner/cli/run.py", ALL_STAGES),
        ("requirements.lock", ALL_STAGES),
        ("Dockerfile", ALL_STAGES),
        ("deploy/entrypoint.sh", ALL_STAGES),
        ("hm_reco/api/warm_up.py", ALL_STAGES),
        ("deploy/tag.py", []),
        ("unknown/file.bin", ALL_STAGES),
        ("nbs/reporting/99_removed.ipynb", ALL_STAGES),
        ("docs/tutorial.md", []),
        ("README.md", []),
        ("tests/test_cli.py", []),
        ("hm_reco/_modidx.py", []),
    ],
)
def test_changed_file_affects_expected_components(path, expected):
    assert find_affected([path]) == expected


def test_changed_files_affect_union_of_components():
    assert find_affected(["nbs/reporting/06_baskets.ipynb", "nbs/api/03_model_manager.ipynb"]) == [
        "eda",
        "inference",
    ]
    assert find_affected([]) == []


def run_git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_changed_files_start_at_merge_base(tmp_path):
    run_git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    for name, branch in (("a", ""), ("b", "topic"), ("c", "main")):
        if branch:
            run_git(tmp_path, "checkout", "--quiet", *(["-b"] if branch == "topic" else []), branch)
        (tmp_path / f"{name} ü.txt").write_text(name)
        run_git(tmp_path, "add", "--all")
        run_git(tmp_path, "commit", "--quiet", "--message", name)
    assert list_changed_files("main", "topic", tmp_path) == ["b ü.txt"]
    assert list_changed_files(NO_BASE, "topic", tmp_path) is None
    with pytest.raises(DetectionError, match="cannot compare"):
        list_changed_files("f" * 40, "topic", tmp_path)


def test_failed_detection_exits_without_list(capsys):
    assert run_detection(["--base", "f" * 40]) == 1
    assert capsys.readouterr().out == ""
    assert run_detection(["--base", NO_BASE]) == 0
    assert json.loads(capsys.readouterr().out) == ALL_STAGES


def test_detection_runs_without_dependencies(tmp_path):
    command = [sys.executable, "-S", "-I", "-c"]
    code = f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); "
    code += "from deploy.changed_components import main"
    args = ["--base", NO_BASE]
    result = subprocess.run(
        [*command, f"{code}; sys.exit(main({args!r}))"], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == ALL_STAGES


OVERLAY = """# owned by the delivery of hm-reco
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - ../../base
images:
  - name: sidecar
    newTag: "1.0"
  - name: ml-fashion-recommender/inference
    newName: old
    newTag: main-1
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A bare GitOps repository with two overlays."""
    bare, clone = tmp_path / "gitops.git", tmp_path / "first"
    run_git(tmp_path, "init", "--quiet", "--bare", "--initial-branch", "main", str(bare))
    run_git(tmp_path, "clone", "--quiet", str(bare), str(clone))
    for name in ("staging", "production"):
        file = clone / APP / "overlays" / name / "kustomization.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(OVERLAY)
    run_git(clone, "add", "--all")
    run_git(clone, "commit", "--quiet", "--message", "first")
    run_git(clone, "push", "--quiet", "origin", "HEAD:main")
    return bare


def build_gitops_args(
    repository: Path, overlay: str, digest: str = DIGEST, *extra: str
) -> list[str]:
    args = ["set", "--repository", str(repository), "--app", APP, "--overlay", overlay]
    args += ["--image", IMAGE, "--digest", digest, "--tag", f"main-{SHA}"]
    return [*args, "--note", "MAP@12 0.0446", *extra]


def read_overlay(repository: Path, overlay: str, branch: str = "main") -> str:
    return run_git(repository, "show", f"{branch}:{APP}/overlays/{overlay}/kustomization.yaml")


def test_gitops_set_changes_digest_only(repository, capsys):
    assert run_gitops(build_gitops_args(repository, "staging")) == 0
    text = read_overlay(repository, "staging")
    content = YAML(typ="safe").load(text)
    assert content["images"] == [
        {"name": "sidecar", "newTag": "1.0"},
        {"name": "ml-fashion-recommender/inference", "newName": IMAGE, "digest": DIGEST},
    ]
    assert text.startswith("# owned by the delivery") and f"# main-{SHA}" in text
    assert read_overlay(repository, "production") == OVERLAY.strip()
    message = run_git(repository, "log", "-1", "--format=%B", "main")
    assert message.startswith(f"deploy(inference): main-{SHA}") and "MAP@12 0.0446" in message
    capsys.readouterr()
    assert run_gitops(build_gitops_args(repository, "staging")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run_git(repository, "rev-list", "--count", "main") == "2"


def test_gitops_set_retries_after_concurrent_push(repository, tmp_path, monkeypatch):
    original_push, calls = gitops.push, []

    def push_after_competitor(clone: Path, branch: str, force: bool = False) -> bool:
        calls.append(branch)
        if len(calls) == 1:  # a competing delivery pushes first
            assert publish_change(str(repository), "main", update_production, "another") != ""
        return original_push(clone, branch, force)

    def update_production(clone: Path) -> None:
        file = clone / APP / "overlays" / "production" / "kustomization.yaml"
        set_image(file, "ml-fashion-recommender/inference", IMAGE, OTHER_DIGEST)

    monkeypatch.setattr(gitops, "push", push_after_competitor)
    assert run_gitops(build_gitops_args(repository, "staging")) == 0
    assert len(calls) == 3  # rejected, competing, retried
    assert DIGEST in read_overlay(repository, "staging") and OTHER_DIGEST in read_overlay(
        repository, "production"
    )
    assert run_git(repository, "rev-list", "--count", "main") == "3"


def test_gitops_publish_gives_up_after_max_attempts(repository, monkeypatch):
    monkeypatch.setattr(gitops, "push", lambda *_, **__: False)

    def change(clone: Path) -> None:
        (clone / "new").write_text("x")

    with pytest.raises(GitOpsError, match=f"{MAX_ATTEMPTS} attempts failed"):
        publish_change(str(repository), "main", change, "m", pause_seconds=0)


def test_gitops_set_production_pushes_pull_request_branch(repository):
    assert (
        run_gitops(
            build_gitops_args(repository, "production", DIGEST, "--onto", "deploy/inference")
        )
        == 0
    )
    assert read_overlay(repository, "production") == OVERLAY.strip()
    assert DIGEST in read_overlay(repository, "production", "deploy/inference")
    assert (
        run_gitops(
            build_gitops_args(repository, "production", OTHER_DIGEST, "--onto", "deploy/inference")
        )
        == 0
    )
    assert OTHER_DIGEST in read_overlay(repository, "production", "deploy/inference")


def test_gitops_preview_is_created_and_removed(repository):
    assert run_gitops(build_gitops_args(repository, "pr-12")) == 0
    content = YAML(typ="safe").load(read_overlay(repository, "pr-12"))
    assert content["resources"] == ["../staging"] and content["nameSuffix"] == "-pr-12"
    assert content["images"][0]["digest"] == DIGEST
    remove_args = ["remove", "--repository", str(repository), "--app", APP, "--overlay"]
    assert run_gitops([*remove_args, "pr-12"]) == 0
    assert "pr-12" not in run_git(repository, "ls-tree", "-r", "--name-only", "main")
    assert run_gitops([*remove_args, "pr-12"]) == 0  # second time: nothing to do
    assert run_gitops([*remove_args, "staging"]) == 1
    assert DIGEST not in read_overlay(repository, "staging")


@pytest.mark.parametrize(
    ("overlay", "digest", "message"),
    [
        ("staging", "latest", "expected sha256:"),
        ("elsewhere", DIGEST, "no file kustomization.yaml"),
    ],
)
def test_gitops_set_with_invalid_input_is_rejected(repository, overlay, digest, message, capsys):
    assert run_gitops(build_gitops_args(repository, overlay, digest)) == 1
    assert message in capsys.readouterr().err
    assert run_git(repository, "rev-list", "--count", "main") == "1"


@pytest.mark.parametrize("content", ["[1, 2", "- a list"])
def test_set_image_in_invalid_kustomization_raises(tmp_path, content):
    file = tmp_path / "kustomization.yaml"
    file.write_text(content)
    with pytest.raises(GitOpsError, match=r"kustomization.yaml"):
        set_image(file, "x", IMAGE, DIGEST)
    assert file.read_text() == content


def test_gitops_token_is_not_leaked(repository, monkeypatch, capsys):
    monkeypatch.setenv("GITOPS_REPO_TOKEN", "canary-7f3a")
    commands: list[list[str]] = []
    original_run = subprocess.run

    def record_command(command, **options):
        commands.append(list(map(str, command)))
        assert "GITOPS_REPO_TOKEN" not in options["env"]
        return original_run(command, **options)

    monkeypatch.setattr(gitops.subprocess, "run", record_command)
    assert run_gitops(build_gitops_args(Path("/no/such/place"), "staging")) == 1
    captured = capsys.readouterr()
    assert "canary-7f3a" not in captured.err + captured.out + str(commands)
