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


def write_dictionary(folder, kind, weights, **trainer):
    """config.json and ae.pt of dictionary_learning -> the folder."""
    folder.mkdir(parents=True)
    own = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 1, "lm_name": "EleutherAI/pythia-70m"}
    own |= {"submodule_name": "resid_post_layer_1"} | trainer
    (folder / "config.json").write_text(json.dumps({"trainer": own, "buffer": {"ctx_len": 128, "io": "out"}}))
    torch.save(weights, folder / "ae.pt")
    return str(folder)


def dictionary_weights(bias=True):
    """Encoder and decoder as torch's linear layers hold them."""
    weights = {"encoder.weight": unit(F, D), "decoder.weight": unit(F, D).T.contiguous()}
    return weights | ({"encoder.bias": noise(F)} if bias else {})


def write_llama_scope(folder, *, file="checkpoints/final.safetensors", dtype=torch.float32, **hyperparams):
    """hyperparams.json and the weights -> folder, weights in float32, the configuration."""
    (folder / file).parent.mkdir(parents=True)
    weights = {
        "encoder.weight": unit(F, D),
        "encoder.bias": noise(F) - 0.3,
        "decoder.weight": (unit(F, D) * torch.linspace(0.5, 2, F)[:, None]).T.contiguous(),
        "decoder.bias": noise(D, seed=2),
    }
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / file)
    site = "blocks.19.hook_resid_post"
    full = {
        "hook_point_in": site, "hook_point_out": site, "d_model": D, "d_sae": F, "expansion_factor": F // D,
        "act_fn": "jumprelu", "jump_relu_threshold": 0.7, "norm_activation": "dataset-wise", "top_k": K,
        "dataset_average_activation_norm": {"in": 2.5, "out": 2.5}, "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True, "use_glu_encoder": False,
    } | hyperparams  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(full))
    return folder, {name: tensor.to(dtype).float() for name, tensor in weights.items()}, full


def write_qwen_scope(root, *, repository="SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", layers=(0,), **changed):
    """layerN.sae.pt in a snapshot of a repository whose name says the rest -> folder, weights."""
    folder = root / f"models--Qwen--{repository}" / "snapshots" / "ab"
    folder.mkdir(parents=True)
    weights = {"W_enc": unit(F, D), "W_dec": unit(F, D).T.contiguous(), "b_enc": noise(F), "b_dec": noise(D, seed=2)}
    weights |= changed
    for layer in layers:
        torch.save(weights, folder / f"layer{layer}.sae.pt")
    return folder, weights


def write_openai(path, *, activation="TopK", **changed):
    """A file of OpenAI's -> its weights. A None leaves one out."""
    path.parent.mkdir(parents=True)
    weights = {
        "pre_bias": noise(D, seed=2),
        "latent_bias": noise(F),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
        "encoder.weight": unit(F, D),
        "decoder.weight": unit(F, D).T.contiguous(),
        "activation": activation,
    }
    weights |= {"activation_state_dict": {"k": K, "postact_fn": "ReLU"}} if activation == "TopK" else {}
    weights |= changed
    torch.save({name: value for name, value in weights.items() if value is not None}, path)
    return weights
