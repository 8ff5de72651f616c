"""The command line `darkmatter`: parse arguments, run an experiment, write result, figures and page, print a table."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from simple_parsing import ArgumentParser, DashVariant
from simple_parsing.wrappers.field_wrapper import ArgumentGenerationMode

from darkmatter_ext.runtime.inputs import InputError, out_of_memory, reason, require, require_one_of
from darkmatter_ext.runtime.ranks import is_first_process, under_torchrun
from darkmatter_ext.runtime.storage import require_writable_folder

DEBUG_ENVIRONMENT_VARIABLE = "DARKMATTER_DEBUG"
KEPT = "what was finished is kept, start the same command again"
# Bytes of address space below which no command begins. The smallest runs of all commands took 2.2 to 2.9 GiB of it (0.5 to 0.7
# of them in memory; x86-64, torch 2.13 without CUDA, one thread or two; each more takes some 0.03). With less, the system ends
# a process at any point, or threads wait for ever: a new thread of CPython or Arrow that finds no memory does not tell the one
# that started it.
LEAST_ADDRESS_SPACE = 4 << 30
PROGRESS_ENVIRONMENT_VARIABLE = "DARKMATTER_PROGRESS"  # 0: no progress is shown
DESCRIPTION = "Measure the dark matter of sparse autoencoders: the part of a model's activations they do not explain."


class _Parser(ArgumentParser):
    """An argument parser whose errors are one line: what was wrong, without the usage text."""

    def __init__(self, **options: Any) -> None:
        options |= {"argument_generation_mode": ArgumentGenerationMode.FLAT, "allow_abbrev": False}
        super().__init__(add_option_string_dash_variants=DashVariant.DASH, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def named(self, argument: str) -> str:
        """The name under which this command's user gives a library argument: `sae_dtype` -> `--sae-dtype`."""
        flag = "--" + argument.replace("_", "-")
        known = {flag for action in self._actions for flag in action.option_strings}
        positional = {action.dest: str(action.metavar or action.dest) for action in self._actions}
        return flag if flag in known else positional.get(argument, argument)


def _require_address_space() -> None:
    """Raise InputError where a limit (`ulimit -v`, some batch systems) leaves less than the libraries take."""
    limit, mib = resource.getrlimit(resource.RLIMIT_AS)[0], 1 << 20
    enough = limit == resource.RLIM_INFINITY or limit >= LEAST_ADDRESS_SPACE
    rule = f"must be at least {LEAST_ADDRESS_SPACE // mib} MiB or unlimited (`ulimit -v`)"
    require(enough, "the limit of address space", rule, limit // mib)


def _quiet_libraries() -> None:
    """Silence the progress bars and advice of other libraries, which would mix with ours; their errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _run_experiment(name: str, settings: Any, out: Path, *, brief: bool = False) -> None:
    from darkmatter_ext import experiments
    from darkmatter_ext.report.page import write_page
    from darkmatter_ext.report.terminal import show_result
    from darkmatter_ext.runtime.processes import processes
    from darkmatter_ext.runtime.progress import Stages

    require_writable_folder("out", out)
    _quiet_libraries()
    start = time.perf_counter()
    wanted = os.environ.get(PROGRESS_ENVIRONMENT_VARIABLE) != "0"
    stages = Stages(show=wanted and is_first_process())
    with stages.shown(), processes(settings.device):
        result = experiments.experiment(name).run(settings, stages)
    if not is_first_process():
        return
    written = [result.save(out / f"{name}.json")]
    section = experiments.section(result, experiments.draw(result, out))
    written += [*(figure.path for figure in section.figures), write_page([section], out / "report.html")]
    show_result(section, written, time.perf_counter() - start, brief=brief)


# ---- the commands: each adds its arguments to a parser and is called with the parsed arguments


def _add_run(parser: _Parser, arguments: Sequence[str]) -> None:
    """Add the arguments of one experiment: each has its own settings, with a preset's values, so no parser fits all."""
    from darkmatter_ext import experiments

    known = ", ".join(experiments.names())
    parser.add_argument("experiment", metavar="EXPERIMENT", nargs="?", help=f"one of {known}; default: list them")
    if not arguments or arguments[0].startswith("-"):
        return
    module = experiments.experiment(arguments[0])
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo")
    preset = first.parse_known_args(arguments[1:])[0].preset
    require_one_of("--preset", tuple(module.PRESETS), preset)
    parser.description = experiments.about(arguments[0])
    parser.add_argument("--preset", default="demo", help=f"settings to start from: {', '.join(module.PRESETS)}")
    out = Path("results") / arguments[0]
    parser.add_argument("--out", type=Path, default=out, help="folder for result, figures and page")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    defaults = module.PRESETS[preset]
    parser.add_arguments(type(defaults), dest="settings", default=defaults)


def _run(parsed: argparse.Namespace) -> None:
    from darkmatter_ext.experiments import experiment

    if parsed.experiment is None:
        _list(parsed)
        return
    if parsed.dry_run:
        print("\n".join(experiment(parsed.experiment).plan(parsed.settings)))
        return
    _run_experiment(parsed.experiment, parsed.settings, parsed.out)


def _add_demo(parser: _Parser, _arguments: Sequence[str]) -> None:
    out = Path("results/demo")
    parser.add_argument("--out", type=Path, default=out, help="folder for result, figures and page")


def _demo(parsed: argparse.Namespace) -> None:
    from darkmatter_ext.experiments import experiment

    _run_experiment("decomposition", experiment("decomposition").PRESETS["demo"], parsed.out, brief=True)


def _list(_parsed: argparse.Namespace) -> None:
    from darkmatter_ext import experiments

    for name in experiments.names():
        presets = ", ".join(experiments.experiment(name).PRESETS)
        print(f"{name:20}{experiments.about(name)} presets: {presets}")


def _add_figure(parser: _Parser, _arguments: Sequence[str]) -> None:
    parser.add_argument("result", type=Path, metavar="RESULT", help="a result file")
    parser.add_argument("--out", type=Path, help="folder for the figures; default: beside the result")
    parser.add_argument("--kind", default="png", choices=("png", "pdf", "svg"), help="file type")


def _figure(parsed: argparse.Namespace) -> None:
    from darkmatter_ext import experiments
    from darkmatter_ext.report.result import load_result

    result = load_result(parsed.result)
    folder = require_writable_folder("out", parsed.out or parsed.result.parent)
    print(*(figure.path for figure in experiments.write_figures(result, folder, kind=parsed.kind)), sep="\n")


def _add_report(parser: _Parser, _arguments: Sequence[str]) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="result files")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    about = (
        "explanations of latents for the latent browser, as docs/page.md says; SAE=FILE where there are several SAEs"
    )
    parser.add_argument("--explanations", nargs="+", default=[], metavar="[SAE=]FILE", help=about)


def _report(parsed: argparse.Namespace) -> None:
    from darkmatter_ext import experiments
    from darkmatter_ext.report.result import load_result

    results = [load_result(path, alone=True) for path in parsed.results]
    require_writable_folder("out", parsed.out.absolute().parent)
    print(experiments.write_report(results, parsed.out, parsed.explanations))
    if parsed.open:
        webbrowser.open(parsed.out.absolute().as_uri())


def _add_train(parser: _Parser, _arguments: Sequence[str]) -> None:
    from darkmatter_ext.measurement.train_on_text import TrainSettings

    parser.add_argument(
        "--out", type=Path, default=Path("results/train"), help="folder for the SAEs and the run's state"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_arguments(TrainSettings, dest="settings", default=TrainSettings())


def _train(parsed: argparse.Namespace) -> None:
    from darkmatter_ext.measurement import train_on_text
    from darkmatter_ext.report.terminal import show_training
    from darkmatter_ext.runtime.processes import processes
    from darkmatter_ext.runtime.progress import Stages

    if parsed.dry_run:
        print("\n".join(train_on_text.plan(parsed.settings)))
        return
    require_writable_folder("out", parsed.out)
    _quiet_libraries()
    wanted = os.environ.get(PROGRESS_ENVIRONMENT_VARIABLE) != "0" and is_first_process()

    def log(entries: list[dict[str, float]]) -> None:
        for entry in entries if wanted else ():
            shown = "  ".join(f"{key} {value:.4g}" for key, value in entry.items())
            print(shown, file=sys.stderr)

    stages = Stages(show=wanted)
    with stages.shown(), processes(parsed.settings.device) as own:
        trained = train_on_text.train_on_text(parsed.settings, parsed.out, own, stages, log)
    if is_first_process():
        show_training([(parsed.out / train_on_text.name(sae.config), sae.report) for sae in trained])


def _env(_parsed: argparse.Namespace) -> None:
    from darkmatter_ext.ops.build_info import build_info
    from darkmatter_ext.runtime.storage import cache_dir

    print(json.dumps(build_info() | {"cache": str(cache_dir())}, indent=2))


def _add_check_sae(parser: _Parser, _arguments: Sequence[str]) -> None:
    parser.add_argument("sae", metavar="SAE", help="a folder, or a release of SAELens' list (or RELEASE:ID)")
    parser.add_argument("--sae-id", help="the SAE of the release")
    parser.add_argument("--activations", type=Path, help="a .safetensors, .npy or .pt file of activations [..., d_in]")
    parser.add_argument("--tokens", type=int, default=1024, help="random activations; at most as many of the given")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "float64"), help="convert the SAE first")
    parser.add_argument("--activation-scale", type=float, help="for an SAE made on activations scaled by this factor")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0)


def _check_sae(parsed: argparse.Namespace) -> int:
    from darkmatter_ext.report.terminal import show_verdict
    from darkmatter_ext.saes.check import check_sae, load_any, read_activations
    from darkmatter_ext.saes.loading import describe_sae

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
    show_verdict(f"{sae.cfg.architecture()} {sae.cfg.d_in} -> {sae.cfg.d_sae}, {sae.cfg.dtype}", verdict)
    return 0 if verdict.passed else 1


def _add_nothing(_parser: _Parser, _arguments: Sequence[str]) -> None:
    """For a command without arguments."""


class Command(NamedTuple):
    """A command: it adds its arguments to a parser and runs on the parsed arguments."""

    add: Callable[[_Parser, Sequence[str]], None]
    run: Callable[[argparse.Namespace], int | None]
    about: str


COMMANDS = {
    "demo": Command(
        _add_demo, _demo, "The dark matter of SAEs on an embedded language model, in minutes, with nothing to set."
    ),
    "run": Command(_add_run, _run, "Run an experiment."),
    "train": Command(_add_train, _train, "Train SAEs on a model's activations."),
    "list": Command(_add_nothing, _list, "The experiments and their presets."),
    "figure": Command(_add_figure, _figure, "Draw the figures of a result again."),
    "report": Command(_add_report, _report, "Write one HTML page from result files, figures inside."),
    "check-sae": Command(
        _add_check_sae, _check_sae, "Compare an SAE with its accelerated self: answers, times, misloading."
    ),
    "env": Command(_add_nothing, _env, "What is compiled, what is in use, and where the cache is."),
}


def _usage() -> str:
    commands = "\n".join(f"  {name:11}{command.about}" for name, command in COMMANDS.items())
    return f"usage: darkmatter COMMAND ...\n\n{DESCRIPTION}\n\n{commands}\n\n`darkmatter COMMAND --help` tells more."


def _process_label() -> str:
    """Which of several processes is printing; empty if there is only one."""
    return f" [process {os.environ['RANK']}]" if under_torchrun() else ""


def _refused(error: Exception, parser: _Parser | None) -> int:
    """Print bad input as one line, with the command's own names for arguments."""
    if os.environ.get(DEBUG_ENVIRONMENT_VARIABLE):
        raise error
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, InputError) and parser is not None:
        argument, colon, rest = message.partition(":")
        message = ", ".join(map(parser.named, argument.split(", "))) + colon + rest
    print(f"darkmatter{_process_label()}: {message}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns the exit code: 0, 1 for a failed check, 2 for bad input or too little memory (one line on stderr), 130 if
    interrupted. Anything else is our bug and keeps its traceback.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    parser = None
    try:
        require_one_of("COMMAND", tuple(COMMANDS), arguments[0])
        if arguments[0] != "env":  # who asks what this machine is may ask it with any limit
            _require_address_space()
        command = COMMANDS[arguments[0]]
        parser = _Parser(prog=f"darkmatter {arguments[0]}", description=command.about)
        command.add(parser, arguments[1:])
        return command.run(parser.parse_args(arguments[1:])) or 0
    except (InputError, OSError) as error:
        return _refused(error, parser)
    except KeyboardInterrupt:
        print(f"darkmatter: interrupted; {KEPT}", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(DEBUG_ENVIRONMENT_VARIABLE) or not out_of_memory(error):
            raise
        return _refused(MemoryError(f"out of memory ({reason(error)}); {KEPT} with more"), parser)
