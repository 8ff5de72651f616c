"""Results that a page explores, with planted tokens and numbers: small, hostile, or large."""

import base64
import gzip
import json
import re

import numpy as np

from darkmatter_ext.report.figures import save_figures
from darkmatter_ext.report.page import Section, write_page
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table

HOSTILE = (
    "</script><script>window.broken = 1</script>", "<img src=x onerror='window.broken = 2'>", "\"'`&lt;",
    "\u202edesrever\u202c", "\u2066isolate\u2069", "\u200bzero\ufeff", "\x00\x07\x1b[31m\x7f\x85", "\n", "\t", "   ", "\x00",
    "\u2028line\u2029", "{{ 7 * 7 }}", "=cmd|'/c calc'!A1", "é\ufffd漢字🙂",
)  # fmt: skip
MARGIN, FLOOR, T = 2, 0.05, 8


def explored_result(*, contexts=6, length=16, words=(), vocabulary=40, saes=2, latents=64, seed=0, **more):
    """A result whose text is seeded; tokens below position MARGIN were not measured. The hardest token is planted."""
    random = np.random.default_rng(seed)
    texts = [*words, *(f" word{i}" for i in range(vocabulary - len(words)))]
    tokens = random.integers(0, len(texts), (contexts, length)).astype(np.int32)
    tokens[0, : min(length, len(words))] = np.arange(min(length, len(words)))
    hardest = (contexts - 1, length - 1)
    unmeasured = np.broadcast_to(np.arange(length) < MARGIN, tokens.shape)
    later = (np.arange(contexts) >= 2)[:, None]  # the model was spliced in the first two contexts
    arrays = {
        "page/tokens": tokens,
        "page/vocabulary": np.frombuffer(json.dumps(texts).encode(), np.uint8),
        "page/contexts": np.arange(contexts, dtype=np.int32) * 3,
        "page/documents": np.arange(contexts, dtype=np.int32) // 2,
        "page/loss": random.uniform(1, 2, tokens.shape).astype(np.float32),
        "page/site0/x": np.where(unmeasured, np.nan, 4.0).astype(np.float32),
    }
    for sae in range(saes):
        error = random.uniform(FLOOR, 1, tokens.shape)
        error[hardest] = 3.0 + sae  # of ||x||^2 = 4
        nonlinear = 0.25 * error
        strength = -np.sort(-random.uniform(1, 2, (*tokens.shape, T)), axis=-1)
        active = random.integers(0, latents, (*tokens.shape, T)).astype(np.int32)
        active[hardest][0], strength[hardest][0] = 7, 9.0
        arrays |= {
            f"page/sae{sae}/error": np.where(unmeasured, np.nan, error).astype(np.float32),
            f"page/sae{sae}/linear": np.where(unmeasured, np.nan, 0.75 * error).astype(np.float32),
            f"page/sae{sae}/nonlinear": np.where(unmeasured, np.nan, nonlinear).astype(np.float32),
            f"page/sae{sae}/kl": np.where(unmeasured | later, np.nan, random.uniform(0, 1, tokens.shape)).astype(
                np.float32
            ),
            f"page/sae{sae}/l0": np.where(unmeasured, -1, T).astype(np.int32),
            f"page/sae{sae}/latents": np.where(unmeasured[..., None], -1, active).astype(np.int32),
            f"page/sae{sae}/values": np.where(unmeasured[..., None], 0, strength).astype(np.float32),
        }
        places = np.tile(np.arange(T, dtype=np.int32), (latents, 1))
        places[7, 0] = tokens.size - 1
        columns = {
            "number": np.arange(latents, dtype=np.int32), "fired": np.full(latents, 5, np.int32),
            "rate": np.linspace(0.01, 0.5, latents), "mean_value": np.full(latents, 1.5),
            "decoder_norm": np.ones(latents), "nonlinear_share": np.linspace(0, 0.6, latents), "places": places,
            "values": np.tile(np.linspace(9, 2, T), (latents, 1)),
            "nearest": np.tile(np.arange(5, dtype=np.int32), (latents, 1)),
            "cosines": np.full((latents, 5), 0.5),
        }  # fmt: skip
        arrays |= {f"page/sae{sae}/latent/{name}": column for name, column in columns.items()}
    common = {"d_sae": latents, "hook": "h", "site": 0, "latents_kept": latents}
    listed = [{"name": f"sae-{i}", "folder": f"saes/{i}", **common} for i in range(saes)]
    about = {"saes": listed, "contexts": contexts, "tokens": int((~unmeasured).sum()), "held_out": 10 * tokens.size}
    about["kl"] = {"contexts": 2}
    config = {"seed": seed, "model": "model", "hook": "h"}
    return Result("decomposition", config, {"sae-0/fvu": 0.25}, series={"explored": about}, arrays=arrays, **more)


def packed_head(page):
    """The JSON head of what the explorer of a page reads."""
    block = gzip.decompress(base64.b64decode(re.search(r'class="packed">([^<]*)<', page.read_text())[1]))
    return json.loads(block[4 : 4 + int.from_bytes(block[:4], "little")])


def lines(result):
    """A line with intervals and a level, over names."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.errorbar([1, 2, 4], [0.5, 0.25, 0.125], yerr=[[0.1] * 3, [0.2] * 3], color="#0072B2", label="L0 32")
    axes.axhline(0.1, color="black", label="_none")
    axes.set_xticks([1, 2, 4], ["one", "<b>two</b>", "\u202efour"])
    axes.set_ylabel("FVU")
    axes.set_title("The law")
    return figure


def page_of(result, folder, *, reading=("What it says.",)):
    """The page of a result with one figure."""
    figures = save_figures(result, {"lines": lines}, folder)
    table = Table("planted <result>", ("SAE", "FVU"), [["sae-0", "0.25"]])
    return write_page(
        [Section(result, table, list(reading), figures, "darkmatter run decomposition")], folder / "p.html"
    )
