"""Batches that devices cannot share out evenly: filled up with repeats of weight 0, they train as on one device."""

import contextlib
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from jaxdiff.config import ShardingConfig
from jaxdiff.tasks import train
from jaxdiff.tasks.make import make_task
from jaxdiff.training.loop import init_sharded
from jaxdiff.training.sharding import make_mesh, make_runner
from tests.tasks.families import family
from tests.tasks.test_autoencoder import PERCEPTUAL, TINY
from tests.tasks.test_vae import VAE
from tests.tiny import tiny_config
from tests.training.test_sharding import relative_distance

STEPS = 3
TASKS = {
    "diffusion": {"data.flip": True, "diffusion.loss": "min_snr", "diffusion.label_dropout": 0.3},
    "accumulated": {"training.accumulation_steps": 3, "diffusion.label_dropout": 0.3},
    "vae": VAE | {"data.flip": True, "vae.hidden": 64},
    # Adam's first steps go by a gradient's sign, where it is rounding only: an epsilon above that keeps it out.
    "autoencoder": TINY
    | {"autoencoder_kl.discriminator_start": 1, "autoencoder_kl.kl_weight": 0.1, "optimizer.epsilon": 1e-4},
}
MODES = {
    "jit": (ShardingConfig(), 4),
    "fsdp": (ShardingConfig(fsdp=4), 4),
    "pmap": (ShardingConfig(mode="pmap"), 4),
    "fsdp x data": (ShardingConfig(fsdp=4), 8),  # where some devices have repeats only
    "pmap of 8": (ShardingConfig(mode="pmap"), 8),
}
SLOW = ("fsdp x data", "pmap of 8")


def places():
    """Every task in every mode, those slow that compile long or say little more."""
    for task, mode in itertools.product(TASKS, MODES):
        slow = task in ("accumulated", "autoencoder") or (mode in SLOW and task != "vae")
        yield pytest.param(task, mode, marks=[pytest.mark.slow] if slow else [])


def steps_of(changes, sharding, devices):
    """Trained parameters, metrics and batches of a few steps as `train.py` makes them, of six images each."""
    config = tiny_config(**{"training.batch_size": 6, **changes})
    mesh = make_mesh(sharding, jax.devices()[:devices])
    config, _, loaders, _ = train.open_run(config, None, mesh)
    task, key, history = make_task(config), jax.random.key(1), []
    if config.task == "autoencoder":
        task.__dict__["perceptual"] = PERCEPTUAL
    trainable = task.trainable(mesh)
    shapes = jax.eval_shape(trainable.init, key)
    frozen = trainable.frozen
    runner = make_runner(trainable.make_update, shapes, mesh, sharding.mode, frozen)
    state = init_sharded(trainable.init, key, runner.state_shardings)
    with contextlib.closing(train.make_batches(loaders, None, 0)) as source:
        batches = list(itertools.islice(source, STEPS))
    for batch in batches:
        state, metrics = runner.step(state, runner.put_batch(batch), key, *runner.frozen)
        history.append({name: float(value) for name, value in metrics.items()})
    trained = [getattr(state, name, {}) for name in ("params", "ema_params", "discriminator_params")]
    split = [leaf for leaf in jax.tree.leaves(state.params) if leaf.addressable_shards[0].data.size < leaf.size]
    assert bool(split) == (sharding.fsdp > 1 and config.task != "autoencoder"), "only that one has no large array"
    return jax.device_get(trained), history, batches


@pytest.fixture(scope="module")
def alone():
    """What one device makes of a task, by the task's name."""
    found = {}

    def of(task):
        if task not in found:
            found[task] = steps_of(TASKS[task], ShardingConfig(), 1)
        return found[task]

    return of


@pytest.mark.parametrize(("task", "mode"), list(places()))
def test_six_images_on_more_devices_are_six_images_on_one(alone, task, mode):
    trained, history, batches = steps_of(TASKS[task], *MODES[mode])
    expected, of_one, plain = alone(task)
    assert all("weight" not in batch and len(batch["image"]) == 6 for batch in plain), "one device needs no more"
    assert all(len(batch["image"]) > 6 and (batch["weight"] > 0).sum() == 6 for batch in batches)
    for name in of_one[-1]:
        ours, theirs = ([metrics[name] for metrics in found] for found in (history, of_one))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4 if task == "autoencoder" else 1e-5, atol=1e-6, err_msg=name)
    assert relative_distance(trained, expected) < 1e-5


@pytest.mark.parametrize("task", ["diffusion", "vae"])
def test_the_comparison_notices_weights_that_are_ignored(alone, task, monkeypatch):
    with_weights = train.make_batches

    def without(*args):
        for batch in with_weights(*args):
            yield {name: value for name, value in batch.items() if name != "weight"}

    monkeypatch.setattr(train, "make_batches", without)
    trained, history, _ = steps_of(TASKS[task], *MODES["jit"])
    expected, of_one, _ = alone(task)
    assert relative_distance(trained, expected) > 1e-4
    assert abs(history[0]["loss"] - of_one[0]["loss"]) > 1e-3 * abs(of_one[0]["loss"])


@pytest.mark.slow
def test_dropout_masks_are_those_of_one_device():
    """The numbers of the first six of eight images are those that six would get."""
    changes = {"model.dropout": 0.3}
    trained, dropped, _ = steps_of(changes, *MODES["jit"])
    expected, of_one, _ = steps_of(changes, ShardingConfig(), 1)
    np.testing.assert_allclose([m["loss"] for m in dropped], [m["loss"] for m in of_one], rtol=1e-5)
    assert relative_distance(trained, expected) < 1e-5


def test_what_divides_is_not_filled_up():
    _, _, batches = steps_of(TASKS["vae"] | {"training.batch_size": 8}, ShardingConfig(), 4)
    assert all(set(batch) == {"image", "label", "index"} and len(batch["image"]) == 8 for batch in batches)


def test_a_run_says_that_it_fills_up_and_counts_its_own_images(tmp_path, capsys):
    """Eight devices, six images: the command from start to end."""
    config = tiny_config(**VAE, **{"training.batch_size": 6, "training.num_steps": 2})
    assert train.train_run(config, tmp_path / "run").step == 2
    assert (
        "2 steps of 6 images (and 2 repeated with weight 0, for all devices to have as many)" in capsys.readouterr().out
    )


CAPTIONED = {
    "latent text": {},
    "fine-tuning": {},  # by LoRA
    "whole fine-tuning": {"lora.rank": 0, "text.trained": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTIONED)
def test_runs_with_captions_and_latents_are_those_of_one_device(name, tmp_path, monkeypatch):
    """The whole command, six images a step; that the third step agrees says that two updates did."""
    told = {"training.batch_size": 6, "training.num_steps": 3, "training.log_every": 1, "training.sample_every": 0}
    told |= {"sampling.steps": 1, "sampling.num_images": 1, "sampling.batch_per_device": 1, "optimizer.epsilon": 1e-4}
    config = family(name.removeprefix("whole "), tmp_path, **told, **CAPTIONED[name])
    found = []
    for number, (sharding, devices) in enumerate(((ShardingConfig(), 1), (ShardingConfig(fsdp=4), 8))):
        mesh, workdir = make_mesh(sharding, jax.devices()[:devices]), tmp_path / f"run{number}"
        with monkeypatch.context() as patch:
            patch.setattr(train, "make_mesh", lambda _, mesh=mesh: mesh)
            train.train_run(dataclasses.replace(config, sharding=sharding), workdir)
        records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        found.append([(record["loss"], record["grad_norm"]) for record in records if "loss" in record])
    assert len(found[0]) == 3 and len({loss for loss, _ in found[0]}) == 3
    np.testing.assert_allclose(*found, rtol=1e-4)
