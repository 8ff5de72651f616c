"""Entry points for notebooks: `dm.measure` measures SAEs in one line, `dm.run` runs an experiment.

found = dm.measure(sae=["sae-16k", "sae-65k"], model="google/gemma-2-2b", text="text.txt")
found["sae-16k"].fvu, found["sae-16k"].interval("fvu"), found.tokens(["sae-16k/nonlinear"])
dm.page(dm.run("scaling", sae=["sae-16k", "sae-65k"]), open=True)
"""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darkmatter_ext import experiments
from darkmatter_ext.measurement.run import Measurement, measured, prepare
from darkmatter_ext.measurement.settings import Settings, replaced
from darkmatter_ext.report.result import Result, load_result
from darkmatter_ext.runtime.inputs import require, require_one_of
from darkmatter_ext.runtime.processes import processes
from darkmatter_ext.runtime.progress import Stages

Specs = str | Path | Sequence[str | Path]


def measure(*, sae: Specs = (), progress: bool = True, **settings: Any) -> Measurement:
    """Measure the dark matter of SAEs: FVU, its linear and nonlinear parts, prediction tests, every token.

    Args:
        sae: one or several SAEs, each a folder in a known format or RELEASE:ID from SAELens' list; none: train SAEs here.
        progress: show progress.
        settings: any setting of `darkmatter run`, by name: model, text, dataset, tokens, hook, passes, seed, ...

    Returns:
        Measurement: `found["NAME"].fvu`, `.interval("fvu")`; `found.tokens()`; NAME is in `found.saes`.

    Raises:
        InputError: one line naming the setting, the rule and the value given.
        StateError: a damaged cache or checkpoint; the same call resumes from what is intact.

    Cost: the model and each SAE read every token twice. Only the per-token table grows with the number of tokens.
    """
    wanted = replaced(Settings(), **_given(sae), **settings)
    stages = Stages(show=progress)
    with stages.shown(), processes(wanted.device):
        return measured(prepare(wanted, stages, transcoders=True), stages)


def run(experiment: str, *, sae: Specs = (), preset: str = "demo", progress: bool = True, **settings: Any) -> Result:
    """Run an experiment as `darkmatter run` does, without writing files: `.save(PATH)` keeps the result.

    Args:
        experiment: one of `darkmatter list`.
        sae: as in `measure`; none: the preset's.
        preset: settings to start from.
        progress: show progress.
        settings: any setting of the experiment, by name.

    Raises as `measure` does, and InputError for an unknown experiment or preset.
    """
    module = experiments.experiment(experiment)
    require_one_of("preset", tuple(module.PRESETS), preset)
    wanted: Settings = replaced(module.PRESETS[preset], **_given(sae), **settings)
    stages = Stages(show=progress)
    with stages.shown(), processes(wanted.device):
        return module.run(wanted, stages)


def page(
    *results: Result | str | Path,
    out: str | Path = "report.html",
    open: bool = False,
    explanations: Sequence[str] = (),
) -> Path:
    """Write one page for one or several results, as `darkmatter report` does.

    Args:
        results: results, or their file paths.
        out: the page, a single file that needs no network.
        open: open it in the browser.
        explanations: files with explanations of latents, FILE or SAE=FILE (see docs/page.md).

    Returns:
        Path: where the page is. Raises InputError if there is no result, or a file is not one.
    """
    require(bool(results), "results", "must be at least one", "none")
    found = [result if isinstance(result, Result) else load_result(result, alone=True) for result in results]
    of_files = not any(isinstance(result, Result) for result in results)
    path = experiments.write_report(found, Path(out), explanations, of_files=of_files)
    if open:
        webbrowser.open(path.absolute().as_uri())
    return path


def _given(sae: Specs) -> dict[str, Any]:
    specs = (sae,) if isinstance(sae, str | Path) else tuple(sae)
    return {"sae": tuple(map(str, specs))} if specs else {}
