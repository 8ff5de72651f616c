"""The command line `darkmatter`: parses, runs an experiment, writes result, figures and report, prints a table."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from simple_parsing import ArgumentParser, DashVariant
from simple_parsing.wrappers.field_wrapper import ArgumentGenerationMode

from darkmatter_ext.runtime.storage import require_writable_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from darkmatter_ext.report.result import Result
    from darkmatter_ext.saes.check import Verdict

DEBUG_ENVIRONMENT_VARIABLE = "DARKMATTER_DEBUG"
# What bad input raises (errors are one line each, see the docstrings); anything else is a bug and keeps its traceback.
_EXPECTED_ERRORS = (ValueError, TypeError, RuntimeError, OSError)
LOG_WIDTH = 120
DESCRIPTION = "Measure the dark matter of sparse autoencoders: the part of a model's activations they do not explain."


class _OneLineParser(ArgumentParser):
    """An argument parser whose errors are one line: what was wrong, not the whole usage again."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser(command: str, description: str) -> _OneLineParser:
    return _OneLineParser(
        prog=f"darkmatter {command}".strip(),
        description=description,
        add_option_string_dash_variants=DashVariant.DASH,
        argument_generation_mode=ArgumentGenerationMode.FLAT,
        allow_abbrev=False,
    )


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries below would land between ours; their errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _table(result: Result) -> Table:
    from rich.table import Table

    from darkmatter_ext.report import table

    content = table(result)
    shown = Table(title=content.title, pad_edge=False)
    for number, heading in enumerate(content.headings):
        shown.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in content.rows:
        shown.add_row(*row)
    return shown


def _console() -> Console:
    """The terminal's width; in a file or a pipe enough for the tables."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


def _show(result: Result, written: Sequence[Path], seconds: float) -> None:
    from darkmatter_ext.report import reading

    console = _console()
    console.print(_table(result))
    for line in [*reading(result), *result.notes]:
        console.print(f"- {line}", highlight=False, markup=False)
    for sae in result.series["saes"]:
        console.print(f"SAE      {sae['folder']}", highlight=False, markup=False, soft_wrap=True)
    for path in written:
        console.print(f"wrote    {path}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"took     {seconds:.0f} s", highlight=False)


def _run_experiment(name: str, config: Any, out: Path) -> None:
    from darkmatter_ext.experiments import experiment
    from darkmatter_ext.figures import save_figures
    from darkmatter_ext.report import write_report
    from darkmatter_ext.runtime.processes import is_first_process, processes, under_torchrun
    from darkmatter_ext.runtime.progress import Stages

    if under_torchrun() and not getattr(config, "shares_work", False):
        raise ValueError(
            "torchrun: must be used with a preset whose work is divided, such as one-pass, got --preset demo"
        )
    require_writable_folder("--out", out)
    _quiet_libraries()
    start = time.perf_counter()
    wanted = sys.stderr.isatty() or bool(os.environ.get("DARKMATTER_PROGRESS"))
    stages = Stages(show=wanted and is_first_process())
    with stages.shown(), processes(config.device):
        result = experiment(name).run(config, stages)
    if not is_first_process():
        return
    written = [result.save(out / f"{name}.json")]
    figures = save_figures(result, out)
    written += [*figures, write_report([(result, figures)], out / "report.html")]
    _show(result, written, time.perf_counter() - start)


def _command_run(arguments: Sequence[str]) -> None:
    from darkmatter_ext.experiments import EXPERIMENTS, experiment

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: darkmatter run EXPERIMENT [--preset NAME] [--out FOLDER] [--dry-run] [settings]\n")
        print("EXPERIMENT is one of:", *(f"  {name:18}{about}" for name, about in EXPERIMENTS.items()), sep="\n")
        print("\n`darkmatter run EXPERIMENT --help` lists its settings.")
        return
    name, flags = arguments[0], arguments[1:]
    module = experiment(name)
    preset_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    preset_parser.add_argument("--preset", default="demo")
    preset, flags = preset_parser.parse_known_args(flags)
    if preset.preset not in module.PRESETS:
        raise ValueError(f"--preset: must be one of {', '.join(module.PRESETS)}, got {preset.preset!r}")
    defaults = module.PRESETS[preset.preset]
    parser = _parser(f"run {name}", type(defaults).__doc__ or "")
    parser.add_argument("--preset", default="demo", help=f"settings to start from: {', '.join(module.PRESETS)}")
    parser.add_argument(
        "--out", type=Path, default=Path("results") / name, help="folder for result, figures and report"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_arguments(type(defaults), dest="config", default=defaults)
    parsed = parser.parse_args(list(flags))
    if parsed.dry_run:
        print("\n".join(module.plan(parsed.config)))
        return
    _run_experiment(name, parsed.config, parsed.out)


def _command_demo(arguments: Sequence[str]) -> None:
    from darkmatter_ext.experiments import experiment

    parser = _parser("demo", "The decomposition experiment on the embedded language model, with nothing to set.")
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="folder for result, figures and report")
    parsed = parser.parse_args(list(arguments))
    _run_experiment("decomposition", experiment("decomposition").PRESETS["demo"], parsed.out)


def _command_list(arguments: Sequence[str]) -> None:
    from darkmatter_ext.experiments import EXPERIMENTS, experiment

    _parser("list", "The experiments and their presets.").parse_args(list(arguments))
    for name, about in EXPERIMENTS.items():
        print(f"{name:18}{about}; presets: {', '.join(experiment(name).PRESETS)}")


def _command_figure(arguments: Sequence[str]) -> None:
    from darkmatter_ext.figures import save_figures
    from darkmatter_ext.report.result import load_result

    parser = _parser("figure", "Draw the figures of a result file again.")
    parser.add_argument("result", type=Path, metavar="RESULT", help="a result file")
    parser.add_argument("--out", type=Path, help="folder for the figures; default: beside the result")
    parser.add_argument("--kind", default="png", choices=("png", "pdf", "svg"), help="file type")
    parsed = parser.parse_args(list(arguments))
    result = load_result(parsed.result)
    folder = require_writable_folder("--out", parsed.out or parsed.result.parent)
    print(*save_figures(result, folder, kind=parsed.kind), sep="\n")


def _command_report(arguments: Sequence[str]) -> None:
    from darkmatter_ext.figures import save_figures
    from darkmatter_ext.report import write_report
    from darkmatter_ext.report.result import load_result

    parser = _parser("report", "Write one HTML page from result files, figures inside.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="result files")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    parsed = parser.parse_args(list(arguments))
    results = [(path, load_result(path)) for path in parsed.results]
    require_writable_folder("--out", parsed.out.absolute().parent)
    sections = [(result, save_figures(result, path.parent)) for path, result in results]
    print(write_report(sections, parsed.out))


def _command_env(arguments: Sequence[str]) -> None:
    from darkmatter_ext.ops.build_info import build_info
    from darkmatter_ext.runtime.storage import cache_dir

    _parser("env", "What is compiled, what is in use, and where the cache is.").parse_args(list(arguments))
    print(json.dumps(build_info() | {"cache": str(cache_dir())}, indent=2))


def _command_check_sae(arguments: Sequence[str]) -> int:
    from darkmatter_ext.saes.check import check_sae, load_any, read_activations
    from darkmatter_ext.saes.loading import describe_sae

    about = "One SAE, plain and accelerated, side by side: same answer? how much faster? does it look misloaded?"
    parser = _parser("check-sae", about)
    parser.add_argument("sae", metavar="SAE", help="a folder, or a release of SAELens' list (or RELEASE:ID)")
    parser.add_argument("--sae-id", help="the SAE of the release")
    parser.add_argument("--activations", type=Path, help="a .safetensors, .npy or .pt file of activations [..., d_in]")
    parser.add_argument("--tokens", type=int, default=1024, help="random activations; at most as many of the given")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "float64"), help="convert the SAE first")
    parser.add_argument("--activation-scale", type=float, help="for an SAE made on activations scaled by this factor")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(list(arguments))
    _quiet_libraries()
    sae = load_any(parsed.sae, parsed.sae_id, parsed.dtype, parsed.activation_scale)
    spec = parsed.sae if parsed.sae_id is None else f"{parsed.sae}:{parsed.sae_id}"
    given = None if parsed.activations is None else read_activations(parsed.activations, sae.cfg.d_in)
    verdict = check_sae(
        sae,
        given,
        n_tokens=parsed.tokens,
        seed=parsed.seed,
        rounds=parsed.rounds,
        expected_l0=describe_sae(spec).expected_l0,
    )
    _show_verdict(f"{sae.cfg.architecture()} {sae.cfg.d_in} -> {sae.cfg.d_sae}, {sae.cfg.dtype}", verdict)
    return 0 if verdict.passed else 1


def _show_verdict(title: str, verdict: Verdict) -> None:
    from rich.table import Table

    console = _console()
    comparisons = Table("activations", "compared with SAELens", "found", "limit", "verdict", title=title)
    for row in verdict.comparisons:
        comparisons.add_row(
            row.data, row.quantity, f"{row.found:.2g}", f"{row.limit:.2g}", "same" if row.passed else "DIFFERENT"
        )
    timings = Table("call", "SAELens, ms", "accelerated, ms", "faster by", title="median time")
    for row in verdict.timings:
        timings.add_row(row.call, f"{row.plain_ms:.1f}", f"{row.fast_ms:.1f}", f"{row.plain_ms / row.fast_ms:.1f}x")
    console.print(comparisons)
    console.print(timings)
    console.print(str(verdict.stats), highlight=False, markup=False)
    for sign in verdict.signs:
        console.print(f"looks misloaded: {sign}", highlight=False, markup=False, soft_wrap=True)
    console.print("same answer" if verdict.passed else "DIFFERENT ANSWER", highlight=False)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int | None], str]] = {
    "demo": (_command_demo, "the dark matter of SAEs on an embedded language model, in minutes"),
    "run": (_command_run, "run an experiment: darkmatter run EXPERIMENT --help"),
    "list": (_command_list, "the experiments"),
    "figure": (_command_figure, "draw the figures of a result again"),
    "report": (_command_report, "one HTML page from results"),
    "check-sae": (_command_check_sae, "compare an SAE with its accelerated self: answers and times"),
    "env": (_command_env, "what is compiled and in use"),
}


def _process_label() -> str:
    """Which of several processes speaks, or nothing."""
    from darkmatter_ext.runtime.processes import under_torchrun

    return f" [process {os.environ['RANK']}]" if under_torchrun() else ""


def _usage() -> str:
    commands = "\n".join(f"  {name:11}{about}" for name, (_, about) in COMMANDS.items())
    return f"usage: darkmatter COMMAND ...\n\n{DESCRIPTION}\n\n{commands}\n\n`darkmatter COMMAND --help` tells more."


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 1 for a failed check, 2 for bad input (one line on stderr), 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    try:
        if arguments[0] not in COMMANDS:
            raise ValueError(f"COMMAND: must be one of {', '.join(COMMANDS)}, got {arguments[0]!r}")
        return COMMANDS[arguments[0]][0](arguments[1:]) or 0
    except _EXPECTED_ERRORS as error:
        if os.environ.get(DEBUG_ENVIRONMENT_VARIABLE):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"darkmatter{_process_label()}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("darkmatter: interrupted; what was finished is kept, start the same command again", file=sys.stderr)
        return 130
