"""Create a new stage: a working notebook, its graph entry and its test."""

import keyword
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Template

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from runner.backends import MANIFEST_BACKENDS
from runner.deployment import build_manifests, write_manifest_file
from runner.graph import (
    PIPELINE_FILE,
    PipelineError,
    find_project_root,
    load_pipeline,
    select_stages,
)

FENCED_CODE = re.compile(r"^```python *(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]{1,40}")


def _fill_template(template: str, name: str) -> str:
    text = files("runner").joinpath(template).read_text(encoding="utf-8")
    return Template(text).substitute(name=name, title=name.replace("_", " ").capitalize())


def _parse_cells(text: str) -> Iterator[nbformat.NotebookNode]:
    """Convert prose and fenced code to cells; the word after `python` is a tag."""
    position = 0
    for block in FENCED_CODE.finditer(text):
        if prose := text[position : block.start()].strip():
            yield new_markdown_cell(prose)
        yield new_code_cell(block[2].strip(), metadata={"tags": [block[1]]} if block[1] else {})
        position = block.end()


def _check_name(name: str, root: Path) -> None:
    """Check the name of a new stage; raises `PipelineError` if invalid or outside a clone."""
    if not NAME_PATTERN.fullmatch(name) or keyword.iskeyword(name):
        expected = "lower-case letters, digits and _, such as price_watch (a module's name)"
        raise PipelineError(f"stage name {name!r}: expected {expected}")
    if name in load_pipeline() or list((root / "nbs").rglob(f"[0-9]*_{name}.ipynb")):
        raise PipelineError(f"stage name {name!r}: it exists already; hm plan lists the stages")
    needed = (
        root / "nbs" / "stages",
        *((root / backend.path).parent for backend in MANIFEST_BACKENDS.values()),
    )
    if not all(folder.is_dir() for folder in needed) or not PIPELINE_FILE.is_relative_to(root):
        raise PipelineError(f"{root} is not a clone of the project; a new stage needs one")
    if not Path(sys.executable).with_name("nbdev-export").exists():
        raise PipelineError("nbdev is not installed (it exports notebooks): make .installed")


def _build_notebook(name: str, folder: Path) -> nbformat.NotebookNode:
    """Build and execute the notebook."""
    kernelspec = {"display_name": "python3", "language": "python", "name": "python3"}
    cells = list(_parse_cells(_fill_template("new_stage.md", name)))
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernelspec})
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, kernel_name="python3", resources=resources).execute()


def new_stage(name: str, after: str) -> list[Path]:
    """Write a stage's notebook, its test, its graph entry and its module; returns the files.

    Raises `PipelineError` before it writes any file.
    """
    root = find_project_root()
    _check_name(name, root)
    select_stages(load_pipeline(), [after])
    folder = root / "nbs" / "stages"
    last_number = max(int(path.name[:2]) for path in folder.glob("[0-9][0-9]_*.ipynb"))
    notebook = folder / f"{min(last_number // 10 * 10 + 10, 99)}_{name}.ipynb"
    nbformat.write(_build_notebook(name, folder), notebook)
    test = root / "tests" / f"test_{name}.py"
    test.write_text(_fill_template("new_stage_test.txt", name), encoding="utf-8")
    notebook_path = notebook.relative_to(root).as_posix()
    graph_entry = (
        f"  {name}:\n    notebook: {notebook_path}\n    after: [{after}]\n"
        "    headline: {units: units}\n"
    )
    pipeline_text = PIPELINE_FILE.read_text(encoding="utf-8").rstrip("\n")
    PIPELINE_FILE.write_text(f"{pipeline_text}\n{graph_entry}", encoding="utf-8")
    # the order of the imports depends on the name
    sort_imports = ["ruff", "check", "--fix", "--quiet", str(test)]
    for tool, *arguments in (["nbdev-export"], ["nbdev-clean"], sort_imports):
        command = [str(Path(sys.executable).with_name(tool)), *arguments]
        subprocess.run(command, check=True, cwd=root)
    module = root / "hm_reco" / "stages" / f"{name}.py"
    written = [
        write_manifest_file(*manifest) for manifest in build_manifests(load_pipeline()).items()
    ]
    return [notebook, test, PIPELINE_FILE, module, *written]
