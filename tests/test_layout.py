"""Layout of the package: imports go down from floor to floor and in no circle, and files are short."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    "_files _torch_modules _wording _arguments _version _base_classes _core < formulas < targets < engine < functional "
    "< linear < losses < teachers < store < trainer callbacks evaluation shipping < sklearn skorch < demo < cli "
    "< __main__"
)
FLOOR = {name: number for number, names in enumerate(FLOORS.split("<")) for name in names.split()}
USERS = {"demo", "cli"}  # which may import the package as a whole
MOST_LINES = 400


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((ROOT / "pydistill").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
MODULES = {*FILES, "pydistill._core"}


def statements(tree):
    """All imports, those inside functions too; not those for annotations alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from statements(node)


def imports(name):
    """Modules of the package that a module imports; ``from package import module`` imports the module."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(TREES[name]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            names = [f"{start}.{a.name}" if f"{start}.{a.name}" in MODULES else start for a in node.names]
        yield from (n for n in names if n.split(".")[0] == "pydistill")


GRAPH = {name: set(imports(name)) for name in FILES if name != "pydistill"}


def part(module):
    """The top-level name: engine for pydistill.engine.checks; nothing for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def test_every_module_has_a_floor():
    assert {part(name) for name in GRAPH} <= FLOOR.keys()


@pytest.mark.parametrize("name", GRAPH)
def test_imports_go_down(name):
    up = [other for other in GRAPH[name] if part(other) and FLOOR[part(other)] > FLOOR[part(name)]]
    assert up == []
    assert "pydistill" not in GRAPH[name] or part(name) in USERS, "imports the whole package"


def test_no_modules_import_each_other():
    try:
        TopologicalSorter({name: others - {name} for name, others in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def lines_of(path, tree=None):
    """Lines of a file; of Python without the docstrings of public functions and classes."""
    count = len(path.read_text().splitlines())
    for node in ast.walk(tree) if tree else ():
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and ast.get_docstring(node) is not None:
            count -= node.body[0].end_lineno - node.body[0].lineno + 1
    return count


@pytest.mark.parametrize("path", [*FILES.values(), *sorted((ROOT / "csrc").iterdir())], ids=lambda path: path.name)
def test_files_are_short(path):
    tree = TREES[name_of(path)] if path.suffix == ".py" else None
    assert lines_of(path, tree) < MOST_LINES
