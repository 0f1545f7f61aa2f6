"""Runs that change images, models with mask channels, and what sample.py's flags ask for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
from jaxdiff.config import ConfigError
from jaxdiff.files import save_png
from jaxdiff.generation.image_model import Request
from jaxdiff.tasks.asked import how_many, what_is_asked
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.run import Run
from jaxdiff.tasks.vae import VAETask
from jaxdiff.weights.tokenizer import train_tokenizer
from tests.generation.gaussian_model import left_half, pictures
from tests.tiny import tiny_batch, tiny_config


def random_params(task):
    """Random in every leaf: freshly initialised, the network would answer zero whatever it is shown."""
    leaves, tree = jax.tree.flatten(task.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def run():
    task = DiffusionTask(tiny_config(**{"sampling.guidance": 2.0}))
    return Run(task, random_params(task), 0, tuple("abcdefghij"))


@pytest.fixture(scope="module")
def inpainting():
    task = DiffusionTask(tiny_config(**{"diffusion.inpainting": True}))
    return Run(task, random_params(task), 0, tuple("abcdefghij"))


def made(mask):
    return mask[..., 0] > 0


# Runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "inpainting"])
def test_a_run_changes_images(kind, request):
    run = request.getfixturevalue(kind)
    images, mask, labels = pictures(3), left_half(), np.array([1, 2, 3], np.int32)
    found = run.inpaint(images, mask, range(3), labels)
    np.testing.assert_array_equal(found[:, ~made(mask)], images[:, ~made(mask)])
    assert not np.array_equal(found, images)
    np.testing.assert_array_equal(run.inpaint(images[2], mask, [2], labels[2:]), found[2:])
    np.testing.assert_array_equal(run.image_to_image(images, range(3), labels, strength=0.0), images)
    ends = run.interpolate(3, [4, 5], labels[:1])[[0, -1]]
    np.testing.assert_array_equal(ends, run.make([4, 5], labels[[0, 0]]))


def test_a_condition_alone_is_a_request(run):
    labels = np.array([1, 2], np.int32)
    np.testing.assert_array_equal(run.make([0, 1], labels), run.make([0, 1], Request(labels)))


def test_a_vae_changes_no_images():
    task = VAETask(tiny_config(**{"task": "vae", "model.num_classes": 0}))
    with pytest.raises(ConfigError, match="only a diffusion model can do that, and this run is of task 'vae'"):
        Run(task, None, 0, ()).image_to_image(pictures(1), [0])


# Mask channels -----------------------------------------------------------------------------------------------------


def test_training_masks_differ_and_hide_what_they_cover(inpainting):
    task, x = inpainting.task, jnp.full((64, 8, 8, 1), 0.5)
    channels = np.asarray(task.masked(inpainting.params, x, jax.random.split(jax.random.key(0), 64)))
    assert channels.shape == (64, 8, 8, 2)
    np.testing.assert_array_equal(channels[..., 1], 0.5 * (1 - channels[..., 0]))
    assert len(np.unique(channels[..., 0].reshape(64, -1), axis=0)) > 30


def test_the_loss_teaches_what_the_mask_channels_mean(inpainting):
    task, params = inpainting.task, inpainting.params
    batch = {k: jnp.asarray(v[:4]) for k, v in tiny_batch(task.config).items()}
    loss = jax.jit(task.loss)(params, batch, jax.random.key(0))[0]
    turned = {k: v[::-1] for k, v in batch.items()}
    np.testing.assert_allclose(jax.jit(task.loss)(params, turned, jax.random.key(0))[0], loss, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: task.loss(p, batch, jax.random.key(0))[0]))(params)
    kernel = np.asarray(gradient["unet"]["conv_in"]["kernel"])  # of patches of 2x2 pixels of (x_t, mask, known image)
    assert kernel.shape[2] == 3 * 4 and (np.abs(kernel).max((0, 1, 3)) > 0).all()


def test_the_network_looks_at_what_is_known(inpainting):
    """In the part to be made it matters what the rest shows; without mask channels a network sees it in x_t only."""
    mask, other = left_half(), pictures(2)
    other[1, :, :4] = other[0, :, :4]
    found = inpainting.inpaint(other, mask, [0, 0], np.array([1, 1], np.int32))
    assert not np.array_equal(found[0][made(mask)], found[1][made(mask)])


# The command's flags -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Image files by name."""
    mask, image = left_half(), pictures(1)[0]
    for name, picture in {"image": image, "mask": mask, "black": mask * 0, "other": pictures(1, side=9)[0]}.items():
        save_png(tmp_path / f"{name}.png", picture)
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def asked(run, *flags):
    args = sample.parse_args(["--workdir=x", *flags])
    return what_is_asked(args, run, how_many(args))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask_image=mask.png"], "--mask_image says what of an image to make anew: give that with --init_image"),
        (["--strength=0.5"], "give that with --init_image"),
        (["--init_image=nowhere.png"], "nowhere.png: no such file or directory"),
        (["--init_image=."], "is a directory"),
        (["--init_image=text.png"], "text.png is not a PNG, JPEG, WEBP or BMP image"),
        (["--init_image=image.png", "--mask_image=text.png"], "--mask_image: .*text.png is not a PNG"),
        (["--init_image=image.png", "--mask_image=other.png"], "9x9 pixels, the image 8x8: they must be of one size"),
        (["--init_image=image.png", "--mask_image=black.png"], "black all over: nothing is to be made"),
        (["--init_image=image.png", "--strength=1.5"], "--strength 1.5 must lie from 0 .* to 1"),
        (["--init_image=image.png", "--strength=-0.1"], "--strength -0.1 must lie from 0"),
        (["--interpolate=1"], "--interpolate 1: must be at least 2"),
        (["--interpolate=4", "--init_image=image.png"], "leave out --init_image"),
        (["--interpolate=4", "--prompt=a", "--prompt=b", "--prompt=c"], "from one --prompt to another: got 3"),
        (["--interpolate=4", "--label=a,b"], "nothing lies between two of them"),
        (["--interpolate=4", "--prompt=a", "--prompt=b"], "trained without captions"),
    ],
)
def test_wrong_flags_are_one_line(run, files, monkeypatch, flags, message):
    monkeypatch.chdir(files)
    with pytest.raises(ConfigError, match=message) as caught:
        asked(run, *flags)
    assert "\n" not in str(caught.value)


def test_the_flag_at_fault_is_named(run, files, monkeypatch):
    monkeypatch.chdir(files)
    other = dataclasses.replace(run.model, image_shape=(8, 8, 2), latent_shape=(8, 8, 2))
    monkeypatch.setattr(Run, "model", other)
    with pytest.raises(ConfigError, match="^--init_image: cannot convert an image of 1 channels to 2"):
        asked(run, "--init_image=image.png", "--mask_image=mask.png")
    monkeypatch.undo()
    monkeypatch.chdir(files)
    with pytest.raises(ConfigError, match="^--mask_image: the mask is black"):
        asked(run, "--init_image=image.png", "--mask_image=black.png")


def test_interpolate_says_how_many_not_num(run, capsys):
    way = asked(run, "--interpolate=4", "--num=64", "--label=c")
    assert capsys.readouterr().err == "note: --interpolate 4 says how many images, not --num 64\n"
    np.testing.assert_array_equal(way.arrays["weights"], asked(run, "--interpolate=4", "--label=c").arrays["weights"])
    assert len(way.seeds) == 4 and capsys.readouterr().err == ""


def test_flags_become_requests(run, files, monkeypatch):
    monkeypatch.chdir(files)
    plain = asked(run, "--num=3", "--seed=5")
    np.testing.assert_array_equal(plain.seeds, [5, 6, 7])
    np.testing.assert_array_equal(plain.request, [0, 1, 2])
    edit = asked(run, "--num=2", "--label=c", "--init_image=image.png")
    np.testing.assert_array_equal(edit.request.image, np.repeat(pictures(1), 2, 0))
    assert edit.strength == 0.8 and edit.request.mask is None
    inpaint = asked(run, "--num=2", "--init_image=image.png", "--mask_image=mask.png")
    np.testing.assert_array_equal(inpaint.request.mask[1], left_half())
    assert inpaint.strength == 1
    way = asked(run, "--interpolate=3", "--label=c", "--seed=8")
    np.testing.assert_array_equal(way.seeds, [8, 8, 8])
    np.testing.assert_array_equal(way.request.blend.seed, [9, 9, 9])
    np.testing.assert_array_equal(way.request.condition, [2, 2, 2])
    np.testing.assert_array_equal(way.names, [0, 1, 2])
    np.testing.assert_array_equal(way.arrays["weights"], [0, 0.5, 1])


def test_two_prompts_keep_the_seed(run):
    config = dataclasses.replace(
        run.task.config, text=dataclasses.replace(run.task.config.text, enabled=True, context_length=16)
    )
    task = DiffusionTask(config, train_tokenizer(["a red circle", "a blue square"], 560, 16))
    way = asked(Run(task, None, 0, (), ("a red circle",)), "--interpolate=3", "--prompt=a red", "--prompt=a blue")
    np.testing.assert_array_equal(way.request.blend.seed, way.seeds)
    assert not np.array_equal(way.request.condition["tokens"], way.request.blend.condition["tokens"])
    seeds = asked(Run(task, None, 0, (), ("a red circle",)), "--interpolate=3", "--prompt=a red")
    assert seeds.request.blend.condition is None and (seeds.request.blend.seed == seeds.seeds + 1).all()
