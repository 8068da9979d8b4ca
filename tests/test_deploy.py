"""What the workflows call: tags, detection of changes, the GitOps repository (a real bare one)."""

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
from deploy.changed_components import main as changed
from deploy.gitops import MAX_ATTEMPTS, GitOpsError, publish_change, set_image
from deploy.gitops import main as tell
from deploy.tag import build_tags, to_tag_part
from deploy.tag import main as tag
from runner.cli import app
from runner.deployment import MANIFEST_FILES, build_manifests
from runner.graph import load_pipeline

SHA = "0123456789abcdef0123456789abcdef01234567"  # pragma: allowlist secret
DIGEST, OTHER = ("sha256:" + digit * 64 for digit in "ab")
APP = "apps/ml-recommendation-inference"
IMAGE = "123456789012.dkr.ecr.eu-north-1.amazonaws.com/ml-fashion-recommender/inference"
ALL = list(load_pipeline())


@pytest.mark.parametrize(
    ("ref", "number", "expected"),
    [
        ("refs/heads/main", None, [f"main-{SHA}", "main-0123456", "main-latest"]),
        ("refs/heads/develop", None, [f"develop-{SHA}", "develop-0123456", "develop-latest"]),
        ("refs/heads/feat/Größe #7", None, [f"feat-Gr-e-7-{SHA}", "feat-Gr-e-7-0123456"]),
        ("refs/pull/12/merge", 12, [f"pr-12-{SHA}", "pr-12-0123456", "pr-12"]),
    ],
)
def test_tags(ref, number, expected):
    assert build_tags(ref, SHA, number, moving=True) == expected
    still = build_tags(ref, SHA, number)
    assert still == expected[:2] and not any(t.endswith("latest") for t in still)


def test_a_tag_is_never_longer_than_a_registry_takes():
    assert len(build_tags("refs/heads/" + "x" * 300, SHA)[0]) <= 128
    assert to_tag_part("-.a.-") == "a"
    with pytest.raises(ValueError, match="nothing in it"):
        to_tag_part("äöü")


@pytest.mark.parametrize(
    "words",
    [
        ["--ref", "refs/heads/main", "--sha", "0123"],
        ["--ref", "refs/tags/v1", "--sha", SHA],
        ["--ref", "refs/heads/main", "--sha", SHA.upper()],
    ],
)
def test_what_names_no_image_is_refused(words, capsys):
    assert tag(words) == 1
    assert "expected" in capsys.readouterr().err


def test_what_the_image_copies_is_known_to_the_detection():
    lines = Path("Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--" not in line]
    for name in (name for names in copied for name in names if Path(name).is_file()):
        if not name.endswith(("README.md", "LICENSE")):
            assert find_affected([name]) == ALL, name


def test_no_secret_of_a_checkout_gets_into_an_image():
    lines = Path(".dockerignore").read_text().split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"  # nothing, and then
    let_in = {rule[1:].split("/")[0] for rule in rules if rule.startswith("!")}
    assert not let_in & {"config", ".env", ".git", "secrets", "lake", ".aws"}
    inside = [name for name in let_in if Path(name).is_dir() and name != "deploy"]
    assert set(inside) == {"hm_reco", "nbs", "reports", "runner"}


def test_the_workflow_of_argo_is_the_graph():
    made = build_manifests(load_pipeline())
    assert {name: Path(file).read_text() for name, file in MANIFEST_FILES.items()} == made


def test_a_schedule_is_the_callers():
    told = CliRunner().invoke(app, ["manifests", "argo", "--schedule", "15 4 * * 1"])
    template, cron = yaml.safe_load_all(told.stdout)
    assert cron["spec"]["schedules"] == ["15 4 * * 1"]
    assert (
        cron["spec"]["workflowSpec"]["workflowTemplateRef"]["name"] == template["metadata"]["name"]
    )
    after = {task["name"]: task.get("dependencies", []) for task in _dag(template)}
    assert after == {name: [*stage.after] for name, stage in load_pipeline().items()}


def _dag(template):
    return template["spec"]["templates"][0]["dag"]["tasks"]


def test_roles_may_do_nothing_to_everything():
    for path in sorted(Path("deploy/aws").glob("*-policy.json")):
        for statement in json.loads(path.read_text())["Statement"]:
            if statement["Effect"] == "Allow":
                actions = statement["Action"]
                assert not any(
                    "*" in a for a in ([actions] if isinstance(actions, str) else actions)
                )
                assert statement["Resource"] != "*" or actions == "ecr:GetAuthorizationToken"


def test_components_are_the_stages():
    assert list(list_components()) == ALL


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nbs/lake/01_storage.ipynb", ALL),
        ("hm_reco/lake/storage.py", ALL),
        ("nbs/ranking/02_forest.ipynb", ["training", "inference"]),
        ("hm_reco/reporting/data_drift.py", ["eda"]),
        ("nbs/api/03_model_manager.ipynb", ["inference"]),
        ("nbs/stages/10_ingestion.ipynb", ["ingestion"]),
        ("runner/cli/run.py", ALL),
        ("requirements.lock", ALL),
        ("Dockerfile", ALL),
        ("deploy/entrypoint.sh", ALL),
        ("hm_reco/api/warm_up.py", ALL),
        ("deploy/tag.py", []),
        ("nobody/knows.it", ALL),
        ("nbs/reporting/99_removed.ipynb", ALL),
        ("docs/tutorial.md", []),
        ("README.md", []),
        ("tests/test_cli.py", []),
        ("hm_reco/_modidx.py", []),
    ],
)
def test_what_a_file_touches(path, expected):
    assert find_affected([path]) == expected


def test_several_files_touch_each_their_own():
    assert find_affected(["nbs/reporting/06_baskets.ipynb", "nbs/api/03_model_manager.ipynb"]) == [
        "eda",
        "inference",
    ]
    assert find_affected([]) == []


def git(folder: Path, *words: str) -> str:
    named = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *named, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_changes_are_counted_from_where_the_two_parted(tmp_path):
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    for name, branch in (("a", ""), ("b", "topic"), ("c", "main")):
        if branch:
            git(tmp_path, "checkout", "--quiet", *(["-b"] if branch == "topic" else []), branch)
        (tmp_path / f"{name} ü.txt").write_text(name)
        git(tmp_path, "add", "--all")
        git(tmp_path, "commit", "--quiet", "--message", name)
    assert list_changed_files("main", "topic", tmp_path) == ["b ü.txt"]
    assert list_changed_files(NO_BASE, "topic", tmp_path) is None
    with pytest.raises(DetectionError, match="cannot compare"):
        list_changed_files("f" * 40, "topic", tmp_path)


def test_a_failed_detection_is_no_empty_list(capsys):
    assert changed(["--base", "f" * 40]) == 1
    assert capsys.readouterr().out == ""
    assert changed(["--base", NO_BASE]) == 0
    assert json.loads(capsys.readouterr().out) == ALL


def test_detection_needs_python_alone(tmp_path):
    command = [sys.executable, "-S", "-I", "-c"]
    code = f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); from deploy.changed_components import main"
    words = ["--base", NO_BASE]
    done = subprocess.run(
        [*command, f"{code}; sys.exit(main({words!r}))"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ALL


OVERLAY = """# who may change this: the delivery of hm-reco
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
    bare, first = tmp_path / "gitops.git", tmp_path / "first"
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch", "main", str(bare))
    git(tmp_path, "clone", "--quiet", str(bare), str(first))
    for name in ("staging", "production"):
        file = first / APP / "overlays" / name / "kustomization.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(OVERLAY)
    git(first, "add", "--all")
    git(first, "commit", "--quiet", "--message", "first")
    git(first, "push", "--quiet", "origin", "HEAD:main")
    return bare


def words(repository: Path, overlay: str, digest: str = DIGEST, *more: str) -> list[str]:
    told = ["set", "--repository", str(repository), "--app", APP, "--overlay", overlay]
    told += ["--image", IMAGE, "--digest", digest, "--tag", f"main-{SHA}"]
    return [*told, "--note", "MAP@12 0.0446", *more]


def shown(repository: Path, overlay: str, branch: str = "main") -> str:
    return git(repository, "show", f"{branch}:{APP}/overlays/{overlay}/kustomization.yaml")


def test_an_overlay_gets_the_digest_and_keeps_the_rest(repository, capsys):
    assert tell(words(repository, "staging")) == 0
    text = shown(repository, "staging")
    content = YAML(typ="safe").load(text)
    assert content["images"] == [
        {"name": "sidecar", "newTag": "1.0"},
        {"name": "ml-fashion-recommender/inference", "newName": IMAGE, "digest": DIGEST},
    ]
    assert text.startswith("# who may change this") and f"# main-{SHA}" in text
    assert shown(repository, "production") == OVERLAY.strip()
    message = git(repository, "log", "-1", "--format=%B", "main")
    assert message.startswith(f"deploy(inference): main-{SHA}") and "MAP@12 0.0446" in message
    capsys.readouterr()
    assert tell(words(repository, "staging")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert git(repository, "rev-list", "--count", "main") == "2"


def test_a_push_in_between_is_kept(repository, tmp_path, monkeypatch):
    real, calls = gitops.push, []

    def late(clone: Path, branch: str, force: bool = False) -> bool:
        calls.append(branch)
        if len(calls) == 1:  # another delivery is faster
            assert publish_change(str(repository), "main", other, "another") != ""
        return real(clone, branch, force)

    def other(clone: Path) -> None:
        file = clone / APP / "overlays" / "production" / "kustomization.yaml"
        set_image(file, "ml-fashion-recommender/inference", IMAGE, OTHER)

    monkeypatch.setattr(gitops, "push", late)
    assert tell(words(repository, "staging")) == 0
    assert len(calls) == 3  # ours refused, the other one, ours again
    assert DIGEST in shown(repository, "staging") and OTHER in shown(repository, "production")
    assert git(repository, "rev-list", "--count", "main") == "3"


def test_it_gives_up_when_others_never_stop(repository, monkeypatch):
    monkeypatch.setattr(gitops, "push", lambda *_, **__: False)

    def change(clone: Path) -> None:
        (clone / "new").write_text("x")

    with pytest.raises(GitOpsError, match=f"others pushed {MAX_ATTEMPTS} times"):
        publish_change(str(repository), "main", change, "m", pause_seconds=0)


def test_production_goes_to_a_branch_for_a_pull_request(repository):
    assert tell(words(repository, "production", DIGEST, "--onto", "deploy/inference")) == 0
    assert shown(repository, "production") == OVERLAY.strip()
    assert DIGEST in shown(repository, "production", "deploy/inference")
    assert tell(words(repository, "production", OTHER, "--onto", "deploy/inference")) == 0
    assert OTHER in shown(repository, "production", "deploy/inference")


def test_a_preview_comes_and_goes(repository):
    assert tell(words(repository, "pr-12")) == 0
    content = YAML(typ="safe").load(shown(repository, "pr-12"))
    assert content["resources"] == ["../staging"] and content["nameSuffix"] == "-pr-12"
    assert content["images"][0]["digest"] == DIGEST
    remove = ["remove", "--repository", str(repository), "--app", APP, "--overlay"]
    assert tell([*remove, "pr-12"]) == 0
    assert "pr-12" not in git(repository, "ls-tree", "-r", "--name-only", "main")
    assert tell([*remove, "pr-12"]) == 0  # once more: nothing to do
    assert tell([*remove, "staging"]) == 1
    assert DIGEST not in shown(repository, "staging")


@pytest.mark.parametrize(
    ("overlay", "digest", "message"),
    [
        ("staging", "latest", "expected sha256:"),
        ("elsewhere", DIGEST, "no file kustomization.yaml"),
    ],
)
def test_what_makes_no_sense_is_refused(repository, overlay, digest, message, capsys):
    assert tell(words(repository, overlay, digest)) == 1
    assert message in capsys.readouterr().err
    assert git(repository, "rev-list", "--count", "main") == "1"


@pytest.mark.parametrize("content", ["[1, 2", "- a list"])
def test_a_kustomization_that_is_none_is_refused(tmp_path, content):
    file = tmp_path / "kustomization.yaml"
    file.write_text(content)
    with pytest.raises(GitOpsError, match=r"kustomization.yaml"):
        set_image(file, "x", IMAGE, DIGEST)
    assert file.read_text() == content


def test_the_token_is_in_no_message_and_no_command(repository, monkeypatch, capsys):
    monkeypatch.setenv("GITOPS_REPO_TOKEN", "canary-7f3a")
    seen: list[list[str]] = []
    real = subprocess.run

    def spy(command, **options):
        seen.append(list(map(str, command)))
        assert "GITOPS_REPO_TOKEN" not in options["env"]
        return real(command, **options)

    monkeypatch.setattr(gitops.subprocess, "run", spy)
    assert tell(words(Path("/no/such/place"), "staging")) == 1
    told = capsys.readouterr()
    assert "canary-7f3a" not in told.err + told.out + str(seen)
