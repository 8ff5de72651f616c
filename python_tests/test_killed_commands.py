"""Every long command, ended by SIGKILL at random times and started again, gives what it gives undisturbed.

`DARKMATTER_KILLS=200` (`make nightly`) is how many kills in all; without it a few of two commands. Kills at chosen moments
(each read, rename and flush of a measurement, each step of a training) are in measurement/test_resume.py and
training/test_train.py.
"""

import os
import signal

import pytest
from cases.children import reports
from cases.models import make_workplace
from cases.runs import SETTINGS

KILLS = int(os.environ.get("DARKMATTER_KILLS", "0"))
COMMANDS = ("train", *SETTINGS)
FEW = {"train": 2, "decomposition": 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS if KILLS else FEW)
def test_a_killed_command_started_again_gives_the_same(name, tmp_path):
    count = -(-KILLS // len(COMMANDS)) if KILLS else FEW[name]
    workplace = tmp_path / "work"
    workplace.mkdir()
    arguments = (make_workplace(workplace), tmp_path, f"{name}:{count}")
    found = reports("interrupted_command", *arguments, DARKMATTER_PROGRESS="0")
    assert len(found) == count
    assert [own for own in found if not own["same"] or own["started_again"] != 0] == []
    killed = [own for own in found if own["status"] == -signal.SIGKILL]
    assert len(killed) >= count / 2  # the others had ended before: a machine is not always as fast
