"""The pages of the documentation: the files and links that they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "bench" / "NOTES.md", *sorted((ROOT / "docs").glob("*.md"))]
_FILE = re.compile(r"`((?:\.ci|bench|csrc|docs|examples|pydistill|tests)/[\w./]*|CMakeLists\.txt|[A-Z]+\.md)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    missing = {name for name in _FILE.findall(page.read_text()) if not (ROOT / name).exists()}
    assert not missing


def test_the_architecture_names_every_part():
    page = (ROOT / "docs" / "architecture.md").read_text()
    ignored = ("__init__.py", "__main__.py", "__pycache__", "_core.pyi", "py.typed")
    parts = [p for folder in ("pydistill", "pydistill/engine", "csrc") for p in (ROOT / folder).iterdir()]
    parts = [p for p in parts if p.name not in ignored and not p.name.startswith("vec_")]
    assert [p.name for p in parts if not re.search(rf"[`/]{re.escape(p.stem)}[`./]", page)] == []
