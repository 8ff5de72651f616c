"""Small SAEs and transcoders written as other libraries write them, and their weights for a definition in plain torch."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

D, F, K = 16, 48, 4


def unit(n, d, seed=0):
    """[n, d] random unit rows."""
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def noise(*shape, seed=1):
    """A tenth of a normal."""
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(n=200, d=D):
    """[n, d] normal."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(5))


def top(acts, k=K):
    """The k largest of each row, zeros elsewhere."""
    kept = acts.topk(k, dim=-1)
    return torch.zeros_like(acts).scatter(-1, kept.indices, kept.values)


def write_sparsify(folder, *, dtype=torch.float32, module="layers.1", d=D, f=F, weights=None, **config):
    """layers.N/cfg.json and sae.safetensors, the training's config.json above -> folder, weights in float32."""
    own = folder / module
    own.mkdir(parents=True)
    found = {
        "encoder.weight": unit(f, d),
        "encoder.bias": noise(f),
        "W_dec": unit(f, d),
        "b_dec": noise(d, seed=2),
    } | (weights or {})
    if config.get("skip_connection"):
        found.setdefault("W_skip", noise(d, d, seed=4))
    save_file({name: tensor.to(dtype) for name, tensor in found.items()}, own / "sae.safetensors")
    full = {
        "activation": "topk", "expansion_factor": f // d, "normalize_decoder": True, "num_latents": 0, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d,
    } | config  # fmt: skip
    (own / "cfg.json").write_text(json.dumps(full))
    (folder / "config.json").write_text(
        json.dumps({"model": "EleutherAI/pythia-70m", "ctx_len": 512, "dataset": "pile"})
    )
    return own, {name: tensor.to(dtype).float() for name, tensor in found.items()}


def write_circuit_tracer(folder, *, layers=1, d=D, f=F, config=None, **changed):
    """config.yaml and layer_N.safetensors -> the last file, its weights. A None leaves a weight out."""
    import yaml

    folder.mkdir(parents=True)
    full = {
        "model_name": "meta-llama/Llama-3.2-1B", "model_kind": "transcoder_set", "scan": "mine/transcoders",
        "feature_input_hook": "hook_resid_mid", "feature_output_hook": "mlp.hook_out",
    } | (config or {})  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(full))
    weights = {"W_enc": unit(f, d), "W_dec": unit(f, d, seed=3), "b_enc": noise(f) - 0.2, "b_dec": noise(d, seed=2)}
    weights = {name: tensor for name, tensor in (weights | changed).items() if tensor is not None}
    for layer in range(layers):
        save_file(weights, folder / f"layer_{layer}.safetensors")
    return folder / f"layer_{layers - 1}.safetensors", weights


def write_gemma_scope(root, path, **changed):
    """params.npz in google/gemma-scope-2b-pt-res/layer_N/width_16k/average_l0_M -> folder, weights."""
    folder = root / path
    folder.mkdir(parents=True)
    weights = {
        "W_enc": unit(F, D).T,
        "W_dec": unit(F, D),
        "b_enc": noise(F),
        "b_dec": noise(D, seed=2),
        "threshold": 0.5 + noise(F, seed=3).abs(),
    } | changed
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in weights.items()})
    return folder, weights
