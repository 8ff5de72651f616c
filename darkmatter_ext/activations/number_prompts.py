"""Texts containing numbers: a model's states at a number, and what patching that state does to a sum.

Shapes: v values, t templates, n prompts, L tokens, d width of the site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.activations.hook_points import capture
from darkmatter_ext.activations.splicing import SplicedModel
from darkmatter_ext.estimators.intervals import bootstrap, ratio
from darkmatter_ext.runtime.inputs import require

TEMPLATES = (  # long enough to place the number beyond a context's first positions, which SAEs do not see
    "The meeting took place in the year 19{a}",
    "You will find more about it in chapter {a}",
    "The answer is printed at the end of page {a}",
    "At the market this morning she bought {a}",
    "By now her grandfather must be at least {a}",
    "He always wore a shirt with the number {a}",
    "The value of the variable x was set to {a}",
    "We took the bus to the station, line {a}",
)
SHOWN = ((31, 4), (54, 2))
EXAMPLES = "".join(f"{a} + {b} = {a + b}\n" for a, b in SHOWN)  # without them the embedded model cannot add
MOST_PROMPTS, READ_PROMPTS = 400, 64  # in total, and per pass
Ids = Callable[[str], list[int]]  # the tokens of a text, with BOS in front if the model is used with it


def tokens_of(tokenizer: Any, *, bos: bool) -> Ids:
    """The function that tokenises a text."""
    first = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    return lambda text: [*first, *tokenizer(text, add_special_tokens=False)["input_ids"]]


@torch.inference_mode()
def number_states(
    network: Any, hooks: Sequence[str], rows: Sequence[Sequence[Sequence[int]]], advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """Hook point -> [v, t, d] float32 on the CPU: the state at the last token of every row.

    Raises InputError if the model reads two values as the same tokens.
    """
    found: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for template in rows:
        same = len(template) - len({tuple(row) for row in template})
        require(
            same == 0,
            "model",
            "must have a tokenizer that tells the values apart",
            f"{same} with the tokens of another",
        )
        by_length: dict[int, list[int]] = {}
        for number, row in enumerate(template):
            by_length.setdefault(len(row), []).append(number)
        own: dict[str, dict[int, Tensor]] = {hook: {} for hook in hooks}
        for numbers in by_length.values():
            tokens = torch.tensor([template[number] for number in numbers], device=network.device)
            states = capture(network, hooks, lambda tokens=tokens: network(tokens, use_cache=False))
            for hook, x in states.items():
                own[hook] |= dict(zip(numbers, x[:, -1].float().cpu(), strict=True))
        for hook, states in own.items():
            found[hook].append(torch.stack([states[number] for number in range(len(template))]))
        advance(1)
    return {hook: torch.stack(columns, dim=1) for hook, columns in found.items()}


class Prompts(NamedTuple):
    """Sums up to their last digit ("23 + 4 = 2" after two examples), all of one length; also with another first number."""

    tokens: Tensor  # [n, L]
    other: Tensor  # [n, L] with another first number
    place: int  # where that number ends
    value: Tensor  # [n] int64, the first number
    to: Tensor  # [n] int64, the other first number
    added: Tensor  # [n] int64, the second number
    own: Tensor  # [n] the correct token
    answer: Tensor  # [n] the token that would be correct for the other number

    def those(self, chosen: Tensor) -> Prompts:
        """The prompts at some places, [m] int64."""

        def of(column: Any) -> Any:
            return column if isinstance(column, int) else column[chosen]

        return Prompts(*map(of, self))


def sum_prompts(ids: Ids, values: Sequence[int], *, seed: int, most: int = MOST_PROMPTS) -> Prompts | None:
    """At most `most` sums of a value and one digit without a carry; None if tokens are not digits.

    The other number differs from the value only in its last digit, so the digits shown of the sum are right for both.
    """
    generator, low, high = torch.Generator().manual_seed(seed), min(values), max(values)
    rows = []
    for a in values:
        if a < 10:
            continue
        leading, first = str(a)[:-1], a - a % 10
        for added in range(1, 10 - a % 10):
            if (a, added) in SHOWN:  # its answer is shown there
                continue
            others = [b for b in range(max(low, first), min(high, first + 9 - added) + 1) if b != a]
            if not others:
                continue
            b = others[int(torch.randint(len(others), (1,), generator=generator))]
            rows.append((leading, a, b, added))
    order = torch.randperm(len(rows), generator=generator)[:most].sort().values.tolist()
    made = [own for own in (_sum_prompt(ids, *rows[place]) for place in order) if own is not None]
    if not made:
        return None
    shapes = [(len(row[0]), row[2]) for row in made]
    kept = [row for row, shape in zip(made, shapes, strict=True) if shape == max(set(shapes), key=shapes.count)]
    text, other, place, *rest = zip(*kept, strict=True)
    return Prompts(torch.tensor(text), torch.tensor(other), place[0], *(torch.tensor(column) for column in rest))


def _sum_prompt(ids: Ids, leading: str, a: int, b: int, added: int) -> tuple[Any, ...] | None:
    """One row of Prompts; None if the last digit of the sum is not a token of its own."""
    texts = [f"{EXAMPLES}{value} + {added} = {leading}" for value in (a, b)]
    text, other = map(ids, texts)
    goes_on = [ids(f"{begun}{value % 10 + added}") for begun, value in zip(texts, (a, b), strict=True)]
    if goes_on[0][:-1] != text or goes_on[1][:-1] != other or len(other) != len(text):
        return None
    place = len(ids(f"{EXAMPLES}{a}")) - 1
    return text, other, place, a, b, added, goes_on[0][-1], goes_on[1][-1]


@torch.inference_mode()
def summed_rightly(network: Any, prompts: Prompts) -> Tensor:
    """[n] bool: whether the model's first choice is the sum's last digit."""
    parts = [part.to(network.device) for part in prompts.tokens.split(READ_PROMPTS)]
    chosen = [network(part, use_cache=False).logits[:, -1].argmax(-1).cpu() for part in parts]
    return torch.cat(chosen) == prompts.own


@torch.inference_mode()
def last_states(network: Any, hooks: Sequence[str], tokens: Tensor) -> dict[str, Tensor]:
    """Hook point -> [n, d] float32 on the CPU: the state at the last of tokens [n, L]."""
    found: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for part in tokens.to(network.device).split(READ_PROMPTS):
        states = capture(network, hooks, lambda part=part: network(part, use_cache=False))
        for hook, x in states.items():
            found[hook].append(x[:, -1].float().cpu())
    return {hook: torch.cat(parts) for hook, parts in found.items()}


def patch_logits(model: SplicedModel, prompts: Prompts, moves: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """The logit [n] of the other sum's last digit, unpatched and with the state at the number's end replaced.

    Args:
        model: from the site on.
        moves: name -> [n, d] to add to the state; `random_move` is derived from the helix's.

    Returns:
        "original", "full" (the state of the other number in the same place), "mean" (the mean state of all prompts) and
        every move.
    """
    device = model.network.device
    tokens, rows = prompts.tokens.to(device), torch.arange(len(prompts.tokens))
    x = model.activation(tokens)
    own, other = x[:, prompts.place], model.activation(prompts.other.to(device))[:, prompts.place]
    drawn = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed)).to(own)
    moves = {name: move.to(own) for name, move in moves.items()}
    moves["random_move"] = drawn / drawn.norm(dim=1, keepdim=True) * moves["helix"].norm(dim=1, keepdim=True)
    points = {"original": own, "full": other, "mean": own.mean(0).expand_as(own)}
    points |= {name: own + move for name, move in moves.items()}
    found = {}
    with torch.inference_mode():
        for name, point in points.items():
            spliced = x.clone()
            spliced[:, prompts.place] = point
            logits = model.logits(model.hidden(tokens, spliced)[:, -1]).float().cpu()
            found[name] = logits[rows, prompts.answer]
    return found


def patch_numbers(logits: Mapping[str, Tensor], *, seed: int) -> dict[str, float]:
    """Scores of patches: 0 for the mean state, 1 for the other number's own; NaN if the two cannot be distinguished.

    Intervals are by prompt (Fieller): give one prompt per value.
    """
    base = logits["mean"]
    numbers = {}
    for name, logit in logits.items():
        if name not in ("original", "full", "mean"):
            columns = torch.stack([logit - base, logits["full"] - base], dim=1)
            numbers |= ratio(columns.double()).numbers(f"patch/{name}")
    for name in ("full", "mean"):
        gain = (logits[name] - logits["original"]).double()
        sums = torch.stack([gain, torch.ones_like(gain)], dim=1)
        numbers |= bootstrap(sums, lambda s: s[..., :1] / s[..., 1:], seed=seed)[0].numbers(f"patch_logit/{name}")
    return numbers
