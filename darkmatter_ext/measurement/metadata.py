"""What inputs given SAEs expect, from their metadata and the flags: followed, overridden or refused, and always reported.

SAELens stores with an SAE what it was trained on: context length, BOS, positions, special tokens, weight processing,
scaling of activations. Measured on anything else, its latents mean something else. `usage` decides for a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from darkmatter_ext.activations.hook_points import translated_hook
from darkmatter_ext.activations.sources import asked_processing
from darkmatter_ext.activations.store import load_tokenizer, published_name
from darkmatter_ext.activations.text import special_token_ids
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.flat_activations import SCALED, WHITENED
from darkmatter_ext.saes.loading import SaeDescription

DEFAULT_CONTEXT_LENGTH = 256  # used if no SAE says what it was trained on
BACKENDS = ("auto", "huggingface", "transformer-lens")
Positions = tuple[int | None, ...]  # arguments of slice; () stands for all positions
SpecialTokens = bool | tuple[int, ...]  # tokens to leave out: all of the tokenizer's special ones, or these ids

# Keys that say where an SAE comes from, or that are read elsewhere (hook point, architecture).
_NOTHING_TO_DO = frozenset(("hook_name", "hook_name_out", "hook_head_index", "hook_head_index_out", "hook_layer"))
_NOTHING_TO_DO |= {"hf_hook_name", "hf_hook_name_out", "model_name", "dataset_path", "dataset_trust_remote_code"}
_NOTHING_TO_DO |= {"neuronpedia_id", "sae_lens_version", "sae_lens_training_version", "training_architecture", "k"}
_NOTHING_TO_DO |= {"training_architecture_details", "normalize_decoder", "trained_on", "finetuning_scaling_factor"}
_NOTHING_TO_DO |= {"context_size", "prepend_bos", "seqpos_slice", "exclude_special_tokens"}
_NOTHING_TO_DO |= {"model_from_pretrained_kwargs"}
# What a precomputed source has already decided.
_STORED = {"cache": ("context_size", "prepend_bos"), "tokenised": ("prepend_bos",)}
_MODEL_CLASSES = ("HookedTransformer", "AutoModelForCausalLM")  # these give the same activations as our sources
# Options of model loading that decide which weights it has, and those that change no activations.
_OTHER_WEIGHTS = ("revision", "checkpoint_index", "checkpoint_value", "checkpoint_label", "first_n_layers")
_NO_MATTER = ("device", "n_devices", "device_map", "dtype", "torch_dtype", "move_to_device", "default_padding_side")
_NO_MATTER = (*_NO_MATTER, "trust_remote_code", "center_unembed", "default_prepend_bos")


@dataclass(frozen=True)
class InputFlags:
    """Flags for the inputs of SAEs; the defaults follow the SAEs' metadata."""

    context_length: int = 0
    """tokens per context, BOS included; 0: as the SAEs' metadata says (the shortest), else 256"""
    bos: str = "auto"
    """start every context with BOS: yes, no, or auto: as the SAEs' metadata says"""
    positions: str = "auto"
    """positions to measure in each context, START:STOP or START:STOP:STEP as in Python, or auto: as the SAEs' metadata says"""
    exclude_special_tokens: str = "auto"
    """leave out the tokenizer's special tokens (BOS, EOS, PAD): yes, no, or auto: as the SAEs' metadata says"""
    activation_scale: tuple[float, ...] = ()
    """scale of the activations, for SAEs trained on scaled ones whose files do not give it: one for all, or one per SAE"""
    backend: str = "auto"
    """huggingface, transformer-lens, or auto: transformer-lens if the SAEs ask for processed weights"""

    def check_inputs(self) -> None:
        """Raises ValueError for an invalid flag."""
        yes_no = ("auto", "yes", "no")
        for name, allowed in (("backend", BACKENDS), ("bos", yes_no), ("exclude_special_tokens", yes_no)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.context_length < 0:
            raise InputError(f"context_length: must be at least 0, got {self.context_length}")
        if self.positions != "auto":
            given_positions(self.positions)
        for scale in self.activation_scale:
            if not 0 < scale < float("inf"):
                raise InputError(f"activation_scale: must be above 0 and finite, got {scale:g}")


@dataclass(frozen=True)
class Usage:
    """How to make the inputs of a run's SAEs."""

    context_length: int = DEFAULT_CONTEXT_LENGTH
    bos: bool = True
    positions: Positions = ()
    special_tokens: SpecialTokens = False
    processing: Mapping[str, bool] = field(default_factory=dict)  # of weights, by TransformerLens
    scales: tuple[float | None, ...] = ()  # one per SAE, see `load_sae`
    notes: tuple[str, ...] = ()


def given_positions(text: str) -> Positions:
    """The slice given by a flag. Raises ValueError if it is not a slice."""
    parts = text.split(":")
    try:
        numbers = tuple(int(part) if part.strip() else None for part in parts)
        if len(parts) not in (2, 3):
            raise ValueError
        return _slice(list(numbers))
    except ValueError:
        raise InputError(f"positions: must be auto, START:STOP or START:STOP:STEP, got {text!r}") from None


def _slice(value: Any) -> Positions:
    """`seqpos_slice` as SAELens uses it, `slice(*value)`, in one form for equal slices. Raises ValueError for anything else."""
    whole = isinstance(value, list | tuple) and 1 <= len(value) <= 3
    if not whole or any(part is not None and (type(part) is not int) for part in value):
        raise ValueError("seqpos_slice must be one to three integers or null")
    cut = slice(*value)
    step = 1 if cut.step is None else cut.step
    if step == 0:
        raise ValueError("seqpos_slice must have a step other than 0")
    start = None if step > 0 and cut.start == 0 else cut.start
    return () if (start, cut.stop, abs(step)) == (None, None, 1) else (start, cut.stop, step)


def _special(value: Any) -> SpecialTokens:
    """`exclude_special_tokens` as SAELens uses it. Raises ValueError for anything but true, false or a list of ids."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, list | tuple) or any(type(token) is not int for token in value):
        raise ValueError("exclude_special_tokens must be true, false or a list of ids")
    return tuple(sorted(set(value))) or False


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("prepend_bos must be true or false")
    return value


def _length(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("context_size must be a number of tokens")
    return value


class _Reading:
    """The metadata of some SAEs, key by key, recording how each key was handled."""

    def __init__(self, saes: Sequence[SaeDescription], stored: str = "") -> None:
        self.saes = saes
        self.stored = stored  # the flag of a precomputed source, "cache" or "tokenised"
        self.followed: list[str] = []
        self.overridden: list[str] = []
        self.unsaid: list[str] = []
        self.ignored: list[str] = []
        self.as_stored: list[str] = []

    def values(self, key: str, parse: Callable[[Any], Any]) -> dict[str, Any]:
        """The distinct values, by how they are written."""
        found = {}
        for sae in self.saes:
            if (value := sae.metadata.get(key)) is not None:
                try:
                    found.setdefault(str(parse(value)), (parse(value), str(value)))
                except ValueError as error:
                    raise InputError(f"sae: {error}, got {value!r} in {sae.spec}") from None
        return {written: parsed for parsed, written in found.values()}

    def one(self, key: str, flag: str, given: Any, parse: Callable[[Any], Any], default: Any) -> Any:
        """The flag's value, else the one all SAEs name. Raises ValueError if they differ."""
        values = self.values(key, parse)
        if given is not None:
            other = [written for written, value in values.items() if value != given]
            self._chosen(key, flag, values, other)
            return given
        if len(values) > 1 and key not in _STORED.get(self.stored, ()):
            first, second = list(values)[:2]
            raise InputError(
                f"{flag}: must be given, the SAEs were made with {first} and {second}, got {self.saes[0].spec} ..."
            )
        self._chosen(key, flag, values, [])
        return next(iter(values.values()), default)

    def shortest(self, given: int) -> int:
        """The flag's context length, else the shortest one among the SAEs."""
        values = self.values("context_size", _length)
        if given:
            self._chosen("context_size", "context_length", values, [w for w, size in values.items() if size != given])
            return given
        least = min(values.values(), default=DEFAULT_CONTEXT_LENGTH)
        if len(values) > 1 and self.stored != "cache":
            self.followed.append(f"context_size {least} (the shortest of {', '.join(values)})")
        else:
            self._chosen("context_size", "context_length", values, [])
        return least

    def processing(self, backend: str) -> dict[str, bool]:
        """The weight processing all SAEs ask for, unless the backend is huggingface. An SAE that names none asks for none."""
        asked = [asked_processing(sae.metadata.get("model_from_pretrained_kwargs")) for sae in self.saes]
        named = {", ".join(options) or "none": options for options in asked}
        shown = [f"processed weights ({name})" for name, options in named.items() if options]
        if self.stored == "cache":
            self.as_stored += shown
            return {}
        if backend == "huggingface":
            self.overridden += [f"{text} (by backend)" for text in shown]
            return {}
        if len(named) > 1:
            first, second = list(named)[:2]
            raise InputError(
                f"backend: must be huggingface, the SAEs ask for different processing of the model's weights ({first}; "
                f"{second}), got {backend} for {self.saes[0].spec} ..."
            )
        self.followed += shown
        return asked[0]

    def _chosen(self, key: str, flag: str, values: Mapping[str, Any], other: Sequence[str]) -> None:
        if self.stored and key in _STORED[self.stored]:
            self.as_stored.append(f"{key} {' and '.join(values)}" if values else key)
        elif not values:
            self.unsaid.append(key)
        elif other:
            self.overridden.append(f"{key} {' and '.join(other)} (by {flag})")
        else:
            self.followed.append(f"{key} {next(iter(values))}")

    def notes(self) -> tuple[str, ...]:
        kinds = (
            ("followed", self.followed),
            ("overridden", self.overridden),
            (f"as {self.stored} was made", self.as_stored),
            ("not said", self.unsaid),
            ("not followed", self.ignored),
        )
        said = "; ".join(f"{kind}: {', '.join(dict.fromkeys(parts))}" for kind, parts in kinds if parts)
        return (f"The SAEs' metadata: {said}.",) if said else ()


def _places(reading: _Reading, own: Sequence[SaeDescription], model: str, hook: str) -> None:
    """Handle flags that name another model than the metadata of any SAE, or another hook point than that of `own`."""
    for key, flag, given in (("model_name", "model", published_name(model)), ("hook_name", "hook", hook)):
        for sae in reading.saes:
            named = str(sae.metadata.get(key) or "")
            known = published_name(named) if key == "model_name" else translated_hook(named)
            if given and named and known != given and (key == "model_name" or sae in own):
                reading.overridden.append(f"{key} {named} (by {flag})")


def _model_options(reading: _Reading, model_given: bool) -> None:
    """Handle options of model loading that we do not follow: refuse those that choose other weights."""
    for sae in reading.saes:
        asked = sae.metadata.get("model_from_pretrained_kwargs") or {}
        for option, value in asked.items():
            if option in _OTHER_WEIGHTS and value is not None and not model_given:
                raise InputError(
                    f"model: must be given, {sae.spec} was made on other weights ({option} {value}), got none"
                )
            if value and option not in _NO_MATTER and not asked_processing({option: value}):
                reading.ignored.append(f"{option} {value}")


def _rest(reading: _Reading) -> None:
    """Handle keys that are not followed, each once."""
    for sae in reading.saes:
        for key, value in sae.metadata.items():
            if key in _NOTHING_TO_DO or value is None or value is False or value == {}:
                continue
            if key in ("sequence_separator_token", "disable_concat_sequences"):
                reading.ignored.append(f"{key} {value} (contexts never cross documents)")
            elif key != "model_class_name" or value not in _MODEL_CLASSES:
                reading.ignored.append(f"{key} {value}" if len(str(value)) < 40 else key)


def _scales(reading: _Reading, given: tuple[float, ...]) -> tuple[float | None, ...]:
    """The scale of each SAE's activations, where its files do not give it. Raises ValueError if it is unknown."""
    saes = reading.saes
    lacking = [sae.normalize_activations == SCALED for sae in saes]
    for sae in saes:
        if sae.normalize_activations == WHITENED:
            raise InputError(
                f"sae: must have its whitening folded in or beside it, got normalize_activations "
                f"{WHITENED!r} without its matrices in {sae.spec}"
            )
    if given and not any(lacking):
        raise InputError(f"activation_scale: must be left out, no SAE lacks its factor, got {given[0]:g}")
    if len(given) not in (0, 1, len(saes)):
        raise InputError(f"activation_scale: must be one number or {len(saes)}, one an SAE, got {len(given)}")
    if any(lacking) and not given:
        sae = saes[lacking.index(True)]
        raise InputError(
            f"activation_scale: must be given, {sae.spec} was made on activations scaled by a factor that its files "
            f"do not give (normalize_activations {SCALED!r}), got none"
        )
    every = given * len(saes) if len(given) == 1 else given or (0.0,) * len(saes)
    scales = tuple(scale if lacks else None for scale, lacks in zip(every, lacking, strict=True))
    if any(lacking):
        shown = ", ".join(dict.fromkeys(f"{scale:g}" for scale in scales if scale is not None))
        reading.followed.append(f"normalize_activations {SCALED} (factor {shown} of activation_scale)")
    return scales


def usage(
    saes: Sequence[SaeDescription],
    flags: InputFlags,
    *,
    others: Sequence[SaeDescription] = (),
    model: str = "",
    hook: str = "",
    stored: str = "",
) -> Usage:
    """Decide how to make the inputs of `saes`.

    Args:
        flags: the user's choices, which override the metadata.
        others: more SAEs that get the same inputs, such as predictors.
        model, hook: as the user names them; empty: as the SAEs say.
        stored: "cache" or "tokenised" if activations or tokens are precomputed.

    Raises ValueError, one line, for metadata that cannot be followed, or SAEs that disagree where no flag decides.
    """
    reading = _Reading([*saes, *others], stored)
    if not reading.saes:
        positions = () if flags.positions == "auto" else given_positions(flags.positions)
        length = flags.context_length or DEFAULT_CONTEXT_LENGTH
        if flags.backend == "transformer-lens":
            raise InputError("backend: must be auto or huggingface without sae, got 'transformer-lens'")
        if flags.activation_scale:
            raise InputError(f"activation_scale: must be left out without sae, got {flags.activation_scale[0]:g}")
        return Usage(length, flags.bos != "no", positions, flags.exclude_special_tokens == "yes")
    yes_no = {"yes": True, "no": False}
    length = reading.shortest(flags.context_length)
    bos = reading.one("prepend_bos", "bos", yes_no.get(flags.bos), _boolean, default=True)
    cut = None if flags.positions == "auto" else given_positions(flags.positions)
    positions = reading.one("seqpos_slice", "positions", cut, _slice, default=())
    special = reading.one(
        "exclude_special_tokens",
        "exclude_special_tokens",
        yes_no.get(flags.exclude_special_tokens),
        _special,
        default=False,
    )
    processing = reading.processing(flags.backend)
    _places(reading, saes, model, hook)
    _model_options(reading, bool(model) or stored == "cache")
    scales = _scales(reading, flags.activation_scale)
    _rest(reading)
    return Usage(length, bos, positions, special, processing, scales, reading.notes())


def own_sites(sae: SaeDescription) -> tuple[str, str]:
    """The hook points an SAE names, the one it reads and the one it writes; empty if it names none.

    Raises InputError for an SAE that reads a single head, or a transcoder that does not name both.
    """
    reads, head = str(sae.metadata.get("hook_name") or ""), sae.metadata.get("hook_head_index")
    if head is not None:
        raise InputError(f"sae: must read a whole hook point, got one of head {head} in {sae.spec}")
    if not sae.transcodes:
        return reads, reads
    writes = str(sae.metadata.get("hook_name_out") or "")
    if not reads or not writes:
        raise InputError(
            f"sae: must name what it reads and writes (hook_name, hook_name_out), got the {sae.architecture} {sae.spec} "
            f"with {reads or 'none'} and {writes or 'none'}"
        )
    return reads, writes


def excluded_ids(special_tokens: SpecialTokens, model: str) -> tuple[int, ...]:
    """The token ids to leave out. Raises ValueError if the model's tokenizer is needed and cannot be loaded."""
    if not isinstance(special_tokens, bool):
        return special_tokens
    return special_token_ids(load_tokenizer(model)) if special_tokens else ()
