"""The experiments: one file, one question. Every file in this folder is an experiment; there is no other list.

Each file has
- a docstring whose first line is its line in `darkmatter list`;
- `PRESETS`, name -> settings: a dataclass whose fields are the flags of `darkmatter run`;
- `plan(settings) -> list[str]`, what a run would do, and `run(settings, stages) -> Result`;
- `table(result)`, `reading(result)` and `FIGURES` (name -> function of the result), for readers of the result.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from darkmatter_ext.report.explanations import explained_results
from darkmatter_ext.report.figures import Drawn, save_figures
from darkmatter_ext.report.page import Section, write_page
from darkmatter_ext.report.result import Result
from darkmatter_ext.runtime.inputs import InputError, out_of_memory, reason


def names() -> list[str]:
    """The names of the experiments on the command line."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def _module_name(name: str) -> str:
    if name not in names():
        raise InputError(f"EXPERIMENT: must be one of {', '.join(names())}, got {name!r}")
    return f"{__name__}.{name.replace('-', '_')}"


def about(name: str) -> str:
    """An experiment's question in one line, read from its file without importing it. Raises ValueError as `experiment` does."""
    spec = importlib.util.find_spec(_module_name(name))
    assert spec is not None
    assert spec.origin is not None  # a file of this folder
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or "").partition("\n")[0]


def experiment(name: str) -> ModuleType:
    """The module of an experiment. Raises ValueError, naming the known ones."""
    return importlib.import_module(_module_name(name))


def section(result: Result, figures: Sequence[Drawn] = ()) -> Section:
    """A result, shown the way its experiment shows it. Raises ValueError for a result of an unknown experiment."""
    module = _of(result)
    return Section(result, module.table(result), module.reading(result), figures, command(result))


def write_report(
    results: Sequence[Result], path: Path, explanations: Sequence[str] = (), *, of_files: bool = True
) -> Path:
    """Write the page for some results, with explanations of latents from files.

    Raises as `section` and `explained_results` do. If the results come from files, InputError for one that lacks what its
    experiment shows: a damaged file, or one from another version.
    """
    results = explained_results(results, explanations)
    with tempfile.TemporaryDirectory() as folder, _shows(results) if of_files else nullcontext():
        return write_page([section(result, draw(result, Path(folder))) for result in results], path)


def write_figures(result: Result, folder: Path, *, kind: str) -> list[Drawn]:
    """Draw the figures of a result that was read from a file. Raises as `write_report` does."""
    with _shows([result]):
        return draw(result, folder, kind=kind)


@contextmanager
def _shows(results: Sequence[Result]) -> Iterator[None]:
    """Report in one line what an experiment misses in a result from a file; the traceback stays with the exception."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        versions = [own for result in results if isinstance(own := result.provenance.get("versions"), dict)]
        names = ", ".join(f"{result.experiment} file" for result in results)
        made = ", ".join(sorted({str(own.get("darkmatter_ext")) for own in versions})) or "another version"
        raise InputError(
            f"RESULT: must have all that its experiment shows, got {names} of darkmatter_ext {made} without ({reason(error)})"
        ) from error


def command(result: Result) -> str:
    """The command that reproduces a result: its settings that differ from the first preset."""
    usual: dict[str, Any] = {}  # across all parts of the settings, whose names are unique
    for name, value in asdict(next(iter(_of(result).PRESETS.values()))).items():
        usual |= value if isinstance(value, dict) else {name: value}
    # A result's model and hook were filled in from the SAEs if the settings left them open.
    filled = {"hook", "model"} if result.config.get("sae") else {"hook"} if result.config.get("layers") else set()
    words = ["darkmatter", "run", result.experiment]
    for name, value in result.config.items():
        given = tuple(value) if isinstance(value, list) else value
        if name not in usual or name in filled or given == usual[name]:
            continue
        flag = "--" + name.replace("_", "-")
        words += [flag, *(map(str, given) if isinstance(given, tuple) else [str(given)])]
    return shlex.join(words)


def draw(result: Result, folder: Path, *, kind: str = "png") -> list[Drawn]:
    """Draw every figure of a result into `folder` (png, pdf or svg). Raises as `section` does."""
    return save_figures(result, _of(result).FIGURES, folder, kind=kind)


def _of(result: Result) -> ModuleType:
    if result.experiment not in names():
        raise InputError(f"RESULT: must be of {', '.join(names())}, got a result of {result.experiment!r}")
    return experiment(result.experiment)
