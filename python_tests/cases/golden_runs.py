"""Numbers of the experiments on small given SAEs: `experiments/test_golden_runs.py` compares them with golden_runs.json.

    python -m cases.golden_runs            # in python_tests: the numbers of this machine, as JSON
    python -m cases.golden_runs write      # the same, to golden_runs.json; names of experiments may follow

The model, the text and the SAEs are made of integers by torch's own generator of integers, so that no rounding of another
machine's mathematics is in them; nothing is trained. A change of a number belongs in CHANGELOG.md.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from sae_lens.registry import get_sae_class

from cases.models import small_model, word_tokenizer, write_pairs, write_tasks, write_text
from darkmatter_ext import cli
from darkmatter_ext.report.result import load_result

GOLDEN = Path(__file__).with_name("golden_runs.json")
HOOK, BEFORE = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"
SAES = {  # name -> architecture, width, hook
    **{f"topk-{width}": ("topk", width, HOOK) for width in (24, 32, 48, 64)},
    **{kind: (kind, 48, HOOK) for kind in ("jumprelu", "standard", "gated")},
    "before": ("topk", 24, BEFORE),
    "mlp": ("topk", 24, "blocks.1.hook_mlp_out"),
    "attention": ("topk", 24, "blocks.1.attn.hook_z"),
}
STORED = "--model IN/model --text IN/text.txt --tokens 8000 --context-length 32"
STREAMED = f"--preset one-pass --interval-groups 5 {STORED}"
KINDS = "--sae IN/topk-24 IN/jumprelu IN/standard IN/gated"
FOUR = "--sae IN/topk-24 IN/topk-32 IN/topk-48 IN/topk-64"
EARLIER = "--sae IN/topk-24 --predictor IN/before IN/mlp IN/attention"
TWO = "--sae IN/topk-24 IN/jumprelu"
PROBES = "--tasks IN/tasks.csv --probe-ks 1 4 --train-sizes 8 64 --label-noise 0.5 --probe-seeds 1"
RUNS = {
    "baselines": f"{STREAMED} --sae IN/topk-24 IN/before",
    "decomposition": f"{STREAMED} {KINDS}",
    "downstream": f"{STORED} {TWO} --contexts 6",
    "earlier-layers": f"{STREAMED} {EARLIER}",
    "geometry": f"{STREAMED} --sae IN/topk-24 --clusters 2 4 --chunk 8 --least-chunks 2 --null-draws 5 --pairs IN/pairs.csv",
    "intrinsic-dimension": f"{STORED} --sae IN/topk-24 --points 400",
    "latent-alignment": f"{STREAMED} {KINDS}",
    "norm-test": f"{STREAMED} {KINDS}",
    "numbers": f"{STORED} --sae IN/topk-24 --blocks 0 1 --draws 19",
    "pathology": f"{STORED} {TWO} --contexts 6",
    "per-token": f"{STREAMED} {FOUR}",
    "probing": f"{STORED} --sae IN/topk-24 {PROBES}",
    "pursuit": f"{STREAMED} --sae IN/topk-24 IN/topk-32 --method gradient",
    "scaling": f"{STREAMED} {FOUR} --l0 4 --with-pursuit",
    "small-maps": f"{STORED} --sae IN/topk-24 --rank 8 --features 64 --epochs 5",
    "synthetic": f"{STORED} --sae IN/topk-24 --noise-seeds 2 --fit-tokens 2000",
}


def _integers(shape, largest, g):
    return torch.randint(-largest, largest + 1, shape, generator=g).float()


def _make_model(folder):
    """A Llama of three blocks whose weights are small integers over a power of two."""
    g, network = torch.Generator().manual_seed(0), small_model("llama")
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(_integers(weight.shape, 8, g) / 16 if weight.ndim == 2 else torch.ones_like(weight))
    network.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def _make_sae(folder, kind, width, hook, g):
    """An SAE whose decoder is its encoder's transpose, so that it reconstructs something."""
    sae_class, config_class = get_sae_class(kind)
    sae = sae_class(config_class(d_in=16, d_sae=width, **({"k": 4} if kind == "topk" else {})))
    rows = _integers((width, 16), 8, g) / 16
    weights = {"W_enc": rows.T, "W_dec": rows / 2, "b_dec": _integers((16,), 4, g) / 16}
    weights |= {"b_enc": torch.full((width,), -0.25), "b_gate": torch.full((width,), -0.5)}
    weights |= {"threshold": torch.full((width,), 0.75), "b_mag": torch.zeros(width), "r_mag": torch.zeros(width)}
    sae.load_state_dict({own: weights[own] for own in sae.state_dict()})
    for key, value in {"hook_name": hook, "context_size": 32, "prepend_bos": True}.items():
        sae.cfg.metadata[key] = value
    sae.save_model(folder)


def make_inputs(folder: Path) -> None:
    """The model, the texts and the SAEs."""
    _make_model(folder / "model")
    write_text(folder / "text.txt", words=900)
    write_tasks(folder / "tasks.csv")
    write_pairs(folder / "pairs.csv")
    g = torch.Generator().manual_seed(1)
    for name, (kind, width, hook) in SAES.items():
        _make_sae(folder / name, kind, width, hook, g)


def numbers(folder: Path, names=tuple(RUNS)) -> dict[str, dict[str, float]]:
    """Of every run, in this process; the cache is in the folder."""
    os.environ["DARKMATTER_CACHE"] = str(folder / "cache")
    make_inputs(folder)
    found = {}
    for name in names:
        words = [word.replace("IN/", f"{folder}/") for word in RUNS[name].split()]
        with contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(["run", name, *words, "--out", str(folder / "out")])
        if status != 0:
            raise SystemExit(f"{name} ended with {status}")
        result = load_result(folder / "out" / f"{name}.json")
        found[name] = {key: float(f"{value:.10g}") for key, value in result.numbers.items()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        found = numbers(Path(work), sys.argv[2:] or tuple(RUNS))
    if sys.argv[1:2] == ["write"]:
        GOLDEN.write_text(
            json.dumps((json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}) | found, indent=0) + "\n"
        )
    else:
        sys.stdout.write(json.dumps(found))
