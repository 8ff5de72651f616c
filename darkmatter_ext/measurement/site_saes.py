"""The SAEs of a run: described before anything is loaded, then loaded once, or trained here on text set aside for that."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkmatter_ext.measurement.metadata import Usage
from darkmatter_ext.measurement.run_checks import RunChecks
from darkmatter_ext.measurement.settings import Settings, ToTrain
from darkmatter_ext.measurement.stored_tokens import StoredTokens
from darkmatter_ext.measurement.tokens import SAE_TRAINING
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import cache_dir, fingerprint
from darkmatter_ext.saes.encoders import Encode, Encoder, as_encoder, site_name
from darkmatter_ext.saes.loading import SaeDescription, describe_sae, load_sae
from darkmatter_ext.saes.sanity import misloaded, signs
from darkmatter_ext.training.config import StreamConfig, TrainingConfig
from darkmatter_ext.training.train import train

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor

ALL_OF_IT = StreamConfig(held_out_share=0)  # of the training text: held-out text is measured, not evaluated here
Make = Callable[["SAE"], Encode]  # how an SAE is used: with its own encoder, with pursuit, as a control derived from it


@dataclass(frozen=True, eq=False)
class SiteSae:
    """An SAE at a hook point, or a transcoder from one hook point to another."""

    name: str  # unique in a run
    hook: str  # its site: what it reconstructs, or a transcoder's two, see `encoders.site_name`
    folder: str  # or RELEASE:ID
    d_in: int
    d_sae: int
    architecture: str
    expected_l0: float | None
    trained: ToTrain | None  # how, if it was trained here
    load: Callable[[], SAE]
    weight_bytes: int
    stays: bool = True  # `load` returns the same object every time; not so under a memory budget
    ends: tuple[str, str] | None = None  # what a transcoder reads and writes

    @property
    def reads(self) -> str:
        """The hook point it reads."""
        return self.ends[0] if self.ends else self.hook

    @property
    def writes(self) -> str:
        """The hook point it reconstructs."""
        return self.ends[1] if self.ends else self.hook

    @property
    def listed(self) -> dict[str, Any]:
        """What a result lists about it, for readers and figures."""
        entry = {
            "name": self.name, "d_sae": self.d_sae, "architecture": self.architecture, "folder": self.folder,
            "hook": self.hook,
        }  # fmt: skip
        if self.trained is not None:
            entry |= {"seed": self.trained.seed, "frozen": self.trained.freeze, "trained_as": self.trained.architecture}
        return entry

    def encoder(self, make: Make = as_encoder, *, name: str = "", checks: RunChecks | None = None) -> Encoder:
        """This SAE, used in some way and checked when it is loaded. Its own encoder is made only once."""

        def load() -> Encode:
            sae = self.load()
            encode = self.own_of(sae) if make is as_encoder else make(sae)
            if checks is not None:
                own = encode if make is as_encoder else None
                checks.see(self.name, self.reads, sae, own, self.expected_l0, writes=self.writes)
            return encode

        return Encoder.of_site(
            name or self.name, self.reads, self.d_sae, load, weight_bytes=self.weight_bytes, writes=self.writes
        )

    @functools.cached_property
    def _encode(self) -> Encode:
        return as_encoder(self.load())

    def own_of(self, loaded: SAE) -> Encode:
        """The own encoder of an object returned by `load`; under a memory budget, nothing is read twice."""
        return self._encode if self.stays else as_encoder(loaded)

    @property
    def own(self) -> Encode:
        """Its own encoder: x [n, d] -> Sae(x), L0 and active latents."""
        return self.own_of(self.load())


def given_saes(
    described: Sequence[SaeDescription],
    ends: Sequence[tuple[str, str]],
    scales: Sequence[float | None],
    settings: Settings,
    device: str,
) -> list[SiteSae]:
    """Existing SAEs, with what each reads and writes. Names are short if that makes them unique, else the whole spec.

    They stay loaded unless the settings give a memory budget; then the user of an SAE keeps it as long as the budget allows.
    """
    short = [sae.name for sae in described]
    dtype, budget = settings.saes.sae_dtype, settings.measure.sae_memory_gb
    found = []
    for sae, (reads, writes), scale in zip(described, ends, scales, strict=True):
        load = functools.partial(load_sae, sae.spec, device=device, dtype=dtype, activation_scale=scale)
        found.append(
            SiteSae(
                name=sae.name if short.count(sae.name) == 1 else sae.spec,
                hook=site_name((reads,), writes),
                folder=sae.spec,
                d_in=sae.d_in,
                d_sae=sae.d_sae,
                architecture=sae.architecture,
                expected_l0=sae.expected_l0,
                trained=None,
                load=load if budget > 0 else functools.cache(load),
                weight_bytes=sae.weight_bytes,
                stays=budget <= 0,
                ends=(reads, writes) if sae.transcodes else None,
            )
        )
    return found


def training_of(settings: Settings, own: ToTrain) -> TrainingConfig:
    """How to train an SAE of the settings."""
    return TrainingConfig(
        d_sae=own.width,
        k=own.k,
        architecture=own.architecture,
        steps=settings.saes.steps,
        freeze=own.freeze,
        seed=settings.seed + own.seed,
    )


def ensure_trained(
    folder: Path,
    x: Callable[[], Tensor],
    training: TrainingConfig,
    metadata: Mapping[str, Any],
    progress: Callable[[int], None],
) -> None:
    """Train an SAE on x() [n, d] and save it in `folder`, unless an earlier run left it there. Only training calls x()."""
    if not folder.exists():
        train(x(), training, stream=ALL_OF_IT, metadata=metadata, progress=progress).save(folder)


def trained_saes(
    settings: Settings, usage: Usage, model: str, sites: Mapping[str, StoredTokens], stages: Stages
) -> list[SiteSae]:
    """SAEs at each site: trained on this text, or found from an identical earlier run."""
    saes, with_k = [], len(settings.saes.ks) > 1
    for hook, tokens in sites.items():
        training_set = functools.cache(functools.partial(tokens.with_role, SAE_TRAINING))  # [n, d], in memory
        rows = fingerprint(training=(tokens.roles == SAE_TRAINING).flatten().tolist())  # how others are used may differ
        metadata = {"model_name": model, "hook_name": hook, "prepend_bos": usage.bos}
        metadata["context_size"] = usage.context_length
        for own in settings.saes.trained:
            training = training_of(settings, own)
            key = fingerprint(activations=tokens.cache.folder.name, rows=rows, training=dataclasses.asdict(training))
            folder = cache_dir("saes") / f"{own.architecture}-{own.width}-{key}"
            name = own.name(with_k=with_k)
            with stages.stage(f"train SAE, {name}", training.steps) as advance:
                ensure_trained(folder, lambda x=training_set: x().to(settings.device), training, metadata, advance)
            name = name if [hook] == settings.saes.trained_hooks else f"{hook}/{name}"
            saes.append(_trained(name, hook, folder, own, settings.device))
    return saes


def _trained(name: str, hook: str, folder: Path, own: ToTrain, device: str) -> SiteSae:
    found = describe_sae(str(folder))
    load = functools.cache(functools.partial(load_sae, folder, device=device))
    return SiteSae(
        name, hook, str(folder), found.d_in, found.d_sae, found.architecture, None, own, load, found.weight_bytes
    )


def signs_of(saes: Sequence[SiteSae], samples: Mapping[str, Tensor]) -> list[str]:
    """What looks wrong with the SAEs, for a result that does not measure them in sweeps."""
    return [
        misloaded(sae.name, sign)
        for sae, loaded in ((sae, sae.load()) for sae in saes)
        for sign in signs(loaded, samples[sae.hook], expected_l0=sae.expected_l0, encode=sae.own_of(loaded))
    ]
