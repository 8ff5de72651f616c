"""What a reader of a result must know about its tokens: which are left out and why, how they are split, what was followed."""

from __future__ import annotations

from collections.abc import Mapping

from darkmatter_ext.activations.store import load_tokenizer
from darkmatter_ext.activations.text import bos_note
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.resolved import Resolved

FEW_TOKENS = 20  # per dimension: b* fitted on fewer fits noise


def run_notes(found: Resolved, sites: Mapping[str, SiteMeasurement], counts: Mapping[str, float]) -> list[str]:
    """Notes on a measurement. `counts`: what its result reports about tokens."""
    lines = token_notes(found, counts)
    lines += [*found.usage.notes, *rank_notes(sites)]
    widest = max(len(b_star.weight) for site in sites.values() for b_star in site.maps.values())
    return lines + few_tokens_note(widest, next(iter(sites.values())).n_fit)


def token_notes(found: Resolved, counts: Mapping[str, float]) -> list[str]:
    """How many tokens each rule left out, and how the others are split; the numbers are those of the result."""
    measure, usage, settings = found.settings.measure, found.usage, found.settings
    names = ("dropped_first_positions", "left_out_special", "left_out_high_norm")
    position, special, norm = (int(counts[f"tokens/{name}"]) for name in names)
    used = ("fit", "held_out", "sae_training", *(("norm_fit",) if measure.passes == 1 else ()))
    total = position + special + norm + sum(int(counts.get(f"tokens/{name}", 0)) for name in used)
    within = f" or not in {slice(*usage.positions)}" if usage.positions else ""
    what = f"{special} for being special, " if found.excluded else ""
    lines = [
        f"{position} of {total} tokens are left out by position (below {measure.drop_positions}{within}), {what}{norm} by "
        f"norm (above {measure.max_norm_ratio:g} medians of the first contexts)."
    ]
    if "tokens/sae_training" in counts and not settings.saes.sae:
        training = int(counts["tokens/sae_training"])
        lines.append(f"Split by {measure.split}: {training} tokens train the SAEs and are not measured.")
    stored = settings.data.stored
    front = "BOS as they were stored" if stored else bos_note(load_tokenizer(found.model), usage.bos)
    asked = f"; weights processed by TransformerLens ({', '.join(usage.processing)})" if usage.processing else ""
    readings = f"{measure.passes} reading{'s' if measure.passes > 1 else ''} of every token"
    lines.append(f"Contexts of {usage.context_length} tokens, {front}, split by {measure.split}; {readings}{asked}.")
    return lines


def rank_notes(sites: Mapping[str, SiteMeasurement]) -> list[str]:
    """A note on sites whose activations do not span their width: b* is not unique there, its share cannot grow with width."""
    ranks = {hook: next(iter(site.maps.values())) for hook, site in sites.items()}
    return [
        f"{hook}: the activations span {b_star.rank} of {len(b_star.weight)} dimensions on the fit tokens."
        for hook, b_star in ranks.items()
        if b_star.rank < len(b_star.weight)
    ]


def few_tokens_note(d: int, n_fit: int) -> list[str]:
    """A note if b* has too few tokens."""
    few = n_fit < FEW_TOKENS * d
    return [f"b* has {d} inputs and {n_fit} tokens to fit them: expect overfitting (see r2_vec_train)."] if few else []
