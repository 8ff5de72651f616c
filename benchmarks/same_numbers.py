"""Does a change of the code change a number? The same small runs on both sides, all numbers compared.

    PYTHONPATH=BEFORE python benchmarks/same_numbers.py run --python PYTHON --out before
    PYTHONPATH=AFTER python benchmarks/same_numbers.py run --python PYTHON --out after --inputs before/inputs
    python benchmarks/same_numbers.py compare before after

Every run is one `darkmatter run`: the experiments, SAEs trained or given, activations stored,
streamed or cached, on a small random language model. It has a folder, a cache and a log of its own.
One machine and one thread for both sides: after training, sums of another order are other numbers.
Compared: numbers, series and columns by token of the results; not seconds, provenance, config, notes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HOOK = "blocks.1.hook_resid_post"
SITE = f"--model IN/model --hook {HOOK} --text IN/text.txt --tokens 16000 --context-length 32"
DEMO = f"{SITE} --interval-groups 5 --k 4 --steps 40"  # of families: SAEs trained here
KEPT = DEMO.replace(f" --hook {HOOK}", "") + " --store True"  # SAEs given, activations kept
SINGLE = f"{SITE} --k 4 --steps 40"  # of the experiments that splice or plant
GIVEN = SINGLE.replace(f" --hook {HOOK}", "")
STREAM = "--preset one-pass --interval-groups 5 --tokens 12000"
READ = f"{STREAM} --model IN/model --text IN/text.txt"  # a model is run
FOUR = "--sae IN/topk-24 IN/topk-32 IN/topk-48 IN/topk-64"
KINDS = "--sae IN/topk-24 IN/jumprelu IN/standard IN/gated"
SITES = "--sae IN/topk-24 IN/jumprelu IN/topk-before"
EARLIER = "--sae IN/topk-24 --predictor IN/topk-before IN/topk-mlp IN/topk-attention"
ERRORS = (
    "--error-width 64 --error-k 1 --error-steps 20 --training-seeds 2 --latents 4 --sae-fraction 0.4 --fit-fraction 0.4"
)
NOISE = "--noise-seeds 2 --fit-tokens 2000 --score-tokens 2000"
LOBES = "--clusters 2 4 --chunk 8 --least-chunks 2 --null-draws 5 --pairs IN/pairs.csv"
PROBES = "--tasks IN/tasks.csv --probe-ks 1 4 --train-sizes 8 64 --label-noise 0.5 --probe-seeds 1"
CODE = "--parity released-code"
RUNS = {  # name -> arguments of `darkmatter run`, IN: the folder of inputs; names stay when flags are renamed
    "adapt": f"adapt {SINGLE} --widths 24 --contexts 6 --ranks 1 4 --adapt-tokens 512 --choose-contexts 2 --adapt-seeds 2",
    "baselines": f"baselines {DEMO} --layers 0 1 --widths 24",
    "baselines-code": f"baselines {DEMO} --layers 1 --widths 24 {CODE}",
    "baselines-given": f"baselines {KEPT} {SITES}",
    "baselines-stream": f"baselines {READ} {SITES}",
    "baselines-cache": f"baselines {STREAM} --cache IN/cache-0 IN/cache-1 {SITES}",
    "decomposition": f"decomposition {DEMO} --widths 24 48 --ks 2 4 --full-grid",
    "decomposition-code": f"decomposition {DEMO} --widths 24 48 {CODE}",
    "decomposition-tokens": f"decomposition {DEMO} --widths 24 --split tokens --seed 3 --max-norm-ratio 1.3",
    "decomposition-given": f"decomposition {KEPT} {KINDS} --max-norm-ratio 1.3",
    "decomposition-given-processed": f"decomposition {KEPT} --sae IN/processed",
    "decomposition-stream": f"decomposition {READ} {KINDS} --table-contexts 0",
    "decomposition-stream-code": f"decomposition {READ} {KINDS} {CODE} --split tokens",
    "decomposition-once": f"decomposition {READ} {SITES} --passes 1 --loss --token-means --max-norm-ratio 1.3",
    "decomposition-products": f"decomposition {READ} {KINDS} --products float32 --sae-memory-gb 1e-5",
    "decomposition-documents": f"decomposition {READ} --sae IN/topk-24 --contexts-per-document 20 --seed 3",
    "decomposition-predictors": f"decomposition {READ} {EARLIER}",
    "decomposition-processed": f"decomposition {READ} --sae IN/processed",
    "decomposition-tokenised": f"decomposition {STREAM} --model IN/model --tokenised IN/tokenised {FOUR}",
    "decomposition-cache": f"decomposition {STREAM} --cache IN/cache-1 {KINDS}",
    "decomposition-dataset": f"decomposition {STREAM} --cache IN/dataset --sae IN/topk-24 IN/jumprelu",
    "downstream": f"downstream {SINGLE} --widths 24 48 --contexts 6",
    "downstream-given": f"downstream {SINGLE} --sae IN/topk-24 IN/jumprelu --contexts 6",
    "earlier-layers": f"earlier-layers {DEMO} --widths 24",
    "earlier-layers-code": f"earlier-layers {DEMO} --widths 24 {CODE}",
    "earlier-layers-given": f"earlier-layers {KEPT} {EARLIER}",
    "earlier-layers-stream": f"earlier-layers {READ} {EARLIER}",
    "error-saes": f"error-saes {SINGLE} --widths 64 {ERRORS}",
    "error-saes-code": f"error-saes {SINGLE} --widths 64 {ERRORS} {CODE}",
    "geometry": f"geometry {DEMO} --layers 0 1 --widths 24 {LOBES}",
    "geometry-stream": f"geometry {READ} --sae IN/topk-24 {LOBES}",
    "latent-alignment": f"latent-alignment {DEMO} --widths 24 48",
    "latent-alignment-code": f"latent-alignment {DEMO} --widths 24 48 {CODE}",
    "latent-alignment-stream": f"latent-alignment {READ} {KINDS}",
    "norm-test": f"norm-test {DEMO} --widths 24 48 --ks 2 4",
    "norm-test-code": f"norm-test {DEMO} --widths 24 48 --ks 2 4 {CODE}",
    "norm-test-stream": f"norm-test {READ} {SITES}",
    "norm-test-stream-code": f"norm-test {READ} {KINDS} {CODE}",
    "numbers": f"numbers {DEMO} --widths 24 --blocks 0 1 --draws 19 --templates w{{a}} w3-w{{a}}",
    "pathology": f"pathology {SINGLE} --layers 0 1 --widths 24 --contexts 6",
    "pathology-given": f"pathology {GIVEN} {SITES} --contexts 6",
    "per-token": f"per-token {DEMO} --widths 24 48",
    "per-token-code": f"per-token {DEMO} --widths 24 48 {CODE}",
    "per-token-stream": f"per-token {READ} {FOUR}",
    "probing": f"probing {DEMO} --widths 24 --frozen decoder {PROBES}",
    "probing-stream": f"probing {GIVEN} --sae IN/topk-24 {PROBES} --pool mean",
    "pursuit": f"pursuit {DEMO} --widths 24 48",
    "pursuit-orthogonal": f"pursuit {DEMO} --widths 24 --method orthogonal {CODE}",
    "pursuit-stream": f"pursuit {READ} {FOUR} --method matching",
    "scaling": f"scaling {DEMO} --widths 24 32 48 64 --ks 4 6 --l0 4 --with-pursuit",
    "scaling-code": f"scaling {DEMO} --widths 24 48 --ks 4 --l0 4 {CODE}",
    "scaling-given": f"scaling {KEPT} {FOUR} --l0 4",
    "scaling-stream": f"scaling {READ} {FOUR} --l0 4 --with-pursuit",
    "scaling-once": f"scaling {READ} {FOUR} --l0 4 --passes 1",
    "intrinsic-dimension": f"intrinsic-dimension {DEMO} --layers 0 1 --widths 24 --points 400",
    "diff": f"diff {DEMO} --widths 24 --sae-seeds 2 --contexts 6 --tuning-steps 3 --rank 2 --causal-latents 2 --spacing 20",
    "small-maps": f"small-maps {DEMO} --widths 24 --sae-seeds 2 --rank 8 --features 64 --epochs 5",
    "synthetic": f"synthetic {SINGLE} --widths 24 {NOISE}",
    "synthetic-code": f"synthetic {SINGLE} --widths 24 {NOISE} {CODE}",
}
# Both tables name keys by a regular expression over RUN/KEY, KEY as `compare` prints it, and say why.
RENAMED: dict[str, tuple[str, str]] = {  # expression of the key before -> (replacement, as re.sub's, and reason)
    r"^(baselines-given/.*)blocks\.\d\.hook_resid_post/(topk|jumprelu)": (r"\1\2", "given SAEs go by their own names"),
    r"^(earlier-layers-given/.*)/blocks\.0\.hook_resid_post": (r"\1/topk-before", "predictors go by their names"),
    r"^(earlier-layers-given/.*)/blocks\.1\.attn\.hook_z": (r"\1/topk-attention", "predictors go by their names"),
    r"^(earlier-layers-given/.*)/blocks\.1\.hook_mlp_out": (r"\1/topk-mlp", "predictors go by their names"),
    r"^(scaling/.*topk-\d+) (random|shuffled|pursuit)": (r"\1-k4 \2", "a control goes by the name of its SAE"),
}
MENDED: dict[str, str] = {  # expression of the key after -> why its number was wrong before
    r"tokens/(dropped_first_positions|left_out_\w+|high_norm_share_of_energy)": "counted another rule than was applied",
    r"tokens/(median_norm|sae_training|largest_norm)$": "the median that was applied; counts of all runs that store",
    r"norm_over_median": "over the median that was applied",
    r"^decomposition-tokens/": "a norm limit that takes tokens: training text goes by the same median as the other",
    r"^earlier-layers-stream/.*(all|res|random)": "the site's own SAE and the random control are always among them",
}

SINGLE_PRECISION = 2.0**-22  # columns stored in float32 may differ in the last places


def _make_inputs(folder: Path) -> None:
    """A three-block Llama with a text, tokens and stored activations, and SAEs, of fixed seeds."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = [f"w{number}" for number in range(126)]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["<unk>", "<bos>", *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    for saved in (model, PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")):
        saved.save_pretrained(folder / "model")
    shares = 1 / torch.arange(2.0, 128)  # of the words, as in language
    picks = torch.multinomial(shares, 24 * 900, replacement=True).view(24, 900).tolist()
    texts = [f"=== {n}\n" + " ".join(words[pick] for pick in own) for n, own in enumerate(picks)]
    (folder / "text.txt").write_text("\n".join(texts))
    pairs = [f"{number % 2},{words[number]},{words[number + 40]}" for number in range(40)]
    (folder / "pairs.csv").write_text("\n".join(["relation,a,b", *pairs]))
    tasks = [f"{words[n]} {words[n // 2 % 2]},{n // 2 % 2},{n // 2},{n % 2}" for n in range(120)]
    (folder / "tasks.csv").write_text("\n".join(["prompt,target,document,domain", *tasks]))
    ids = torch.multinomial(shares, 500 * 32, replacement=True).view(500, 32) + 2
    Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(folder / "tokenised")
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[2]
    Dataset.from_dict({HOOK: hidden.tolist(), "token_ids": ids.tolist()}).save_to_disk(folder / "dataset")
    _make_saes(folder)
    _darkmatter(RUNS["baselines"], folder, folder / "first", folder / "made")
    for meta in (folder / "made").glob("activations/*/meta.json"):
        meta.parent.rename(folder / f"cache-{json.loads(meta.read_text())['hook'].split('.')[1]}")


def _make_saes(folder: Path) -> None:
    """SAEs of four kinds whose decoder is their encoder's transpose, so that they reconstruct something."""
    import torch
    from sae_lens.registry import get_sae_class

    previous, processed = "blocks.0.hook_resid_post", {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    for name, kind, width, hook, more in (
        *((f"topk-{width}", "topk", width, HOOK, {}) for width in (24, 32, 48, 64)),
        *((kind, kind, 48, HOOK, {}) for kind in ("jumprelu", "standard", "gated")),
        ("topk-before", "topk", 24, previous, {}),
        ("topk-mlp", "topk", 24, "blocks.1.hook_mlp_out", {}),
        ("topk-attention", "topk", 24, "blocks.1.attn.hook_z", {}),
        ("processed", "topk", 24, HOOK, processed | {"seqpos_slice": [5, -5, 2], "exclude_special_tokens": [4]}),
    ):
        sae_class, config_class = get_sae_class(kind)
        active: dict[str, Any] = {"k": 4} if kind == "topk" else {}
        sae = sae_class(config_class(d_in=32, d_sae=width, **active))
        rows = torch.nn.functional.normalize(torch.randn(width, 32), dim=1)
        weights = {"W_enc": rows.T, "W_dec": 0.8 * rows, "b_dec": 0.1 * torch.randn(32)}
        weights |= {"b_enc": torch.full((width,), -0.2), "b_gate": torch.full((width,), -0.5)}
        weights |= {"threshold": torch.full((width,), 0.7), "b_mag": torch.zeros(width), "r_mag": torch.zeros(width)}
        sae.load_state_dict({own: weights[own] for own in sae.state_dict()})
        for key, value in ({"hook_name": hook, "context_size": 32, "prepend_bos": True} | more).items():
            sae.cfg.metadata[key] = value
        sae.save_model(folder / name)


def _darkmatter(run: str, inputs: Path, out: Path, cache: Path) -> None:
    """What `python -m darkmatter_ext run ...` does, in this process."""
    os.environ["DARKMATTER_CACHE"] = str(cache)
    sys.argv = ["darkmatter", "run", *(word.replace("IN/", f"{inputs}/") for word in run.split()), "--out", str(out)]
    try:
        runpy.run_module("darkmatter_ext", run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        if stopped.code:
            raise


def _forked(log: Path, work: Callable[..., None], *arguments: Any) -> bool:
    """Whether the work succeeds in a child, which has the imports of this process and nothing of earlier work."""

    def logged() -> None:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work(*arguments)

    child = multiprocessing.get_context("fork").Process(target=logged)
    child.start()
    child.join()
    return child.exitcode == 0


def run_here(out: Path, inputs: Path, names: Sequence[str]) -> int:
    """Make the inputs where there are none, then the runs; 1 when one failed."""
    import matplotlib.pyplot as _plots  # ten seconds of imports, once for all children
    import sae_lens as _saes

    import darkmatter_ext as own

    print(f"{own.__file__}, sae_lens {_saes.__version__}, figures by {_plots.get_backend()}")
    if not inputs.exists():
        part = inputs.with_name(inputs.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if not _forked(out / "inputs.log", _make_inputs, part):
            raise SystemExit(f"the inputs failed, see {out / 'inputs.log'}")
        part.rename(inputs)
    failed, began = [], time.perf_counter()
    for name in names or RUNS:
        folder, cache, start = out / name, out / f"{name}.cache", time.perf_counter()
        for old in (folder, cache):
            shutil.rmtree(old, ignore_errors=True)
        good = _forked(out / f"{name}.log", _darkmatter, RUNS[name], inputs, folder, cache)
        failed += [] if good else [name]
        print(f"{name:30}{time.perf_counter() - start:6.1f} s{'' if good else '  FAILED, see its log'}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def _run(parsed: argparse.Namespace) -> int:
    """The runs with the Python asked for, with one thread, away from packages in the current folder."""
    if unknown := set(parsed.only) - set(RUNS):
        raise SystemExit(f"--only: must be of {', '.join(RUNS)}, got {', '.join(sorted(unknown))}")
    out = parsed.out.absolute()
    inputs = parsed.inputs.absolute() if parsed.inputs else out / "inputs"
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    environment = os.environ | fixed | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [parsed.python, str(Path(__file__).absolute()), "here", str(out), str(inputs), *parsed.only]
    return subprocess.run(command, cwd=out, env=environment, check=False).returncode


def _leaves(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number below a JSON value with its key; null is NaN."""
    if isinstance(value, dict | list):
        for part, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{key}/{part}", entry)
    elif value is None or isinstance(value, int | float):
        yield key, math.nan if value is None else float(value)


def numbers_of(folder: Path) -> dict[str, tuple[float, float]]:
    """Key -> (number, its own rounding) of a run: numbers, series, and the columns kept by token."""
    import numpy as np
    import pyarrow.dataset as ds

    found: dict[str, tuple[float, float]] = {}
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        for part in ("numbers", "series"):
            found |= {key: (value, 0.0) for key, value in _leaves(part, result[part])}
        columns = dict(np.load(path.with_name(result["arrays"]))) if result["arrays"] else {}
        tables = result["series"].get("per_token", {})  # by hook, in the run's cache folder
        for hook, table in tables.items() if all(map(os.path.exists, tables.values())) else ():
            order = [("context", "ascending"), ("position", "ascending")]
            rows = ds.dataset(table, format="parquet").to_table().sort_by(order)
            columns |= {f"{hook}/{name}": rows[name].to_numpy() for name in rows.column_names}
        for name, column in columns.items():
            rounding = SINGLE_PRECISION if column.dtype == np.float32 else 0.0
            if column.dtype.kind in "biuf":
                found |= {f"tokens/{name}/{n}": (float(value), rounding) for n, value in enumerate(column.ravel())}
    return found


def _renamed(key: str) -> str:
    for expression, (replacement, _) in RENAMED.items():
        key = re.sub(expression, replacement, key)
    return key


def _compare_run(name: str, parsed: argparse.Namespace) -> bool | None:
    """Print how a run's numbers compare; whether they are the same, None for a run that neither side has."""
    before, after = ({f"{name}/{key}": own for key, own in numbers_of(side / name).items()} for side in parsed.sides)
    if not before and not after:
        return None
    before = {_renamed(key): value for key, value in before.items()}
    mended = {key for key in before | after if any(re.search(own, key) for own in MENDED)}
    missing, new = before.keys() - after.keys() - mended, after.keys() - before.keys() - mended
    shared, differ, largest = (before.keys() & after.keys()) - mended, [], (0.0, "-")
    for key in shared:
        (one, rounding), (two, _) = before[key], after[key]
        if one == two or (math.isnan(one) and math.isnan(two)):
            continue
        gap, size = abs(one - two), max(abs(one), abs(two))  # NaN where one is, and then not within any limit
        largest = max(largest, (math.inf if math.isnan(gap) else gap / size, key))
        if not gap <= max(max(parsed.rtol, rounding) * size, parsed.atol):
            differ.append(key)
    print(
        f"{name:30}{len(shared) - len(differ):7} equal, {len(differ)} differ, {len(missing)} missing, {len(new)} new, "
        f"{len(mended)} mended; largest difference {largest[0]:.1e} {largest[1]}"
    )
    for about, keys in (("differs", differ), ("missing", missing), ("new", new)):
        for key in sorted(keys)[: parsed.show]:
            print(f"    {about} {key}:", " -> ".join(str(side.get(key, ["none"])[0]) for side in (before, after)))
    return not (differ or missing or new)


def _compare(parsed: argparse.Namespace) -> int:
    """A line a run; 1 when a number differs, is missing or is new, other than the two tables say."""
    same = [found for name in RUNS if (found := _compare_run(name, parsed)) is not None]
    print(f"{len(same)} runs of {len(RUNS)} compared, {same.count(False)} differ")
    return int(not same or not all(same))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="make the runs with one version of the package")
    run.add_argument("--python", default=sys.executable, help="that finds this version (PYTHONPATH is inherited)")
    run.add_argument("--out", type=Path, required=True, help="folder of results, caches and logs")
    run.add_argument("--inputs", type=Path, help="model, text and SAEs; default: OUT/inputs, made where missing")
    run.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of the list in this file")
    run.set_defaults(work=_run)
    compare = commands.add_parser("compare", help="compare the numbers of two folders of `run`")
    compare.add_argument("sides", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="their folders")
    compare.add_argument("--rtol", type=float, default=1e-12)
    compare.add_argument("--atol", type=float, default=1e-14, help="for numbers that are zero but for rounding")
    compare.add_argument("--show", type=int, default=5, help="keys of a kind to print for a run")
    compare.set_defaults(work=_compare)
    here = commands.add_parser("here", help="what `run` starts with its Python")
    here.add_argument("out", type=Path)
    here.add_argument("inputs", type=Path)
    here.add_argument("names", nargs="*")
    here.set_defaults(work=lambda own: run_here(own.out, own.inputs, own.names))
    parsed = parser.parse_args()
    return parsed.work(parsed)


if __name__ == "__main__":
    sys.exit(main())
