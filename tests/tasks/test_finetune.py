"""Training that begins from a Stable Diffusion checkpoint: whole or by LoRA, resumed, exported, and refused where impossible."""

import dataclasses
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

import sample
from jaxdiff import text_to_image
from jaxdiff.config import ConfigError, SamplingConfig, default_config, to_config, to_json
from jaxdiff.data.latents import open_latents
from jaxdiff.files import write_text
from jaxdiff.generation.sampling import make_recipe
from jaxdiff.tasks.diffusion import DiffusionTask, make_schedule
from jaxdiff.tasks.export import export_run
from jaxdiff.tasks.first_stage import load_first_stage
from jaxdiff.tasks.latents import encode_data
from jaxdiff.tasks.pretrained import frozen_on_devices, keep_pretrained, open_pretrained, resolved
from jaxdiff.tasks.run import load_run, restore_run
from jaxdiff.tasks.stable_diffusion import PARTS, SizeError, load_stable_diffusion, open_stable_diffusion
from jaxdiff.tasks.train import train_run
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.sharding import make_mesh, make_runner, state_shardings
from jaxdiff.weights.checkpoint import component_rules
from jaxdiff.weights.names import to_theirs
from tests.tasks import small_checkpoint as small
from tests.tasks import tiny_checkpoint as tiny
from tests.weights.small_stable_diffusion import assert_same


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return tiny.write(folder / "sd")


@pytest.fixture(scope="module")
def photos(folder):
    return tiny.write_photos(folder / "photos")


def config_of(checkpoint, photos="", **changes):
    config = default_config()
    config.update_from_flattened_dict(
        {
            "model.pretrained": str(checkpoint),
            "model.dropout": 0.0,
            "text.enabled": True,
            "data.source": "folder",
            "data.dir": str(photos),
            "data.image_size": tiny.SIDE,
            "training.batch_size": 8,
            "training.num_steps": 2,
            "training.log_every": 1,
            "sampling.clip": "none",
            "sampling.steps": 1,
            "sampling.num_images": 8,
            "sampling.batch_per_device": 1,
            "optimizer.learning_rate": 1e-2,
            **changes,
        }
    )
    return to_config(config)


LORA = {"lora.rank": 2, "lora.alpha": 1.0, "lora.targets": ("attention", "projections", "text_encoder")}


def task_of(checkpoint, **changes):
    config = config_of(checkpoint, **changes)
    pretrained = open_pretrained(config)
    config = resolved(config, pretrained)
    stage, text, unet = frozen_on_devices(
        pretrained, config, {"text_encoder": ""}, pretrained.first_stage(), small.one_device()
    )
    return DiffusionTask(config, pretrained.model.tokenizer, stage, text, pretrained, unet)


def batch_of(task):
    rng, count = np.random.default_rng(0), 4
    images = rng.integers(0, 256, (count, tiny.SIDE, tiny.SIDE, 3), dtype=np.uint8)
    tokens = task.tokenizer.encode([f"cat {i}" for i in range(count)])
    return {"image": images, "tokens": tokens, "index": np.arange(count, dtype=np.int32)}


@pytest.fixture(scope="module")
def lora_task(checkpoint):
    return task_of(checkpoint, **LORA)


@pytest.mark.parametrize("kind", [tiny.INPAINT1, tiny.SD2])
def test_what_the_checkpoint_is_replaces_what_the_config_says(kind, tmp_path):
    tiny.write(tmp_path, kind)
    config = config_of(tmp_path, **{"diffusion.schedule": "cosine", "model.num_classes": 0})
    pretrained = open_pretrained(config)
    found = resolved(config, pretrained)
    v = kind == tiny.SD2
    assert found.diffusion.prediction == ("v" if v else "noise") and found.diffusion.inpainting == (
        "inpainting" in kind
    )
    assert (found.model.channels, found.model.channel_multipliers, found.model.num_res_blocks) == (16, (1, 1), 1)
    assert found.text.enabled and found.text.width == tiny.CONTEXT and found.text.context_length == small.TOKENS
    schedule, theirs = make_schedule(found.diffusion), pretrained.model.model.schedule
    jax.tree.map(np.testing.assert_array_equal, schedule, theirs)  # the levels that the file says
    assert to_config(json.loads(to_json(found))) == found  # as config.json keeps it


def test_the_file_may_be_contradicted_about_what_it_predicts(checkpoint):
    config = config_of(checkpoint, **{"model.pretrained_prediction": "v"})
    assert resolved(config, open_pretrained(config)).diffusion.prediction == "v"


def test_training_begins_with_the_checkpoints_numbers_where_each_will_live(checkpoint):
    """Split over fsdp; the optimiser's moments are zero, and the average is a copy."""
    task = task_of(checkpoint, **{"text.trained": True, "sharding.fsdp": 4})
    assert set(task.frozen) == {"autoencoder"}
    mesh = make_mesh(task.config.sharding)
    trainable = task.trainable(mesh)
    shapes = jax.eval_shape(trainable.init, jax.random.key(0))
    shardings = state_shardings(shapes, mesh, "jit")
    state = trainable.begin(shardings)
    theirs = tiny.params(tiny.SD1)
    for part in ("unet", "text_encoder"):
        assert_same(state.params[part], theirs[part])
        assert_same(state.ema_params[part], theirs[part])
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))


def test_lora_begins_as_the_base_model_and_learns_by_its_factors_alone(lora_task, checkpoint):
    """Loss of the base model; a gradient for every B, none for A while B = 0; nothing else is a parameter."""
    params = lora_task.init(jax.random.key(0))
    assert set(params) == {"lora"} and set(params["lora"]) == {"unet", "text_encoder"}
    assert set(lora_task.frozen) == {"autoencoder", "text_encoder", "unet"}
    batch, key = batch_of(lora_task), jax.random.key(1)
    values = small.jit(jax.value_and_grad(lora_task.loss, has_aux=True))
    (loss, _), gradient = values(params, batch, key, lora_task.frozen)
    base = task_of(checkpoint)
    unet = {"unet": lora_task.frozen["unet"]}
    expected, _ = small.jit(base.loss)(unet, batch, key, base.frozen)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for path, leaf in flatten_dict(gradient, sep="/").items():
        assert bool(jnp.any(leaf != 0)) == path.endswith("/b"), path
    moved = jax.tree.map(lambda p: p + 0.1, params)
    assert abs(float(values(moved, batch, key, lora_task.frozen)[0][0]) - float(loss)) > 1e-3


def test_frozen_parameters_are_split_as_the_state_is(lora_task):
    mesh = make_mesh(config_of("x", **{"sharding.fsdp": 4}).sharding)
    shapes = jax.eval_shape(lora_task.trainable(mesh).init, jax.random.key(0))
    runner = make_runner(lambda axis: lambda *args: args[0], shapes, mesh, "jit", lora_task.frozen)
    kernel = runner.frozen[0]["unet"]["up_0_0"]["residual"]["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


@pytest.fixture(scope="module")
def run(folder, lora_task):
    """The workdir of a run as training leaves it, with random factors and nothing compiled; see the slow tests for training."""
    workdir, task = folder / "run", lora_task
    keep_pretrained(task.pretrained, task.config, workdir)
    write_text(workdir / "config.json", to_json(task.config))
    write_text(workdir / "captions.json", json.dumps(["cat"]))
    state = task.trainable(small.one_device()).init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(state.params)
    rng = np.random.default_rng(0)
    factors = structure.unflatten([0.3 * jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves])
    checkpoints = Checkpoints(workdir / "checkpoints", 1)
    checkpoints.save(2, dataclasses.replace(state, params=factors, ema_params=factors))
    checkpoints.close()
    return workdir


def test_a_lora_run_keeps_its_factors_alone(run, checkpoint):
    task, step, params, _ = restore_run(run)
    assert step == 2 and set(params) == {"lora"}
    stored = json.loads((run / "config.json").read_text())
    assert stored["diffusion"]["schedule"] == "scaled_linear" and stored["model"]["pretrained"] == str(checkpoint)
    assert set(json.loads((run / "pretrained.json").read_text())["sha256"]) == {"unet", "autoencoder", "text_encoder"}
    trained, base = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, task.frozen))
    state = jax.eval_shape(task.trainable(small.one_device()).init, jax.random.key(0))
    held = sum(leaf.size for leaf in jax.tree.leaves(state))  # factors, their average, two moments, and counters
    assert 0 < trained < base / 4 and held <= 4 * trained + 8


def test_a_run_visits_the_levels_as_the_checkpoints_scheduler_file_says(lora_task, checkpoint):
    """Sampler, times and options are those of `sample.py --model`, also where something else is asked for."""
    sd = open_stable_diffusion(checkpoint)
    for changes in ({}, {"sampler": "dpm++2m"}, {"sampler": "euler", "spacing": "karras"}, {"spacing": "trailing"}):
        ours, theirs = (
            make_recipe(
                model, SamplingConfig(**{"sampler": "file", "spacing": "file", **changes}, steps=5, clip="none")
            )
            for model in (lora_task.image_model, sd.model)
        )
        assert (ours.sampler, ours.options, ours.prediction) == (theirs.sampler, theirs.options, theirs.prediction)
        np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)
        assert ours.sampler == changes.get("sampler", "pndm")
    plain = dataclasses.replace(sd.settings, steps=5)  # of `--model` without a flag
    filed = dataclasses.replace(plain, sampler="file")
    np.testing.assert_array_equal(make_recipe(sd.model, plain).timesteps, make_recipe(sd.model, filed).timesteps)
    assert lora_task.describe_sampling(filed) == "pndm, 5 steps, guidance 7.5"
    with pytest.raises(ConfigError, match="no spacing 'karras'"):
        lora_task.describe_sampling(dataclasses.replace(filed, spacing="karras"))


def test_what_is_exported_is_what_the_run_samples_with(run, checkpoint, tmp_path):
    whole = load_run(run).params
    export_run(run, tmp_path / "sd")
    export_run(run, tmp_path / "one.safetensors", "single-file")
    found = load_stable_diffusion(tmp_path / "sd", mesh=small.one_device())
    one = load_file(tmp_path / "one.safetensors")  # which says too little of a model this small to be opened
    for part, component in PARTS.items():
        assert_same(found.params[part], whole[part])
        rules = component_rules(component, tiny.configs(tiny.SD1)[component], as_single_file=True)
        for name, tensor in to_theirs(whole[part], rules).items():
            np.testing.assert_array_equal(one[name], tensor)
    for naming in ("kohya", "diffusers"):
        path = tmp_path / f"{naming}.safetensors"
        export_run(run, path, "lora", naming)
        found = load_stable_diffusion(checkpoint, mesh=small.one_device(), lora=path)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.params, dict(whole))
    half = load_stable_diffusion(checkpoint, mesh=small.one_device(), lora=path, lora_scale=0.5)
    base = load_stable_diffusion(checkpoint, mesh=small.one_device())
    between = jax.tree.map(lambda a, b: (a + b) / 2, base.params, found.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), half.params, between)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), base.params["unet"], found.params["unet"])
    assert sum(jax.tree.leaves(changed)) == 40  # kernels of attention and projections
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "diffusers.safetensors",
        "kohya.safetensors",
        "one.safetensors",
        "sd",
    ]


def test_a_run_makes_images_of_other_sizes_as_the_exported_folder_does(run, tmp_path, monkeypatch):
    """By the command, and in a notebook; of a size asked for twice the sampler is the same, and so compiles once."""
    export_run(run, tmp_path / "sd")
    sd, opened = load_stable_diffusion(tmp_path / "sd", mesh=small.one_device()), load_run(run)
    settings = dataclasses.replace(opened.settings, steps=2)
    expected = text_to_image(sd.with_size(24, 8), ["a cat"], [3], settings=settings)
    assert expected.shape == (1, 24, 8, 3)
    ours = text_to_image(opened.with_size(24, 8), ["a cat"], [3], settings=settings, mesh=small.one_device())
    np.testing.assert_allclose(ours, expected, atol=1)
    flags = ["--prompt=a cat", "--seed=3", "--num=1", "--steps=2", "--height=24", "--width=8"]
    monkeypatch.setattr("jaxdiff.tasks.run.make_mesh", lambda config: small.one_device())
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--workdir={run}", f"--npz={tmp_path / 'x.npz'}", *flags])
    sample.main()
    np.testing.assert_allclose(np.load(tmp_path / "x.npz")["images"], expected, atol=1)
    assert opened.with_size(24, 8).model is opened.with_size(24, 8).model and opened.with_size().model is opened.model
    assert load_run(run, width=8).model.image_shape == (tiny.SIDE, 8, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--height=17", "--height 17: this model makes images of multiples of 2 pixels, as 16"),
        ("--height=16 --width=0", "--width 0: this model makes images of multiples of 2 pixels, as 2"),
        (
            "--height=8192 --width=8192",
            "the parameters need .* and one image at least .* more, .*: make smaller images",
        ),
        ("--dtype=float16 --height=24", "--dtype goes with --model, and a run has its own"),
    ],
)
def test_a_size_that_a_run_cannot_make_is_refused_before_a_tensor_is_read(run, monkeypatch, capsys, flags, message):
    def load(*args):
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr("jaxdiff.tasks.pretrained.load_params", load)
    monkeypatch.setattr("jaxdiff.tasks.memory.device_memory", lambda device, sharing: 2**30)
    assert refusal(monkeypatch, capsys, f"--workdir={run} {flags}", message)


def test_a_run_that_did_not_begin_from_stable_diffusion_keeps_its_size(lora_task, run, tmp_path, monkeypatch, capsys):
    write_text(tmp_path / "config.json", to_json(to_config(default_config())))
    own = "goes with --model, and with runs that began from one: this run has its own"
    assert refusal(monkeypatch, capsys, f"--workdir={tmp_path} --height=24", f"--height {own}")
    assert refusal(monkeypatch, capsys, f"--workdir={tmp_path} --width=24", f"--width {own}")
    plain = dataclasses.replace(load_run(run), task=dataclasses.replace(lora_task, pretrained=None))
    with pytest.raises(SizeError, match=f"width {own}"):
        plain.with_size(width=24)


def refusal(monkeypatch, capsys, flags, message):
    """Whether sample.py ends with one line that says so."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt=a", *flags.split()])
    with pytest.raises(SystemExit) as caught:
        sample.main()
    error = capsys.readouterr().err
    return caught.value.code == 2 and error.count("\n") == 1 and re.match(f"error: {message}", error)


def test_nothing_is_written_over_and_nothing_half(run, tmp_path, monkeypatch):
    (tmp_path / "sd").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_run(run, tmp_path / "sd")
    with pytest.raises(ConfigError, match="must end in .safetensors"):
        export_run(run, tmp_path / "x", "single-file")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("jaxdiff.weights.export.write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        export_run(run, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["sd"]


def test_a_checkpoint_moved_or_exchanged_is_said_in_a_line(run, checkpoint, photos, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    stored = json.loads((copy / "config.json").read_text())

    def point_to(path):
        stored["model"]["pretrained"] = str(path)
        (copy / "config.json").write_text(json.dumps(stored))

    point_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="if it has moved, say so in"):
        load_run(copy)
    shutil.copytree(checkpoint, tmp_path / "moved")
    point_to(tmp_path / "moved")
    restore_run(copy)
    tiny.write(tmp_path / "other", scale=0.5)
    point_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="another autoencoder"):
        load_run(copy)
    with pytest.raises(ConfigError, match="another autoencoder"):
        train_run(config_of(tmp_path / "other", photos, **LORA), copy)
    with pytest.raises(ConfigError, match="config.lora.rank = 2, now it is 3"):
        train_run(config_of(checkpoint, photos, **LORA | {"lora.rank": 3}), copy)


def test_latents_are_encoded_by_the_checkpoints_autoencoder(checkpoint, photos, tmp_path):
    config = config_of(checkpoint, photos)
    encode_data(config, tmp_path / "latents")
    assert open_latents(tmp_path / "latents").info.sha256 == load_first_stage(checkpoint).sha256
    changes = {"data.source": "latents", "data.dir": str(tmp_path / "latents")}
    with pytest.raises(ConfigError, match="latents of another autoencoder"):
        train_run(config_of(tiny.write(tmp_path / "other", scale=0.5), **changes), tmp_path / "run")
    inpainting = tiny.write(tmp_path / "inpainting", tiny.INPAINT1)
    with pytest.raises(ConfigError, match="needs the images"):
        train_run(config_of(inpainting, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.pretrained": "nowhere"}, "config.model.pretrained: nowhere: there is no such file"),
        ({"data.image_size": 15}, "must be divisible by 2"),
        ({"data.channels": 1}, "the autoencoder's images have 3"),
        ({"sampling.sampler": "file", "sampling.spacing": "karras"}, "no spacing 'karras'"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_made(checkpoint, photos, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train_run(config_of(checkpoint, photos, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.pretrained": ""} | LORA, "needs a model to adapt"),
        ({"model.pretrained": "", "sampling.sampler": "file"}, "sampling.sampler = 'file' needs a checkpoint"),
        (LORA | {"lora.targets": ("everything",)}, "'everything' must be one of attention"),
        (LORA | {"lora.targets": ()}, "must name some of"),
        (LORA | {"text.trained": True}, "add 'text_encoder'"),
        ({"autoencoder": "x"}, "has its own"),
        ({"text.pretrained": "x"}, "has its own"),
        ({"sampling.clip": "clip"}, "must be 'none'"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of("x", **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (tiny.SD1, LORA | {"sharding.fsdp": 4}),
        (tiny.SD1, {"text.trained": True, "diffusion.loss": "min_snr"}),
        (tiny.SD2, LORA | {"model.dtype": "bfloat16", "model.remat": True}),
        (tiny.INPAINT2, {"training.accumulation_steps": 1, "sharding.mode": "pmap"}),
        (tiny.SD1, LORA | {"model.param_dtype": "bfloat16"}),
    ],
)
def test_a_run_stopped_and_resumed_is_the_same_run(kind, changes, photos, tmp_path):
    sd = tiny.write(tmp_path / "sd", kind)
    states = []
    for name, stops in (("once", (4,)), ("twice", (2, 4))):
        for stop in stops:
            outcome = train_run(config_of(sd, photos, **changes, **{"training.num_steps": stop}), tmp_path / name)
        states.append(outcome.state)
    assert_same(states[0].params, states[1].params)
    assert_same(states[0].ema_params, states[1].ema_params)
    images = load_run(tmp_path / "twice").text_to_image(["cat"] * 2, [0, 1])
    assert images.shape == (2, tiny.SIDE, tiny.SIDE, 3)
    assert list((tmp_path / "twice" / "samples").glob("*.png"))
    export_run(tmp_path / "twice", tmp_path / "out")
    again = load_stable_diffusion(tmp_path / "out", mesh=small.one_device())
    whole = load_run(tmp_path / "twice").params
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32)), again.params["unet"], whole["unet"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("single_file", [False, True])
def test_training_on_kept_latents(photos, tmp_path, single_file):
    made = small if single_file else tiny  # a single file of a model so small does not say what it is
    sd = made.write(tmp_path / "sd", tiny.SD1, single_file=single_file)
    words = {"text.tokenizer": str(tmp_path / "sd" / "words")} if single_file else {}
    words["data.image_size"] = made.SIDE
    encode_data(config_of(sd, photos, **words), tmp_path / "latents")
    changes = LORA | words | {"data.source": "latents", "data.dir": str(tmp_path / "latents")}
    assert train_run(config_of(sd, **changes), tmp_path / "run").step == 2
    assert train_run(config_of(sd, **changes | {"training.num_steps": 3}), tmp_path / "run").step == 3
