"""Load existing SAEs: what their files say, and their weights as a SAELens object, with one-line errors.

A *spec* names an SAE: a folder (or its weights file) in one of the layouts of `formats`, or RELEASE:ID from SAELens' list,
or REPOSITORY:ID for a repository that one of its releases comes from.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from darkmatter_ext.runtime.inputs import InputError, told
from darkmatter_ext.saes.flat_activations import SCALED, WHITENED, for_flat_activations, why_not_usable
from darkmatter_ext.saes.formats import FORMATS, found_at, on_disk
from darkmatter_ext.saes.formats.layout import Format, Place

if TYPE_CHECKING:
    from sae_lens import SAE

SCALER_NAME, WHITENING_NAME = (
    "activation_scaler.json",
    "activation_whitening.safetensors",
)  # files next to SAELens' checkpoints
_L0 = re.compile(r"l0[_=-]?(\d+(?:\.\d+)?)(?![\d.]*\w)")  # average_l0_71


@dataclass(frozen=True)
class SaeDescription:
    """What an SAE's configuration says, without its weights."""

    spec: str  # see the module
    name: str
    d_in: int
    d_sae: int
    architecture: str
    metadata: dict[str, Any]  # SAELens' keys: model_name, hook_name, context_size, prepend_bos, ...
    normalize_activations: str = "none"  # "none" if the files give the factor, which loading folds in
    expected_l0: float | None = None  # from its k, its id, SAELens' list or the training target
    d_out: int = 0  # width of a transcoder's output; 0: same as its input

    @property
    def weight_bytes(self) -> int:
        """Size of encoder and decoder in float32."""
        return 4 * (self.d_in + self.width_out) * self.d_sae

    @property
    def transcodes(self) -> bool:
        """Whether it writes to a different site than it reads."""
        return "transcoder" in self.architecture or self.metadata.get("hook_name_out") not in (
            None, self.metadata.get("hook_name"),
        )  # fmt: skip

    @property
    def width_out(self) -> int:
        """Width of its output."""
        return self.d_out or self.d_in


def release_and_id(spec: str) -> tuple[str, str]:
    """The two parts of RELEASE:ID. Raises InputError for what is neither that nor on this disk."""
    release, _, sae_id = spec.partition(":")
    if not sae_id:
        first, *others = FORMATS
        raise InputError(
            f"sae: must be a folder with {first.files}, or RELEASE:ID, got {spec!r} "
            f"(no such folder; other layouts: {', '.join(known.name for known in others)})"
        )
    return release, sae_id


def _converter(release: str) -> str | None:
    """SAELens' name for the format of a repository that it knows from other releases; None if it knows the release itself."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory, get_releases_for_repo_id

    directory = get_pretrained_saes_directory()
    siblings = get_releases_for_repo_id(release) if release not in directory else []
    return (directory[siblings[0]].conversion_func or "sae_lens") if siblings else None


def _hub_config(release: str, sae_id: str) -> dict[str, Any]:
    """SAELens' configuration of RELEASE:ID; downloads at most a small file."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    converter = _converter(release)
    if converter is None:
        content = loaders.load_sae_config_from_huggingface(release, sae_id)
    else:
        getter = loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[converter]
        content = loaders.handle_config_defaulting(getter(release, sae_id, "cpu", False, {}))
    folds = content.get("normalize_activations") == SCALED and get_norm_scaling_factor(release, sae_id) is not None
    return dict(content) | ({"normalize_activations": "none"} if folds else {})


def _expected_l0(spec: str, config: dict[str, Any]) -> float | None:
    """Mean active latents per token that the SAE was made for, if anything states it."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    metadata = config.get("metadata") or {}
    training = metadata.get("training_architecture_details") or {}
    release, _, sae_id = spec.partition(":")
    listed = get_pretrained_saes_directory().get(release)
    named = _L0.search(spec)
    found = (
        listed.expected_l0.get(sae_id) if listed else None,
        named[1] if named else None,  # before its k: the id exposes a wrong k
        config.get("k"),
        metadata.get("k"),
        training.get("k"),
        training.get("target_l0"),
    )
    return next((float(value) for value in found if value), None)


def describe_sae(spec: str) -> SaeDescription:
    """The configuration of an SAE, including those saved in old formats. Downloads at most a small file.

    Raises ValueError (one line) if there is none or it cannot be read.
    """
    with told("sae", "must be an SAE that can be read", spec):
        if on_disk(spec):
            layout, place = found_at(spec)
            config, name = layout.config(place), place.name
            if (kind := config.get("normalize_activations", "none")) in (SCALED, WHITENED):
                factor = {SCALED: SCALER_NAME, WHITENED: WHITENING_NAME}[kind]
                config |= {"normalize_activations": "none"} if (place.folder / factor).is_file() else {}
        else:
            release, name = release_and_id(spec)
            config = _hub_config(release, name)
        return SaeDescription(
            spec,
            name,
            config["d_in"],
            config["d_sae"],
            config.get("architecture", "standard"),
            config.get("metadata") or {},
            config.get("normalize_activations") or "none",
            _expected_l0(spec, config),
            config.get("d_out") or 0,
        )


def load_sae(
    spec: str | Path, *, device: str = "cpu", dtype: str | None = None, activation_scale: float | None = None
) -> SAE:
    """Load the SAE that a spec names (see the module), in eval mode, without gradients; RELEASE:ID is downloaded once.

    Args:
        dtype: of the weights: "float32", "bfloat16" or "float16"; default: as stored.
        activation_scale: the factor by which the training activations were multiplied, to be folded into the weights if
            the SAE needs it and its files do not give it. Without it, such an SAE is loaded as saved.

    Raises ValueError, in one line with the reason, if a folder or file is missing, truncated or not what it should
    be, or a weight is NaN or infinite.
    """
    layout, place = found_at(spec) if on_disk(spec) else (None, None)
    if layout is not None and place is not None:
        sae = _from_disk(layout, place, device)
    else:
        sae = _from_hub(str(spec), device, dtype or "float32")
    for name, parameter in sae.named_parameters():
        if not bool(parameter.isfinite().all()):
            found = "NaN" if bool(parameter.isnan().any()) else "infinity"
            raise InputError(f"sae: weights must be finite, got {found} in {name} of {spec}")
    _fold_scaling(sae, None if place is None else place.folder, activation_scale)
    sae = (sae if dtype is None else sae.to(getattr(torch, dtype))).eval().requires_grad_(False)
    if not why_not_usable(sae):
        with told("sae", "must have a configuration that its weights can be used with", spec), torch.inference_mode():
            for_flat_activations(sae)(torch.zeros(1, 1, sae.cfg.d_in, dtype=sae.dtype, device=sae.device))
    return sae


def _from_disk(layout: Format, place: Place, device: str) -> SAE:
    from sae_lens import SAE

    from darkmatter_ext.saes.topk_transcoders import CLASSES

    with told(
        "sae", f"must be a complete SAE in {layout.name} format", place.weights if place.shared else place.folder
    ):
        kind: type[SAE] = CLASSES.get(layout.config(place)["architecture"], SAE)
        return kind.load_from_disk(place.folder, device=device, converter=layout.converter(place))


def _from_hub(spec: str, device: str, dtype: str) -> SAE:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

    release, sae_id = release_and_id(spec)
    with told("sae", "must be an SAE that can be loaded", spec):
        converter = _converter(release)
        loader = None if converter is None else NAMED_PRETRAINED_SAE_LOADERS[converter]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are loading an SAE using the HuggingFace repo_id")
            return SAE.from_pretrained(release, sae_id, device=device, dtype=dtype, converter=loader)


def _fold_scaling(sae: SAE, folder: Path | None, given: float | None) -> None:
    """Fold the activation scaling factor into the weights: the one in SAELens' checkpoint, otherwise the given one."""
    from sae_lens.training.activation_scaler import ActivationScaler

    kind, scaler = sae.cfg.normalize_activations, ActivationScaler()
    if kind not in (SCALED, WHITENED):
        if given is not None:
            raise InputError(f"activation_scale: must be left out for normalize_activations {kind!r}, got {given}")
        return
    if folder is not None and (folder / SCALER_NAME).is_file():
        with told("sae", f"{SCALER_NAME} must be as SAELens writes it", folder):
            scaler.load(folder / SCALER_NAME)
    own = getattr(scaler, "whitening", None)  # not in older releases of SAELens
    if kind == WHITENED and own is not None:
        sae.fold_activation_whitening(own.mean, own.matrix, own.inverse_matrix)
    factor = scaler.scaling_factor if scaler.scaling_factor is not None else given
    if kind == SCALED and factor is not None:
        if not factor > 0:
            raise InputError(f"activation_scale: must be above 0, got {factor}")
        sae.fold_activation_norm_scaling_factor(factor)
