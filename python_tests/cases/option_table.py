"""Every option of SAELens' configuration classes at every architecture: fast, or the reason why not.

The options and their values are read from the dataclasses, each cell is tried and compared with the plain twin, and the
table is docs/drop_in_options.md: in python_tests, `python -m cases.option_table` writes it anew.
"""

import dataclasses
import functools
import re
import typing
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY

import darkmatter_ext as dm
from cases import lives
from cases.life_answers import assert_alike
from cases.life_edits import Draw
from cases.pretrained import NOT_SAID, by_architecture, pretrained_options

PAGE = Path(__file__).parents[2] / "docs" / "drop_in_options.md"
D_IN, D_SAE, K, ITERATIONS = 32, 256, 8, 4
TRANSCODERS = tuple(name for name in SAE_CLASS_REGISTRY if "transcoder" in name)
FAST, IMPOSSIBLE = "fast", "-"
SIZES_AND_NAMES = (
    "d_in",
    "d_sae",
    "device",
    "metadata",
)  # decide nothing here: every size and device is tried elsewhere


@dataclasses.dataclass(frozen=True)
class Value:
    """One row of the table: a field, what is tried for it, and which configurations it stands for."""

    field: str
    label: str
    tried: object
    covers: typing.Callable[[dict], bool] | None = None  # None: those that have this very value

    def counts(self, said):
        if self.covers is not None:
            return self.covers(said)
        return said.get(self.field, NOT_SAID) == self.tried


def _exactly(field, *values):
    return [Value(field, str(value), value) for value in values]


# Values of the fields whose type does not list them. A field that is neither here nor listed by its type fails the test.
OPEN_FIELDS = {
    "dtype": [Value("dtype", name, name, lambda said: False) for name in ("float32", "float64", "bfloat16", "float16")],
    "k": [
        Value("k", "up to 6 % of the latents", K, lambda said: 0 < said.get("k", 0) <= 0.06 * said["d_sae"]),
        Value("k", "more", D_SAE // 8, lambda said: said.get("k", 0) > 0.06 * said.get("d_sae", 0)),
        Value("k", "0", 0),
    ],
    "d_out": [
        Value("d_out", "d_in", D_IN, lambda said: False),
        Value("d_out", "another", 48, lambda said: False),
    ],
    "residual_threshold": _exactly("residual_threshold", 0.0, 0.01, 3.0),
    "max_iterations": [
        Value("max_iterations", "None (d_in)", None),
        Value("max_iterations", "a number", ITERATIONS),
        Value("max_iterations", "more than d_sae", D_SAE + 1),
    ],
}
# What __post_init__ accepts besides the values its type lists.
UNLISTED = {"normalize_activations": ("constant_norm_rescale",)}


def values_of(config_class, field):
    """The values of a field: from its type, or from OPEN_FIELDS."""
    kind = typing.get_type_hints(config_class)[field.name]
    if kind is bool:
        return _exactly(field.name, False, True)
    if typing.get_origin(kind) is typing.Literal:
        listed = typing.get_args(kind)
        return _exactly(field.name, *listed, *(v for v in UNLISTED.get(field.name, ()) if v not in listed))
    if field.name not in OPEN_FIELDS:
        raise AssertionError(
            f"{config_class.__name__}.{field.name}: a field this test does not know; add it to OPEN_FIELDS"
        )
    return OPEN_FIELDS[field.name]


@functools.cache
def refusal(architecture):
    """Why `accelerate` refuses an architecture as a whole, "" where it does not."""
    sae_class = SAE_CLASS_REGISTRY[architecture][0]
    try:
        dm.accelerate(sae_class.__new__(sae_class))
    except ValueError as error:
        return f"refused by accelerate: {re.search(r'[(](.*)[)]', str(error))[1]}"
    return ""


@functools.cache
def rows():
    """Every value of every field of the configurations that can be accelerated."""
    found = {}
    for architecture, (_, config_class) in SAE_CLASS_REGISTRY.items():
        if not refusal(architecture):
            for field in dataclasses.fields(config_class):
                if field.name not in SIZES_AND_NAMES:
                    found |= {(field.name, value.label): value for value in values_of(config_class, field)}
    order = [name for name, _ in found]
    return sorted(found.values(), key=lambda value: order.index(value.field))


def build(architecture, value):
    """The SAE of a cell; None where SAELens refuses the configuration, or has no such field."""
    _, config_class = SAE_CLASS_REGISTRY[architecture]
    known = {field.name for field in dataclasses.fields(config_class)}
    if value.field not in known:
        return None
    options = {"apply_b_dec_to_input": False, "d_out": D_IN} if architecture in TRANSCODERS else {}
    options |= {"k": K} if "k" in known else {}
    options |= {"max_iterations": ITERATIONS} if "max_iterations" in known else {}
    try:
        return lives.Config(architecture, D_IN, D_SAE, options | {value.field: value.tried}).build()
    except (ValueError, NotImplementedError):
        return None


def tried(architecture, value, *, gradients):
    """The reasons for which the calls of a cell are SAELens' own; [] where all are fast."""
    plain, fast = build(architecture, value), dm.accelerate(build(architecture, value))
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            assert_alike(plain, fast, lives.tokens(plain, Draw(3), lives.N_TOKENS))
    stats = dm.stats(fast)
    slow = {"encode", "decode", "forward"} - stats.fast.keys()
    return sorted({reason for method, reasons in stats.fallback.items() if method in slow for reason in reasons})


@functools.cache
def cell(architecture, field, label):
    """ "fast", "-" (no such SAE), or the reasons."""
    value = next(v for v in rows() if (v.field, v.label) == (field, label))
    if refusal(architecture):
        return refusal(architecture)
    if build(architecture, value) is None:
        return IMPOSSIBLE
    without, with_gradients = (tried(architecture, value, gradients=g) for g in (False, True))
    if without:
        return "; ".join(without)
    return FAST if not with_gradients else f"fast without gradients; with them: {'; '.join(with_gradients)}"


# The page

INTRODUCTION = """# Options of SAELens, and which are fast

Every option of the configuration classes of sae_lens {version} at every architecture it registers
for inference, tried and compared with the plain SAE: **fast** means that `encode`, `decode` and
`forward` all went through this package; a number in brackets is the reason why SAELens answers,
below the table; "-" means that SAELens has no such SAE. One option at a time differs from its
default. Whatever the table says, the answer is that of SAELens. An option is not all that
decides: SAEs of fewer than 256 latents, dense latents and processors without vector kernels are
SAELens' own (`dm.stats` says so), and so is a decode too small to pay (that limit is off here).

After "·": how many of the {n} SAEs in SAELens' `pretrained_saes.yaml` are in that cell. Counted
without network: the configuration function of each loader is called with every download failing,
and says what it knows from names. For loaders that need a file, what their source fixes is
counted, and dictionary_learning's class is taken from the name of the release. Fields that only
the file holds are not counted (all of the 289 in SAELens' own format; `k` of
dictionary_learning), nor is `dtype`, which the caller of `from_pretrained` chooses (float32 by
default).

The tests compare this page with what they find; in python_tests, `python -m cases.option_table`
writes it.
"""


def page():
    options = pretrained_options()
    architectures, totals = list(SAE_CLASS_REGISTRY), by_architecture(options)
    reasons, lines = {}, []
    for value in rows():
        row = []
        for architecture in architectures:
            text = cell(architecture, value.field, value.label)
            if text not in (FAST, IMPOSSIBLE):
                text = f"[{reasons.setdefault(text, len(reasons) + 1)}]"
            count = sum(value.counts(said) for said in options if said.get("architecture") == architecture)
            row.append(text + (f" · {count}" if count and text != IMPOSSIBLE else ""))
        lines.append(f"| {value.field} | {value.label} | {' | '.join(row)} |")
    total = " | ".join(f"· {totals[name]}" if totals[name] else "" for name in architectures)
    return "\n".join(
        [
            INTRODUCTION.format(version=version("sae_lens"), n=len(options)),
            f"| option | value | {' | '.join(name.replace('_', ' ') for name in architectures)} |",
            "|" + "---|" * (len(architectures) + 2),
            *lines,
            f"| all | {totals[NOT_SAID]} of unknown architecture | {total} |",
            "",
            *[f"{number}. {reason}" for reason, number in reasons.items()],
            "",
        ]
    )


if __name__ == "__main__":
    from cases.peer_option_table import section

    PAGE.write_text(f"{page()}\n{section()}")
