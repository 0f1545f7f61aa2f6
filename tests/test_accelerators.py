"""Steps and samplers are known to compile for accelerators that this machine does not have."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.command_line import config_from_flags
from jaxdiff.config import check
from jaxdiff.generation.generate import keys_of, to_uint8
from jaxdiff.losses import gradient_penalty
from jaxdiff.models.layers import ResidualBlock
from jaxdiff.models.progressive_gan import Discriminator
from jaxdiff.tasks import captions
from jaxdiff.tasks.autoencoder import AutoencoderTask
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.first_stage import FirstStage
from jaxdiff.tasks.make import Parts, make_task
from jaxdiff.tasks.preflight import _compile, _open
from jaxdiff.tasks.pretrained import open_pretrained, resolved
from jaxdiff.tasks.progressive_gan import FOLD_BELOW, resolve_length
from jaxdiff.tasks.text_model import TextModel
from jaxdiff.training.collectives import collectives
from jaxdiff.training.sharding import batch_sharding, make_mesh, replicated
from jaxdiff.weights.tokenizer import train_tokenizer
from tests.tasks import tiny_checkpoint
from tests.tasks.families import FAMILIES, family

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


# The real TPU compiler ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v5e():
    pytest.importorskip("libtpu")
    from jaxdiff.tasks.targets import choose_target, open_target

    choose_target("v5e:2x2")
    return open_target("v5e:2x2")


@pytest.mark.tpu
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_and_a_sampler_of_each_family_compile_for_a_v5e_slice(name, tmp_path, v5e):
    """Ahead of time, over 4 chips."""
    run = _open(family(name, tmp_path, **{"sampling.steps": 2}), tmp_path / "run", v5e)
    step = _compile(run)
    assert "all-reduce" in collectives(step.compiled.as_text())
    assert run.kept < step.needed < v5e.room == 15.75 * 2**30
    assert step.compiled.cost_analysis()["flops"] > 0
    text = sampler(run).compile().as_text()
    assert collectives(text) == {}  # every image is made where it stays


@pytest.mark.tpu
def test_what_does_not_fit_is_told_by_the_compiler(tmp_path, v5e):
    run = _open(family("pixels", tmp_path), tmp_path / "run", v5e)
    huge = {name: np.broadcast_to(array[:1], (2**22, *array.shape[1:])) for name, array in run.batch.items()}
    step = _compile(dataclasses.replace(run, batch=huge))
    assert step.compiled is None and step.needed > v5e.room


@pytest.mark.tpu
def test_what_dropout_keeps_is_drawn_once_and_in_no_convolution(v5e):
    """Left to itself the compiler draws it anew in the forward convolution and in both of its gradients."""
    here = jax.sharding.SingleDeviceSharding(v5e.devices[0])
    block = ResidualBlock(128, dropout=0.1)
    x = jax.ShapeDtypeStruct((8, 8, 8, 128), np.float32, sharding=here)
    key = jax.ShapeDtypeStruct((), jax.eval_shape(jax.random.key, 0).dtype, sharding=here)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        jax.eval_shape(block.init, jax.random.key(0), np.zeros(x.shape, x.dtype)),
    )

    def loss(params, x, key):
        return (block.apply(params, x, train=True, rngs={"dropout": key}) ** 2).sum()

    text = jax.jit(jax.grad(loss, (0, 1)), out_shardings=here).lower(params, x, key).compile().as_text()
    bodies = dict(re.findall(r"^%([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))  # of all but the entry

    def whole(name):
        return bodies[name] + "".join(map(whole, re.findall(r"\bcalls=%([\w.-]+)", bodies[name])))

    convolutions = [whole(name) for name in bodies if " convolution(" in whole(name)]
    assert len(convolutions) >= 6
    assert max(body.count(" shift-left(") for body in convolutions) == 0
    assert sum(body.count(" shift-left(") >= 20 for body in bodies.values()) == 1  # Threefry has 20 rounds


@pytest.mark.tpu
def test_folded_features_and_images_save_a_progressive_gan_memory(v5e):
    """16 channels fill an eighth of the rows that a TPU computes with, and an image's 3 next to nothing."""
    here = jax.sharding.SingleDeviceSharding(v5e.devices[0])

    def needed(fold_below):
        judge = Discriminator(resolution=128, channel_base=1024, fold_below=fold_below, dtype=jnp.bfloat16)
        x = jax.ShapeDtypeStruct((4, 128, 128, 3), np.float32, sharding=here)
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            jax.eval_shape(judge.init, jax.random.key(0), np.zeros(x.shape, x.dtype)),
        )

        def loss(params, x):
            return gradient_penalty(lambda x: judge.apply(params, x, alpha=0.5)[0], x).mean()

        lowered = jax.jit(jax.grad(loss), out_shardings=here).lower(params, x)
        return lowered.compile({"exec_time_optimization_effort": -1.0}).memory_analysis().temp_size_in_bytes

    assert needed(FOLD_BELOW) < 0.7 * needed(0)


def sampler(run):
    """The program that makes images, lowered for the run's devices; of an autoencoder that which reconstructs them."""
    task, mesh = run.task, run.mesh
    settings = run.config.sampling
    count = mesh.size * settings.batch_per_device
    split, copied = batch_sharding(mesh), replicated(mesh)

    def there(tree, where):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)

    params = run.state.params
    if isinstance(task, AutoencoderTask):
        images = jax.ShapeDtypeStruct((count, *task.image_shape), np.uint8, sharding=split)
        return jax.jit(task.reconstruct, out_shardings=split).lower(there(params, copied), images)
    request = None
    if isinstance(task, DiffusionTask):
        params = jax.eval_shape(task.whole, params)
        request = captions.request(task.tokenizer, ["a cat"] * count) if task.tokenizer else np.zeros(count, np.int32)
    elif task.config.model.num_classes:
        request = np.zeros(count, np.int32)
    sample = task.make_sample(settings, task.is_guided(settings))

    def program(params, seeds, request, knobs):
        return to_uint8(sample(params, keys_of(seeds), request, knobs))

    inputs = there((np.zeros(count, np.uint32), request), split)
    knobs = there(jax.tree.map(np.asarray, task.make_knobs(settings)), copied)
    return jax.jit(program, out_shardings=split).lower(there(params, copied), *inputs, knobs)


# Lowering, which needs no compiler -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_step_of_every_config_lowers(name, tmp_path):
    """As it is shipped, from shapes alone; of a progressive GAN the last stage's."""
    update, arguments = shipped(name, tmp_path)
    traced = jax.jit(update).trace(*arguments)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.convolution" in text


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cifar10_step_lowers(platform, dtype, tmp_path):
    update, arguments = shipped("cifar10.py", tmp_path, f"--config.model.dtype={dtype}")
    assert sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params)) == 35_746_307
    text = jax.jit(update).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" in text
    assert ("bf16" in text) == (dtype == "bfloat16")


def shipped(name, folder, *flags):
    """Update of a config in configs/ and shapes to call it with; where it needs files, small ones stand in."""
    argv = ["train.py", f"--config={ROOT / 'configs' / name}", *flags]
    if name == "stable_diffusion_finetune.py":
        argv.append(f"--config.model.pretrained={tiny_checkpoint.write(folder / 'sd')}")
    config, _ = config_from_flags(argv, "")
    parts = parts_of(config)
    config = resolve_length(resolved(config, parts.pretrained) if parts.pretrained else config)
    if config.model.num_classes == -1:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=10))
    check(config)
    task = make_task(config, parts)
    trainable = task.trainable(make_mesh(config.sharding, jax.devices()[:1]))
    count, side, stages = config.training.batch_size, config.data.image_size, trainable.stages
    if stages:
        count, side = stages[-1].batch_size, int(stages[-1].name.split("x")[0])
    batch = {
        "image": jax.ShapeDtypeStruct((count, side, side, config.data.channels), np.uint8),
        "index": jax.ShapeDtypeStruct((count,), np.int32),
    }
    if parts.tokenizer is None:
        batch["label"] = jax.ShapeDtypeStruct((count,), np.int32)
    else:
        batch["tokens"] = jax.ShapeDtypeStruct((count, parts.tokenizer.context_length), np.int32)
    key = jax.eval_shape(jax.random.key, 0)
    frozen = () if trainable.frozen is None else (trainable.frozen,)
    update = trainable.make_update(None, number=len(stages) - 1) if stages else trainable.make_update(None)
    return update, (jax.eval_shape(trainable.init, key), batch, key, *frozen)


def parts_of(config):
    """What a diffusion run takes besides its config."""
    if config.model.pretrained:
        pretrained = open_pretrained(config)
        networks, shapes = pretrained.model.networks, pretrained.model.params
        stage = dataclasses.replace(networks.first_stage, params=shapes["autoencoder"])
        text = TextModel(networks.text_encoder, shapes["text_encoder"], pretrained.model.tokenizer, "")
        return Parts(text.tokenizer, stage, text, pretrained, shapes["unet"] if config.lora.rank else None)
    text, stage = config.text, None
    tokenizer = train_tokenizer(["a red heart"], 520, text.context_length) if text.enabled else None
    if config.autoencoder:  # that of the other config
        other, _ = config_from_flags(["train.py", f"--config={ROOT / 'configs' / 'emoji_vae.py'}"], "")
        task = AutoencoderTask(other)
        stage = FirstStage(task.model, jax.eval_shape(task.init, jax.random.key(0)))
    return Parts(tokenizer, stage)
