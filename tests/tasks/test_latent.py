"""Diffusion in an autoencoder's latents: the same task behind encode and decode, whose workdir is all it takes."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import ConfigError, ShardingConfig
from jaxdiff.data.latents import open_latents
from jaxdiff.generation.generate import from_uint8
from jaxdiff.models.text_encoder import CLIPTextEncoder
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.tasks import latents
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.first_stage import CONFIG, TENSORS, load_first_stage, save_first_stage
from jaxdiff.tasks.latents import encode_data, moments
from jaxdiff.tasks.run import Run, load_run
from jaxdiff.tasks.text_model import keep_text_model, load_text_model
from jaxdiff.tasks.train import train_run
from jaxdiff.training.loop import init_sharded
from jaxdiff.training.sharding import make_mesh, make_runner
from jaxdiff.weights.names import text_encoder_rules, to_theirs
from jaxdiff.weights.tensors import write_tensors
from jaxdiff.weights.tokenizer import train_tokenizer
from tests.generation.gaussian_model import left_half, pictures
from tests.tiny import tiny_batch, tiny_config

MODEL = AutoencoderKL(1, 2, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, norm_groups=2)
MEAN, STD = (0.5, -0.3), (2.0, 1.0)
LATENT = {
    "model.patch_size": 1,
    "sampling.clip": "none",
    "training.num_steps": 2,
    "training.sample_every": 0,
    "data.flip": True,
}


def random_like(tree, seed, scale=0.2):
    """Random in every leaf: freshly initialised, half of a network answers zero."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([np.float32(leaf + scale * rng.standard_normal(leaf.shape)) for leaf in leaves])


def make_stage(folder, seed=0):
    params = MODEL.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]
    return save_first_stage(folder, MODEL, random_like(params, seed), MEAN, STD, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("first_stage") / "autoencoder"
    make_stage(path)
    return path


def latent_config(folder, **changes):
    return tiny_config(**{**LATENT, "autoencoder": str(folder), **changes})


@pytest.fixture(scope="module")
def task(folder):
    return DiffusionTask(latent_config(folder), first_stage=load_first_stage(folder))


@pytest.fixture(scope="module")
def params(task):
    return random_like(task.init(jax.random.key(0)), 1, 0.1)


def test_one_factor_and_one_shift_give_all_latents_mean_0_and_variance_1(folder):
    stage = load_first_stage(folder)
    assert stage.latents_mean == MEAN and stage.latents_std == STD and stage.latent_shape((8, 8, 1)) == (4, 4, 2)
    rng = np.random.default_rng(0)
    z = np.array(MEAN) + np.array(STD) * rng.standard_normal((4000, 4, 4, 2))
    scaled = stage.scaled(z)
    assert scaled.mean() == pytest.approx(0, abs=0.02) and scaled.std() == pytest.approx(1, abs=0.02)


def test_decode_undoes_the_scaling_and_encode_does_it(folder):
    stage, x = load_first_stage(folder), np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32)
    posterior = stage.posterior(stage.params, x)
    keys = jax.random.split(jax.random.key(0), 3)
    latents = stage.encode(stage.params, x, keys)
    np.testing.assert_allclose(latents, (posterior.sample(keys) - 0.1) / np.sqrt(2.5 + 0.16), atol=1e-5)
    again = MODEL.apply({"params": stage.params}, posterior.sample(keys), method="decode")
    np.testing.assert_allclose(stage.decode(stage.params, latents), again, atol=1e-4)


def test_the_hash_is_of_what_decides_a_latents_meaning(folder, tmp_path):
    sha256 = load_first_stage(folder).sha256
    shutil.copytree(folder, tmp_path / "a")
    assert load_first_stage(tmp_path / "a").sha256 == sha256
    config = json.loads((folder / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | {"sample_size": 99}))
    assert load_first_stage(tmp_path / "a").sha256 == sha256
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert load_first_stage(tmp_path / "a").sha256 != sha256
    assert make_stage(tmp_path / "b", seed=1).sha256 != sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "VQModel"}, "a VQModel, not an AutoencoderKL"),
        ({"block_out_channels": [8, "x"]}, "block_out_channels"),
        ({"block_out_channels": [8, 12]}, "multiples of the first"),
        ({"scaling_factor": 0}, "must be positive"),
        ({"scaling_factor": "big"}, "must be a number"),
        ({"latent_channels": 0}, "latent_channels = 0"),
        ({"latent_channels": 3}, "misshapen"),
        ({"layers_per_block": 2}, "missing"),
        ({"act_fn": "gelu"}, "act_fn"),
    ],
)
def test_what_is_no_autoencoder_of_ours_is_named(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | change))
    with pytest.raises(ConfigError, match=message) as caught:
        load_first_stage(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_first_stage(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no autoencoder"):
        load_first_stage(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="writes it when it ends"):
        load_first_stage(tmp_path / "run")
    shutil.copytree(folder, tmp_path / "a")
    whole = (folder / TENSORS).read_bytes()
    (tmp_path / "a" / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=TENSORS):
        load_first_stage(tmp_path / "a")


def test_the_loss_is_a_pixel_models_loss_of_the_latents(task, params):
    """The first stage changes x0 and nothing else: the same network, on latents as if they were images."""
    batch = tiny_batch(task.config)
    keys = jax.random.split(jax.random.key(5), 16)
    whole = task.whole(params)
    x0 = task.clean(whole, batch, keys)
    posterior = task.first_stage.posterior(task.first_stage.params, from_uint8(batch["image"]))
    np.testing.assert_allclose(x0, task.first_stage.scaled(posterior.sample(keys)), atol=1e-5)
    kept = moments(task.first_stage, task.first_stage.params, batch["image"])
    np.testing.assert_allclose(task.clean(whole, {"moments": kept}, keys), x0, atol=1e-5)
    losses = [
        float(task.loss(params, {**batch, **change}, jax.random.key(0), task.frozen)[0])
        for change in ({}, {"moments": kept})
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_no_gradient_reaches_the_first_stage_and_no_state_holds_it(task):
    trainable = task.trainable(make_mesh(ShardingConfig(), jax.devices()[:1]))
    state = jax.eval_shape(trainable.init, jax.random.key(0))
    assert set(state.params) == set(state.ema_params) == {"unet"} and set(trainable.frozen) == {"autoencoder"}


@pytest.mark.parametrize("mode", [pytest.param("jit", marks=pytest.mark.slow), "pmap"])
def test_steps_are_the_same_on_one_device_and_on_eight(task, mode):
    batch = tiny_batch(task.config)

    def three_steps(sharding, devices):
        mesh = make_mesh(sharding, jax.devices()[:devices])
        trainable = task.trainable(mesh)
        shapes = jax.eval_shape(trainable.init, jax.random.key(0))
        runner = make_runner(trainable.make_update, shapes, mesh, sharding.mode, trainable.frozen)
        state = init_sharded(trainable.init, jax.random.key(0), runner.state_shardings)
        for _ in range(3):
            state, metrics = runner.step(state, runner.put_batch(batch), jax.random.key(1), *runner.frozen)
        return jax.device_get((state.params, metrics["loss"]))

    (params, loss), (wanted, wanted_loss) = three_steps(ShardingConfig(mode=mode), 8), three_steps(ShardingConfig(), 1)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, wanted)


def test_a_run_needs_its_workdir_only(folder, tmp_path):
    """The autoencoder is copied: it may go, but it may not be exchanged."""
    elsewhere, workdir = tmp_path / "autoencoder", tmp_path / "run"
    shutil.copytree(folder, elsewhere)
    config = latent_config(elsewhere)
    train_run(config, workdir)
    shutil.rmtree(elsewhere)
    run = load_run(workdir)
    images = run.make([1, 2], run.labels(["3"], 2))
    assert images.shape == (2, 8, 8, 1) and images.std() > 0
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=3))
    assert train_run(longer, workdir).step == 3
    make_stage(elsewhere, seed=1)
    with pytest.raises(ConfigError, match="another autoencoder than the one this run was begun with"):
        train_run(longer, workdir)
    shutil.rmtree(workdir / "autoencoder")
    with pytest.raises(ConfigError, match="no autoencoder at"):
        load_run(workdir)


def test_training_from_kept_latents_is_training_on_the_images(folder, tmp_path):
    config = latent_config(folder, **{"training.num_steps": 3, "data.split": "tenth"})
    told = encode_data(config, tmp_path / "latents")
    assert "encoded 179 images and their mirror images" in told and "times as fast" in told
    source = open_latents(tmp_path / "latents")
    assert len(source) == 179 and source.num_classes == 10 and source[3]["moments"].shape == (2, 4, 4, 4)
    from_images = train_run(config, tmp_path / "images").state.params
    from_latents = train_run(
        dataclasses.replace(
            config, data=dataclasses.replace(config.data, source="latents", dir=str(tmp_path / "latents"))
        ),
        tmp_path / "kept",
    ).state.params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), from_images, from_latents)


@pytest.mark.parametrize(
    ("per_device", "told"),
    [
        (16, "; at 51 a second, compilation apart, and they are read back at 320 a second: 6 times as fast"),
        (
            32,
            "; they are read back at 320 a second; how fast they are encoded one batch, with compilation, cannot tell",
        ),
    ],
)
def test_compilation_does_not_count_as_encoding(folder, tmp_path, monkeypatch, per_device, told):
    """By a clock that ticks once a look and 1000 times while the encoder is compiled; of 179 images 128 are a batch."""
    ticks = [0]

    def look():
        ticks[0] += 1
        return float(ticks[0])

    def slow_to_compile(*args):
        ticks[0] += 1000
        return moments(*args)

    monkeypatch.setattr(latents, "time", types.SimpleNamespace(perf_counter=look))
    monkeypatch.setattr(latents, "moments", slow_to_compile)
    monkeypatch.setattr(latents, "BATCH_PER_DEVICE", per_device)
    config = latent_config(folder, **{"data.split": "tenth", "data.flip": False})
    assert encode_data(config, tmp_path / "latents").endswith(told)


def test_latents_of_another_autoencoder_are_refused_before_anything_is_written(folder, tmp_path):
    config = latent_config(folder, **{"data.split": "tenth"})
    encode_data(config, tmp_path / "latents")
    with pytest.raises(ConfigError, match="exists already"):
        encode_data(config, tmp_path / "latents")
    make_stage(tmp_path / "other", seed=1)
    wrong = latent_config(tmp_path / "other", **{"data.source": "latents", "data.dir": str(tmp_path / "latents")})
    with pytest.raises(ConfigError, match="latents of another autoencoder"):
        train_run(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.image_size": 9}, "data.image_size = 9 must be divisible by 2"),
        ({"data.channels": 3}, "data.channels = 3, but the autoencoder's images have 1"),
        ({"model.patch_size": 8}, "latents of 4x4: 4 must be divisible by 8"),
        ({"model.attention_resolutions": (8,)}, "8 is not a side of this U-Net, which has 4"),
    ],
)
def test_what_does_not_fit_the_latents_is_refused_before_anything_is_written(folder, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train_run(latent_config(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling.clip": "clip"}, "sampling.clip = 'clip' is for pixels"),
        ({"autoencoder": "", "data.source": "latents"}, "needs the autoencoder"),
        ({"data.source": "latents", "diffusion.inpainting": True}, "needs the images"),
        ({"data.source": "latents", "evaluation.every": 1}, "training images"),
        ({"text.pretrained": "somewhere"}, "config.text.enabled is False"),
    ],
)
def test_impossible_latent_configs(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        latent_config(folder, **changes)


def test_likelihoods_are_of_latents_only_and_so_refused(task):
    with pytest.raises(ConfigError, match="no likelihood of images"):
        task.likelihoods(4)


# A pretrained text encoder -----------------------------------------------------------------------------------------

CAPTIONS = ["a red circle", "a large blue square on the left"]
TEXT = {
    "data.source": "shapes",
    "data.channels": 3,
    "model.num_classes": 0,
    "text.enabled": True,
    "sampling.guidance": 2.0,
}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A CLIP text encoder with its tokenizer, as Stable Diffusion has them."""
    path = tmp_path_factory.mktemp("sd")
    tokenizer = train_tokenizer(CAPTIONS, 560, 12)
    tokenizer.save(path / "tokenizer")
    encoder = CLIPTextEncoder(tokenizer.vocabulary_size, 12, 16, num_layers=1, num_heads=2, activation="gelu")
    params = random_like(encoder.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"], 0)
    config = {
        "vocab_size": tokenizer.vocabulary_size,
        "max_position_embeddings": 12,
        "hidden_size": 16,
        "num_hidden_layers": 1,
    }
    config |= {"num_attention_heads": 2, "intermediate_size": 64, "hidden_act": "gelu", "model_type": "clip_text_model"}
    (path / "text_encoder").mkdir()
    (path / "text_encoder" / "config.json").write_text(json.dumps(config))
    write_tensors(path / "text_encoder" / "model.safetensors", to_theirs(params, text_encoder_rules(1)))
    return path


def test_a_pretrained_text_encoder_stays_as_it_is_and_goes_with_the_run(text_folder, tmp_path):
    config = tiny_config(
        **TEXT, **{"text.pretrained": str(text_folder), "training.num_steps": 2, "training.sample_every": 0}
    )
    outcome = train_run(config, tmp_path / "run")
    assert set(outcome.state.params) == {"unet"}
    given, run = load_text_model(text_folder), load_run(tmp_path / "run")
    assert run.tokenizer.vocabulary == given.tokenizer.vocabulary and run.tokenizer.context_length == 12
    jax.tree.map(np.testing.assert_array_equal, run.params["text_encoder"], given.params)
    assert load_text_model(tmp_path / "run").sha256 == given.sha256
    assert run.text_to_image(["a red circle"], [0], negative="blue").shape == (1, 8, 8, 3)


def no_settings(tokenizer):
    """Transformers' older layout: the padding is told in a file of its own."""
    (tokenizer / "tokenizer_config.json").unlink()
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))


def one_file(tokenizer):
    """As transformers 5 writes it."""
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    merges = (tokenizer / "merges.txt").read_text().splitlines()[1:]
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": merges}}))
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).unlink()


def test_a_run_in_latents_that_reads_text_changes_images(folder):
    """Where the mask is black nothing moves, the prompt says what comes where it is white, and strength how much of it."""
    tokenizer = train_tokenizer(CAPTIONS, 560, 12)
    small = {"text.width": 16, "text.num_layers": 1, "text.num_heads": 2, "text.context_length": 12}
    config = latent_config(folder, **TEXT | small | {"data.channels": 1})
    task = DiffusionTask(config, tokenizer, first_stage=load_first_stage(folder))
    params = random_like(jax.jit(task.init)(jax.random.key(0)), 1, 0.1)
    run = Run(task, task.whole(params), 0, (), tuple(CAPTIONS))
    images, mask = pictures(2), left_half()
    kept = mask[..., 0] == 0
    found = run.inpaint(images, mask, [4, 5], CAPTIONS)
    np.testing.assert_array_equal(found[:, kept], images[:, kept])
    np.testing.assert_array_equal(run.inpaint(images[1], mask, [5], CAPTIONS[1:])[0], found[1])
    assert not np.array_equal(run.inpaint(images, mask, [4, 5], CAPTIONS[::-1])[:, ~kept], found[:, ~kept])
    still = run.image_to_image(images, [4, 5], CAPTIONS, strength=0.0)
    np.testing.assert_array_equal(run.image_to_image(images, [4, 5], CAPTIONS[::-1], strength=0.0), still)
    changed = run.image_to_image(images, [4, 5], CAPTIONS, strength=0.75)
    assert not np.array_equal(run.image_to_image(images, [4, 5], CAPTIONS[::-1], strength=0.75), changed)


@pytest.mark.parametrize("layout", [no_settings, one_file])
def test_the_copy_of_a_text_encoder_reads_captions_as_the_original_does(text_folder, tmp_path, layout):
    """From whatever files its tokenizer came: so the run can go on, too."""
    shutil.copytree(text_folder, tmp_path / "sd")
    layout(tmp_path / "sd" / "tokenizer")
    given = keep_text_model(str(tmp_path / "sd"), tmp_path / "run")
    kept = keep_text_model(str(tmp_path / "sd"), tmp_path / "run")
    np.testing.assert_array_equal(kept.tokenizer.encode(CAPTIONS), given.tokenizer.encode(CAPTIONS))
    assert kept.sha256 == given.sha256
    assert kept.tokenizer.pad_token == ("!" if layout is no_settings else "<|endoftext|>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"intermediate_size": 32}, "4 times hidden_size"),
        ({"model_type": "t5"}, "type 't5'"),
        ({"vocab_size": 100}, "misshapen"),
        ({"num_hidden_layers": 2}, "missing"),
        ({"num_attention_heads": 3}, "must divide"),
    ],
)
def test_what_is_no_text_encoder_of_ours_is_named(text_folder, tmp_path, change, message):
    shutil.copytree(text_folder, tmp_path / "sd")
    path = tmp_path / "sd" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message) as caught:
        load_text_model(tmp_path / "sd")
    assert "\n" not in str(caught.value)


def test_a_text_encoder_needs_its_tokenizer(text_folder, tmp_path):
    shutil.copytree(text_folder / "text_encoder", tmp_path / "text_encoder")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_text_model(tmp_path / "text_encoder")
    with pytest.raises(ConfigError, match="holds no text encoder"):
        load_text_model(text_folder / "tokenizer")
