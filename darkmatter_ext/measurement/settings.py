"""What a run needs to know: which activations, which SAEs, what is measured. Data and checks; nothing is read or run here.

`Settings` is composed of three parts. An experiment adds fields of its own to it; a preset only sets values. Every name
is a flag of the command line and a keyword of `dm.measure`, whichever part it is in: names are unique.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from darkmatter_ext.activations.hook_points import parse_hook_point
from darkmatter_ext.estimators.sums import PRODUCTS
from darkmatter_ext.measurement.metadata import DEFAULT_CONTEXT_LENGTH, InputFlags
from darkmatter_ext.runtime.inputs import InputError, require, require_at_least, require_one_of
from darkmatter_ext.training.config import ARCHITECTURES, FREEZES

DTYPES = ("float32", "bfloat16", "float16")
SPLITS = ("documents", "contexts", "tokens")
PARITIES = ("paper", "released-code")
TRAINED_HOOK = "blocks.10.hook_resid_post"  # of SAEs that are trained here


@dataclass(frozen=True)
class Data(InputFlags):
    """Which activations."""

    model: str = ""
    """the embedded model, gemma-3-270m, a folder, or a Hugging Face id; default: as the SAEs say, else the embedded one"""
    accept_terms: bool = False
    """accept the model's terms of use, once, where it has some (gemma-3-270m: https://ai.google.dev/gemma/terms)"""
    text: str = ""
    """UTF-8 text file to measure on; default: the documentation installed on this machine"""
    dataset: str = ""
    """Hugging Face dataset (hub id or local path) with a column `text`, instead of text"""
    tokenised: str = ""
    """pre-tokenised dataset with a column `input_ids` or `tokens`, instead of text"""
    cache: tuple[str, ...] = ()
    """read activations from here instead of a model: caches of this package (one a hook), or a SAELens dataset"""
    store: bool = False
    """keep activations on disk, for other runs on the same text; SAEs trained here need it, and it is then so"""
    shuffle_buffer: int = 0
    """shuffle the streamed dataset in a buffer of so many documents; 0: in its order"""
    contexts_per_document: int = 0
    """take at most so many contexts of a document; 0: all"""
    tokens: int = 200_000
    """tokens of text, first positions included; SAEs trained here take their share of them"""
    dtype: str = "float32"
    """of the model: float32, bfloat16 or float16"""
    forward_tokens: int = 0
    """tokens through the model at a time; 0: 4096 where activations are streamed, 2048 where they are stored"""
    device_map: str = ""
    """spread the model over devices as transformers does ("auto"), instead of device"""

    def __post_init__(self) -> None:
        self.check_inputs()
        require_one_of("dtype", DTYPES, self.dtype)
        require_at_least("tokens", 2, self.tokens)
        for name in ("shuffle_buffer", "contexts_per_document", "forward_tokens"):
            require_at_least(name, 0, getattr(self, name))
        given = [name for name in ("text", "dataset", "tokenised", "cache") if getattr(self, name)]
        if len(given) > 1:
            raise InputError(f"{given[0]}: give one of {' and '.join(given)}, got both")

    @property
    def stored(self) -> str:
        """The setting that names what was made before, activations or tokens; nothing where text is given."""
        return "cache" if self.cache else "tokenised" if self.tokenised else ""


class ToTrain(NamedTuple):
    """An SAE that is trained here."""

    architecture: str
    width: int
    k: int
    seed: int = 0  # added to the run's
    freeze: str = "none"  # what stays as drawn: a control

    def name(self, *, with_k: bool) -> str:
        """As results call it."""
        parts = [self.architecture, str(self.width)]
        parts += [f"k{self.k}"] if with_k else []
        parts += [f"seed{self.seed}"] if self.seed else []
        parts += [f"frozen-{self.freeze}"] if self.freeze != "none" else []
        return "-".join(parts)


@dataclass(frozen=True)
class Saes:
    """Which SAEs: those that exist, or SAEs trained here."""

    sae: tuple[str, ...] = ()
    """SAEs: folders of a known format, or RELEASE:ID of SAELens' list; none: train SAEs of widths here"""
    predictor: tuple[str, ...] = ()
    """SAEs of other sites (as sae) whose outputs join x as predictors of the errors"""
    hook: str = ""
    """site, as TransformerLens names it, of SAEs that do not say theirs; of SAEs trained here (blocks.10.hook_resid_post)"""
    layers: tuple[int, ...] = ()
    """blocks at whose residual stream SAEs are trained, instead of hook"""
    architectures: tuple[str, ...] = ("topk",)
    """of the SAEs to train: topk, batchtopk, jumprelu, matryoshka"""
    widths: tuple[int, ...] = (1024, 2048, 4096)
    """latents of the SAEs to train"""
    k: int = 32
    """active latents a token of the SAEs to train"""
    ks: tuple[int, ...] = ()
    """instead of k, several: SAEs of every width are trained with each, the widest of several with the middle one only"""
    full_grid: bool = False
    """train the widest with every one of ks too: it takes about as long as all the others"""
    sae_seeds: int = 1
    """train every SAE so many times, each from a start of its own (with several ks: those of the middle one)"""
    frozen: tuple[str, ...] = ()
    """controls: train the middle width once more with its decoder, encoder or soft-decoder (cosine >= 0.8) as drawn"""
    steps: int = 400
    """training steps of 2048 tokens"""
    sae_fraction: float = 0.6
    """share of the text that trains the SAEs and is not measured (unused with sae)"""
    sae_dtype: str = "float32"
    """of the SAEs' weights: float32, bfloat16 or float16"""

    def __post_init__(self) -> None:
        if self.hook:
            parse_hook_point(self.hook)
        require_one_of("sae_dtype", DTYPES, self.sae_dtype)
        for name in ("k", "steps", "sae_seeds"):
            require_at_least(name, 1, getattr(self, name))
        for name, allowed in (("architectures", ARCHITECTURES), ("frozen", FREEZES[1:])):
            for value in getattr(self, name):
                require_one_of(name, allowed, value)
        require(bool(self.architectures), "architectures", "must name at least one", "none")
        require(0 < self.sae_fraction < 1, "sae_fraction", "must be between 0 and 1", self.sae_fraction)
        if not self.sae:
            self._check_widths()
            require(self.sae_dtype == "float32", "sae_dtype", "must be float32 for SAEs trained here", self.sae_dtype)
        for name in ("ks", "widths", "layers", "architectures", "frozen"):
            values = getattr(self, name)
            what = "numbers" if name in ("ks", "widths", "layers") else "names"
            require(len(set(values)) == len(values), name, f"must be different {what}", list(values))
        require_at_least("layers", 0, min(self.layers, default=0))
        require(bool(self.sae or not self.predictor), "sae", "must be given with predictor", "none")

    def _check_widths(self) -> None:
        require(bool(self.widths), "widths", "must name at least one width when no sae is given", "none")
        for k in self.ks:
            least = min(self.widths)
            require(1 <= k <= least, "ks", f"must be from 1 to the least of widths ({least})", k)
        least = 1 if self.ks else self.k
        for width in self.widths:
            require(width >= least, "widths", f"must be at least k ({least})", width)

    @property
    def trained_hooks(self) -> list[str]:
        """The sites of SAEs that are trained here."""
        return [f"blocks.{layer}.hook_resid_post" for layer in self.layers] or [self.hook or TRAINED_HOOK]

    @property
    def trained(self) -> list[ToTrain]:
        """The SAEs that are trained at each site: by architecture, k, width and seed, then the controls."""
        every = sorted(self.ks) or [self.k]
        middle, widest = every[(len(every) - 1) // 2], max(self.widths, default=0)
        narrower = tuple(width for width in self.widths if width < widest) or self.widths
        found = [
            ToTrain(architecture, width, k, seed)
            for architecture in self.architectures
            for k in self.ks or (self.k,)
            for width in (self.widths if k == middle or self.full_grid else narrower)
            for seed in range(self.sae_seeds if k == middle else 1)
        ]
        between = sorted(self.widths)[(len(self.widths) - 1) // 2 :][:1]
        return found + [
            ToTrain(self.architectures[0], width, middle, freeze=freeze) for width in between for freeze in self.frozen
        ]


@dataclass(frozen=True)
class Regressions:
    """How regressions on x are made. The defaults are the paper's text; each released script has its own way."""

    bias: bool = True
    map_on_all: bool = False  # b* that splits the error into its parts is fitted on held-out tokens too
    fvu_of_all: bool = False  # FVU and FVU_nonlinear are of the fit tokens too


SCALING_SCRIPT = Regressions(bias=False, fvu_of_all=True)  # sae_power_laws.py: what the decomposition is made of


@dataclass(frozen=True)
class Measure:
    """What is measured, on which tokens."""

    drop_positions: int = 8
    """leave out the first positions of each context"""
    max_norm_ratio: float = 10.0
    """leave out tokens with a norm above this many medians of the first 16 contexts; 0: keep all"""
    split: str = "documents"
    """what is never divided between fit and held-out: documents, contexts or tokens (as in the paper)"""
    fit_fraction: float = 0.6
    """share of the measured text that b* is fitted on"""
    norm_fit_fraction: float = 0.5
    """with passes 1: share of the other text that the norm tests are fitted on; the rest is held out"""
    passes: int = 2
    """2: the paper's procedure, every token read twice; 1: every token read once, norm tests fitted on text of their own"""
    parity: str = "paper"
    """paper, or released-code: the choices of the experiment's released script instead (see docs/experiments.md)"""
    interval_groups: int = 10
    """groups of held-out contexts that confidence intervals come from; each keeps a Gram matrix; 1: no intervals"""
    products: str = "float64"
    """of the sums: float64, or float32 added up in float64 (half the time; R2 and FVU within 1e-5)"""
    loss: bool = False
    """also record the model's loss at every token (runs the whole model)"""
    token_means: bool = False
    """also measure how well the mean over a token's occurrences predicts its error"""
    table_contexts: int = 1000
    """held-out contexts whose tokens are written to the per-token table; 0: all"""
    sae_memory_gb: float = 0.0
    """keep at most so much of SAE weights loaded, load the others once a block; 0: keep all"""
    batch_tokens: int = 2048
    """tokens through an SAE at a time"""
    block_contexts: int = 32
    """contexts read at a time, through all SAEs before the next"""
    checkpoint: str = ""
    """folder for the run's state and its per-token table; default: in the cache folder, named by the settings"""
    checkpoint_seconds: float = 300.0
    """seconds between saved states"""
    seed: int = 0
    """of the splits, the shuffles and SAE training"""

    def __post_init__(self) -> None:
        require(self.passes in (1, 2), "passes", "must be 1 or 2", self.passes)
        require_one_of("products", PRODUCTS, self.products)
        require_one_of("parity", PARITIES, self.parity)
        require(self.split in SPLITS, "split", "must be documents, contexts or tokens", repr(self.split))
        if self.passes == 1 and self.split == "tokens":
            raise InputError("split: must be documents or contexts with passes 1, got 'tokens'")
        if self.passes == 1 and self.released:
            raise InputError("passes: must be 2 with parity released-code, got 1")
        for name in ("interval_groups", "batch_tokens", "block_contexts"):
            require_at_least(name, 1, getattr(self, name))
        for name in ("drop_positions", "table_contexts"):
            require_at_least(name, 0, getattr(self, name))
        for name in ("fit_fraction", "norm_fit_fraction"):
            share = getattr(self, name)
            require(0 < share < 1, name, "must be between 0 and 1", share)

    @property
    def released(self) -> bool:
        """Whether an experiment repeats its released script."""
        return self.parity == "released-code"

    def regressions(self, script: Regressions = SCALING_SCRIPT) -> Regressions:
        """The paper's, or those of a released script where that is repeated."""
        return script if self.released else Regressions()


@dataclass(frozen=True)
class Settings:
    """Everything a measurement needs to know."""

    data: Data = Data()
    saes: Saes = Saes()
    measure: Measure = Measure()
    device: str = "cpu"
    """cpu or cuda"""
    page_megabytes: float = 8.0
    """keep held-out text, its tokens' errors and latents in so much, for the report page to explore; 0: nothing"""
    page_kl_tokens: int = 2048
    """of that text, tokens for whose contexts the page shows the model's loss and its KL with Sae(x) for x; 0: none"""

    def __post_init__(self) -> None:
        require_at_least("page_megabytes", 0, self.page_megabytes)
        require_at_least("page_kl_tokens", 0, self.page_kl_tokens)
        require(self.device.split(":")[0] in ("cpu", "cuda"), "device", "must be cpu or cuda", repr(self.device))
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"device: must be available, got {self.device!r} on a machine without a CUDA device")
        require(self.data.context_length != 1, "context_length", "must be at least 2 (0: as the SAEs say)", 1)
        shortest = self.data.context_length or (2 if self.saes.sae else DEFAULT_CONTEXT_LENGTH)
        require_at_least("tokens", 2 * shortest, self.data.tokens)
        self.check_stored()

    def check_stored(self) -> None:
        """SAEs are trained before a measurement on a share of its own text. Raises InputError."""
        if not self.saes.sae and self.data.stored:
            raise InputError(f"sae: must be given with {self.data.stored}, SAEs are trained on text, got none")

    @property
    def seed(self) -> int:
        return self.measure.seed

    @property
    def stores(self) -> bool:
        """Whether activations are kept on disk."""
        return self.data.store or not self.saes.sae

    def flat(self) -> dict[str, Any]:
        """All values by name, of all parts."""
        found: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            found |= value if dataclasses.is_dataclass(getattr(self, name)) else {name: value}
        return found


Changed = TypeVar("Changed", bound=Settings)


def replaced(settings: Changed, **values: Any) -> Changed:
    """The same settings with other values, by name, whichever part they are in.

    Raises InputError for a name that no part has, or a value that its part refuses.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        part = getattr(settings, field.name)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            own = {each.name: values.pop(each.name) for each in dataclasses.fields(part) if each.name in values}
            changes |= {field.name: dataclasses.replace(part, **own)} if own else {}
        elif field.name in values:
            changes[field.name] = values.pop(field.name)
    if values:
        raise InputError(f"{next(iter(values))}: must be one of the settings {', '.join(settings.flat())}, got it")
    return dataclasses.replace(settings, **changes)


def extended(settings: Settings, kind: type[Changed], **values: Any) -> Changed:
    """The same settings as those of an experiment, with some values of its own."""
    same = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)}
    return replaced(kind(**same), **values)
