"""Which options the SAEs in SAELens' own list of pretrained ones have, as far as its list and its loaders tell without network.

A loader's configuration function is called with every download failing; what it still says (it reads names) is its answer.
Loaders that need a file are in NEEDS_A_FILE with what their source says whatever the file holds.
"""

from collections import Counter
from unittest import mock

from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_config_overrides, get_pretrained_saes_directory

NOT_SAID = "not said"
PLAIN_TRANSCODER = {
    "architecture": "transcoder",
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
SCALED_JUMPRELU = {
    "architecture": "jumprelu",
    "apply_b_dec_to_input": False,
    "normalize_activations": "expected_average_only_in",
    "reshape_activations": "none",
}
NEEDS_A_FILE = {
    "sae_lens": {},
    "dictionary_learning_1": {
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    },
    "llama_scope": SCALED_JUMPRELU,
    "llama_scope_r1_distill": SCALED_JUMPRELU,
    "mwhanna_transcoder": PLAIN_TRANSCODER,
    "mntss_clt_layer_transcoder": PLAIN_TRANSCODER,
    "connor_rob_hook_z": {
        "architecture": "standard",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z",
    },
    "temporal": {"architecture": "temporal", "apply_b_dec_to_input": True},
}
# dictionary_learning says its class in a file only; its authors put it into names. The first that occurs counts.
NAMED_CLASSES = {
    "matryoshka": "jumprelu",
    "batch_top_k": "jumprelu",
    "andyrdt": "jumprelu",  # all BatchTopK
    "topk": "topk",
    "gated": "gated",
    "vanilla": "standard",
    "standard": "standard",
    "panneal": "standard",
}


def _no_file(*args, **kwargs):
    raise loaders.EntryNotFoundError("no network here")


def _said(release, sae_id, entry):
    """The configuration of one pretrained SAE, as far as it is known."""
    loader = entry.conversion_func or "sae_lens"
    overrides = get_config_overrides(release, sae_id)
    if loader in NEEDS_A_FILE:
        said = {**NEEDS_A_FILE[loader], **{k: v for k, v in overrides.items() if k == "normalize_activations"}}
        if loader == "dictionary_learning_1":
            name = f"{release} {entry.saes_map[sae_id]}".lower()
            said["architecture"] = next((a for word, a in NAMED_CLASSES.items() if word in name), NOT_SAID)
            said["apply_b_dec_to_input"] = True  # but for its JumpReLU class, which no name here says
        return said
    told = loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[loader](
        entry.repo_id, entry.saes_map[sae_id], "cpu", False, overrides
    )
    return {"rescale_acts_by_decoder_norm": False} | loaders.handle_config_defaulting(told)  # which no loader sets


def pretrained_options():
    """One dict of configuration fields for each SAE of the list."""
    shapes = {"w_enc": [1, 1], "w_dec": [1, 1]}
    with (
        mock.patch.object(loaders, "hf_hub_download", _no_file),
        mock.patch.object(loaders, "get_safetensors_tensor_shapes", return_value=shapes),
    ):
        directory = get_pretrained_saes_directory()
        return [_said(release, sae_id, entry) for release, entry in directory.items() for sae_id in entry.saes_map]


def by_architecture(options):
    return Counter(said.get("architecture", NOT_SAID) for said in options)
