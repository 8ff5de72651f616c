"""Configuration of a measurement of SAEs that exist, and the presets: data and checks, nothing is read or run here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import torch

from darkmatter_ext.activations.hook_points import parse_hook_point
from darkmatter_ext.measurement.measurement import MeasureSettings
from darkmatter_ext.measurement.metadata import InputFlags
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.catalogue import SAE_SETS

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ManySaesConfig(InputFlags):
    """Measure many SAEs in one pass over the tokens; nothing is stored but sums and a table of held-out tokens."""

    sae: tuple[str, ...] = ()
    """SAEs: folders (SAELens, sparsify or dictionary_learning), or RELEASE:ID of SAELens' list (or a repository of one)"""
    predictor: tuple[str, ...] = ()
    """SAEs of other sites (as sae) whose outputs join x as predictors of the errors, as in the earlier-layer test"""
    model: str = ""
    """the embedded model, a local folder, or a Hugging Face id; default: as the SAEs' metadata says"""
    hook: str = ""
    """site of all SAEs, as TransformerLens names it; default: each SAE's own"""
    cache: tuple[str, ...] = ()
    """read activations from here instead of a model: caches of this package (one a hook), or a SAELens dataset"""
    text: str = ""
    """UTF-8 text file to measure on; default: the documentation installed on this machine"""
    dataset: str = ""
    """Hugging Face dataset (hub id or local path) with a column `text`, instead of text"""
    tokenised: str = ""
    """pre-tokenised dataset with a column `input_ids` or `tokens`, instead of text"""
    shuffle_buffer: int = 0
    """shuffle the streamed dataset in a buffer of so many documents; 0: in its order"""
    contexts_per_document: int = 0
    """take at most so many contexts of a document; 0: all"""
    tokens: int = 200_000
    """tokens to measure on, first positions included (of a cache: at most)"""
    drop_positions: int = 8
    """leave out the first positions of each context"""
    max_norm_ratio: float = 10.0
    """leave out tokens with a norm above this many medians of the first 16 contexts; 0: keep all"""
    split: str = "documents"
    """what is never divided between fit and held-out: documents, contexts or tokens (as in the paper)"""
    fit_fraction: float = 0.6
    """share of the text that b* is fitted on"""
    norm_fit_fraction: float = 0.5
    """with passes 1: share of the other text that the norm tests are fitted on; the rest is held out"""
    passes: int = 2
    """2: the paper's procedure, every token read twice; 1: every token read once, norm tests fitted on text of their own"""
    parity: str = "paper"
    """paper, or released-code: regressions on x without bias, b* of the norm tests and FVU on all tokens (passes 2)"""
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
    dtype: str = "float32"
    """of the model: float32, bfloat16 or float16"""
    sae_dtype: str = "float32"
    """of the SAEs' weights: float32, bfloat16 or float16"""
    sae_memory_gb: float = 0.0
    """keep at most so much of SAE weights loaded, load the others once a block; 0: keep all"""
    batch_tokens: int = 2048
    """tokens through an SAE at a time"""
    forward_tokens: int = 4096
    """tokens through the model at a time"""
    block_contexts: int = 32
    """contexts read at a time, through all SAEs before the next"""
    checkpoint: str = ""
    """folder for the run's state and its per-token table; default: in the cache folder, named by the configuration"""
    checkpoint_seconds: float = 300.0
    """seconds between saved states"""
    device: str = "cpu"
    """cpu or cuda"""
    device_map: str = ""
    """spread the model over devices as transformers does ("auto"), instead of device"""
    seed: int = 0
    """of the splits and the shuffle"""

    @property
    def shares_work(self) -> bool:
        """Whether several processes divide the work of this configuration."""
        return True

    def __post_init__(self) -> None:
        if self.hook:
            parse_hook_point(self.hook)
        self.check_inputs()
        for name in ("dtype", "sae_dtype"):
            if getattr(self, name) not in DTYPES:
                raise InputError(f"{name}: must be one of {', '.join(DTYPES)}, got {getattr(self, name)!r}")
        least = {"tokens": 2, "batch_tokens": 1, "forward_tokens": 1, "block_contexts": 1, "drop_positions": 0}
        least |= dict.fromkeys(("shuffle_buffer", "contexts_per_document", "table_contexts"), 0)
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise InputError(f"{name}: must be at least {minimum}, got {getattr(self, name)}")
        given = [name for name in ("text", "dataset", "tokenised", "cache") if getattr(self, name)]
        if len(given) > 1:
            raise InputError(f"{given[0]}: give one of {' and '.join(given)}, got both")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise InputError(f"device: must be cpu or cuda, got {self.device!r}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"device: must be available, got {self.device!r} on a machine without a CUDA device")
        self.settings()  # its own checks

    def settings(self) -> MeasureSettings:
        """The part of the configuration that the measurement itself takes."""
        names = {own.name for own in dataclasses.fields(MeasureSettings)} & {
            own.name for own in dataclasses.fields(self)
        }
        own = {name: getattr(self, name) for name in names - {"token_means", "positions"}}
        return MeasureSettings(**own, sae_memory=self.sae_memory_gb * 1e9)


PRESETS: dict[str, ManySaesConfig] = {"one-pass": ManySaesConfig()}
for _name, _model, _more in (
    # Engels et al.: 300 contexts of 1024 tokens, documents long enough, positions from 200 on, split by token.
    ("gemma-2-9b-l20", "google/gemma-2-9b", {"drop_positions": 200, "tokens": 307_200, "dtype": "bfloat16"}),
    ("gemma-2-9b-all-layers", "google/gemma-2-9b", {"drop_positions": 200, "tokens": 307_200, "dtype": "bfloat16"}),
    ("gpt2-small", "openai-community/gpt2", {"tokens": 300_000}),
    ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", {"drop_positions": 200, "tokens": 307_200, "dtype": "bfloat16"}),
):
    PRESETS[_name] = ManySaesConfig(
        sae=tuple(sae.spec for sae in SAE_SETS[_name]),
        model=_model,
        dataset="monology/pile-uncopyrighted",
        shuffle_buffer=10_000,
        contexts_per_document=1,
        split="tokens",
        fit_fraction=0.61,
        context_length=128 if _name == "gpt2-small" else 1024,
        seed=42,
        **_more,  # type: ignore[arg-type]
    )


Extended = TypeVar("Extended", bound=ManySaesConfig)


def extended(config: ManySaesConfig, kind: type[Extended]) -> Extended:
    """The same settings as a configuration with more fields, these at their defaults."""
    return kind(**{own.name: getattr(config, own.name) for own in dataclasses.fields(config)})
