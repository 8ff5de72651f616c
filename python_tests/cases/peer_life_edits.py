"""What users do to an object of sparsify or dictionary_learning: edits made to an accelerated one and its plain twin alike.

An edit is a function of an SAE and a `Draw` that returns the SAE to go on with (None: the same).
"""

import copy
import pickle

import torch
from torch import nn

import darkmatter_ext as dm
from cases import life_edits, peers
from cases.peers import LIMIT, D, is_coder, parts

EDITS = {}  # name -> (edit, weight)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Draw(life_edits.Draw):
    """Random choices and tensors; the same for both twins."""

    def name(self, sae, ndim=(1, 2)):
        return self.choice([name for name, value in sae.named_parameters() if value.ndim in ndim])

    def fresh(self, sae, name):
        return peers.fresh(sae, name, self.generator)


def edit(weight=1):
    def add(function):
        EDITS[function.__name__] = function, weight
        return function

    return add


def _owner(sae, name):
    owner, _, own = name.rpartition(".")
    return sae.get_submodule(owner), own


@edit(3)
def deepcopy(sae, draw):
    return copy.deepcopy(sae)


@edit()
def deepcopy_in_inference_mode(sae, draw):
    with torch.inference_mode():
        return copy.deepcopy(sae)


@edit()
def pickled(sae, draw):
    return pickle.loads(pickle.dumps(sae))


edit()(life_edits.state_through_a_file)


@edit(2)
def load_state(sae, draw):
    names = {name for name, _ in sae.named_parameters()}
    state = {name: draw.fresh(sae, name) if name in names else v.clone() for name, v in sae.state_dict().items()}
    sae.load_state_dict(state, assign=draw.random() < 0.5)


@edit()
def load_a_layer(sae, draw):
    if "encoder" in sae._modules:
        sae.encoder.load_state_dict({"weight": draw.fresh(sae, "encoder.weight")}, strict=False)


@edit(2)
def to_dtype(sae, draw):
    sae.to(draw.choice(DTYPES))


@edit(2)
def dtype_there_and_back(sae, draw):
    before = parts(sae).W_enc.dtype
    sae.to(draw.choice(DTYPES)).to(before)


@edit()
def a_layer_to_dtype(sae, draw):
    layer = draw.choice(list(sae._modules.values()) or [sae])
    layer.to(draw.choice(DTYPES))


edit()(life_edits.training_mode)


@edit()
def requires_grad(sae, draw):
    sae.requires_grad_(draw.random() < 0.5)


@edit(4)
def new_parameter(sae, draw):
    name = draw.name(sae)
    value = draw.fresh(sae, name)
    if value.ndim == 2 and draw.random() < 0.4:
        value = value.mT.contiguous().mT
    setattr(*_owner(sae, name), nn.Parameter(value, requires_grad=draw.random() < 0.5))


@edit()
def tied(sae, draw):
    own = parts(sae)
    (encoder, of_encoder), turned = own.encoder, getattr(*own.encoder).shape != own.W_dec.shape
    getattr(encoder, of_encoder).data = own.W_dec.data.T if turned else own.W_dec.data
    if draw.random() < 0.5:
        own.W_dec.data[draw.some(len(own.W_dec))] *= -1


def _some_anew(sae, draw, ndim):
    """A few rows of a matrix, or places of a vector, through `.data`."""
    name = draw.name(sae, (ndim,))
    parameter = getattr(*_owner(sae, name))
    places = draw.some(len(parameter))
    parameter.data[places] = draw.fresh(sae, name)[places]


@edit(4)
def data_rows(sae, draw):
    _some_anew(sae, draw, 2)


@edit(4)
def data_columns(sae, draw):
    name = draw.name(sae, (2,))
    parameter = getattr(*_owner(sae, name))
    columns = draw.some(parameter.shape[1])
    parameter.data[:, columns] = draw.fresh(sae, name)[:, columns]


@edit(2)
def data_whole(sae, draw):
    name = draw.name(sae)
    parameter, value = getattr(*_owner(sae, name)), draw.fresh(sae, name)
    how = draw.choice(("copy", "assign", "numpy", "scaled"))
    if how == "copy":
        parameter.data.copy_(value)
    elif how == "assign":
        parameter.data = value
    elif how == "numpy" and parameter.dtype != torch.bfloat16:
        parameter.detach().numpy()[...] = value.numpy()
    else:
        parameter.data *= draw.uniform(0.9, 1.1)


@edit(2)
def data_vector(sae, draw):
    _some_anew(sae, draw, 1)


@edit()
def one_element(sae, draw):
    """In place, where the version tells."""
    parameter = getattr(*_owner(sae, draw.name(sae)))
    with torch.no_grad():
        parameter[tuple(draw.randrange(n) for n in parameter.shape)] += 0.5


@edit()
def hidden_element(sae, draw):
    """Through `.data`, where nothing may tell: `refresh` is the user's part."""
    parameter = getattr(*_owner(sae, draw.name(sae)))
    parameter.data[tuple(draw.randrange(n) for n in parameter.shape)] += 0.5
    if dm.is_accelerated(sae):
        dm.refresh(sae)


@edit(2)
def in_place(sae, draw):
    name = draw.name(sae)
    with torch.no_grad():
        getattr(*_owner(sae, name)).copy_(draw.fresh(sae, name))


@edit(3)
def latents_zeroed(sae, draw):
    own, dead = parts(sae), draw.some(parts(sae).W_enc.shape[1])
    what = draw.choice(("encoder", "bias", "decoder", "all"))
    if what in ("encoder", "all"):
        own.W_enc.data[:, dead] = 0
    if what in ("bias", "all"):
        own.b_enc.data[dead] = 0
    if what in ("decoder", "all"):
        own.W_dec.data[dead] = 0


@edit(2)
def latents_equal(sae, draw):
    own, same = parts(sae), draw.some(parts(sae).W_enc.shape[1])
    own.W_enc.data[:, same] = own.W_enc.data[:, same[:1]].clone()
    own.b_enc.data[same] = own.b_enc.data[same[0]].clone()


@edit()
def dimension_zeroed(sae, draw):
    parts(sae).W_enc.data[draw.some(D)] = 0


@edit()
def not_finite(sae, draw):
    own = parts(sae)
    place, value = draw.randrange(len(own.W_dec)), draw.choice((float("inf"), float("nan")))
    if draw.random() < 0.5:
        own.W_dec.data[place] = value
    else:
        own.b_enc.data[place] = value


@edit(2)
def finite_again(sae, draw):
    for name, parameter in sae.named_parameters():
        if not bool(parameter.isfinite().all()):
            parameter.data = draw.fresh(sae, name)


@edit(2)
def thresholds(sae, draw):
    value = draw.choice((LIMIT, LIMIT, 2.0, -1.0, 1e30, float("nan")))
    if "threshold" in sae._buffers:
        if draw.random() < 0.5:
            sae.threshold = torch.tensor(value)
        else:
            sae.threshold.fill_(min(value, 1e4))
    elif "threshold" in sae._parameters:
        some = draw.some(len(sae.threshold))
        sae.threshold.data[some] = value if len(some) < 3 else LIMIT


@edit(2)
def k(sae, draw):
    number = draw.choice((1, 3, 7, 12)) if draw.random() < 0.8 else draw.choice((64, 512, 513))
    if is_coder(sae):
        sae.cfg.k = number
    elif "k" in sae._buffers:
        if draw.random() < 0.5:
            sae.k = torch.tensor(number)
        else:
            sae.k.fill_(number)


@edit()
def cfg_changed(sae, draw):
    if is_coder(sae):
        if draw.random() < 0.3:
            sae.cfg.activation = draw.choice(("groupmax", "topk"))
        else:
            sae.cfg.transcode = draw.random() < 0.5
    elif hasattr(sae, "apply_b_dec_to_input"):
        sae.apply_b_dec_to_input = draw.random() < 0.5


@edit()
def the_librarys_own_edits(sae, draw):
    if is_coder(sae):
        sae.set_decoder_norm_to_unit_norm()
    else:
        sae.scale_biases(draw.choice((0.9, 1.1)))


@edit()
def hook(sae, draw):
    layer = draw.choice(list(sae._modules.values()) or [sae])
    layer.register_forward_hook(draw.choice((lambda _m, _x, out: None, lambda _m, _x, out: out)))


@edit(3)
def hooks_off(sae, draw):
    for layer in sae.modules():
        layer._forward_hooks.clear()


@edit(2)
def accelerated_again(sae, draw):
    return dm.accelerate(dm.deaccelerate(sae)) if dm.is_accelerated(sae) else None


@edit()
def refresh(sae, draw):
    if dm.is_accelerated(sae):
        dm.refresh(sae)
