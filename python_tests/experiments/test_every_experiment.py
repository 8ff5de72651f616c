"""What every experiment owes its reader: a question, presets, a plan, help, a table, a reading, figures from its file alone.

The contract is the docstring of darkmatter_ext/experiments/__init__.py. A new file in that folder is tested here by itself.
"""

import dataclasses
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from cases.runs import SETTINGS, command

import darkmatter_ext
from darkmatter_ext import cli, experiments
from darkmatter_ext.report.result import Result, load_result
from darkmatter_ext.report.table import Table

NAMES = experiments.names()
PACKAGE = Path(darkmatter_ext.__file__).parent


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_every_experiment_has_a_run_for_its_tests():
    assert sorted(SETTINGS) == NAMES


def test_it_says_what_it_asks_in_a_line(name):
    about = experiments.about(name)
    assert 10 < len(about) <= 110
    assert about[-1] in ".?"


def test_it_has_what_the_contract_names(name):
    module = experiments.experiment(name)
    for function in ("plan", "run", "table", "reading"):
        assert callable(getattr(module, function)), function
    assert module.FIGURES
    assert all(callable(draw) for draw in module.FIGURES.values())
    assert "demo" in module.PRESETS
    for settings in module.PRESETS.values():
        assert dataclasses.is_dataclass(settings)
        assert not isinstance(settings, type)


@pytest.mark.runs
@pytest.mark.parametrize(
    ("name", "preset"), [(name, preset) for name in NAMES for preset in experiments.experiment(name).PRESETS]
)
def test_help_shows_every_setting_once(name, preset, capsys):
    """Whichever part a setting is in: a flag of its own name, no prefix, none twice, each with its line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", name, "--preset", preset, "--help"])
    assert stopped.value.code == 0
    said, _, options = capsys.readouterr().out.partition("options:")
    assert experiments.about(name).split()[0] in said
    shown = re.findall(r"^ {2}(-[\w.-]+)", options, re.MULTILINE)
    settings = [
        f"--{own.replace('_', '-')}" if len(own) > 1 else f"-{own}"
        for own in experiments.experiment(name).PRESETS[preset].flat()
    ]
    assert sorted(shown) == sorted([*settings, "-h", "--preset", "--out", "--dry-run"])


def test_a_dry_run_plans_and_does_nothing(name, workplace, capsys, tmp_path):
    assert cli.main(command(workplace, name, "--dry-run", "--out", str(tmp_path / "no"))) == 0
    assert capsys.readouterr().out.count("\n") >= 3
    assert not (tmp_path / "no").exists()


@pytest.mark.runs
def test_a_run_leaves_its_result_its_figures_and_a_page(name, finished):
    folder, result, said = finished(name)
    assert result.experiment == name
    assert result.numbers
    assert result.provenance["versions"]
    assert set(result.config) == set(experiments.experiment(name).PRESETS["demo"].flat())
    figures = {path.name for path in folder.glob("*.png")}
    assert figures
    assert figures <= {f"{name}_{figure}.png" for figure in experiments.experiment(name).FIGURES}
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(figures)
    for path in ("report.html", f"{name}.json", *figures):
        assert path in said.replace(" ", "")


def _called(folders, work):
    """The functions of those folders of the package that `work` calls, and what it returns."""
    roots = tuple(f"{PACKAGE / folder}/" for folder in folders)
    seen = set()

    def watch(frame, event, _argument):  # returns None: nothing inside a function is traced
        if event == "call" and frame.f_code.co_filename.startswith(roots):
            seen.add(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    sys.settrace(watch)
    try:
        return seen, work()
    finally:
        sys.settrace(None)


@pytest.mark.runs
def test_table_reading_and_figures_are_made_from_the_file_alone(name, finished, tmp_path):
    """Nothing that measures is called, no SAE, model or activation is touched: years later the file is enough."""
    folder, _, _ = finished(name)
    experiments.experiment(name)  # its settings are imported from where they are defined

    def work():
        result = load_result(folder / f"{name}.json")
        return experiments.section(result, experiments.draw(result, tmp_path, kind="svg"))

    called, section = _called(("activations", "saes", "measurement", "ops"), work)
    assert called == set()
    assert isinstance(section.table, Table)
    assert section.table.rows
    assert {len(row) for row in section.table.rows} == {len(section.table.headings)}
    assert section.reading
    assert all(isinstance(line, str) and line for line in section.reading)
    assert {figure.path.stem for figure in section.figures} == {path.stem for path in folder.glob("*.png")}


@pytest.mark.slow
def test_the_page_says_the_command_that_makes_the_result_again(name, finished):
    """Parsed again it gives the settings of the run, but for where they came from."""
    _, result, _ = finished(name)
    words = shlex.split(experiments.command(result))
    assert words[:3] == ["darkmatter", "run", name]
    parser = cli._Parser()
    cli._add_run(parser, words[2:])
    again = parser.parse_args(words[2:]).settings.flat()
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in result.config.items()}
    filled = {"hook"} if config.get("layers") else set()
    assert {key: again[key] for key in again if key not in filled} == {
        key: config[key] for key in again if key not in filled
    }


def test_a_setting_given_empty_is_in_the_command():
    """What a preset has and a run was told to leave out: without the flag the command would make another result."""
    preset = experiments.experiment("probing").PRESETS["demo"]
    settings = dataclasses.asdict(preset.saes).items()
    usual = {name: list(value) if isinstance(value, tuple) else value for name, value in settings}
    assert usual["frozen"] == ["decoder"]
    result = Result("probing", usual | {"frozen": [], "seed": 0}, {})
    words = shlex.split(experiments.command(result))
    assert words == ["darkmatter", "run", "probing", "--frozen"]


# ---- an experiment that a user adds

DUMMY = '''"""How many tokens are there?

They are counted.
"""

from dataclasses import asdict, dataclass

from darkmatter_ext.report.result import Result, provenance
from darkmatter_ext.report.table import Table


@dataclass(frozen=True)
class Settings:
    tokens: int = 5
    """how many to count"""
    device: str = "cpu"
    """where"""
    seed: int = 0
    """of nothing"""


PRESETS = {"demo": Settings(), "more": Settings(tokens=50)}


def plan(settings):
    return [f"count {settings.tokens} tokens"]


def run(settings, stages):
    numbers = {"tokens": float(settings.tokens)}
    return Result("count-tokens", asdict(settings), numbers, provenance=provenance(settings.device))


def table(result):
    return Table("counted", ("what", "tokens"), [["all", f"{result.numbers['tokens']:.0f}"]])


def reading(result):
    return [f"There are {result.numbers['tokens']:.0f}."]


def counted(result):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().bar(["tokens"], [result.numbers["tokens"]])
    return figure


FIGURES = {"counted": counted, "nothing": lambda result: None}
'''


@pytest.fixture
def dummy(tmp_path, monkeypatch):
    """One more file where experiments are looked for."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "count_tokens.py").write_text(DUMMY)
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(folder)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("darkmatter_ext.experiments.count_tokens", None)
    vars(experiments).pop("count_tokens", None)


@pytest.mark.runs
@pytest.mark.usefixtures("dummy")
def test_one_file_is_an_experiment(tmp_path, capsys, refused):
    assert cli.main(["list"]) == 0
    assert "count-tokens" in (listed := capsys.readouterr().out)
    assert "How many tokens are there? presets: demo, more" in listed
    with pytest.raises(SystemExit):
        cli.main(["run", "count-tokens", "--help"])
    assert "how many to count" in capsys.readouterr().out
    assert cli.main(["run", "count-tokens", "--preset", "more", "--dry-run"]) == 0
    assert capsys.readouterr().out == "count 50 tokens\n"
    out = tmp_path / "out"
    assert cli.main(["run", "count-tokens", "--tokens", "7", "--out", str(out)]) == 0
    assert "There are 7." in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"count-tokens.json", "count-tokens_counted.png", "report.html"}
    result = str(out / "count-tokens.json")
    assert cli.main(["figure", result, "--out", str(tmp_path / "again"), "--kind", "pdf"]) == 0
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["count-tokens_counted.pdf"]
    assert cli.main(["report", result, "--out", str(tmp_path / "page.html")]) == 0
    assert "There are 7." in (tmp_path / "page.html").read_text()
    refused(["run", "count-tokens", "--tokens", "many"], "argument --tokens: invalid")


def test_without_the_file_it_is_none(refused):
    assert "count-tokens" not in experiments.names()
    refused(["run", "count-tokens"], "EXPERIMENT: must be one of adapt, ")
