"""Stable Diffusion from disk to images: small checkpoints with random weights, written by our own export."""

import collections
import dataclasses
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
import sample
from jaxdiff.config import ConfigError, ShardingConfig
from jaxdiff.files import save_png
from jaxdiff.generation.image_model import Request
from jaxdiff.generation.inputs import read_image
from jaxdiff.generation.sampling import knobs_of, make_recipe, make_sample
from jaxdiff.tasks import memory, stable_diffusion
from jaxdiff.tasks.asked import how_many, open_asked, what_is_asked
from jaxdiff.tasks.dry_run import Cost, _cost, _params, calls_an_image, dry_run
from jaxdiff.tasks.first_stage import autoencoder_from_config
from jaxdiff.tasks.memory import bytes_of
from jaxdiff.tasks.stable_diffusion import (
    ONLY,
    Networks,
    load_stable_diffusion,
    open_stable_diffusion,
    unet_from_config,
)
from jaxdiff.tasks.text_model import text_encoder_from_config
from jaxdiff.training.sharding import fsdp_shardings, make_mesh
from tests.golden import make_stable_diffusion as peers
from tests.tasks import small_checkpoint as small
from tests.weights.small_stable_diffusion import assert_same

SD1, INPAINT1, SD2, INPAINT2 = small.KINDS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a kind."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = small.write(tmp_path_factory.mktemp("model"), kind)
        return made[kind]

    return of


@pytest.fixture(scope="module")
def loaded(folders):
    """The model of a kind."""
    return functools.cache(lambda kind: load_stable_diffusion(folders(kind), mesh=small.one_device()))


@pytest.fixture(scope="module")
def sd(loaded):
    return loaded(SD1)


@pytest.fixture(scope="module")
def inpainting(loaded):
    return loaded(INPAINT1)


# Images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", peers.KEPT)
def test_images_are_the_golden_ones(loaded, golden_dir, name):
    golden, case = np.load(golden_dir / "stable_diffusion.npz"), peers.CASES[name]
    assert set(golden.files) == set(peers.KEPT)
    images = small.images_of(loaded(case.kind), peers, case)
    assert np.abs(images - golden[name]).max() < 1e-4 * np.abs(golden[name]).max()


def test_an_image_is_its_seeds_and_prompts_alone(sd):
    images = jaxdiff.text_to_image(sd, ["a cat", "a dog"], [3, 4], steps=3)
    assert images.shape == (2, small.SIDE, small.SIDE, 3) and images.std() > 20
    np.testing.assert_array_equal(jaxdiff.text_to_image(sd, "a dog", [4], steps=3), images[1:])
    assert not np.array_equal(jaxdiff.text_to_image(sd, "a cat", [4], steps=3), images[1:])
    assert not np.array_equal(jaxdiff.text_to_image(sd, "a dog", [4], steps=3, guidance=3.0), images[1:])
    assert not np.array_equal(jaxdiff.text_to_image(sd, "a dog", [4], steps=3, negative="blur"), images[1:])


def test_pixels_outside_the_mask_are_kept(inpainting):
    assert inpainting.model.mask_channels
    images = jaxdiff.inpaint(inpainting, "a hat", small.image(), small.mask(), [3], steps=2, sampler="ddim")
    kept = small.mask()[..., 0] == 0
    np.testing.assert_array_equal(images[0][kept], small.image()[kept])
    assert not np.array_equal(images[0], small.image())


@pytest.mark.slow
def test_parameters_that_are_split_stay_so_and_make_the_same_images(sd, folders, monkeypatch):
    mesh = make_mesh(ShardingConfig(fsdp=2), jax.devices()[:2])
    split = load_stable_diffusion(folders(SD1), mesh=mesh)
    leaves = jax.tree.leaves(split.params)
    assert sum(not leaf.sharding.is_fully_replicated for leaf in leaves) > 50
    assert_same(sd.params, split.params)
    copied, put = [], jax.device_put
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", lambda x, *where: copied.append(x) or put(x, *where))
        images = jaxdiff.text_to_image(split, ["a cat", "a dog"], [3, 4], steps=3)
    assert copied and not {id(x) for x in copied} & {id(leaf) for leaf in leaves}
    expected = jaxdiff.text_to_image(sd, ["a cat", "a dog"], [3, 4], steps=3)
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_numbers_that_change_compile_nothing(sd):
    """The same program for any guidance and strength, and for the same checkpoint loaded again."""
    again = open_stable_diffusion(sd.checkpoint.path)
    assert again.model is sd.model and sd.with_size(48, 32).model is again.with_size(48, 32).model
    programs = {
        make_sample(model, dataclasses.replace(sd.settings, guidance=guidance), True)
        for model in (sd.model, again.model)
        for guidance in (2.0, 7.5)
    }
    assert len(programs) == 1
    shapes = [jax.tree.map(np.shape, knobs_of(sd.model, sd.settings, strength)) for strength in (0.3, 1.0)]
    assert shapes[0] == shapes[1]


# Schedules ---------------------------------------------------------------------------------------------------------


def test_the_file_decides_how_levels_are_visited(sd):
    """Another sampler takes its own spacing where the file has none, unless one is asked for."""

    def times(sampler, **changes):
        settings = small.settings_of(sd, sampler, steps=4, **changes)
        recipe = make_recipe(sd.model, settings)
        return recipe, np.asarray(recipe.schedule.network_time(recipe.start_times))[:4].tolist()

    recipe, found = times(None)
    assert recipe.sampler == "pndm" and found == [751, 501, 501, 251]
    assert times("ddim")[1] == [751, 501, 251, 1]
    assert times("euler")[1] == [999, 666, 333, 0]
    assert times("euler", spacing="trailing")[1] == [999, 749, 499, 249]
    assert times("dpm++2m karras")[1] != times("dpm++2m")[1]


def test_guidance_acts_on_its_share_of_the_steps(sd):
    """As a fraction of the steps, whatever the file's time is."""
    for sampler in ("ddim", "euler"):
        settings = small.settings_of(sd, sampler, steps=4, guidance_start=0.25, guidance_end=0.75)
        low, high = knobs_of(sd.model, settings)["interval"]
        times = make_recipe(sd.model, settings).start_times[:4]
        assert [bool(low < t <= high) for t in times] == [False, True, True, False]
    settings = small.settings_of(sd, "ddim", steps=4, spacing="linspace", guidance_start=0.5)
    low, high = knobs_of(sd.model, settings)["interval"]
    times = make_recipe(sd.model, settings).start_times
    assert times[3] == times[4] and [bool(low < t <= high) for t in times[:4]] == [False, False, True, True]


def test_predictions_are_the_files_or_the_users(folders):
    assert open_stable_diffusion(folders(SD2)).model.prediction == "v"
    opened = open_stable_diffusion(folders(SD2), prediction="noise")
    assert opened.model.prediction == make_recipe(opened.model, opened.settings).prediction == "noise"


def counted(sd, settings, strength, masked):
    """For how many images each network is called, in a program in which none does anything."""
    calls, model = collections.Counter(), sd.model

    def called(name, result):
        jax.debug.callback(lambda: calls.update({name: len(result)}))
        return result

    changed = dataclasses.replace(
        model,
        network=lambda params, x, time, condition: called("unet", jnp.zeros_like(x)),
        conditions=lambda params, request, guided: (jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3))),
        encode=lambda params, x, keys: called("encoder", jnp.zeros((len(x), *model.latent_shape))),
        decode=lambda params, x: called("decoder", jnp.zeros((len(x), *model.image_shape))),
    )
    pictures = None if strength is None else small.image()[None]
    request = Request(None, pictures, small.mask()[None] if masked else None)
    sample, keys = make_sample(changed, settings, True), jax.random.split(jax.random.key(0), 1)
    knobs = knobs_of(changed, settings, 1.0 if strength is None else strength)
    jax.block_until_ready(jax.jit(sample)({}, keys, request, knobs))
    jax.effects_barrier()
    return calls


@pytest.mark.parametrize(
    ("kind", "sampler", "strength", "masked", "unet", "encoder"),
    [
        (SD1, "pndm", None, False, 12, 0),
        (SD1, "heun", None, False, 18, 0),
        (SD1, "ddim", None, False, 10, 0),
        (SD1, "pndm", 0.7, False, 8, 1),
        (SD1, "heun", 0.7, False, 10, 1),
        (SD1, "pndm", 0.0, False, 0, 1),
        (SD1, "ddim", 1.0, True, 10, 1),
        (INPAINT1, "euler", None, False, 10, 1),
        (INPAINT1, "euler", 0.4, True, 4, 2),
    ],
)
def test_the_dry_run_counts_what_is_evaluated(folders, kind, sampler, strength, masked, unet, encoder):
    opened = open_stable_diffusion(folders(kind))
    settings = small.settings_of(opened, sampler, steps=5)
    calls = calls_an_image(opened, settings, strength)
    assert calls == {"unet": unet, "encoder": encoder, "decoder": 1, "text_encoder": 2}
    del calls["text_encoder"]
    assert counted(opened, settings, strength, masked) == {name: count for name, count in calls.items() if count}


def test_the_dry_run_needs_no_tensor(folders):
    opened = open_stable_diffusion(folders(SD1), dtype="bfloat16")
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(opened.params))
    lines = dry_run(opened, opened.settings).splitlines()
    assert "U-Net" in lines[0] and "102 x" in lines[0] and "nan" not in "".join(lines)
    assert "  encoder" in lines[1] and lines[1].endswith("not called")
    assert "8 x 1 images (guided" in lines[5] and "text encoder, 51 times the U-Net" in lines[5]
    parameters = bytes_of(opened.params)
    assert parameters == 2 * sum(leaf.size for leaf in jax.tree.leaves(opened.params))
    assert f"{parameters / 2**30:.2f} of parameters" in lines[6] and "within the" in lines[6]


def test_the_dry_run_counts_the_encoder_where_an_image_is_encoded(folders, monkeypatch):
    """Its operations are of the decoder's kind, and its activations may be the largest."""
    opened, costs = open_stable_diffusion(folders(INPAINT1)), {}
    monkeypatch.setattr(
        "jaxdiff.tasks.dry_run._cost", lambda model, part, batch: costs.setdefault(part, Cost(1e9, 7, 2**30))
    )
    costs["encoder"] = Cost(5e12, 11, 6 * 2**30)
    lines = dry_run(opened, opened.settings, strength=0.5).splitlines()
    assert "   2 x 5000.0 GFLOP an image; activations 6.00 GiB" in lines[1]
    assert lines[4].startswith("  an image: 10.0") and lines[4].endswith(" TFLOP")
    assert "text encoder, encoder twice, 26 times the U-Net" in lines[5] and "encoder 11" in lines[5]
    assert "6.00 of activations" in lines[6]


def test_the_halves_of_the_autoencoder_are_the_whole(sd):
    """As many parameters, and an encoder that is what runs."""
    encoder, decoder = (_params(sd, part) for part in ("encoder", "decoder"))
    assert encoder.keys() | decoder.keys() == sd.params["autoencoder"].keys() and not encoder.keys() & decoder.keys()
    assert _cost(sd, "encoder", 1).flops > 0.3 * _cost(sd, "decoder", 1).flops > 0


def test_operations_are_those_of_the_mathematics(sd):
    """Of products of matrices: the text encoder's, counted by hand, are nearly all it does."""
    cost = _cost(sd, "text_encoder", 1)
    encoder, n = sd.networks.text_encoder, small.TOKENS
    a_layer = 2 * n * (4 + 8) * encoder.width**2 + 4 * n * n * encoder.width
    assert encoder.num_layers * a_layer < cost.flops < 1.2 * encoder.num_layers * a_layer
    assert cost.operations > 100 and cost.activations > 4 * n * encoder.width


@pytest.mark.parametrize("room", [1000, None])
def test_a_model_that_cannot_fit_is_refused_before_it_is_read(folders, monkeypatch, room):
    monkeypatch.setattr(memory, "device_memory", lambda device, sharing: room)
    monkeypatch.setattr(stable_diffusion, "load_params", lambda *args: {})
    opened = open_stable_diffusion(folders(SD1))
    if room is None:
        assert opened.load().params == dict.fromkeys(opened.params, {}), "where nobody knows, it is tried"
        return
    with pytest.raises(ConfigError, match="parameters alone need 0.01 GiB on every device, which has 0.00"):
        opened.load()


def test_images_that_cannot_be_made_are_refused_before_the_model_is_read(folders, monkeypatch):
    """The decoder's largest convolution has 64 channels before and 32 after at each pixel."""
    monkeypatch.setattr(stable_diffusion, "load_params", lambda *args: {})
    small_images = open_stable_diffusion(folders(SD1))
    large_images = small_images.with_size(4096, 2048)
    room = bytes_of(small_images.params) + 4096 * 2048 * (64 + 32) * 4 - 1
    monkeypatch.setattr(memory, "device_memory", lambda device, sharing: room)
    small_images.load()
    with pytest.raises(ConfigError, match=r"need 0\.01 GiB on every device and one image at least 3\.00 more"):
        large_images.load()
    open_stable_diffusion(folders(SD1), dtype="float16").with_size(4096, 1024).load()


def test_the_least_activations_are_no_more_than_the_compiler_plans(sd):
    latents = jax.ShapeDtypeStruct((1, *sd.model.latent_shape), np.float32)
    least = memory.least_activations(sd.model.decode, sd.params, latents)
    assert least == 4 * small.SIDE**2 * (64 + 32)
    assert least < _cost(sd, "decoder", 1).activations < 10 * least


def test_a_device_needs_room_for_its_share_only(sd, monkeypatch):
    shapes = {"kernel": jax.ShapeDtypeStruct((8, 100), np.float32)}
    mesh = make_mesh(ShardingConfig(fsdp=8))
    split = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        fsdp_shardings(shapes, mesh, 0),
    )
    monkeypatch.setattr(memory, "device_memory", lambda device, sharing: 400)
    memory.check_room(split, jax.devices()[0])
    with pytest.raises(ConfigError, match="need"):
        memory.check_room(shapes, jax.devices()[0])


# What is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", small.KINDS)
def test_a_single_file_is_the_same_model(folders, kind, tmp_path, capsys):
    file = small.write(tmp_path, kind, single_file=True)
    with pytest.raises(ConfigError, match="has no tokenizer: give --tokenizer FOLDER"):
        open_stable_diffusion(file)
    single = load_stable_diffusion(file, tokenizer=tmp_path / "words", mesh=small.one_device())
    supposed = kind == INPAINT2  # nothing in such a file says that it predicts noise
    assert capsys.readouterr().err.count("epsilon is supposed") == supposed
    open_stable_diffusion(file, tokenizer=tmp_path / "words", prediction=single.model.prediction)
    assert capsys.readouterr().err == "", "what was said needs no note"
    whole = load_stable_diffusion(folders(kind), mesh=small.one_device())
    assert_same(whole.params, single.params)
    for part in ("unet", "autoencoder", "text_encoder", "scaling_factor", "mask_channels"):
        theirs = getattr(whole.networks, part)
        assert getattr(single.networks, part) == theirs or part == "unet"
    assert single.model.prediction == whole.model.prediction
    np.testing.assert_array_equal(single.tokenizer.encode(["a cat"]), whole.tokenizer.encode(["a cat"]))


def test_parameters_have_the_dtype_asked_for(folders):
    half = load_stable_diffusion(folders(SD1), dtype="bfloat16", mesh=small.one_device())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    with pytest.raises(ConfigError, match="dtype 'int8': must be one of float32, bfloat16, float16"):
        load_stable_diffusion(folders(SD1), dtype="int8")


def test_a_scheduler_that_is_not_here_is_replaced_aloud(tmp_path, capsys):
    folder = small.write(tmp_path, SD1, scheduler={"_class_name": "LMSDiscreteScheduler"})
    opened = open_stable_diffusion(folder)
    assert opened.settings.sampler == "dpm++2m"
    assert capsys.readouterr().err.count("LMSDiscreteScheduler is not among the samplers here: dpm++2m takes") == 1
    opened.check(opened.settings)


FULL_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512}
FULL_TEXT = {
    1: {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    2: {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
}


@pytest.mark.parametrize(
    ("version", "change", "counts"),
    [
        (1, {"cross_attention_dim": 768, "attention_head_dim": 8}, (859_520_964, 83_653_863, 123_060_480)),
        (
            2,
            {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
            (865_910_724, 83_653_863, 340_387_840),
        ),
    ],
)
def test_full_networks_have_as_many_parameters_as_the_published_ones(version, change, counts):
    unet = unet_from_config({"in_channels": 4, "sample_size": 64, **change})
    assert (unet.num_heads, unet.head_dim) == ((8, None) if version == 1 else (1, 64))
    networks = Networks(
        unet,
        autoencoder_from_config(FULL_VAE),
        text_encoder_from_config(FULL_TEXT[version]),
        scaling_factor=0.18215,
        shift_factor=0.0,
        scheduler="{}",
        mask_channels=False,
    )
    found = tuple(sum(leaf.size for leaf in jax.tree.leaves(part)) for part in networks.shapes().values())
    assert found == counts and networks.multiple == 8


@pytest.mark.parametrize("key", ONLY)
def test_what_the_network_cannot_be_is_refused_by_name(key):
    config = small.configs(SD1)["unet"]
    assert unet_from_config(config | {key: ONLY[key]}) == unet_from_config(config)
    with pytest.raises(ValueError, match=f"unet: {key} = 256 is not supported, only"):
        unet_from_config(config | {key: 256})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_head_dim": [1, 1, 2]}, "heads of one width"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types"),
        ({"block_out_channels": [32, 48, 64]}, "multiples of the first"),
        ({"something_new": True}, "something_new = True is not supported"),
    ],
)
def test_networks_of_another_make_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        unet_from_config(small.configs(SD2)["unet"] | change)


@pytest.mark.parametrize(
    ("size", "message"), [((42, 32), "height 42: .* multiples of 4 pixels, as 40"), ((32, 0), "width 0: .* as 4")]
)
def test_sizes_that_cannot_be_halved_are_refused(sd, size, message):
    with pytest.raises(ConfigError, match=message):
        sd.with_size(*size)


def test_tensors_of_another_model_are_refused_before_any_is_read(tmp_path):
    folder = small.write(tmp_path, SD1)
    config = folder / "text_encoder/config.json"
    config.write_text(config.read_text().replace('"vocab_size": 514', '"vocab_size": 600'))
    with pytest.raises(ConfigError, match="text_encoder: .*misshapen: .*token_embedding"):
        open_stable_diffusion(folder)


def test_no_prompt_is_refused(sd):
    with pytest.raises(ValueError, match="no prompt was given"):
        jaxdiff.text_to_image(sd, [], [])
    with pytest.raises(ValueError, match=r"strength 1\.5 must lie"):
        jaxdiff.image_to_image(sd, "a cat", small.image(), [3], strength=1.5)


# The command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--prompt a", "give either --workdir"),
        ("--model x --workdir y --prompt a", "give either --workdir"),
        ("--workdir y --prompt a --dtype float16", "--dtype goes with --model"),
        ("--workdir y --prompt a --dry_run", "--dry_run goes with --model"),
        ("--model x", "--prompt is missing"),
        ("--model x --prompt a --label 3", "ask by --prompt, not by --label"),
        ("--model x --prompt a --init_image pyproject.toml", "is not a PNG"),
        ("--model x --prompt a --init_image nowhere.png", "no such file"),
        ("--model x --prompt a --strength 0.5", "--strength says how far"),
        ("--model x --prompt a --init_image a.png --strength 1.5", r"--strength 1\.5 must lie"),
        ("--model nowhere --prompt a", "nowhere: there is no such file or folder"),
        ("--model pyproject.toml --prompt a", "pyproject.toml"),
        ("--model SD --prompt a --height 22", "--height 22: this model makes"),
        ("--model SD --prompt a --prediction w", "prediction 'w': must be one of noise, v, x0"),
        ("--model SD --prompt a --tokenizer docs", "is no tokenizer"),
        ("--model SD --prompt a --variant fp16", "there is no model.fp16.safetensors|fp16"),
        ("--model SD --prompt a --steps 0", "--steps"),
        ("--model SD --prompt a --steps 2000", "2000"),
        ("--model SD --prompt a --sampler plms", "--sampler plms: must be one of"),
        ("--model SD --prompt a --sampler ddim --spacing karras", "has no spacing 'karras'"),
        ("--model SD --prompt a --clip clip", "clip = 'clip' is for pixels"),
        ("--model SD --prompt a --num 0", "--num 0: must be at least 1"),
        ("--model SD --prompt a --seed -1", "--seed -1"),
        ("--model SD --prompt a --out pyproject.toml", "--out pyproject.toml: it is a file"),
        ("--model SD --prompt a --npz docs", "--npz docs: it is a folder"),
    ],
)
def test_flags_are_refused_before_any_tensor_is_read(folders, monkeypatch, argv, message, capsys):
    def load(*args):
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(stable_diffusion, "load_params", load)
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv.replace("SD", str(folders(SD1))).split()])
    with pytest.raises(SystemExit) as caught:
        sample.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(message, error), error


def test_the_command_makes_the_pipelines_images(sd, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(stable_diffusion, "make_mesh", lambda config: small.one_device())
    save_png(tmp_path / "in.png", small.image())
    flags = ["--prompt=a cat", "--prompt=a dog", "--seed=3", "--steps=3", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--model={sd.checkpoint.path}", *flags])
    sample.main()
    assert "Stable Diffusion 1, 3.6 million parameters" in capsys.readouterr().out
    expected = jaxdiff.text_to_image(sd, ["a cat", "a dog"], [3, 4], steps=3)
    for seed, image in zip((3, 4), expected, strict=True):
        np.testing.assert_array_equal(read_image(tmp_path / "out" / f"{seed:06d}.png"), image)
    assert (tmp_path / "out_grid.png").is_file()
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--model={sd.checkpoint.path}", "--steps=3", "--dry_run"])
    sample.main()
    out = capsys.readouterr().out
    assert "1 images, pndm, 3 steps" in out and "GFLOP an image" in out


def test_prompts_take_turns_and_images_are_brought_to_size(folders, tmp_path):
    save_png(tmp_path / "in.png", np.repeat(np.repeat(small.image(), 2, 0), 2, 1))
    argv = [f"--model={folders(SD1)}", "--prompt=a", "--prompt=b", "--num=3", f"--init_image={tmp_path / 'in.png'}"]
    args = sample.parse_args(argv)
    model = open_asked(args)
    assert how_many(args) == 3 and how_many(sample.parse_args(argv[:3])) == 2
    asked = what_is_asked(args, model, 3)
    tokens = asked.request.condition["tokens"]
    np.testing.assert_array_equal(tokens[0], tokens[2])
    assert not np.array_equal(tokens[0], tokens[1]) and asked.strength == 0.8
    assert asked.request.image.shape == (3, small.SIDE, small.SIDE, 3)
