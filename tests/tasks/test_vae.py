"""The textbook's VAE in the same house: loss, bounds, samples, pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import ConfigError, ShardingConfig
from jaxdiff.evaluation.images import open_images
from jaxdiff.tasks import vae
from jaxdiff.tasks.evaluate import evaluate_likelihood
from jaxdiff.tasks.run import Run, load_run
from jaxdiff.tasks.train import train_run
from jaxdiff.training.log import read_metrics
from jaxdiff.training.sharding import make_mesh
from tests.tiny import tiny_batch, tiny_config

VAE = {
    "task": "vae",
    "data.split": "nine_tenths",
    "model.num_classes": 0,
    "vae.latent_dim": 3,
    "vae.channels": (4,),
    "vae.hidden": 8,
    "sampling.batch_per_device": 8,
}


def task_of(**changes):
    return vae.VAETask(tiny_config(**{**VAE, **changes}))


def params_of(task, seed=0):
    leaves, tree = jax.tree.flatten(task.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([leaf + 0.2 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)])


@pytest.mark.parametrize("likelihood", ["discretized", "gaussian", "bernoulli"])
def test_the_loss_is_minus_the_bound_in_bits_per_dimension(likelihood):
    task = task_of(**{"vae.likelihood": likelihood, "vae.beta": 2.0})
    loss, metrics = jax.jit(task.loss)(params_of(task), tiny_batch(task.config), jax.random.key(0))
    bound = metrics["reconstruction"] - 2 * metrics["kl"]
    assert float(loss) == pytest.approx(float(-bound / (64 * np.log(2))), rel=1e-5)
    assert float(metrics["elbo"]) == pytest.approx(float(metrics["reconstruction"] - metrics["kl"]), rel=1e-5)
    assert metrics["kl"] > 0


def test_free_bits_hide_a_small_divergence():
    """With the encoder at N(0, 1) nothing is left of the KL but the free bits."""
    plain, free = task_of(), task_of(**{"vae.free_bits": 0.5})
    params = jax.tree.map(jnp.zeros_like, plain.init(jax.random.key(0)))
    losses = [float(t.loss(params, tiny_batch(plain.config), jax.random.key(0))[0]) for t in (plain, free)]
    assert losses[1] - losses[0] == pytest.approx(3 * 0.5 / (64 * np.log(2)), rel=1e-4)


def test_importance_weights_tighten_the_bound_of_the_digits_left_out():
    task = task_of()
    found = evaluate_likelihood(Run(task, params_of(task), 0, ()), num=20)
    values = {s.name: s.value for s in found.scores}
    assert set(values) == {"elbo_nats", "iwae_100_nats", "bpd_elbo", "bpd_iwae_100"}
    assert values["iwae_100_nats"] > values["elbo_nats"]
    assert values["bpd_elbo"] == pytest.approx(-values["elbo_nats"] / (64 * np.log(2)), rel=1e-6)
    assert "digits (tenth)" in found.images.data
    assert not found.warnings


def test_a_decoder_without_levels_has_no_bits_per_dimension():
    task = task_of(**{"vae.likelihood": "bernoulli"})
    found = evaluate_likelihood(Run(task, params_of(task), 0, ()), num=4)
    assert [s.name for s in found.scores] == ["elbo_nats", "iwae_100_nats"]


def test_samples_depend_on_their_seed_alone():
    task = task_of()
    run = Run(task, params_of(task), 0, ())
    mesh = make_mesh(ShardingConfig(), jax.devices()[:1])
    few = dataclasses.replace(task.config.sampling, batch_per_device=8)
    images = run.make(np.arange(5), mesh=mesh, settings=few)
    np.testing.assert_array_equal(run.make([3], settings=few)[0], images[3])
    assert len(np.unique(images.reshape(5, -1), axis=0)) == 5


def test_a_run_leaves_pictures_and_curves(tmp_path):
    config = tiny_config(**VAE, **{"training.log_every": 2})
    train_run(config, tmp_path / "run")
    for name in ("samples", "reconstructions", "traversal"):
        assert (tmp_path / "run" / name / "step_0000008.png").is_file()
    assert {"loss", "elbo", "kl", "reconstruction"} <= set(read_metrics(tmp_path / "run" / "metrics.jsonl")[0])
    run = load_run(tmp_path / "run")
    assert (run.step, run.make([0]).shape) == (8, (1, 8, 8, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae.channels": ()}, "must hold positive integers"),
        ({"vae.channels": (4, 4, 4, 4)}, "data.image_size = 8 must be divisible by 16"),
        ({"vae.latent_dim": 0}, "must be at least 1"),
        ({"vae.beta": -1.0}, "must not be negative"),
        ({"model.num_classes": 10}, "a VAE has no condition"),
        ({"text.enabled": True}, "a VAE has no condition"),
        ({"vae.likelihood": "laplace"}, "must be one of 'discretized'"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**{**VAE, **changes})


def test_the_parts_of_an_embedded_set_share_nothing_and_leave_nothing_out():
    whole, most, rest = (open_images("digits", split=split) for split in ("train", "nine_tenths", "tenth"))
    assert len(most) + len(rest) == len(whole) == 1797
    together = np.concatenate([most.source.images, rest.source.images]).sum(dtype=np.int64)
    assert together == whole.source.images.sum(dtype=np.int64)
    assert np.array_equal(rest.source.images[0], whole.source.images[9])
