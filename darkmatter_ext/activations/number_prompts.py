"""Texts with numbers in them: a model's states at a number, and what patching that state does to counting on.

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

Ids = Callable[[str], list[int]]  # the tokens of a text, BOS before them where the model is used with it


def tokens_of(tokenizer: Any, *, bos: bool) -> Ids:
    """What makes the tokens of a text."""
    first = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    return lambda text: [*first, *tokenizer(text, add_special_tokens=False)["input_ids"]]


@torch.inference_mode()
def number_states(
    network: Any, hooks: Sequence[str], rows: Sequence[Sequence[Sequence[int]]], advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """Hook point -> [v, t, d] float32 on the CPU: the state at the last token of every row.

    Raises InputError when the model reads two values as the same tokens.
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
    """Texts that count on, such as "23, 24, 25, 2", all of one length, and the same with another last number."""

    tokens: Tensor  # [n, L]
    other: Tensor  # [n, L] the last number is another
    place: int  # where that number ends
    value: Tensor  # [n] int64, the last number
    to: Tensor  # [n] int64, the other
    own: Tensor  # [n] the token that goes on
    answer: Tensor  # [n] the token that would go on from the other


def counting_prompts(ids: Ids, values: Sequence[int], *, seed: int) -> Prompts | None:
    """A prompt for every value whose successor differs in its last digit alone; None where tokens are not digits."""
    generator, low, high = torch.Generator().manual_seed(seed), min(values), max(values)
    rows = []
    for a in values:
        leading, first = str(a)[:-1], a - a % 10
        others = [b for b in range(max(low, first), min(high, first + 9)) if b != a]
        if a < 10 or a - 2 < 0 or a % 10 == 9 or not others:
            continue
        b = others[int(torch.randint(len(others), (1,), generator=generator))]
        before = f"{a - 2}, {a - 1}, "
        text, other = (ids(f"{before}{value}, {leading}") for value in (a, b))
        place = len(ids(f"{before}{a}")) - 1
        goes_on = [ids(f"{before}{value}, {leading}{(value + 1) % 10}") for value in (a, b)]
        if all(len(row) == len(text) + 1 for row in goes_on) and goes_on[0][:-1] == text and len(other) == len(text):
            rows.append((text, other, place, a, b, goes_on[0][-1], goes_on[1][-1]))
    shapes = [(len(row[0]), row[2]) for row in rows]
    if not rows:
        return None
    kept = [row for row, shape in zip(rows, shapes, strict=True) if shape == max(set(shapes), key=shapes.count)]
    text, other, place, *rest = zip(*kept, strict=True)
    return Prompts(torch.tensor(text), torch.tensor(other), place[0], *(torch.tensor(column) for column in rest))


@torch.inference_mode()
def continued_rightly(network: Any, prompts: Prompts) -> Tensor:
    """[n] bool: whether the model's first choice goes on counting."""
    return (network(prompts.tokens.to(network.device), use_cache=False).logits[:, -1].argmax(-1).cpu()) == prompts.own


def patch_logits(model: SplicedModel, prompts: Prompts, moves: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """The logit [n] of the other number's successor, as it is and with the state at the number's end replaced.

    Args:
        model: from the site on.
        moves: name -> [n, d] that are added to the state; `random_move` is made of the helix's.

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
    """Scores of patches, 0 for the mean state's and 1 for the other number's own, with intervals by prompt, each of another
    value (Fieller); NaN where the two cannot be told apart."""
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
