"""Accelerated training classes against SAELens' own: a step's losses, latents and gradients, and whole runs of its trainer."""

import copy
import dataclasses
import itertools

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes import batchtopk_sae, jumprelu_sae, matryoshka_batchtopk_sae, standard_sae, topk_sae
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

import darkmatter_ext as dm
from darkmatter_ext.saes.stepping_aside import TOO_MANY

D, F, N = 48, 4096, 128
LATER = [pytest.param(name, marks=pytest.mark.slow) for name in ("topk sparse", "batchtopk", "matryoshka")]
CLASSES = {
    "topk": (topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig),
    "batchtopk": (batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig),
    "matryoshka": (
        matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE,
        matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig,
    ),
    "jumprelu": (jumprelu_sae.JumpReLUTrainingSAE, jumprelu_sae.JumpReLUTrainingSAEConfig),
}
OPTIONS = {
    "topk": {"k": 16},
    "topk unscaled": {"k": 16, "rescale_acts_by_decoder_norm": False},
    "topk sparse": {"k": 16, "rescale_acts_by_decoder_norm": False, "use_sparse_activations": True},
    "topk plain input": {"k": 16, "apply_b_dec_to_input": False, "aux_loss_coefficient": 0.3},
    "batchtopk": {"k": 15.5},
    "batchtopk unscaled": {"k": 15.5, "rescale_acts_by_decoder_norm": False},
    "matryoshka": {"k": 16, "matryoshka_widths": [100, 900, F]},
    "matryoshka aux": {"k": 16, "matryoshka_widths": [100, 900, F], "use_matryoshka_aux_loss": True},
    "jumprelu": {"jumprelu_init_threshold": 0.27},
    "jumprelu tanh": {
        "jumprelu_init_threshold": 0.27,
        "jumprelu_sparsity_loss_mode": "tanh",
        "pre_act_loss_coefficient": 1e-3,
        "jumprelu_ste_to_input": True,
    },
    "jumprelu quadratic": {
        "jumprelu_init_threshold": 0.27,
        "jumprelu_sparsity_loss_mode": "quadratic",
        "target_l0": 20.0,
    },
    "jumprelu input": {"jumprelu_init_threshold": 0.27, "jumprelu_ste_to_input": True},
}


def _sae(name, **options):
    torch.manual_seed(0)
    kind, config = CLASSES[name.split()[0]]
    sae = kind(config(d_in=D, d_sae=F, **(OPTIONS.get(name, {}) | options)))
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.3)
        sae.b_enc.normal_(0, 0.02)
        sae.W_dec.mul_(0.5 + torch.rand(F, 1))
    return sae


def _batch(seed=1, dtype=torch.float32):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _given(x, dead=None):
    return TrainStepInput(
        sae_in=x, coefficients={"l0": 0.01}, dead_neuron_mask=dead, n_training_steps=3, is_logging_step=False
    )


def _dead(share):
    return None if share is None else torch.rand(F, generator=torch.Generator().manual_seed(2)) < share


def _dense(tensor):
    return (tensor.to_dense() if tensor.is_sparse else tensor + 0).detach()


def _close(found, expected, rtol):
    return (found - expected).abs().max() <= rtol * expected.abs().max()


@pytest.mark.parametrize("dead", [None, 0.003, 0.5])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_gives_the_losses_latents_and_gradients_of_sae_lens(name, dead):
    plain = _sae(name)
    fast = dm.accelerate(copy.deepcopy(plain))
    outputs = [sae.training_forward_pass(_given(_batch(), _dead(dead))) for sae in (plain, fast)]
    expected, found = outputs
    assert dm.stats(fast).fast == {"training_forward_pass": 1}
    assert list(found.losses) == list(expected.losses)
    assert sum(float(loss.detach()) != 0 for loss in found.losses.values()) >= (1 if dead is None else 2)
    for key, loss in expected.losses.items():
        assert found.losses[key].item() == pytest.approx(loss.item(), rel=1e-5), key
    metrics = [{key: float(value) for key, value in output.metrics.items()} for output in outputs]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    for output in outputs:
        output.loss.backward()
    gradients = {key: parameter.grad for key, parameter in fast.named_parameters()}
    for key, parameter in plain.named_parameters():
        assert gradients[key].stride() == parameter.grad.stride()
        assert _close(gradients[key], parameter.grad, 1e-5), key
        assert parameter.grad.any()
    for part in ("feature_acts", "hidden_pre", "sae_out"):
        ours, theirs = _dense(getattr(found, part)), _dense(getattr(expected, part))
        assert _close(ours, theirs, 1e-5), part
    assert torch.equal(_dense(found.feature_acts) != 0, _dense(expected.feature_acts) != 0)
    assert 2 < (_dense(found.feature_acts) != 0).sum(-1).float().mean() < 60
    assert found.feature_acts.is_sparse == expected.feature_acts.is_sparse


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_in_float64_gradients_agree_to_rounding(name):
    plain = _sae(name, dtype="float64")
    fast = dm.accelerate(copy.deepcopy(plain))
    for sae in (plain, fast):
        sae.training_forward_pass(_given(_batch(dtype=torch.float64), _dead(0.5))).loss.backward()
    assert dm.stats(fast).fast == {"training_forward_pass": 1}
    gradients = {key: parameter.grad for key, parameter in fast.named_parameters()}
    for key, parameter in plain.named_parameters():
        assert _close(gradients[key], parameter.grad, 1e-6 if key == "threshold" else 1e-12), key


def _trained(sae, steps, lr=3e-3, **options):
    """Losses of every step of SAELens' trainer, and the SAE it gives back."""
    config = SAETrainerConfig(
        total_training_samples=steps * N,
        train_batch_size_samples=N,
        lr=lr,
        lr_end=lr / 10,
        dead_feature_window=5,
        logger=LoggingConfig(log_to_wandb=False),
        **options,
    )
    batches = (_batch(seed) for seed in itertools.count(10))
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches)
    losses, logged = [], []
    step = trainer.step

    def watched(batch):
        output = step(batch)
        losses.append({"loss": output.loss.item(), **{key: loss.item() for key, loss in output.losses.items()}})
        logged.append(trainer.build_train_step_log_dict(output, 0))
        return output

    trainer.step = watched
    return losses, logged, trainer.fit(), trainer


@pytest.mark.runs
@pytest.mark.parametrize("name", ["topk", "jumprelu", *LATER])
def test_sae_lens_own_trainer_gets_the_same_losses_over_50_steps(name):
    lr = 3e-4 if name == "jumprelu" else 3e-3
    expected, expected_log, _, plain_trainer = _trained(_sae(name), 50, lr)
    sae = dm.accelerate(_sae(name))
    found, log, trained, trainer = _trained(sae, 50, lr)
    assert trained is sae
    fast = dm.stats(sae).fast["training_forward_pass"]
    assert fast == 50 or (name == "jumprelu" and fast >= 10)  # on noise many of its latents come to fire
    assert any(step.get("auxiliary_reconstruction_loss", 1) > 0 for step in found)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), number
    assert found[-1]["mse_loss"] < found[0]["mse_loss"]
    for ours, theirs in zip(log, expected_log, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert torch.equal(trainer.n_forward_passes_since_fired, plain_trainer.n_forward_passes_since_fired)
    assert torch.equal(trainer.act_freq_scores, plain_trainer.act_freq_scores)


def test_what_was_trained_is_saved_and_loaded_as_ever(tmp_path):
    sae = dm.accelerate(_sae("batchtopk"))
    _trained(sae, 3, save_final_checkpoint=True, checkpoint_path=str(tmp_path / "checkpoints"))
    sae.save_inference_model(tmp_path / "saved")
    loaded = SAE.load_from_disk(tmp_path / "saved")
    assert type(loaded) is jumprelu_sae.JumpReLUSAE
    assert loaded.threshold[0].item() == pytest.approx(sae.topk_threshold.item(), rel=1e-6)
    again = _sae("batchtopk")
    again.load_weights_from_checkpoint(next((tmp_path / "checkpoints").glob("*")))
    assert torch.equal(again.W_enc, sae.W_enc)


def test_outside_of_steps_it_answers_as_sae_lens_and_copies_are_their_own():
    plain = _sae("topk")
    fast = dm.accelerate(copy.deepcopy(plain))
    x = _batch()
    assert torch.equal(fast.encode(x), plain.encode(x))
    assert torch.equal(fast(x), plain(x))
    fast.training_forward_pass(_given(x))
    other = copy.deepcopy(fast)
    assert dm.is_accelerated(other)
    assert dm.stats(other).fast == {}
    assert other.training_forward_pass(_given(x)).loss == fast.training_forward_pass(_given(x)).loss
    assert type(dm.deaccelerate(fast)) is topk_sae.TopKTrainingSAE


def test_latents_are_differentiable_however_late_they_are_read():
    """Somebody's own loss on the latents that a step returns."""
    plain = _sae("topk")
    fast = dm.accelerate(copy.deepcopy(plain))
    for sae in (plain, fast):
        output = sae.training_forward_pass(_given(_batch()))
        with torch.no_grad():
            assert output.feature_acts.bool().float().sum().item() == 16 * N  # the trainer's look
            assert float((output.feature_acts > 0).sum()) == 16 * N
        (output.loss + 0.1 * output.feature_acts.abs().sum() + 1e-3 * output.hidden_pre.square().mean()).backward()
    gradients = {key: parameter.grad for key, parameter in fast.named_parameters()}
    for key, parameter in plain.named_parameters():
        assert _close(gradients[key], parameter.grad, 1e-5), key


def test_pre_activations_are_not_made_of_later_weights():
    sae = dm.accelerate(_sae("topk"))
    output = sae.training_forward_pass(_given(_batch()))
    with torch.no_grad():
        sae.W_enc.mul_(2)
    with pytest.raises(RuntimeError, match=r"^hidden_pre: must be read before the weights are edited"):
        output.hidden_pre.sum()


def test_a_dense_start_is_left_to_sae_lens_until_latents_are_sparse():
    """SAELens' default threshold lets half of all latents through; the losses are the same all along."""
    sae = dm.accelerate(_sae("jumprelu", jumprelu_init_threshold=0.01))
    plain = _sae("jumprelu", jumprelu_init_threshold=0.01)
    for number in range(24):
        if number == 12:
            with torch.no_grad():
                for each in (plain, sae):
                    each.threshold.fill_(0.27)
        outputs = [each.training_forward_pass(_given(_batch(number))) for each in (plain, sae)]
        assert outputs[1].loss.item() == pytest.approx(outputs[0].loss.item(), rel=1e-5)
    stats = dm.stats(sae)
    assert list(stats.fallback["training_forward_pass"]) == [TOO_MANY]
    assert stats.fast["training_forward_pass"] >= 6


def _hooked(sae):
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts * 1.5)


def _overridden(sae):
    sae.calculate_aux_loss = lambda **_: {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "latents or pre-activations are hooked"),
        (_overridden, "calculate_aux_loss is overridden"),
        (lambda sae: setattr(sae.cfg, "normalize_activations", "layer_norm"), "activations are normalised at run time"),
        (lambda sae: setattr(sae.activation_fn, "k", 500), "k is not from 0 to 6% of the latents"),
    ],
)
def test_a_step_that_is_not_the_known_one_is_left_to_sae_lens(change, reason):
    plain, fast = _sae("topk"), dm.accelerate(_sae("topk"))
    losses = []
    for sae in (plain, fast):
        change(sae)
        losses.append(sae.training_forward_pass(_given(_batch())).loss.item())
    assert losses[0] == losses[1]
    assert dm.stats(fast).fallback == {"training_forward_pass": {reason: 1}}


def test_hooks_that_no_dense_latents_need_run_in_a_fast_step():
    plain, fast = _sae("topk"), dm.accelerate(_sae("topk"))
    losses = []
    for sae in (plain, fast):
        sae.hook_sae_recons.add_hook(lambda x_hat, hook: 0.5 * x_hat)
        sae.hook_sae_input.add_hook(lambda x, hook: x + 0.1)
        losses.append(sae.training_forward_pass(_given(_batch())).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert dm.stats(fast).fast == {"training_forward_pass": 1}


def test_other_training_classes_are_refused_with_the_reason():
    class Own(topk_sae.TopKTrainingSAE):
        def calculate_aux_loss(self, **_):
            return {}

    dense = standard_sae.StandardTrainingSAE(standard_sae.StandardTrainingSAEConfig(d_in=8, d_sae=16))
    own = Own(topk_sae.TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2))
    for sae, why in (
        (dense, "a training class without sparse latents"),
        (own, "its calculate_aux_loss is not that of"),
    ):
        with pytest.raises(ValueError, match=rf"^sae: must be an SAE that can be accelerated, got .*\({why}"):
            dm.accelerate(sae)
        assert not dm.is_accelerated(sae)
    with pytest.raises(ValueError, match=r"^save_memory: must be False for a TopKTrainingSAE, got True"):
        dm.accelerate(_sae("topk"), save_memory=True)


def test_every_option_of_the_known_classes_is_tried_here():
    """A new option of SAELens is looked at before its steps are said to be the same."""
    known = {"d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
             "metadata", "decoder_init_norm", "k", "use_sparse_activations", "aux_loss_coefficient",
             "rescale_acts_by_decoder_norm", "topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss",
             "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "l0_coefficient",
             "l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_tanh_scale", "jumprelu_ste_to_input",
             "target_l0"}  # fmt: skip
    assert {field.name for _, config in CLASSES.values() for field in dataclasses.fields(config)} <= known
