"""The rules of the house, read from the source: who may import whom, sizes, nothing heavy at import."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from cases.children import run_python

import darkmatter_ext as dm

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "darkmatter_ext"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# A folder imports folders of lower floors, never a neighbour's or a higher one.
FLOORS = [
    {"runtime"}, {"estimators"}, {"ops"}, {"activations", "saes"}, {"training"}, {"measurement"}, {"report"}, {"experiments"},
    {"cli", "notebook"},
]  # fmt: skip
FLOOR = {folder: number for number, floor in enumerate(FLOORS) for folder in floor}
TOP = {"__init__", "__main__", "_C"}


def _name(path):
    """`darkmatter_ext/ops/encode.py` -> `ops.encode`; a folder is its `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_name(path) for path in SOURCES}


@functools.cache
def _imports(path):
    """The modules of the package that a file names in its imports."""
    return list(_imported(path))


def _imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "darkmatter_ext":
            inside = node.module.partition(".")[2]
            below = [f"{inside}.{alias.name}".strip(".") for alias in node.names]
            yield from (name if name in MODULES else inside for name in below)
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("darkmatter_ext."))


def _folder(name):
    return name.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_point_downward(path):
    own = _folder(_name(path))
    if own in TOP:
        return
    for other in filter(None, _imports(path)):
        if _folder(other) not in TOP | {own}:
            assert FLOOR[_folder(other)] < FLOOR[own], f"{_name(path)} imports {other}"


def test_no_circle_inside_a_folder():
    graph = {_name(path): {o for o in _imports(path) if "." in o and _folder(o) not in TOP} for path in SOURCES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError naming the circle


def test_experiments_do_not_import_each_other():
    for path in (PACKAGE / "experiments").glob("*.py"):
        assert not [other for other in _imports(path) if _folder(other) == "experiments"], path


def test_torch_ops_are_called_in_ops_only():
    for path in SOURCES:
        if _folder(_name(path)) != "ops":
            assert "torch.ops" not in path.read_text(), path


@pytest.mark.parametrize("folder", ["darkmatter_ext", "benchmarks", "python_tests"])
def test_least_squares_name_their_driver(folder):
    """torch's default on the CPU gives other bits from call to call, and may find a wrong rank: see `lstsq`."""
    calls = 0
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.linalg.lstsq":
                assert "driver" in [keyword.arg for keyword in node.keywords], f"{path}:{node.lineno}"
                calls += 1
    assert calls > 0 or not (ROOT / folder).is_dir()


@pytest.mark.parametrize(
    "pattern", ["darkmatter_ext/**/*.py", "csrc/**/*.*", "python_tests/**/*.py", "benchmarks/**/*.py"]
)
def test_files_stay_under_500_lines(pattern):
    assert {str(path): n for path in ROOT.glob(pattern) if (n := len(path.read_text().splitlines())) > 500} == {}


@pytest.mark.runs
def test_importing_the_package_starts_no_heavy_library():
    code = (
        "import sys, darkmatter_ext; "
        "heavy = {'sae_lens', 'transformers', 'transformer_lens', 'matplotlib', 'datasets'} & set(sys.modules); "
        "import torch; assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    run_python(code)


def test_no_exported_name_is_also_a_module():
    """Importing a module sets its name on the package: an exported function of that name would be gone."""
    assert not set(dm.__all__) & {_folder(name) for name in MODULES}


def test_the_api_page_lists_every_public_name():
    listed = [line.rpartition(".")[2] for line in (ROOT / "docs/api.md").read_text().splitlines() if line[:3] == ":::"]
    assert sorted(listed) == sorted(dm.__all__)


def test_tests_share_through_cases_alone():
    """What two test files need is in `cases`, by a public name; a test file is imported by nobody."""
    for path in sorted((ROOT / "python_tests").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names]
                imported = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
                assert not [name for name in imported if "test_" in name.replace("pytest_", "")], path
                assert not [name for name in imported if name.startswith("cases.") and "._" in name], path
        if path.parent.name == "cases":
            assert not [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")], path
