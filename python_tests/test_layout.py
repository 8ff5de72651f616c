"""The rules of the house, read from the source: who may import whom, file sizes, nothing heavy at import."""

import ast
from pathlib import Path

import pytest
from children import run_python

import darkmatter_ext as dm

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "darkmatter_ext"
# Downward only: a module may import modules of lower levels, or of its own level when listed together in ALLOWED.
LEVELS = {
    "storage": 0, "_library": 0, "progress": 0, "sparse": 0, "packed_weights": 0,
    "_registrations": 1, "reference": 1, "soundness": 1, "ops": 2, "unchecked": 2.1, "row_layout": 0,
    "stepping_aside": 2.2, "environment": 3, "pursuit_choice": 3, "pursuit_steps": 3.5,
    "pursuit_on_cuda": 4, "batched_pursuit": 5,
    "embedded": 3, "text": 3, "error": 3, "regression": 3, "intervals": 3, "power_law": 4, "nulls": 3,
    "activations": 4, "decomposition": 4, "architectures": 5.2, "drop_in_state": 5.4, "drop_in": 6,
    "selection": 5, "sae": 7, "training": 5, "results": 5, "interpretability": 5, "splicing": 6, "judges": 6,
    "site": 8.3, "check_sae": 8.3, "controls": 8, "pursuing": 8, "experiments": 9,
    "figures": 10, "report": 11, "cli": 12, "__main__": 13, "__init__": 13,
    "hook_points": 3, "checkpoint": 1, "distributed": 0, "per_token": 1, "presets": 0, "cost_plan": 3, "contexts": 4,
    "moments": 4, "sources": 5, "measurement": 8,
    "inputs": 0, "encoders": 1, "formats": 2, "loading": 3, "metadata": 6, "sanity": 8.05,
    "sweeps": 8.1, "one_pass": 8.2, "many_saes_config": 8.3, "many_saes": 8.5, "family": 8.7,
}  # fmt: skip
ALLOWED = {(package, package) for package in ("experiments", "figures", "report")}


def _module(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("darkmatter_ext"):
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("darkmatter_ext."))


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    own = _module(path)
    for other in _imports(path):
        if other not in LEVELS:
            continue  # a name exported by the package itself
        assert LEVELS[other] < LEVELS[own] or (own, other) in ALLOWED, f"{path.name} imports {other}"


def test_every_module_has_a_level():
    assert {_module(path) for path in SOURCES} == set(LEVELS)


def test_experiments_import_neither_each_other_nor_figures():
    for path in (PACKAGE / "experiments").glob("*.py"):
        if path.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert "experiments" not in node.module, path
                assert "figures" not in node.module, path


def test_torch_ops_are_called_in_ops_and_registrations_only():
    for path in SOURCES:
        if path.name not in ("ops.py", "unchecked.py", "_registrations.py", "_library.py"):
            assert "torch.ops" not in path.read_text(), path


def test_files_stay_under_600_lines():
    sources = [
        *SOURCES,
        *(ROOT / "csrc").rglob("*.*"),
        *(ROOT / "python_tests").glob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
    long = [str(path) for path in sources if len(path.read_text().splitlines()) > 600]
    assert long == []


def test_importing_the_package_starts_no_heavy_library():
    code = (
        "import sys, darkmatter_ext; "
        "heavy = {'sae_lens', 'transformers', 'transformer_lens', 'matplotlib', 'datasets'} & set(sys.modules); "
        "import torch; assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    run_python(code)


def test_no_exported_name_is_also_a_module():
    """Importing a module sets its name on the package: an exported function of that name would be gone."""
    assert not set(dm.__all__) & {_module(path) for path in SOURCES}
    assert set(dm.__all__) <= set(dir(dm))
