"""What a run needs to know: which activations, which SAEs, what to measure. Data and checks; nothing is read or run here.

`Settings` has three parts. An experiment adds fields of its own; a preset only sets values. Every name is a command-line
flag and a keyword of `dm.measure`, whichever part it belongs to, so names are unique.
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
TRAINED_HOOK = "blocks.10.hook_resid_post"  # where SAEs are trained by default


@dataclass(frozen=True)
class Data(InputFlags):
    """Which activations to measure."""

    model: str = ""
    """the embedded model, gemma-3-270m, a folder, or a Hugging Face id; default: as the SAEs say, else the embedded one"""
    accept_terms: bool = False
    """accept the model's terms of use, if it has any; needed once (gemma-3-270m: https://ai.google.dev/gemma/terms)"""
    text: str = ""
    """UTF-8 text file to measure on; default: the documentation installed on this machine"""
    dataset: str = ""
    """Hugging Face dataset (hub id or local path) with a `text` column, instead of text"""
    tokenised: str = ""
    """pre-tokenised dataset with an `input_ids` or `tokens` column, instead of text"""
    cache: tuple[str, ...] = ()
    """read activations from here instead of a model: caches of this package (one per hook), or a SAELens dataset"""
    store: bool = False
    """keep activations on disk for other runs on the same text; always on when SAEs are trained here"""
    shuffle_buffer: int = 0
    """shuffle the streamed dataset with a buffer of this many documents; 0: keep its order"""
    contexts_per_document: int = 0
    """take at most this many contexts from each document; 0: all"""
    tokens: int = 200_000
    """tokens of text, first positions included; SAEs trained here take their share of them"""
    dtype: str = "float32"
    """dtype of the model: float32, bfloat16 or float16"""
    forward_tokens: int = 0
    """tokens per forward pass of the model; 0: 4096 if activations are streamed, 2048 if they are stored"""
    device_map: str = ""
    """spread the model over several devices, as transformers does ("auto"), instead of using device"""

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
        """The setting that names precomputed activations or tokens; empty if text is given."""
        return "cache" if self.cache else "tokenised" if self.tokenised else ""


class ToTrain(NamedTuple):
    """An SAE that is trained here."""

    architecture: str
    width: int
    k: int
    seed: int = 0  # added to the run's seed
    freeze: str = "none"  # the part that stays as initialised, for a control

    def name(self, *, with_k: bool) -> str:
        """The SAE's name in results."""
        parts = [self.architecture, str(self.width)]
        parts += [f"k{self.k}"] if with_k else []
        parts += [f"seed{self.seed}"] if self.seed else []
        parts += [f"frozen-{self.freeze}"] if self.freeze != "none" else []
        return "-".join(parts)


@dataclass(frozen=True)
class Saes:
    """Which SAEs to measure: existing ones, or SAEs trained here."""

    sae: tuple[str, ...] = ()
    """SAEs: folders in a known format, or RELEASE:ID from SAELens' list; none: train SAEs of widths here"""
    predictor: tuple[str, ...] = ()
    """SAEs of other sites (given like sae) whose outputs join x as predictors of the errors"""
    hook: str = ""
    """site (TransformerLens name) of SAEs that do not name theirs, and of SAEs trained here (blocks.10.hook_resid_post)"""
    layers: tuple[int, ...] = ()
    """train SAEs on the residual stream after these blocks, instead of at hook"""
    architectures: tuple[str, ...] = ("topk",)
    """architectures of the SAEs to train: topk, batchtopk, jumprelu, matryoshka"""
    widths: tuple[int, ...] = (1024, 2048, 4096)
    """widths (numbers of latents) of the SAEs to train"""
    k: int = 32
    """active latents per token of the SAEs to train"""
    ks: tuple[int, ...] = ()
    """several values of k: train every width with each of them, but the widest of several with the middle one only"""
    full_grid: bool = False
    """also train the widest with every one of ks: this takes about as long as all the others"""
    sae_seeds: int = 1
    """train every SAE this many times, each from its own random start (with several ks: only those of the middle one)"""
    frozen: tuple[str, ...] = ()
    """controls: train the middle width again with its decoder, encoder or soft-decoder (cosine >= 0.8) as initialised"""
    steps: int = 400
    """training steps of 2048 tokens"""
    sae_fraction: float = 0.6
    """share of the text that trains the SAEs and is not measured (ignored if sae is given)"""
    sae_dtype: str = "float32"
    """dtype of the SAEs' weights: float32, bfloat16 or float16"""

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
        """The sites at which SAEs are trained here."""
        return [f"blocks.{layer}.hook_resid_post" for layer in self.layers] or [self.hook or TRAINED_HOOK]

    @property
    def trained(self) -> list[ToTrain]:
        """The SAEs to train at each site: by architecture, k, width and seed, then the controls."""
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
    """How regressions on x are done. The defaults follow the paper's text; each released script does it its own way."""

    bias: bool = True
    map_on_all: bool = False  # also fit the b* that splits the error on held-out tokens
    fvu_of_all: bool = False  # FVU and FVU_nonlinear include the fit tokens


SCALING_SCRIPT = Regressions(bias=False, fvu_of_all=True)  # sae_power_laws.py, which makes the decomposition


@dataclass(frozen=True)
class Measure:
    """What to measure, and on which tokens."""

    drop_positions: int = 8
    """leave out the first positions of each context"""
    max_norm_ratio: float = 10.0
    """leave out tokens with a norm above this many medians of the first 16 contexts; 0: keep all"""
    split: str = "documents"
    """unit that is never divided between fit and held-out: documents, contexts or tokens (as in the paper)"""
    fit_fraction: float = 0.6
    """share of the measured text that b* is fitted on"""
    norm_fit_fraction: float = 0.5
    """with passes 1: share of the remaining text that the norm tests are fitted on; the rest is held out"""
    passes: int = 2
    """2: the paper's procedure, every token read twice; 1: every token read once, norm tests fitted on separate text"""
    parity: str = "paper"
    """paper, or released-code: follow the experiment's released script instead (see docs/experiments.md)"""
    interval_groups: int = 10
    """groups of held-out contexts for the confidence intervals; each keeps a Gram matrix; 1: no intervals"""
    products: str = "float64"
    """dtype of products in the sums: float64, or float32 added up in float64 (half the time; R2 and FVU within 1e-5)"""
    loss: bool = False
    """also record the model's loss at every token (runs the whole model)"""
    token_means: bool = False
    """also measure how well the mean over a token's occurrences predicts its error"""
    table_contexts: int = 1000
    """held-out contexts whose tokens are written to the per-token table; 0: all"""
    sae_memory_gb: float = 0.0
    """keep at most this many GB of SAE weights loaded, and load the others once per block; 0: keep all"""
    batch_tokens: int = 2048
    """tokens that go through an SAE at a time"""
    block_contexts: int = 32
    """contexts read at a time; they go through all SAEs before the next are read"""
    checkpoint: str = ""
    """folder for the run's state and its per-token table; default: in the cache folder, named after the settings"""
    checkpoint_seconds: float = 300.0
    """seconds between saved states"""
    seed: int = 0
    """seed of the splits, the shuffles and SAE training"""

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
        """Whether an experiment reproduces its released script."""
        return self.parity == "released-code"

    def regressions(self, script: Regressions = SCALING_SCRIPT) -> Regressions:
        """The paper's regressions, or those of the released script if that is being reproduced."""
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
    """megabytes of held-out text, with its tokens' errors and latents, kept for the report page to explore; 0: none"""
    page_kl_tokens: int = 2048
    """tokens of that text, in whole contexts, with the model's loss and its KL with Sae(x) in place of x; 0: none"""

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
        """Raise InputError if SAEs are to be trained without text: training takes a share of the measured text."""
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
        """All values of all parts, by name."""
        found: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            found |= value if dataclasses.is_dataclass(getattr(self, name)) else {name: value}
        return found


Changed = TypeVar("Changed", bound=Settings)


def replaced(settings: Changed, **values: Any) -> Changed:
    """The same settings with some values replaced, by name, whichever part they are in.

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
    """The same settings as settings of an experiment, with some values of its own."""
    same = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)}
    return replaced(kind(**same), **values)
