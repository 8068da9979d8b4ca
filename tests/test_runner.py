"""What a stage leaves, when it runs again, and that its state is that of its process."""

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
from tests.toys import MANIFEST, job, run_toys, toy

CGROUP = Path("/sys/fs/cgroup/memory")


def test_a_stage_leaves_notebook_report_manifest_and_ledger(tmp_path, lake: Lake):
    [entry] = run_toys(lake, job(toy(tmp_path), "r1", rate="0.7", article="0000000001"))
    assert entry.state == "succeeded"
    assert entry.metrics == {"article": "0000000001", "rate": 0.7, "twice": 1.4}
    assert entry.peak_memory_mb > 10 and entry.seconds > 0 and entry.cpu_seconds > 0.1

    executed = nbformat.read(lake.path(entry.notebook), as_version=4)
    injected = [c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert 'article = "0000000001"' in injected[0].source
    page = lake.path(entry.report).read_text()
    assert "to the end" in page and "A stage for tests." in page and "write_manifest" not in page
    assert "<td>rate</td><td>0.7</td><td>-p</td>" in page
    assert "<td>kind</td><td>binary</td><td>notebook</td>" in page
    assert "r1/index.html" in lake.path("reports", "index.html").read_text()
    run = lake.path("reports", "r1", "index.html").read_text()
    assert "hm reproduce r1" in run and "toy.html" in run and "twice" in run

    [row] = read_runs(lake)
    assert row == entry and len(row.git_commit) >= 7
    manifest = json.loads(lake.path("runs", "r1", "toy.json").read_text())
    assert manifest["cache_key"] == entry.cache_key and manifest["parameters"]["rate"] == 0.7
    assert list(lake.path("runs").rglob("*.part")) == []


# what a notebook does -> the ledger's state and cause
ENDS = {
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


@pytest.mark.parametrize("end", ENDS)
def test_the_state_is_that_of_the_process(tmp_path, lake: Lake, end):
    body, state, cause = ENDS[end]
    [entry] = run_toys(lake, job(toy(tmp_path, body), "r1"))
    assert (entry.state, read_runs(lake)[0].state) == (state, state)
    assert cause in entry.error
    first = nbformat.read(lake.path(entry.notebook), as_version=4).cells[0].source
    assert f"did not succeed: {state}" in first and cause in first
    page = lake.path(entry.report).read_text()
    assert f"did not succeed: {state}" in page and "<b>sour</b>" not in page
    assert "hm run" not in page and state in lake.path("reports", "index.html").read_text()


def test_a_stage_that_takes_too_long_is_ended(tmp_path, lake: Lake):
    body = "import subprocess\nsubprocess.run(['sleep', '600.25'])"
    [entry] = run_toys(lake, job(toy(tmp_path, body, timeout=3), "r1"))
    assert entry.state == "timeout" and "time limit of 3 s" in entry.error
    assert 3 < entry.seconds < 60
    assert subprocess.run(["pgrep", "-f", "sleep 600.25"], check=False).returncode == 1


def test_running_out_of_memory_is_told_from_a_kill(tmp_path, lake: Lake):
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
        [entry] = run_toys(lake, job(toy(tmp_path, body), "r1"))
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()
    assert entry.state == "killed" and entry.error.startswith("out of memory")


def test_a_full_disk_is_recorded_and_the_next_run_succeeds(tmp_path, small_disk):
    lake = open_lake(str(small_disk / "lake"))
    fill = f"import os\nwith open('{small_disk}/fill', 'wb') as f:\n    f.write(bytes(50_000_000))"
    [entry] = run_toys(lake, job(toy(tmp_path, fill), "r1"))
    assert entry.state == "failed" and "No space left on device" in entry.error
    assert read_runs(lake)[0].state == "failed" and lake.path(entry.notebook).is_file()
    (small_disk / "fill").unlink()
    [entry] = run_toys(lake, job(toy(tmp_path), "r2"))
    assert entry.state == "succeeded" and lake.path("runs", "reserve").is_file()


def test_retries_only_where_declared(tmp_path, lake: Lake):
    mark = tmp_path / "mark"
    body = f"from pathlib import Path\nmark = Path('{mark}')\n"
    body += "if not mark.exists():\n    mark.touch()\n    raise ValueError('first time')\n"
    [entry] = run_toys(lake, job(toy(tmp_path, body + MANIFEST), "r1"))
    assert (entry.state, entry.attempt) == ("failed", 1)
    mark.unlink()
    [entry] = run_toys(lake, job(toy(tmp_path, body + MANIFEST, retries=1), "r2"))
    assert (entry.state, entry.attempt) == ("succeeded", 2)
    assert [(e.run_id, e.state) for e in read_runs(lake)] == [
        ("r1", "failed"),
        ("r2", "succeeded"),
    ]


def test_a_named_run_goes_on(tmp_path, lake: Lake):
    """As containers do, one a stage, with one that is tried again."""
    mark = tmp_path / "mark"
    body = f"from pathlib import Path\nmark = Path('{mark}')\n"
    body += "if not mark.exists():\n    mark.touch()\n    raise ValueError('first time')\n"
    first = toy(tmp_path, MANIFEST.replace('"toy"', '"first"'), name="first")
    second = toy(tmp_path, body + MANIFEST.replace('"toy"', '"second"'), name="second")
    run_toys(lake, job(first, "night-1"))
    note = lake.path("runs", "night-1", "run.json").read_text()
    for state in ("failed", "succeeded"):
        assert [e.state for e in run_toys(lake, job(second, "night-1"))] == [state]
    assert [(e.run_id, e.stage, e.state) for e in read_runs(lake)] == [
        ("night-1", "first", "succeeded"),
        ("night-1", "second", "succeeded"),
    ]
    page = lake.path("reports", "night-1", "index.html").read_text()
    assert "first.html" in page and "second.html" in page
    assert lake.path("runs", "night-1", "run.json").read_text() == note
    assert validate_run_id("night-1") == "night-1"
    for name in ("../up", "Night", "", "a" * 64, "-x"):
        with pytest.raises(ValueError, match="expected small letters"):
            validate_run_id(name)


def test_independent_stages_run_side_by_side_and_failures_stop_only_what_follows(tmp_path, lake):
    def meets(name: str) -> Stage:
        """A stage that waits till both are there."""
        body = f"import time\nfrom pathlib import Path\nplace = Path({str(tmp_path)!r})\n"
        body += f"(place / '{name}.here').touch()\nend = time.time() + 60\n"
        body += "while len(list(place.glob('*.here'))) < 2:\n"
        body += "    assert time.time() < end, 'nobody came'\n    time.sleep(0.05)\n"
        return toy(tmp_path, body + MANIFEST.replace('"toy"', f'"{name}"'), name=name)

    one, two = meets("one"), meets("two")
    bad = toy(tmp_path, "1 / 0", name="bad")
    after = toy(tmp_path, name="after", after=("bad",))
    last = toy(tmp_path, name="last", after=("after",))
    jobs = [job(stage, "r1") for stage in (one, two, bad, after, last)]
    entries = {e.stage: e for e in run_toys(lake, *jobs)}
    assert entries["one"].state == entries["two"].state == "succeeded"
    assert entries["bad"].state == "failed" and not {"after", "last"} & entries.keys()
    with pytest.raises(StageError, match=r"'bad' failed: ZeroDivisionError[\s\S]*bad\.ipynb"):
        run_jobs(lake, [job(bad, "r2")], RunDisplay(Console(), quiet=True), get_library_hooks())


def test_what_has_not_changed_is_not_run_again(tmp_path, lake: Lake):
    stage = toy(tmp_path)
    assert [e.state for e in run_toys(lake, job(stage, "r1"))] == ["succeeded"]
    [again] = run_toys(lake, job(stage, "r2"))
    assert again.state == "cached" and "r1" in again.error
    assert len(read_runs(lake)) == 1  # a run in which nothing ran leaves nothing
    assert [e.state for e in run_toys(lake, job(stage, "r3"), force=True)] == ["succeeded"]

    def why(stage, **given):
        todo = job(stage, **given)
        values, entries = todo.parameters.values, read_runs(lake)
        return decide(
            read_published(lake), stage, values, entries, get_library_hooks().fingerprint
        ).reason

    assert why(stage) == "unchanged"
    assert why(stage, rate="0.2") == "rate: 0.1 → 0.2"
    assert why(toy(tmp_path, name="new")) == "it never ran here"
    (tmp_path / "more").mkdir()
    more = toy(tmp_path / "more", MANIFEST + "# more")
    assert why(more) == "notebook changed"
    record(lake, StageRun("r9", "new", {}, "abc", "killed"))
    assert why(toy(tmp_path, name="new")) == "its last run was killed"


def test_sources_and_tables_belong_to_what_must_not_change(tmp_path, lake: Lake):
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
    stage = toy(tmp_path, body, name="ingestion")
    states = lambda: [e.state for e in run_toys(lake, job(stage))]  # noqa: E731
    assert (states(), states()) == (["succeeded"], ["cached"])
    (data / "a.csv").write_text("2 is more")
    assert (states(), states()) == (["succeeded"], ["cached"])
    other = job(stage, rate="0.9")  # writes the same table, so the first run's is not there now
    assert [e.state for e in run_toys(lake, other)] == ["succeeded"]
    assert states() == ["succeeded"]


def test_the_key_follows_the_library_that_a_notebook_imports(tmp_path, monkeypatch):
    key = compute_cache_key(toy(tmp_path), {"rate": 1, "lake": "x", "run_id": "y"})
    assert {"hm_reco.lake.storage", "hm_reco.lake.settings"} <= key["library"].keys()
    assert key["parameters"] == {"rate": 1} and "hm_reco.ranking.ranker" not in key["library"]
    magic = (
        "!ls\nfrom hm_reco.ranking.ranker import train\nfrom hm_reco.stages.demo import demo_lake"
    )
    (tmp_path / "magic").mkdir()
    key = compute_cache_key(toy(tmp_path / "magic", magic), {})
    assert "hm_reco.ranking.ranker" in key["library"] and "hm_reco.lake.storage" in key["library"]
    assert not any(name.startswith("hm_reco.stages") for name in key["library"])


def test_the_board_tells_on_a_terminal_and_in_a_log(tmp_path, lake: Lake):
    log = Console(record=True, file=open(os.devnull, "w"), width=120)  # noqa: SIM115, PTH123
    body = "from hm_reco.lake.progress import track\nimport time\n"
    body += "for i in track(range(3), 'weeks'):\n    time.sleep(1.1)\nprint('milk')\n"
    stage = toy(tmp_path, body + MANIFEST)
    run_jobs(lake, [job(stage, "r1")], RunDisplay(log, verbose=True), get_library_hooks())
    text = log.export_text()
    assert "toy         started: it never ran here" in text and "toy | milk" in text
    assert "toy         succeeded" in text and "weeks: 2 of 3" in text
    assert "\r" not in text

    terminal = Console(record=True, file=open(os.devnull, "w"), width=120, force_terminal=True)  # noqa: SIM115, PTH123
    board = RunDisplay(terminal)
    seen: list[str] = []
    tick = board.refresh

    def look() -> None:
        tick()
        with terminal.capture() as capture:
            terminal.print(board._build_table())
        seen.append(capture.get())

    board.refresh = look  # type: ignore[method-assign]
    run_jobs(lake, [job(stage, "r2")], board, get_library_hooks(), force=True)
    assert any("cell 6/7" in s and "Run" in s and "weeks: " in s for s in seen), seen[-1]
    quiet = Console(record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    run_jobs(lake, [job(stage, "r3")], RunDisplay(quiet, quiet=True), get_library_hooks())
    assert quiet.export_text() == ""


def test_the_ledger_shows_the_last_state(lake: Lake):
    assert read_runs(lake) == []
    entry = StageRun("r1", "toy", {"a": 1}, "abc")
    record(lake, entry)
    assert read_runs(lake) == [entry]
    entry.state, entry.attempt = "failed", 2
    time.sleep(0.01)
    record(lake, entry)
    assert [(e.state, e.parameters) for e in read_runs(lake)] == [("failed", {"a": 1})]


def test_a_repetition_takes_the_recorded_commit_where_the_checkout_differs(capsys):
    root = find_project_root()
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not head:
        pytest.skip("needs a git checkout")
    board = RunDisplay(Console(width=200))
    key = compute_cache_key(load_pipeline()["eda"], {})
    with checkout_code([StageRun("r1", "eda", {}, head, cache_key=key)], board) as folder:
        assert folder == root
    changed = StageRun("r1", "eda", {}, f"{head}+changes", cache_key=key | {"notebook": "another"})
    with checkout_code([changed], board) as folder:
        assert folder != root and (folder / "nbs" / "stages" / "30_eda.ipynb").is_file()
    unknown = StageRun("r1", "eda", {}, "0" * 40, cache_key={})
    with checkout_code([unknown], board) as folder:
        assert folder == root
    said = capsys.readouterr().out
    assert f"reproducing with commit {head}; it had uncommitted changes" in said
    assert f"no commit {'0' * 40} here; reproducing with the present code" in said


def test_the_commit_is_known_from_the_image_and_unknown_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GIT_SHA", raising=False)
    assert get_git_commit(tmp_path) == "unknown"
    monkeypatch.setenv("GIT_SHA", "0123abc")
    assert get_git_commit(tmp_path) == "0123abc"
