"""The runner: outputs of a stage, caching, states, display, reproduction."""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

from hm_reco.lake.runs import StageRun, get_git_commit, read_runs, record, validate_run_id
from hm_reco.lake.storage import Lake, open_lake, read_published
from runner.cache import compute_cache_key, decide
from runner.cli.options import get_library_hooks
from runner.display import RunDisplay
from runner.graph import Stage, find_project_root, load_pipeline
from runner.rerun import checkout_code
from runner.scheduler import StageError, run_jobs
from tests.toy_pipeline import MANIFEST, build_job, build_toy_stage, run_toy_jobs

CGROUP = Path("/sys/fs/cgroup/memory")


def test_stage_leaves_notebook_report_manifest_and_stage_run(tmp_path, lake: Lake):
    [stage_run] = run_toy_jobs(
        lake, build_job(build_toy_stage(tmp_path), "r1", rate="0.7", article="0000000001")
    )
    assert stage_run.state == "succeeded"
    assert stage_run.metrics == {"article": "0000000001", "rate": 0.7, "twice": 1.4}
    assert stage_run.peak_memory_mb > 10 and stage_run.seconds > 0 and stage_run.cpu_seconds > 0.1

    executed = nbformat.read(lake.path(stage_run.notebook), as_version=4)
    injected = [c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert 'article = "0000000001"' in injected[0].source
    page = lake.path(stage_run.report).read_text()
    assert "to the end" in page and "A stage for tests." in page and "write_manifest" not in page
    assert "<td>rate</td><td>0.7</td><td>-p</td>" in page
    assert "<td>kind</td><td>binary</td><td>notebook</td>" in page
    assert "r1/index.html" in lake.path("reports", "index.html").read_text()
    run = lake.path("reports", "r1", "index.html").read_text()
    assert "hm reproduce r1" in run and "toy.html" in run and "twice" in run

    [row] = read_runs(lake)
    assert row == stage_run and len(row.git_commit) >= 7
    manifest = json.loads(lake.path("runs", "r1", "toy.json").read_text())
    assert manifest["cache_key"] == stage_run.cache_key and manifest["parameters"]["rate"] == 0.7
    assert list(lake.path("runs").rglob("*.part")) == []


# what a notebook does -> state and cause in the run store
EXIT_CASES = {
    "an error": ("raise ValueError('the milk is <b>sour</b>')", "failed", "ValueError: the milk"),
    "a failing command": ("!exit 3", "failed", "CalledProcessError: Command 'exit 3'"),
    "its output": ("lines = !ls /no/such", "failed", "CalledProcessError: Command 'ls"),
    "sys.exit": ("import sys\nsys.exit(3)", "failed", "SystemExit: 3"),
    "sys.exit(0)": ("import sys\nsys.exit(0)", "failed", "without calling write_manifest"),
    "no manifest": ("pass", "failed", "without calling write_manifest"),
    "kill -9": ("import os\nos.kill(os.getpid(), 9)", "killed", "killed by SIGKILL, its memory"),
    "SIGTERM": ("import os\nos.kill(os.getpid(), 15)", "killed", "killed by SIGTERM"),
    "os._exit": ("import os\nos._exit(3)", "killed", "ended by itself with exit code 3"),
    "a native crash": ("import ctypes\nctypes.string_at(0)", "killed", "killed by SIGSEGV"),
}


@pytest.mark.parametrize("exit_case", EXIT_CASES)
def test_stage_state_matches_process_exit(tmp_path, lake: Lake, exit_case):
    body, state, cause = EXIT_CASES[exit_case]
    [stage_run] = run_toy_jobs(lake, build_job(build_toy_stage(tmp_path, body), "r1"))
    assert (stage_run.state, read_runs(lake)[0].state) == (state, state)
    assert cause in stage_run.error
    first = nbformat.read(lake.path(stage_run.notebook), as_version=4).cells[0].source
    assert f"did not succeed: {state}" in first and cause in first
    page = lake.path(stage_run.report).read_text()
    assert f"did not succeed: {state}" in page and "<b>sour</b>" not in page
    assert "hm run" not in page and state in lake.path("reports", "index.html").read_text()


def test_stage_beyond_time_limit_is_stopped(tmp_path, lake: Lake):
    body = "import subprocess\nsubprocess.run(['sleep', '600.25'])"
    [stage_run] = run_toy_jobs(lake, build_job(build_toy_stage(tmp_path, body, timeout=3), "r1"))
    assert stage_run.state == "timeout" and "time limit of 3 s" in stage_run.error
    assert 3 < stage_run.seconds < 60
    assert subprocess.run(["pgrep", "-f", "sleep 600.25"], check=False).returncode == 1


def test_out_of_memory_is_distinguished_from_kill(tmp_path, lake: Lake):
    group = CGROUP / f"hm-reco-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("300000000")
    except OSError:
        pytest.skip("needs a memory cgroup that may be written to")
    body = (
        f"import os\nopen('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "blocks = [bytearray(10_000_000) for _ in range(100)]"
    )
    try:
        [stage_run] = run_toy_jobs(lake, build_job(build_toy_stage(tmp_path, body), "r1"))
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()
    assert stage_run.state == "killed" and stage_run.error.startswith("out of memory")


def test_full_disk_is_recorded_and_next_run_succeeds(tmp_path, small_disk):
    lake = open_lake(str(small_disk / "lake"))
    fill = f"import os\nwith open('{small_disk}/fill', 'wb') as f:\n    f.write(bytes(50_000_000))"
    [stage_run] = run_toy_jobs(lake, build_job(build_toy_stage(tmp_path, fill), "r1"))
    assert stage_run.state == "failed" and "No space left on device" in stage_run.error
    assert read_runs(lake)[0].state == "failed" and lake.path(stage_run.notebook).is_file()
    (small_disk / "fill").unlink()
    [stage_run] = run_toy_jobs(lake, build_job(build_toy_stage(tmp_path), "r2"))
    assert stage_run.state == "succeeded" and lake.path("runs", "reserve").is_file()


def test_retries_only_where_declared(tmp_path, lake: Lake):
    marker = tmp_path / "mark"
    body = f"from pathlib import Path\nmark = Path('{marker}')\n"
    body += "if not mark.exists():\n    mark.touch()\n    raise ValueError('first time')\n"
    [stage_run] = run_toy_jobs(lake, build_job(build_toy_stage(tmp_path, body + MANIFEST), "r1"))
    assert (stage_run.state, stage_run.attempt) == ("failed", 1)
    marker.unlink()
    [stage_run] = run_toy_jobs(
        lake, build_job(build_toy_stage(tmp_path, body + MANIFEST, retries=1), "r2")
    )
    assert (stage_run.state, stage_run.attempt) == ("succeeded", 2)
    assert [(e.run_id, e.state) for e in read_runs(lake)] == [
        ("r1", "failed"),
        ("r2", "succeeded"),
    ]


def test_named_run_continues_in_next_process(tmp_path, lake: Lake):
    """One process per stage, as containers do, with one retry."""
    marker = tmp_path / "mark"
    body = f"from pathlib import Path\nmark = Path('{marker}')\n"
    body += "if not mark.exists():\n    mark.touch()\n    raise ValueError('first time')\n"
    first = build_toy_stage(tmp_path, MANIFEST.replace('"toy"', '"first"'), name="first")
    second = build_toy_stage(tmp_path, body + MANIFEST.replace('"toy"', '"second"'), name="second")
    run_toy_jobs(lake, build_job(first, "night-1"))
    run_record = lake.path("runs", "night-1", "run.json").read_text()
    for state in ("failed", "succeeded"):
        assert [e.state for e in run_toy_jobs(lake, build_job(second, "night-1"))] == [state]
    assert [(e.run_id, e.stage, e.state) for e in read_runs(lake)] == [
        ("night-1", "first", "succeeded"),
        ("night-1", "second", "succeeded"),
    ]
    page = lake.path("reports", "night-1", "index.html").read_text()
    assert "first.html" in page and "second.html" in page
    assert lake.path("runs", "night-1", "run.json").read_text() == run_record
    assert validate_run_id("night-1") == "night-1"
    for name in ("../up", "Night", "", "a" * 64, "-x"):
        with pytest.raises(ValueError, match="expected lower-case letters"):
            validate_run_id(name)


def test_scheduler_runs_in_parallel_and_failure_stops_dependents(tmp_path, lake):
    def build_waiting_stage(name: str) -> Stage:
        """A stage that waits until both stages run."""
        body = f"import time\nfrom pathlib import Path\nplace = Path({str(tmp_path)!r})\n"
        body += f"(place / '{name}.here').touch()\nend = time.time() + 60\n"
        body += "while len(list(place.glob('*.here'))) < 2:\n"
        body += "    assert time.time() < end, 'no other stage'\n    time.sleep(0.05)\n"
        return build_toy_stage(tmp_path, body + MANIFEST.replace('"toy"', f'"{name}"'), name=name)

    first, second = build_waiting_stage("one"), build_waiting_stage("two")
    failing = build_toy_stage(tmp_path, "1 / 0", name="bad")
    dependent = build_toy_stage(tmp_path, name="after", after=("bad",))
    indirect = build_toy_stage(tmp_path, name="last", after=("after",))
    jobs = [build_job(stage, "r1") for stage in (first, second, failing, dependent, indirect)]
    stage_runs = {e.stage: e for e in run_toy_jobs(lake, *jobs)}
    assert stage_runs["one"].state == stage_runs["two"].state == "succeeded"
    assert stage_runs["bad"].state == "failed" and not {"after", "last"} & stage_runs.keys()
    with pytest.raises(StageError, match=r"'bad' failed: ZeroDivisionError[\s\S]*bad\.ipynb"):
        run_jobs(
            lake, [build_job(failing, "r2")], RunDisplay(Console(), quiet=True), get_library_hooks()
        )


def test_unchanged_stage_is_cached(tmp_path, lake: Lake):
    stage = build_toy_stage(tmp_path)
    assert [e.state for e in run_toy_jobs(lake, build_job(stage, "r1"))] == ["succeeded"]
    [cached_run] = run_toy_jobs(lake, build_job(stage, "r2"))
    assert cached_run.state == "cached" and "r1" in cached_run.error
    assert len(read_runs(lake)) == 1  # a fully cached run records nothing
    assert [e.state for e in run_toy_jobs(lake, build_job(stage, "r3"), force=True)] == [
        "succeeded"
    ]

    def get_reason(stage, **assignments):
        planned_job = build_job(stage, **assignments)
        values, stage_runs = planned_job.parameters.values, read_runs(lake)
        return decide(
            read_published(lake), stage, values, stage_runs, get_library_hooks().fingerprint
        ).reason

    assert get_reason(stage) == "unchanged"
    assert get_reason(stage, rate="0.2") == "rate: 0.1 → 0.2"
    assert get_reason(build_toy_stage(tmp_path, name="new")) == "it never ran here"
    (tmp_path / "more").mkdir()
    changed_stage = build_toy_stage(tmp_path / "more", MANIFEST + "# more")
    assert get_reason(changed_stage) == "notebook changed"
    record(lake, StageRun("r9", "new", {}, "abc", "killed"))
    assert get_reason(build_toy_stage(tmp_path, name="new")) == "its last run was killed"


def test_changed_source_or_table_version_is_not_cached(tmp_path, lake: Lake):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.csv").write_text("1")
    body = "import polars as pl\nfrom hm_reco.lake.storage import open_lake\n"
    body += (
        "from hm_reco.lake.tables import write\nfrom hm_reco.lake.published import write_manifest\n"
    )
    body += "from hm_reco.data.sources import fingerprint\nhere = open_lake(lake)\n"
    body += "version = write(here, 'raw/x', pl.DataFrame({'a': [1]}))\n"
    body += f"seen = {{'{data}': fingerprint('{data}')}}\n"
    body += "write_manifest(here, run_id, 'ingestion', {}, {'raw/x': version}, {}, seen)"
    stage = build_toy_stage(tmp_path, body, name="ingestion")
    run_stage = lambda: [e.state for e in run_toy_jobs(lake, build_job(stage))]  # noqa: E731
    assert (run_stage(), run_stage()) == (["succeeded"], ["cached"])
    (data / "a.csv").write_text("2 is more")
    assert (run_stage(), run_stage()) == (["succeeded"], ["cached"])
    other_job = build_job(stage, rate="0.9")  # overwrites the table of the first run
    assert [e.state for e in run_toy_jobs(lake, other_job)] == ["succeeded"]
    assert run_stage() == ["succeeded"]


def test_cache_key_covers_imported_modules(tmp_path, monkeypatch):
    cache_key = compute_cache_key(
        build_toy_stage(tmp_path), {"rate": 1, "lake": "x", "run_id": "y"}
    )
    assert {"hm_reco.lake.storage", "hm_reco.lake.settings"} <= cache_key["library"].keys()
    assert (
        cache_key["parameters"] == {"rate": 1}
        and "hm_reco.ranking.ranker" not in cache_key["library"]
    )
    magic = (
        "!ls\nfrom hm_reco.ranking.ranker import train\nfrom hm_reco.stages.demo import demo_lake"
    )
    (tmp_path / "magic").mkdir()
    cache_key = compute_cache_key(build_toy_stage(tmp_path / "magic", magic), {})
    assert (
        "hm_reco.ranking.ranker" in cache_key["library"]
        and "hm_reco.lake.storage" in cache_key["library"]
    )
    assert not any(name.startswith("hm_reco.stages") for name in cache_key["library"])


def test_display_on_terminal_and_in_log(tmp_path, lake: Lake):
    log = Console(record=True, file=open(os.devnull, "w"), width=120)  # noqa: SIM115, PTH123
    body = "from hm_reco.lake.progress import track\nimport time\n"
    body += "for i in track(range(3), 'weeks'):\n    time.sleep(1.1)\nprint('milk')\n"
    stage = build_toy_stage(tmp_path, body + MANIFEST)
    run_jobs(lake, [build_job(stage, "r1")], RunDisplay(log, verbose=True), get_library_hooks())
    text = log.export_text()
    assert "toy         started: it never ran here" in text and "toy | milk" in text
    assert "toy         succeeded" in text and "weeks: 2 of 3" in text
    assert "\r" not in text

    terminal = Console(record=True, file=open(os.devnull, "w"), width=120, force_terminal=True)  # noqa: SIM115, PTH123
    display = RunDisplay(terminal)
    screens: list[str] = []
    refresh = display.refresh

    def capture_screen() -> None:
        refresh()
        with terminal.capture() as capture:
            terminal.print(display._build_table())
        screens.append(capture.get())

    display.refresh = capture_screen  # type: ignore[method-assign]
    run_jobs(lake, [build_job(stage, "r2")], display, get_library_hooks(), force=True)
    assert any(
        "cell 6/7" in screen and "Run" in screen and "weeks: " in screen for screen in screens
    ), screens[-1]
    quiet = Console(record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    run_jobs(lake, [build_job(stage, "r3")], RunDisplay(quiet, quiet=True), get_library_hooks())
    assert quiet.export_text() == ""


def test_run_store_returns_last_state(lake: Lake):
    assert read_runs(lake) == []
    stage_run = StageRun("r1", "toy", {"a": 1}, "abc")
    record(lake, stage_run)
    assert read_runs(lake) == [stage_run]
    stage_run.state, stage_run.attempt = "failed", 2
    time.sleep(0.01)
    record(lake, stage_run)
    assert [(e.state, e.parameters) for e in read_runs(lake)] == [("failed", {"a": 1})]


def test_reproduce_uses_recorded_commit_when_code_differs(capsys):
    root = find_project_root()
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not head:
        pytest.skip("needs a git checkout")
    display = RunDisplay(Console(width=200))
    cache_key = compute_cache_key(load_pipeline()["eda"], {})
    with checkout_code([StageRun("r1", "eda", {}, head, cache_key=cache_key)], display) as folder:
        assert folder == root
    changed = StageRun(
        "r1", "eda", {}, f"{head}+changes", cache_key=cache_key | {"notebook": "another"}
    )
    with checkout_code([changed], display) as folder:
        assert folder != root and (folder / "nbs" / "stages" / "30_eda.ipynb").is_file()
    unknown = StageRun("r1", "eda", {}, "0" * 40, cache_key={})
    with checkout_code([unknown], display) as folder:
        assert folder == root
    output = capsys.readouterr().out
    assert f"reproducing with commit {head}; it had uncommitted changes" in output
    assert f"commit {'0' * 40} not found; reproducing with the current code" in output


def test_git_commit_from_image_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GIT_SHA", raising=False)
    assert get_git_commit(tmp_path) == "unknown"
    monkeypatch.setenv("GIT_SHA", "0123abc")
    assert get_git_commit(tmp_path) == "0123abc"
