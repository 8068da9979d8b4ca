"""Build the pages of the docs site, or find dead links in the built site.

python docs/site.py pages      into build/docs, with build/docs.yml for mkdocs
python docs/site.py links      of build/site
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).parents[1]
PAGES, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"
NAV: dict[str, str | dict[str, str]] = {
    "Start": "README.md",
    "Tutorial": "docs/tutorial.md",
    "Commands": "docs/commands.md",
    "How to": {
        "Keep the lake on S3": "docs/how-to/s3.md",
        "Run on a schedule": "docs/how-to/scheduling.md",
        "Tune the model": "docs/how-to/tuning.md",
        "Promote, roll back": "docs/how-to/promoting.md",
        "Serve": "docs/how-to/serving.md",
        "Add a stage": "docs/how-to/new-stage.md",
    },
    "Delivery": {
        "Workflows": "docs/workflows/README.md",  # the section's first page
        "ci": "docs/workflows/ci.md",
        "build-and-push-ecr": "docs/workflows/build-and-push-ecr.md",
        "build-inference-gitops": "docs/workflows/build-inference-gitops.md",
        "scheduled-pipeline": "docs/workflows/scheduled-pipeline.md",
        "Containers and clusters": "docs/how-to/deploying.md",
        "Set up AWS": "deploy/aws/README.md",
    },
    "Guides": {
        "Running stages": "docs/running.md",
        "Scaling": "docs/scaling.md",
        "Data": "docs/data.md",
        "Reports": "docs/reports.md",
        "Serving": "docs/serving.md",
        "Configuration": "config/README.md",
    },
    "Background": {
        "Notebooks first": "docs/explanation/notebooks.md",
        "Time": "docs/explanation/time.md",
        "The recommender": "docs/recommender.md",
        "Measurements": "docs/explanation/measured.md",
    },
}
# the folders of nbs/, each after those that it imports
PACKAGES = (
    "lake",
    "compute",
    "data",
    "retrieval",
    "ranking",
    "registry",
    "serving",
    "api",
    "reporting",
    "stages",
    "explore",
)
LINK = re.compile(r"\]\(([^)#:\s]+)")
HREF = re.compile(r'<[a-z][^<>]*\s(?:href|src)="([^"#?]+)')
LAKE_FILE = re.compile(r"[a-z]+\.json")  # files of a lake that notebook outputs link to


def copy_page(path: Path) -> None:
    """Copy a file of the project to the same path below the pages."""
    target = PAGES / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".ipynb":
        target.write_text(json.dumps(strip_directives(json.loads(path.read_text()))))
    else:
        shutil.copyfile(path, target)


def strip_directives(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook without nbdev's directives."""
    cells = []
    for cell in notebook["cells"]:
        lines = [line for line in cell["source"] if not line.startswith("#| ")]
        if "".join(lines).strip():
            cells.append(cell | {"source": lines})
    return notebook | {"cells": cells}


def copy_guides() -> None:
    """Copy README, guides and notebooks, and the files that the guides link to."""
    root_pages = ("README.md", "CONTRIBUTING.md", "config/README.md")
    guides = [*(ROOT / name for name in root_pages), *(ROOT / "docs").rglob("*.md")]
    linked = {
        (guide.parent / target).resolve()
        for guide in guides
        for target in LINK.findall(guide.read_text())
    }
    for path in {*guides, *linked, *(ROOT / "nbs").rglob("[0-9]*.ipynb")}:
        if path.is_file() and ".ipynb_checkpoints" not in path.parts:
            copy_page(path)


def to_markdown_table(rows: list[dict[str, object]]) -> str:
    """Rows as a table in Markdown."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([str(row[name]) for name in header] for row in rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def build_stages_page() -> str:
    """The parameters of each stage, from the notebooks."""
    from runner.graph import load_pipeline
    from runner.parameters import format_type, read_parameters

    parts = ["# Parameters of the stages\n\n`hm run STAGE -p name=value`; `hm params STAGE` too."]
    for name, stage in load_pipeline().items():
        rows = [
            {
                "parameter": f"`{p.name}`",
                "type": f"`{format_type(p.annotation)}`",
                "default": f"`{p.default!r}`",
                "in a whole run": f"`{stage.parameters[p.name]!r}`"
                if p.name in stage.parameters
                else "",
                "meaning": p.help,
            }
            for p in read_parameters(stage.notebook)
        ]
        notebook = f"../{Path(stage.notebook).relative_to(ROOT)}"
        parts.append(f"## {name}\n\n[The notebook]({notebook})\n\n{to_markdown_table(rows)}")
    return "\n\n".join(parts)


def build_tables_page() -> str:
    """All tables of a lake and their columns, from a small lake."""
    from hm_reco.lake.storage import get_owner
    from hm_reco.lake.tables import list_table_names, scan
    from hm_reco.stages.demo import demo_lake

    lake, parts = (
        demo_lake("training", 300),
        ["# Tables\n\nDelta tables, by the stage that writes them."],
    )
    for name in list_table_names(lake):
        columns = scan(lake, name).collect_schema()
        rows = [{"column": f"`{column}`", "type": f"`{kind}`"} for column, kind in columns.items()]
        parts.append(
            f"## {name}\n\nWritten by {get_owner(name) or 'the runner'}.\n\n"
            f"{to_markdown_table(rows)}"
        )
    return "\n\n".join(parts)


def build_rest_page() -> str:
    """Routes and fields of requests and responses, from the OpenAPI document."""
    from hm_reco.api.app import create_app

    document = create_app().openapi()
    routes = [
        {"route": f"`{method.upper()} {path}`", "what": details.get("description", "").strip()}
        for path, methods in document["paths"].items()
        for method, details in methods.items()
    ]
    parts = [f"# REST\n\n`/openapi.json` is the complete document.\n\n{to_markdown_table(routes)}"]
    for name, schema in document["components"]["schemas"].items():
        if fields := schema.get("properties"):
            rows = [
                {
                    "field": f"`{field}`",
                    "meaning": details.get("description", details.get("title", "")),
                }
                for field, details in fields.items()
            ]
            parts.append(
                f"## {name}\n\n{schema.get('description', '')}\n\n{to_markdown_table(rows)}"
            )
    return "\n\n".join(parts)


def build_features_page() -> str:
    """The catalogue of the ranker's features."""
    from hm_reco.ranking.features import FEATURES

    table = to_markdown_table([feature._asdict() for feature in FEATURES])
    return (
        f"# Features of the ranker\n\nEach candidate has {len(FEATURES)} features. `window` is the "
        "part of the purchases that a feature reads; `available_from` says since when a value may "
        f"be used without leakage.\n\n{table}\n"
    )


def write_reference() -> dict[str, str]:
    """The reference pages; their titles and paths."""
    pages = {}
    for title, build_page in (
        ("Stages", build_stages_page),
        ("Tables", build_tables_page),
        ("Features", build_features_page),
        ("REST", build_rest_page),
    ):
        pages[title] = f"reference/{title.lower()}.md"
        (PAGES / pages[title]).write_text(build_page())
    for package in sorted(path for path in (ROOT / "hm_reco").iterdir() if path.is_dir()):
        modules = sorted(package.glob("[a-z]*.py"))
        if modules:
            pages[f"hm_reco.{package.name}"] = f"reference/{package.name}.md"
            names = "\n\n".join(f"::: hm_reco.{package.name}.{module.stem}" for module in modules)
            (PAGES / f"reference/{package.name}.md").write_text(
                f"# hm_reco.{package.name}\n\n{names}\n"
            )
    return pages


def list_notebooks() -> list[dict[str, object]]:
    """The notebooks for the navigation, by package."""
    return [
        {
            package: [
                str(p.relative_to(PAGES)) for p in sorted((PAGES / "nbs" / package).glob("*.ipynb"))
            ]
        }
        for package in PACKAGES
    ]


def _to_nav(pages: dict[str, str]) -> list[dict[str, str]]:
    return [{title: path} for title, path in pages.items()]


def write_pages() -> None:
    """Write everything that mkdocs needs."""
    shutil.rmtree(PAGES, ignore_errors=True)
    (PAGES / "reference").mkdir(parents=True)
    copy_guides()
    reference = write_reference()
    nav: list[dict[str, Any]] = [
        *(
            {name: [pages] if isinstance(pages, str) else _to_nav(pages)}
            for name, pages in NAV.items()
        ),
        {"Notebooks": list_notebooks()},
        {"Reference": [{title: path} for title, path in reference.items()]},
        {"Contributing": "CONTRIBUTING.md"},
    ]
    config: dict[str, Any] = {
        "INHERIT": "../mkdocs.yml",
        "docs_dir": "docs",
        "site_dir": "site",
        "nav": nav,
    }
    config["hooks"] = ["../docs/site.py"]
    for name in ("site.css", "offline.js"):
        shutil.copy(ROOT / "docs" / name, PAGES / name)
    config["extra_css"] = ["site.css"]
    PAGES.with_suffix(".yml").write_text(yaml.safe_dump(config, sort_keys=False))
    print(f"{len(list(PAGES.rglob('*.*')))} files in {PAGES.relative_to(ROOT)}")


def on_post_page(output: str, page: Any, **_: object) -> str:
    """mkdocs hook: links to notebooks and guides become page links; nothing is loaded from the web.

    Scrollable blocks get the keyboard focus, and the search gets a label.
    """
    root_prefix = "../" * page.url.count("/")
    shim = r'<script src="https://[^"]*iframe-worker[^"]*"></script>'
    output = re.sub(shim, f'<script src="{root_prefix}offline.js"></script>', output)
    output = re.sub(r'<script src="https://[^"]*"></script>', "", output)
    output = output.replace('role="dialog"', 'role="dialog" aria-label="Search"', 1)
    output = output.replace(
        '<div class="highlight-ipynb', '<div tabindex="0" class="highlight-ipynb'
    )
    return re.sub(r'(href="(?!https?:)[^"#]+)\.(?:ipynb|md)\b', r"\1.html", output)


def find_dead_links() -> Iterator[str]:
    """Dead links of the built site, and assets that a page loads from the web."""
    for page in SITE.rglob("[!4]*.html"):
        text = page.read_text()
        for link in HREF.findall(text):
            is_external = re.match(r"[a-z]+:|//", link) or LAKE_FILE.fullmatch(link)
            if not is_external and not (page.parent / unquote(link)).exists():
                yield f"{page.relative_to(SITE)}: {link}"
        for asset in re.findall(r'<(?:script|link|img)[^>]+(?:href|src)="(https?://[^"]+)', text):
            yield f"{page.relative_to(SITE)}: loads {asset}"


def main(command: str) -> int:
    """Run one of the two commands."""
    if command == "pages":
        write_pages()
        return 0
    dead = sorted(set(find_dead_links()))
    print(*dead[:50], f"{len(dead)} dead links", sep="\n")
    return bool(dead)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
