"""Report bad input in one line: argument, rule, given value. Any other error is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_REASON = 400  # characters: torch lists every key of a state_dict, the hub a page of advice


class InputError(ValueError):
    """Input that cannot be used. Its text is one line: `argument: rule, got value`."""

    def __init__(self, text: str = "") -> None:
        # A value may come from a damaged file: what would begin a line is a space, what would steer a terminal an escape.
        shown = (" " if one in "\n\r\t" else one if one.isprintable() else ascii(one)[1:-1] for one in text)
        super().__init__("".join(shown))

    @property
    def argument(self) -> str:
        """The argument that the message is about, as the called function names it."""
        return str(self).partition(":")[0]


class StateError(InputError, RuntimeError):
    """Something a run needs on this machine is damaged or missing: a cache, a checkpoint, the compiled ops, a server."""


def require(holds: bool, argument: str, rule: str, given: object) -> None:
    """Raise InputError unless a rule holds: `argument: rule, got given`."""
    if not holds:
        raise InputError(f"{argument}: {rule}, got {given}")


def require_one_of(argument: str, allowed: tuple[str, ...], given: object) -> None:
    """Raise InputError unless a name is among those allowed."""
    require(given in allowed, argument, f"must be {_choice(allowed)}", repr(given))


def require_at_least(argument: str, minimum: float, given: float) -> None:
    """Raise InputError for a number below the minimum."""
    require(given >= minimum, argument, f"must be at least {minimum:g}", given)


def _choice(allowed: tuple[str, ...]) -> str:
    return " or ".join(allowed) if len(allowed) == 2 else f"one of {', '.join(allowed)}"


def reason(error: BaseException) -> str:
    """What an exception says, on one line: not just its first line, because torch puts the reason on the second."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = f"no key {text}"
    if not text:
        return type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 4]} ..."


# What libraries say when the system gives no more memory: torch on the CPU and on a GPU, C++, the loader of libraries, files.
_OUT_OF_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "failed to map segment",
    "can't start new thread",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any library says that there is no more memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


@contextmanager
def told(argument: str, rule: str, given: object) -> Iterator[None]:
    """Turn the various errors of other libraries into one line: `argument: rule, got given (reason)`.

    A tensor that finds no memory is one of them: a damaged file may ask for any size.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{argument}: {rule}, got {given} ({reason(error)})") from None
