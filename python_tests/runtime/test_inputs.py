"""Bad input is one line and exit code 2; everything else is a bug of ours and keeps its traceback."""

import subprocess
import sys

import pytest

from darkmatter_ext import cli
from darkmatter_ext.experiments import experiment
from darkmatter_ext.runtime.inputs import (
    LONGEST_REASON,
    InputError,
    StateError,
    reason,
    require,
    require_at_least,
    require_one_of,
    told,
)


def _line(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return str(caught.value)


def test_each_rule_names_argument_rule_and_value():
    require(True, "x", "must vary", "a constant")
    assert _line(require, False, "x", "must vary", "a constant") == "x: must vary, got a constant"
    require_one_of("split", ("rows", "tokens"), "rows")
    assert _line(require_one_of, "split", ("rows", "tokens"), "x") == "split: must be rows or tokens, got 'x'"
    assert _line(require_one_of, "kind", ("a", "b", "c"), 3) == "kind: must be one of a, b, c, got 3"
    require_at_least("k", 1, 1)
    assert _line(require_at_least, "k", 1, 0) == "k: must be at least 1, got 0"
    assert _line(require_at_least, "ratio", 0.5, 0.25) == "ratio: must be at least 0.5, got 0.25"


def test_an_input_error_is_a_value_error_that_knows_its_argument():
    error = InputError("drop_positions: must be from 0 to 7, got 8: too many")
    assert isinstance(error, ValueError)
    assert error.argument == "drop_positions"
    assert isinstance(StateError("checkpoint: is damaged"), InputError)
    assert isinstance(StateError("checkpoint: is damaged"), RuntimeError)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("Error(s) in loading:\n\tsize mismatch"), "Error(s) in loading: size mismatch"),
        (KeyError("W_enc"), "no key 'W_enc'"),
        (AssertionError(), "AssertionError"),
        (OSError("  "), "OSError"),
    ],
)
def test_the_reason_of_another_librarys_error_is_one_line(error, text):
    assert reason(error) == text


def test_a_long_reason_is_cut():
    assert reason(ValueError("x " * 1000)).endswith(" ...")
    assert len(reason(ValueError("x " * 1000))) == LONGEST_REASON


def test_told_turns_any_error_into_one_and_leaves_ours_alone():
    def other_library():
        with told("model", "must be a causal language model", "'a/b'"):
            raise OSError("not found\nat the hub")

    assert _line(other_library) == "model: must be a causal language model, got 'a/b' (not found at the hub)"

    def ours():
        with told("model", "must be a causal language model", "'a/b'"):
            raise StateError("cache: is damaged, got a file")

    with pytest.raises(StateError, match=r"^cache: is damaged, got a file$"):
        ours()
    with pytest.raises(KeyboardInterrupt), told("model", "must be", "x"):
        raise KeyboardInterrupt
    with told("model", "must be", "x"):
        pass


# ---- at the command line


def _planted(monkeypatch, error):
    def run(_settings, _stages):
        raise error

    monkeypatch.setattr(experiment("synthetic"), "run", run)


def test_an_input_error_of_an_experiment_is_one_line_with_the_flags_name(monkeypatch, capsys, tmp_path):
    _planted(monkeypatch, InputError("drop_positions: must be from 0 to 31,\ngot 32"))
    assert cli.main(["run", "synthetic", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "darkmatter: --drop-positions: must be from 0 to 31, got 32\n"
    _planted(monkeypatch, StateError("no_flag_of_ours: must be there, got none"))
    assert cli.main(["run", "synthetic", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "darkmatter: no_flag_of_ours: must be there, got none\n"


def test_a_full_disk_is_one_line_too(monkeypatch, capsys, tmp_path):
    _planted(monkeypatch, OSError(28, "No space left on device"))
    assert cli.main(["run", "synthetic", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "darkmatter: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("kind", [TypeError, ValueError, RuntimeError, KeyError, AttributeError])
def test_any_other_error_of_an_experiment_is_not_swallowed(monkeypatch, capsys, tmp_path, kind):
    _planted(monkeypatch, kind("a bug of ours"))
    with pytest.raises(kind, match="a bug of ours"):
        cli.main(["run", "synthetic", "--out", str(tmp_path)])
    assert capsys.readouterr().err == ""


def test_the_debug_variable_shows_where_bad_input_was_told(monkeypatch, tmp_path):
    _planted(monkeypatch, InputError("hook: must be like"))
    monkeypatch.setenv(cli.DEBUG_ENVIRONMENT_VARIABLE, "1")
    with pytest.raises(InputError, match="hook: must be like"):
        cli.main(["run", "synthetic", "--out", str(tmp_path)])


BUG = """
import sys
from darkmatter_ext import cli, experiments
def run(settings, stages):
    return len(5)
experiments.experiment("synthetic").run = run
sys.exit(cli.main(["run", "synthetic", "--out", sys.argv[1]]))
"""


@pytest.mark.runs
def test_a_bug_keeps_its_traceback_and_a_non_zero_exit(tmp_path):
    """In a process of its own, as a user sees it."""
    done = subprocess.run(
        [sys.executable, "-c", BUG, str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)") or "\nTraceback" in done.stderr
    assert "return len(5)" in done.stderr or "in run" in done.stderr
    assert "TypeError: object of type 'int' has no len()" in done.stderr
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize("error", [InputError, StateError])
def test_what_a_damaged_file_says_stays_on_one_line(error):
    """Separators are ends of lines to Python, and escape sequences are orders to a terminal."""
    said = str(error("tasks: must have a column, got targe\x1d\u2028, \x1b[2J\nprompt and é"))
    assert said == r"tasks: must have a column, got targe\x1d\u2028, \x1b[2J prompt and é"
