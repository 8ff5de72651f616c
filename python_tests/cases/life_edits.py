"""What users do to an SAE: edits that are made to an accelerated SAE and to its plain twin alike.

An edit is a function of an SAE and a `Draw` that returns the SAE to go on with (None: the same). It may raise: then it must
raise for both. Values are drawn from what the SAE was built with, so that latents stay sparse over a long life.
"""

import copy
import io
import pickle
import random
import tempfile

import torch
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopK
from torch import nn

import darkmatter_ext as dm

EDITS = {}  # name -> (edit, weight)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HOOK_POINTS = ("input", "acts_pre", "acts_post", "recons", "error", "output")


class Draw(random.Random):
    """Random choices and tensors; the same for both twins."""

    def __init__(self, seed):
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def some(self, n):
        """A few numbers below n."""
        return sorted(self.sample(range(n), min(n, self.choice((1, 2, n // 4)))))

    def fresh(self, sae, name):
        """New values for a parameter, of the size it was built with."""
        value = self.normal(*getattr(sae, name).shape) * 0.1
        if name == "W_enc":
            value = self.normal(*value.shape) / len(value) ** 0.5
        elif name == "threshold":
            value = 1.9 + value.abs()
        elif name in ("b_enc", "b_gate") and not (hasattr(sae, "threshold") or hasattr(sae.activation_fn, "k")):
            value -= 2.0
        elif name == "W_dec" and sae.cfg.architecture() == "matching_pursuit":
            value = nn.functional.normalize(value, dim=1)
        return value.to(getattr(sae, name).dtype)

    def name(self, sae, *names):
        return self.choice([name for name in names or names_of(sae) if name in sae._parameters])


def names_of(sae):
    return [name for name, value in sae._parameters.items() if value is not None]


def edit(weight=1):
    def add(function):
        EDITS[function.__name__] = function, weight
        return function

    return add


# Copies, files


@edit(3)
def deepcopy(sae, draw):
    return copy.deepcopy(sae)


@edit()
def deepcopy_of_copies(sae, draw):
    return copy.deepcopy(copy.copy(copy.deepcopy(sae)))


@edit()
def deepcopy_in_inference_mode(sae, draw):
    with torch.inference_mode():
        return copy.deepcopy(sae)


@edit()
def shallow_copy(sae, draw):
    return copy.copy(sae)


@edit()
def pickled(sae, draw):
    try:
        return pickle.loads(pickle.dumps(sae))
    except (AttributeError, pickle.PicklingError):  # closures: SAELens' own objects cannot be pickled
        return None


@edit()
def state_through_a_file(sae, draw):
    file = io.BytesIO()
    torch.save(sae.state_dict(), file)
    file.seek(0)
    sae.load_state_dict(torch.load(file), assign=draw.random() < 0.5)


@edit(2)
def saved_and_loaded(sae, draw):
    with tempfile.TemporaryDirectory() as folder:
        sae.save_model(folder)
        return (SAE if draw.random() < 0.5 else type(sae)).load_from_disk(folder)


@edit()
def built_anew(sae, draw):
    """From the class of the object, as some tools do, with the weights loaded afterwards."""
    other = type(sae)(copy.deepcopy(sae.cfg))
    other.load_state_dict(sae.state_dict())
    return other


@edit(2)
def load_state(sae, draw):
    state = {name: draw.fresh(sae, name) for name in sae.state_dict()}
    if draw.random() < 0.3:
        state = {draw.choice(sorted(state)): next(iter(state.values()))} if len(state) == 1 else state
    sae.load_state_dict(state, assign=draw.random() < 0.5)


@edit()
def load_one(sae, draw):
    name = draw.name(sae)
    sae.load_state_dict({name: draw.fresh(sae, name)}, strict=False, assign=draw.random() < 0.5)


# dtype, device, modes


@edit(2)
def to_dtype(sae, draw):
    return sae.to(draw.choice(DTYPES))


@edit(2)
def dtype_there_and_back(sae, draw):
    before = sae.dtype
    return sae.to(draw.choice(DTYPES)).to(before)


@edit()
def half_and_double(sae, draw):
    """Module methods that pass by SAELens' own `to`: sae.dtype stays, the parameters change."""
    before = sae.dtype
    getattr(sae, draw.choice(("half", "double", "bfloat16", "float")))()
    return sae if draw.random() < 0.3 else sae.to(before)


@edit()
def device(sae, draw):
    return draw.choice((lambda: sae.to("cpu"), sae.cpu, lambda: sae.to(torch.zeros(1, dtype=sae.dtype))))()


@edit()
def training_mode(sae, draw):
    sae.train(draw.random() < 0.5)


@edit()
def requires_grad(sae, draw):
    if draw.random() < 0.5:
        sae.requires_grad_(draw.random() < 0.5)
    else:
        getattr(sae, draw.name(sae)).requires_grad_(draw.random() < 0.5)


# Parameters


@edit(4)
def new_parameter(sae, draw):
    name = draw.name(sae)
    value = draw.fresh(sae, name)
    if value.ndim == 2 and draw.random() < 0.4:
        value = value.mT.contiguous().mT
    setattr(sae, name, nn.Parameter(value, requires_grad=draw.random() < 0.7))


@edit()
def tied(sae, draw):
    if "W_enc" in sae._parameters and sae.W_dec.shape == sae.W_enc.T.shape:
        sae.W_enc.data = sae.W_dec.data.T
        if draw.random() < 0.5:
            sae.W_dec.data[draw.some(len(sae.W_dec))] *= -1


@edit(4)
def data_rows(sae, draw):
    name = draw.name(sae, "W_enc", "W_dec", "W_skip")
    rows = draw.some(len(getattr(sae, name)))
    getattr(sae, name).data[rows] = draw.fresh(sae, name)[rows]


@edit(4)
def data_columns(sae, draw):
    name = draw.name(sae, "W_enc", "W_dec", "W_skip")
    columns = draw.some(getattr(sae, name).shape[1])
    getattr(sae, name).data[:, columns] = draw.fresh(sae, name)[:, columns]


@edit(2)
def data_whole(sae, draw):
    name = draw.name(sae)
    parameter = getattr(sae, name)
    value = draw.fresh(sae, name)
    how = draw.choice(("copy", "assign", "numpy", "negative", "scaled"))
    if how == "copy":
        parameter.data.copy_(value)
    elif how == "assign":
        parameter.data = value
    elif how == "numpy" and parameter.dtype != torch.bfloat16:
        parameter.detach().numpy()[...] = value.numpy()
    elif how == "negative" and name in ("W_enc", "W_dec"):
        parameter.data.neg_()
    else:
        parameter.data *= draw.uniform(0.9, 1.1)


@edit(2)
def data_vector(sae, draw):
    name = draw.name(sae, "b_enc", "b_gate", "b_mag", "r_mag", "b_dec", "threshold")
    places = draw.some(len(getattr(sae, name)))
    getattr(sae, name).data[places] = draw.fresh(sae, name)[places]


@edit(2)
def latents_swapped(sae, draw):
    name = draw.name(sae, "W_enc", "W_dec")
    parameter = getattr(sae, name)
    order = torch.randperm(sae.cfg.d_sae, generator=draw.generator)
    parameter.data = parameter.data[:, order] if name == "W_enc" else parameter.data[order]


@edit()
def one_element(sae, draw):
    """In place, where the version tells."""
    name = draw.name(sae)
    parameter = getattr(sae, name)
    with torch.no_grad():
        parameter.view(-1)[draw.randrange(parameter.numel())] += 0.5


@edit()
def hidden_element(sae, draw):
    """Through `.data`, where nothing may tell: `refresh` is the user's part."""
    name = draw.name(sae)
    parameter = getattr(sae, name)
    parameter.data[tuple(draw.randrange(n) for n in parameter.shape)] += 0.5
    if dm.is_accelerated(sae):
        dm.refresh(sae)


@edit(2)
def in_place(sae, draw):
    name = draw.name(sae)
    with torch.no_grad():
        getattr(sae, name).copy_(draw.fresh(sae, name))


# Latents that can never fire, that are equal, that are steered


def _encoder_biases(sae):
    return [name for name in ("b_enc", "b_gate", "b_mag") if name in sae._parameters]


@edit(3)
def latents_zeroed(sae, draw):
    dead = draw.some(sae.cfg.d_sae)
    what = draw.choice(("encoder", "columns", "biases", "decoder", "all"))
    if what in ("encoder", "columns", "all") and "W_enc" in sae._parameters:
        sae.W_enc.data[:, dead] = 0
    if what in ("encoder", "biases", "all"):
        for name in _encoder_biases(sae):
            getattr(sae, name).data[dead] = 0
    if what in ("decoder", "all"):
        sae.W_dec.data[dead] = 0


@edit()
def dimension_zeroed(sae, draw):
    """One activation dimension is taken out of the encoder, or the decoder."""
    name = draw.name(sae, "W_enc", "W_dec")
    parameter, places = getattr(sae, name), draw.some(sae.cfg.d_in)
    if name == "W_enc":
        parameter.data[places] = 0
    else:
        parameter.data[:, [place % parameter.shape[1] for place in places]] = 0


@edit()
def dimension_then_latent(sae, draw):
    """After a call without a dimension, latents are taken out: parts of them are zero before and after."""
    if "W_enc" in sae._parameters:
        place = draw.randrange(sae.cfg.d_in)
        sae.W_enc.data[place] = 0
        with torch.no_grad():
            sae.encode(draw.normal(8, 4, sae.cfg.d_in // 4).to(sae.dtype).reshape(_shape_of_x(sae)))
        sae.W_enc.data[:, place :: draw.choice((1, sae.cfg.d_in, sae.cfg.d_in))] = 0


def _shape_of_x(sae):
    reshapes = sae.hook_z_reshaping_mode and not hasattr(sae.cfg, "d_out")
    return (8, 4, sae.cfg.d_in // 4) if reshapes else (8, sae.cfg.d_in)


@edit(2)
def latents_equal(sae, draw):
    same = draw.some(sae.cfg.d_sae)
    if "W_enc" in sae._parameters:
        sae.W_enc.data[:, same] = sae.W_enc.data[:, same[:1]].clone()
        for name in _encoder_biases(sae):
            getattr(sae, name).data[same] = getattr(sae, name).data[same[0]].clone()
    else:
        sae.W_dec.data[same] = sae.W_dec.data[same[0]].clone()


@edit(2)
def thresholds(sae, draw):
    if "threshold" in sae._parameters:
        some = draw.some(sae.cfg.d_sae)
        value = draw.choice((1e30, 2.1, 1.9, 0.0, -1.0)) if len(some) < 3 else draw.choice((1e30, 2.1, 1.9))
        sae.threshold.data[some] = min(value, torch.finfo(sae.threshold.dtype).max)


@edit(2)
def k(sae, draw):
    if hasattr(sae.activation_fn, "k"):
        number = draw.choice((0, 1, 3, 7, 12, sae.cfg.d_sae, sae.cfg.d_sae + 1) if draw.random() < 0.3 else (3, 7, 12))
        if draw.random() < 0.3 and isinstance(sae.activation_fn, TopK):
            sae.activation_fn = TopK(number)
        else:
            sae.activation_fn.k = number


@edit()
def activation_function(sae, draw):
    if not hasattr(sae.activation_fn, "k"):
        sae.activation_fn = draw.choice((nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.1), nn.ReLU6()))
    elif isinstance(sae.activation_fn, TopK):
        sae.activation_fn.use_sparse_activations = draw.random() < 0.2


@edit()
def not_finite(sae, draw):
    """A whole latent of the encoder; the next edits may overwrite it, or not."""
    if draw.random() < 0.3 and "W_enc" in sae._parameters:
        name, place = draw.name(sae, "W_enc", "b_enc"), draw.randrange(sae.cfg.d_sae)
        getattr(sae, name).data[..., place] = draw.choice((float("inf"), float("nan")))


@edit()
def decoder_not_finite(sae, draw):
    """A whole latent of the decoder."""
    sae.W_dec.data[draw.randrange(sae.cfg.d_sae)] = draw.choice((float("inf"), float("nan")))


@edit(2)
def finite_again(sae, draw):
    for name in names_of(sae):
        parameter = getattr(sae, name)
        if not bool(parameter.isfinite().all()):
            parameter.data = draw.fresh(sae, name)


# What SAELens and its configuration offer


@edit(2)
def fold_norms(sae, draw):
    sae.fold_W_dec_norm()


@edit()
def fold_scale(sae, draw):
    sae.fold_activation_norm_scaling_factor(draw.choice((0.8, 1.25)))


@edit()
def fold_whitening(sae, draw):
    d = sae.cfg.d_in
    sae.fold_activation_whitening(draw.normal(d) * 0.01, torch.eye(d) * 0.8, torch.eye(d) / 0.8)


@edit(2)
def cfg_changed(sae, draw):
    """SAELens reads these at every call."""
    cfg, name = (
        sae.cfg,
        draw.choice(("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "max_iterations", "residual")),
    )
    if name == "residual" and hasattr(cfg, "residual_threshold"):
        cfg.residual_threshold = draw.choice((0.0, 0.01, 3.0))
        cfg.stop_on_duplicate_support = draw.random() < 0.5
    elif name == "max_iterations" and hasattr(cfg, name):
        cfg.max_iterations = draw.choice((1, 5, 12))
    elif hasattr(cfg, name) and not (name == "apply_b_dec_to_input" and hasattr(cfg, "d_out")):
        setattr(cfg, name, draw.random() < 0.5)


@edit()
def error_term(sae, draw):
    sae.use_error_term = draw.random() < 0.5


def _scaled(tensor, hook):
    return tensor * 1.5


def _ablated(tensor, hook):
    kept = tensor.clone()
    kept[..., ::3] = 0
    return kept


def _looked_at(tensor, hook):
    hook.seen = tensor.shape


@edit(2)
def hook(sae, draw):
    point = draw.choice(HOOK_POINTS)
    sae.add_hook(f"hook_sae_{point}", draw.choice((_scaled, _ablated, _looked_at)), is_permanent=draw.random() < 0.2)


@edit(3)
def hooks_off(sae, draw):
    sae.reset_hooks(including_permanent=draw.random() < 0.8)


@edit()
def hook_z_reshaping(sae, draw):
    """Off and on again: SAELens forgets the head size in between."""
    if sae.cfg.reshape_activations == "hook_z":
        sae.turn_off_forward_pass_hook_z_reshaping()
        sae.turn_on_forward_pass_hook_z_reshaping()


# What is done to the accelerated one only


@edit(2)
def accelerated_again(sae, draw):
    if dm.is_accelerated(sae):
        return dm.accelerate(dm.deaccelerate(sae))
    return None


@edit()
def refresh(sae, draw):
    if dm.is_accelerated(sae):
        dm.refresh(sae)
