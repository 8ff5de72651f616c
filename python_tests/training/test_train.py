"""`dm.train`: sources, held-out text, several SAEs of one stream; killed runs, full disks and bad input."""

import dataclasses
import errno
import signal
import subprocess
import sys

import pytest
import torch
from cases.children import TESTS, environment_of_children
from cases.dense_training import planted
from cases.interrupted_training import configs, run
from cases.planted import LENGTH, PlantedSource
from cases.shared_training import outcome

import darkmatter_ext as dm
from darkmatter_ext.runtime import checkpoint as checkpoints
from darkmatter_ext.training.batches import Batches, SourceTokens, TensorTokens
from darkmatter_ext.training.config import ARCHITECTURES, StreamConfig, TrainingConfig
from darkmatter_ext.training.train import Checkpoint, train

SMALL = TrainingConfig(d_sae=24, k=3, steps=20, batch_size=64)
LATER = [("batchtopk", 13), ("matryoshka", 29)]  # steps at which to kill; with the slow tests
STREAM = StreamConfig(drop_positions=2, buffer_tokens=400, held_out_share=0.2)


@pytest.fixture(scope="module")
def x():
    return planted(n=1000)[0]


@pytest.fixture(scope="module")
def source(x):
    """20 contexts of 50 tokens at two hook points."""
    assert LENGTH == 50
    return PlantedSource({"a": x, "b": x[:, :8] * 2})


def _same(first, second):
    assert first.history == second.history
    assert first.report == second.report
    for own, other in zip(first.sae.parameters(), second.sae.parameters(), strict=True):
        assert torch.equal(own, other)


def test_training_is_seeded_and_needs_no_gradients_from_outside(x):
    with torch.no_grad():  # as experiments call it
        first = dm.train(x, SMALL)
    _same(first, dm.train(x, SMALL))
    other = dm.train(x, dataclasses.replace(SMALL, seed=1))
    assert not torch.equal(first.sae.W_enc, other.sae.W_enc)


def test_several_saes_of_one_stream_are_those_trained_alone(x):
    several = [SMALL, dataclasses.replace(SMALL, d_sae=40, steps=11, architecture="jumprelu")]
    for found, config in zip(train(x, several), several, strict=True):
        _same(found, train(x, config))


def test_the_log_says_how_training_goes(x):
    entries, steps = [], []
    found = train(x, SMALL, log_every=8, log=entries.extend, progress=steps.append)
    assert [entry["step"] for entry in entries] == [8, 16, 20]
    assert set(entries[0]) == {"sae", "step", "loss", "fvu", "l0", "dead_share", "learning_rate", "tokens_a_second"}
    assert sum(steps) == 20
    assert found.report["loss"] == entries[-1]["loss"]
    assert entries[-1]["fvu"] < entries[0]["fvu"] < 1.5


def test_a_scheduler_of_torch_takes_the_configurations_place(x):
    entries = []
    train(
        x,
        SMALL,
        log_every=5,
        log=entries.extend,
        scheduler=lambda optimiser: torch.optim.lr_scheduler.StepLR(optimiser, step_size=5, gamma=0.5),
    )
    assert [entry["learning_rate"] for entry in entries] == [5e-4, 2.5e-4, 1.25e-4, 6.25e-5]


def test_a_source_trains_as_its_tokens_do(source, x):
    found = train(source, SMALL, hook="a", stream=STREAM)
    assert found.sae.cfg.d_in == 16
    assert found.report["held_out/tokens"] == 4 * 48
    assert found.report["train/tokens"] == 8 * 48  # the first buffer
    held_out = x.unflatten(0, (20, 50))[16:, 2:].flatten(0, 1)
    missed = (held_out - found.sae(held_out)).square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert found.report["held_out/fvu"] == pytest.approx(missed.item(), rel=1e-4)


def test_an_epoch_reads_every_training_token_once(source):
    tokens = SourceTokens(source, "b", STREAM)
    assert (tokens.d_in, tokens.n_tokens) == (8, 16 * 48)
    pieces = torch.cat([tokens.piece(0, number, seed=0) for number in range(tokens.pieces(0, 0))])
    wanted = source.activations["b"].unflatten(0, (20, 50))[:16, 2:].flatten(0, 1)
    assert torch.equal(pieces.unique(dim=0), wanted.unique(dim=0))
    assert len(pieces) == len(wanted)
    batches, seen = Batches(tokens, 100, seed=0), []
    for _ in range(7):  # a piece has 384 tokens, three batches of 100
        seen.append(batches.next())
    assert batches.position == [1, 0, 1]
    assert len(torch.cat(seen[:6]).unique(dim=0)) == 600
    assert not torch.equal(seen[0], seen[6])  # another order in the next epoch
    later = Batches(tokens, 100, seed=0)
    later.position = [0, 1, 1]
    assert torch.equal(later.next(), seen[4])


def test_documents_are_not_divided_between_training_and_held_out(source):
    class Long(PlantedSource):
        documents = torch.arange(20) // 7  # 7, 7 and 6 contexts

    tokens = SourceTokens(Long(source.activations), "a", dataclasses.replace(STREAM, held_out_share=0.2))
    assert tokens.n_tokens == 14 * 48
    assert sum(map(len, tokens.held_out())) == 6 * 48


def test_large_norms_and_given_tokens_are_left_out(source, x):
    big = x.clone()
    big[7] *= 1000
    loud = PlantedSource({"a": big})
    assert sum(len(SourceTokens(loud, "a", STREAM).piece(0, n, 0)) for n in range(2)) == 16 * 48 - 1
    keep_all = dataclasses.replace(STREAM, max_norm_ratio=0)
    assert sum(len(SourceTokens(loud, "a", keep_all).piece(0, n, 0)) for n in range(2)) == 16 * 48
    assert len(SourceTokens(loud, "a", STREAM, excluded=[0]).piece(0, 0, 0)) == 0  # every token of it is 0


# ---- stopped runs


@pytest.mark.runs
@pytest.mark.parametrize(
    ("architecture", "step"),
    [("topk", 1), ("jumprelu", 22), *(pytest.param(*own, marks=pytest.mark.slow) for own in LATER)],
)
def test_a_killed_run_goes_on_to_the_same_bits(architecture, step, tmp_path):
    arguments = [sys.executable, "-m", "cases.interrupted_training", str(tmp_path / "run"), architecture, str(step)]
    killed = subprocess.run(arguments, env=environment_of_children(), cwd=TESTS, check=False)
    assert killed.returncode == -signal.SIGKILL
    steps = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = run(tmp_path / "run", architecture, steps.append)
        whole = run(tmp_path / "whole", architecture)
    finally:
        torch.set_num_threads(threads)
    assert steps == [step - 1, *[1] * (31 - step)][step == 1 :]  # the killed step had not been saved
    for own, other in zip(found, whole, strict=True):
        _same(own, other)
    for own, other in zip(run(tmp_path / "run", architecture, steps.append), whole, strict=True):
        _same(own, other)
    assert steps[-1] == 30  # there was nothing left to do


def test_a_full_disk_is_one_line_and_leaves_the_last_good_state(x, tmp_path, monkeypatch):
    writes, flush = [], checkpoints._flush

    def full(path):
        writes.append(path)
        if len(writes) > 11:  # run.json, then two files a state
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    folder = Checkpoint(tmp_path, seconds=0)
    monkeypatch.setattr(checkpoints, "_flush", full)
    with pytest.raises(OSError, match=r"checkpoint: .* cannot be written") as caught:
        train(x, SMALL, checkpoint=folder)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(checkpoints, "_flush", flush)
    steps = []
    found = train(x, SMALL, checkpoint=folder, progress=steps.append)
    assert steps[0] == 5  # done before
    _same(found, train(x, SMALL))


def test_a_folder_of_another_run_is_refused(x, tmp_path):
    train(x, SMALL, checkpoint=tmp_path)
    for other, options in ((x, {"config": dataclasses.replace(SMALL, k=4)}), (x + 1, {"config": SMALL})):
        with pytest.raises(dm.InputError, match="checkpoint: must hold a run of this configuration"):
            train(other, checkpoint=tmp_path, **options)


def test_training_that_diverges_is_one_line_and_leaves_the_last_good_state(x, tmp_path):
    wild = dataclasses.replace(SMALL, learning_rate=1e30, warmup_steps=0, decoder_norm="free")
    with pytest.raises(dm.InputError, match=r"learning_rate: must be lower, training diverged before step \d+, got"):
        train(x, wild, checkpoint=Checkpoint(tmp_path, seconds=0))
    for state in tmp_path.glob("state-*.safetensors"):
        from safetensors.torch import load_file

        assert all(tensor.isfinite().all() for tensor in load_file(state).values())


@pytest.mark.slow
@pytest.mark.parametrize("n", [2])
def test_processes_that_share_each_batch_agree_with_one(n, tmp_path):
    from safetensors.torch import load_file

    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0", "--master-port=0"]  # fmt: skip
    script = ["-m", "cases.shared_training", str(tmp_path / "result.safetensors")]
    environment = environment_of_children(OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*launcher, *script], env=environment, cwd=TESTS, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    shared = load_file(tmp_path / "result.safetensors")
    for name, tensor in outcome().items():  # float64: what is left is the rounding of sums
        torch.testing.assert_close(shared[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


# ---- bad input


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_batch_and_one_latent_are_enough(architecture):
    config = TrainingConfig(d_sae=1, k=1, steps=2, batch_size=4, architecture=architecture, dead_after_tokens=0)
    found = train(torch.randn(4, 3), config, stream=StreamConfig(held_out_share=0))
    assert found.sae.W_dec.shape == (1, 3)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (
            torch.randn(10, 4),
            {},
            dm.InputError,
            "source: must hold at least one batch of 64 tokens to train on, got 10",
        ),
        (torch.ones(300, 4).int(), {}, TypeError, "source: must be a floating-point tensor, got torch.int32"),
        (torch.ones(300, 4), {}, dm.InputError, "source: must be finite and vary, got a standard deviation of 0.0"),
        (torch.full((300, 4), torch.nan), {}, dm.InputError, "source: must be finite, got NaN or infinity in it"),
        (torch.randn(300), {}, dm.InputError, "source: must hold activations [n, d], got shape [300]"),
        (torch.randn(0, 4), {}, dm.InputError, "source: must hold activations [n, d], got shape [0, 4]"),
        (torch.randn(300, 4), {"log_every": 0}, dm.InputError, "log_every: must be at least 1, got 0"),
        (torch.randn(300, 4), {"config": []}, dm.InputError, "config: must name at least one SAE, got none"),
        (
            torch.randn(300, 4),
            {"config": [SMALL, dataclasses.replace(SMALL, batch_size=32)]},
            dm.InputError,
            "batch_size: must be the same for all SAEs of a stream, got [32, 64]",
        ),
        ("source", {}, dm.InputError, "hook: must be one of a, b where there are several, got none"),
        ("source", {"hook": "c"}, dm.InputError, "hook: must be one of a, b, got 'c'"),
        (
            "source",
            {"hook": "a", "stream": StreamConfig(drop_positions=50)},
            dm.InputError,
            "drop_positions: must be from 0 to 49, got 50",
        ),
        (
            "source",
            {"hook": "a", "stream": StreamConfig(buffer_tokens=60)},
            dm.InputError,
            "buffer_tokens: must be at least 64, got 60",
        ),
        (
            "source",
            {"hook": "a", "excluded_tokens": [0]},
            dm.InputError,
            "source: must hold at least one batch of 64 tokens to train on, got 0",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(given, options, error, message, source):
    with pytest.raises(error) as caught:
        train(source if given == "source" else given, **{"config": SMALL} | options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_interrupted_runs_differ_in_length():
    assert [config.steps for config in configs("topk")] == [30, 20]
    assert TensorTokens(torch.randn(10, 2), StreamConfig(held_out_share=0)).n_tokens == 10
