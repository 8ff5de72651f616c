"""The run of every experiment that its tests read: small enough for seconds, large enough to have every part."""

from cases.models import flags

SETTINGS = {
    "adapt": (
        "--widths", "24", "--contexts", "6", "--ranks", "1", "4", "--adapt-tokens", "512", "--choose-contexts", "2",
        "--adapt-seeds", "2", "--learning-rates", "1e-2", "3e-2",
    ),
    "baselines": ("--layers", "0", "1", "--widths", "24"),
    "decomposition": (),
    "diff": (
        "--widths", "24", "--sae-seeds", "2", "--contexts", "6", "--tuning-steps", "3", "--rank", "2", "--causal-latents", "2",
        "--spacing", "20", "--phrase", " explains", "--unique", "0.6",
    ),
    "downstream": ("--contexts", "6"),
    "earlier-layers": ("--widths", "24", "--interval-groups", "3"),
    "error-saes": (
        "--widths", "64", "--k", "2", "--error-width", "64", "--error-k", "1", "--error-steps", "20",
        "--training-seeds", "2", "--sae-fraction", "0.4", "--fit-fraction", "0.4", "--latents", "4",
    ),
    "intrinsic-dimension": ("--layers", "0", "1", "--widths", "24", "--points", "400"),
    "geometry": (
        "--layers", "0", "1", "--widths", "24", "--clusters", "2", "4", "--chunk", "8", "--least-chunks", "2",
        "--null-draws", "5", "--pairs", "{workplace}/pairs.csv",
    ),
    "latent-alignment": (),
    "norm-test": ("--ks", "2", "4"),
    "numbers": ("--widths", "24", "--blocks", "0", "1", "--draws", "19"),
    "pathology": ("--layers", "0", "1", "--contexts", "6", "--widths", "24"),
    "per-token": ("--widths", "48", "24", "--sae-seeds", "2"),
    "probing": (
        "--widths", "24", "--frozen", "decoder", "--tasks", "{workplace}/tasks.csv", "--probe-ks", "1", "4",
        "--train-sizes", "8", "64", "--label-noise", "0.5", "--probe-seeds", "1",
    ),
    "pursuit": ("--method", "gradient"),
    "scaling": ("--widths", "24", "32", "48", "64", "--ks", "4", "6", "--l0", "4", "--with-pursuit", "--sae-seeds", "2",
                "--frozen", "decoder", "soft-decoder"),
    "small-maps": ("--widths", "24", "--sae-seeds", "2", "--rank", "8", "--features", "64", "--epochs", "5"),
    "synthetic": ("--widths", "24", "--noise-seeds", "2", "--fit-tokens", "2000"),
}  # fmt: skip


def command(workplace, experiment, *more):
    """Arguments of that run, some changed or added."""
    own = [word.format(workplace=workplace) for word in SETTINGS[experiment]]
    return flags(workplace, *own, *more, experiment=experiment)
