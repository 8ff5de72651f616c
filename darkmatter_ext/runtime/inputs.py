"""Errors of other libraries told in one line: the reason is kept, whatever line it stands on."""

from __future__ import annotations

LONGEST_REASON = 400  # characters: torch lists every key of a state_dict, the hub a page of advice


def told(error: BaseException) -> str:
    """What an exception says, on one line: never only its first line, for torch puts the reason on the second."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = f"no key {text}"
    if not text:
        return type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 4]} ..."
