"""A limit of memory that is too low is told before anything begins; and libraries are understood when they ran out."""

import pytest
import torch
from cases.children import run_python

from darkmatter_ext import cli
from darkmatter_ext.runtime.inputs import InputError, out_of_memory

GIB = 1 << 30


def test_a_limit_below_the_least_is_told(monkeypatch):
    for limit, shown in [(cli.LEAST_ADDRESS_SPACE - 1, 4095), (GIB, 1024), (0, 0)]:
        monkeypatch.setattr(cli.resource, "getrlimit", lambda _, limit=limit: (limit, cli.resource.RLIM_INFINITY))
        with pytest.raises(InputError, match=f"must be at least 4096 MiB or unlimited .*, got {shown}$"):
            cli._require_address_space()
    for limit in (cli.LEAST_ADDRESS_SPACE, cli.resource.RLIM_INFINITY):
        monkeypatch.setattr(cli.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        cli._require_address_space()


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "env"])
def test_every_command_is_told_before_it_begins(name, tmp_path):
    code = (
        "import resource, sys; from darkmatter_ext import cli;"
        f"resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28)); status = cli.main([{name!r}]);"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    environment = {"DARKMATTER_CACHE": str(tmp_path / "cache"), "DARKMATTER_DEBUG": "", "WORLD_SIZE": "2", "RANK": "1"}
    run = run_python(code, check=False, **environment)
    assert run.returncode == 2
    assert run.stderr == (
        "darkmatter [process 1]: the limit of address space: must be at least 4096 MiB or unlimited (`ulimit -v`), got 256\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_libraries_say_without_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.int8)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shape '[3]' is invalid for input of size 4"))
