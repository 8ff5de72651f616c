"""Known models and sets of public SAEs: names, sizes, where they are read. Data only.

SAEs are named as `sae` takes them, RELEASE:ID. Those in SAELens' list use its release names. Gemma Scope has more SAEs
than the list (26 of the 60 that the paper uses at layer 20 of Gemma 2 9B); these use the name of the repository.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """Sizes of a model, for planning without downloading it."""

    d_model: int
    n_layers: int
    layer_parameters: int
    other_parameters: int  # embedding and unembedding
    file_bytes: int  # of the weights as published


@dataclass(frozen=True)
class KnownSae:
    """One public SAE."""

    spec: str  # RELEASE:ID
    hook: str
    d_in: int
    d_sae: int


KNOWN_MODELS = {
    "google/gemma-2-9b": KnownModel(3584, 42, 198_180_864, 917_504_000, 18_480_000_000),
    "meta-llama/Llama-3.1-8B": KnownModel(4096, 32, 218_103_808, 1_050_673_152, 16_060_000_000),
    "openai-community/gpt2": KnownModel(768, 12, 7_077_888, 39_383_808, 548_000_000),
    "gemma-3-270m": KnownModel(640, 18, 5_570_560, 167_772_160, 536_000_000),
    "smollm2-135m": KnownModel(576, 30, 3_540_096, 28_311_552, 269_000_000),
}
_WIDTHS = {"16k": 2**14, "32k": 2**15, "65k": 2**16, "131k": 2**17, "262k": 2**18, "524k": 2**19, "1m": 2**20}

GEMMA_9B_RELEASE, GEMMA_9B_REPOSITORY = "gemma-scope-9b-pt-res", "google/gemma-scope-9b-pt-res"
# Engels et al.: width -> average L0 of the SAEs at layer 20.
LAYER_20_L0 = {
    "16k": (11, 20, 36, 57, 58, 68, 138, 310, 393, 408, 427),
    "32k": (11, 55, 57, 334, 344, 357),
    "65k": (11, 54, 55, 292, 298, 309),
    "131k": (10, 11, 12, 19, 34, 51, 53, 54, 62, 114, 221, 269, 276, 288),
    "262k": (10, 11, 13, 49, 50, 64, 249, 259, 276),
    "524k": (10, 24, 46, 48, 78, 229, 241, 298),
    "1m": (11, 19, 34, 57, 101, 193),
}
LAYER_20_LISTED = {  # of these, in SAELens' list
    "16k": (11, 20, 36, 58, 68, 138, 310, 408),
    "32k": (11, 57, 344),
    "65k": (11, 55, 298),
    "131k": (11, 19, 34, 53, 62, 114, 221, 276),
    "262k": (11, 50, 259),
    "524k": (10, 48, 241),
    "1m": (11, 19, 34, 57, 101, 193),
}
LAYER_20_NEAR_60 = {"16k": 58, "32k": 57, "65k": 55, "131k": 62, "262k": 64, "524k": 48, "1m": 57}  # "L0 about 60"
# Layers 0 to 39: of the 131k SAEs of SAELens' list, the L0 nearest to 60.
ALL_LAYERS_L0 = (
    41, 56, 70, 46, 51, 51, 66, 65, 72, 75, 47, 49, 52, 54, 56, 55, 65, 64, 62, 60,
    62, 58, 58, 56, 55, 54, 55, 56, 57, 56, 56, 52, 51, 51, 51, 51, 51, 53, 53, 54,
)  # fmt: skip


def _gemma(layer: int, width: str, l0: int, *, listed: bool) -> KnownSae:
    release = GEMMA_9B_RELEASE if listed else GEMMA_9B_REPOSITORY
    spec = f"{release}:layer_{layer}/width_{width}/average_l0_{l0}"
    return KnownSae(spec, f"blocks.{layer}.hook_resid_post", 3584, _WIDTHS[width])


SAE_SETS: dict[str, tuple[KnownSae, ...]] = {
    "gemma-2-9b-l20": tuple(
        _gemma(20, width, l0, listed=l0 in LAYER_20_LISTED[width]) for width, l0s in LAYER_20_L0.items() for l0 in l0s
    ),
    "gemma-2-9b-l20-near-60": tuple(
        _gemma(20, width, l0, listed=l0 in LAYER_20_LISTED[width]) for width, l0 in LAYER_20_NEAR_60.items()
    ),
    "gemma-2-9b-all-layers": tuple(_gemma(layer, "131k", l0, listed=True) for layer, l0 in enumerate(ALL_LAYERS_L0)),
    "gpt2-small": tuple(
        KnownSae(
            f"gpt2-small-res-jb-feature-splitting:blocks.8.hook_resid_pre_{768 * 2**i}",
            "blocks.8.hook_resid_pre",
            768,
            768 * 2**i,
        )
        for i in range(8)
    ),
    "llama-3.1-8b": tuple(
        KnownSae(f"llama_scope_lxr_{factor}x:l15r_{factor}x", "blocks.15.hook_resid_post", 4096, 4096 * factor)
        for factor in (8, 32)
    ),
}
