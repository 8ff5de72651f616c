"""Every option of sparsify's SparseCoder and of dictionary_learning's dictionaries: fast, or the reason why not.

Options are read from the configuration class and from the signatures of encode and forward; each cell is tried and compared
with the plain twin. The tables are the second part of docs/drop_in_options.md, which `python -m cases.option_table` writes.
"""

import dataclasses
import functools
import inspect
import typing
from importlib.metadata import version

import torch

import darkmatter_ext as dm
from cases import peers
from cases.peer_lives import assert_alike

HEADING = "# Options of sparsify and dictionary_learning"
DTYPES = ("float32", "float64", "bfloat16", "float16")
SIZES = ("expansion_factor", "num_latents")  # decide nothing here
N_TOKENS = 12


@dataclasses.dataclass(frozen=True)
class Value:
    """One row: an option, what is tried for it, and how it is set (cfg, dtype, k, attribute, encode or forward)."""

    option: str
    label: str
    tried: object
    how: str


def _dtypes():
    return [Value("dtype", name, getattr(torch, name), "dtype") for name in DTYPES]


def _ks():
    return [Value("k", "up to 6 % of the latents", peers.K, "k"), Value("k", "more", peers.F // 8, "k")]


@functools.cache
def coder_rows():
    """Of SparseCoderConfig; a field that is neither of a listed type nor a size fails the test."""
    config, found = type(peers.sparse_coder().cfg), _dtypes()
    for field in dataclasses.fields(config):
        kind = typing.get_type_hints(config)[field.name]
        if field.name == "k":
            found += _ks()
        elif field.name not in SIZES:
            values = (False, True) if kind is bool else typing.get_args(kind)
            assert values, f"{config.__name__}.{field.name}: an option this test does not know"
            found += [Value(field.name, str(value), value, "cfg") for value in values]
    return tuple(found)


def _arguments(kind, method):
    """Those of a method besides the tensor, with their defaults."""
    signature = inspect.signature(getattr(type(peers.make(kind)), method))
    return {name: given.default for name, given in list(signature.parameters.items())[2:]}


@functools.cache
def dictionary_rows():
    """Of the arguments of encode and forward, the dtypes, k, and what loading from SAELens sets."""
    found = [*_dtypes(), *_ks()]
    found += [Value("apply_b_dec_to_input", str(value), value, "attribute") for value in (False, True)]
    for method in ("encode", "forward"):
        for name in dict.fromkeys(name for kind in peers.DICTIONARIES for name in _arguments(kind, method)):
            values = ("None", None), ("a mask", torch.ones(peers.F))
            if name != "ghost_mask":
                values = ("False", False), ("True", True)
            found += [Value(f"{method}({name})", label, tried, method) for label, tried in values]
    return tuple(found)


def _built(kind, value):
    """The SAE of a cell; None where its class has no such option."""
    if value.how == "cfg":
        sae = peers.sparse_coder(**{value.option: value.tried})
        with torch.no_grad():
            state = peers.make("SparseCoder").state_dict()
            sae.load_state_dict(state | {name: v for name, v in sae.state_dict().items() if name not in state})
        return sae
    dtype = value.tried if value.how == "dtype" else torch.float32
    sae = peers.make(kind, dtype)
    if value.how == "k":
        if peers.is_coder(sae):
            sae.cfg.k = value.tried
        elif "k" not in sae._buffers:
            return None
        else:
            sae.k.fill_(value.tried)
    elif value.how == "attribute":
        if not hasattr(sae, value.option):
            return None
        setattr(sae, value.option, value.tried)
    return sae


@functools.cache
def cell(kind, option, label):
    """ "fast", "-" (no such option), or the reasons."""
    value = next(v for v in (*coder_rows(), *dictionary_rows()) if (v.option, v.label) == (option, label))
    plain = _built(kind, value)
    if plain is None:
        return "-"
    fast = dm.accelerate(_built(kind, value))
    x = peers.activations(N_TOKENS, dtype=peers.parts(plain).W_enc.dtype)
    methods = {"encode"} if peers.is_coder(plain) else {"encode", "decode", "forward"}
    with torch.no_grad():
        if value.how in ("encode", "forward"):
            name, methods = option[len(value.how) + 1 : -1], {value.how}
            if name not in _arguments(kind, value.how):
                return "-"
            for _ in range(2):
                theirs, ours = (getattr(sae, value.how)(x, **{name: value.tried}) for sae in (plain, fast))
            for pair in zip(*(each if isinstance(each, tuple) else (each,) for each in (theirs, ours)), strict=True):
                peers.assert_close(plain, *(each.float() for each in pair), scale=100)
        else:
            for _ in range(2):
                assert_alike(plain, fast, x)
    if peers.is_coder(plain):  # comparing has read pre_acts: ask a fresh one what forward does
        fast = dm.accelerate(_built(kind, value))
        with torch.no_grad():
            fast(x), fast(x)
    stats = dm.stats(fast)
    slow = methods - stats.fast.keys() or (peers.is_coder(plain) and stats.fallback.keys())
    reasons = sorted({why for name, whys in stats.fallback.items() if name in slow for why in whys})
    return "; ".join(reasons) if slow else "fast"


INTRODUCTION = """{heading}

The same for the objects of eai-sparsify {sparsify} and dictionary_learning {dictionary}, under
`torch.no_grad()`: with gradients both libraries answer every call. A row of `encode(...)` or
`forward(...)` is one argument of that call. Of sparsify's encode, decode and forward it is encode
that is fast (decode is as fast already, forward is made of both). BatchTopKSAE keeps its k for the
calls with `use_threshold=False`.
"""


def section():
    """The text, as the page has it."""
    reasons, lines = {}, []

    def table(kinds, rows):
        lines.extend([f"| option | value | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 2)])
        for value in rows:
            cells = [cell(kind, value.option, value.label) for kind in kinds]
            told = [c if c in ("fast", "-") else f"[{reasons.setdefault(c, len(reasons) + 1)}]" for c in cells]
            lines.append(f"| {value.option} | {value.label} | {' | '.join(told)} |")
        lines.append("")

    table(("SparseCoder",), coder_rows())
    table(tuple(peers.DICTIONARIES), dictionary_rows())
    versions = {"sparsify": version("eai-sparsify"), "dictionary": version("dictionary_learning")}
    numbered = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([INTRODUCTION.format(heading=HEADING, **versions), *lines, *numbered, ""])
