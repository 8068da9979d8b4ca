"""The library equals the export of the notebooks, and the notebooks are clean."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("nbs", "hm_reco")
        for path in sorted((folder / name).rglob("*"))
        if path.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in path.parts
    }


def test_export_and_clean_leave_no_diff(tmp_path):
    for name in ("nbs", "hm_reco"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=tmp_path, check=True)
    before, after = read_files(ROOT), read_files(tmp_path)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
