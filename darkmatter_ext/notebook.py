"""The notebook's way in: `dm.measure` for SAEs in a line, `dm.run` for an experiment.

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
    """Measure the dark matter of SAEs: FVU, its linear and nonlinear part, prediction tests, every token.

    Args:
        sae: one or several: a folder of a known format, or RELEASE:ID of SAELens' list; none: SAEs are trained here.
        progress: show what is being done.
        settings: any setting of `darkmatter run`, by name: model, text, dataset, tokens, hook, passes, seed, ...

    Returns:
        Measurement: `found["NAME"].fvu`, `.interval("fvu")`; `found.tokens()`; NAME is in `found.saes`.

    Raises:
        InputError: one line naming the setting, the rule and the value given.
        StateError: a damaged cache or checkpoint; the same call goes on from what is whole.

    Cost: two readings of every token by the model and each SAE; nothing grows with the tokens but the table of them.
    """
    wanted = replaced(Settings(), **_given(sae), **settings)
    stages = Stages(show=progress)
    with stages.shown(), processes(wanted.device):
        return measured(prepare(wanted, stages, transcoders=True), stages)


def run(experiment: str, *, sae: Specs = (), preset: str = "demo", progress: bool = True, **settings: Any) -> Result:
    """Run an experiment as `darkmatter run` does, without writing files: `.save(PATH)` keeps the result.

    Args:
        experiment: one of `darkmatter list`.
        sae: as `measure`; none: as the preset says.
        preset: settings to start from.
        progress: show what is being done.
        settings: any setting of the experiment, by name.

    Raises as `measure`, and InputError for an unknown experiment or preset.
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
    """Write the page of one or several results, as `darkmatter report` does.

    Args:
        results: results, or their files.
        out: the page; a file of its own that needs no network.
        open: show it in the browser.
        explanations: files of explanations of latents, FILE or SAE=FILE (see docs/page.md).

    Returns:
        Path: of the page. Raises InputError for no result, or a file that is none.
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
