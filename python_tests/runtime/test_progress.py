"""Progress without a terminal is a line a stage, on standard error; without `show` nothing."""

from darkmatter_ext.runtime.html import html_table
from darkmatter_ext.runtime.progress import Stages


def _two_stages(stages):
    with stages.shown():
        with stages.stage("train SAE, 24 latents", 3) as advance:
            advance(3)
        with stages.stage("measure"):
            pass


def test_a_line_a_stage(capsys):
    stages = Stages(show=True)
    _two_stages(stages)
    said = capsys.readouterr()
    assert said.err == "train SAE, 24 latents: 0 s\nmeasure: 0 s\n"
    assert said.out == ""
    assert list(stages.seconds) == ["train SAE, 24 latents", "measure"]


def test_nothing_is_shown_unless_asked(capsys):
    _two_stages(Stages(show=False))
    assert capsys.readouterr().err == ""


def test_tables_for_notebooks_hold_text_only():
    made = html_table("a <b>", ["<i>"], [[1, "<script>"]], ["x & y"])
    assert "&lt;script&gt;" in made
    assert "<b>a &lt;b&gt;</b>" in made
    assert "x &amp; y" in made
    assert "<i>" not in made
