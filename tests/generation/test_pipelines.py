"""Text to image, image to image, inpainting and interpolation against the exact denoiser of Gaussian pixels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxdiff
from jaxdiff import image_to_image, inpaint, interpolate, text_to_image
from jaxdiff.diffusion.samplers import SAMPLERS, initial_noise
from jaxdiff.diffusion.timesteps import make_timesteps
from jaxdiff.generation.generate import from_uint8, make_generator
from jaxdiff.generation.image_model import Known, Request
from jaxdiff.generation.pipelines import edit_request
from jaxdiff.generation.sampling import first_step, make_knobs, make_sample
from tests.generation.gaussian_model import (
    MEAN,
    SCHEDULE,
    SIDE,
    STD,
    GaussianPipeline,
    Letters,
    gaussian_model,
    left_half,
    pictures,
)


@pytest.fixture(scope="module")
def pixels():
    return GaussianPipeline()


@pytest.fixture(scope="module")
def reader():
    return GaussianPipeline(tokenizer=Letters())


def pooled(params, x, keys):
    """A first stage: the mean of 2x2 pixels."""
    return x.reshape(len(x), SIDE // 2, 2, SIDE // 2, 2, -1).mean((2, 4))


def spread(params, latents):
    return jnp.repeat(jnp.repeat(latents, 2, 1), 2, 2)


@pytest.fixture(scope="module")
def latent():
    return GaussianPipeline(gaussian_model(latent_shape=(SIDE // 2, SIDE // 2, 1), encode=pooled, decode=spread))


# Where sampling begins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "strength", "start"), [(50, 0.6, 20), (50, 1.0, 0), (50, 0.8, 10), (10, 0.05, 10), (7, 0.5, 4), (9, 0, 9)]
)
def test_strength_counts_steps_as_diffusers_does(steps, strength, start):
    assert first_step(steps, strength) == start


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan")])
def test_strength_outside_its_range_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength .* must lie from 0 .* to 1"):
        first_step(10, strength)


def test_no_step_returns_the_image(pixels):
    images = pictures(3)
    np.testing.assert_array_equal(image_to_image(pixels, None, images, [0, 1, 2], strength=0.0), images)


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_image_to_image_is_the_closed_form(strength):
    """With d = x_t - alpha mean every step of DDIM multiplies d; the factors' product is near the probability flow's.

    The flow takes x_t to mean + std d / sqrt(alpha^2 std^2 + sigma^2).
    """
    model, settings = gaussian_model(), dataclasses.replace(GaussianPipeline().settings, steps=100)
    keys, images = jax.vmap(jax.random.key)(np.arange(4)), pictures(4)
    found = make_sample(model, settings, False)(
        np.float32(0), keys, Request(image=images), make_knobs(SCHEDULE, settings, strength)
    )
    times = make_timesteps(SCHEDULE, 100, settings.spacing)[first_step(100, strength) :]
    alpha, sigma = (np.asarray(f(times), np.float64) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    variance = alpha**2 * STD**2 + sigma**2
    factor = np.prod((alpha[1:] * alpha[:-1] * STD**2 + sigma[1:] * sigma[:-1]) / variance[:-1])
    assert factor == pytest.approx(STD / np.sqrt(variance[0]), rel=0.06)
    x_t = alpha[0] * from_uint8(images) + sigma[0] * initial_noise(SCHEDULE, keys, (4, SIDE, SIDE, 1))
    np.testing.assert_allclose(found, MEAN + factor * (x_t - alpha[0] * MEAN), atol=1e-4)


def test_strength_guidance_and_seeds_do_not_recompile():
    traces, settings = [], GaussianPipeline().settings
    sample = make_sample(gaussian_model(), settings, True)

    def counted(*args):
        traces.append(1)
        return sample(*args)

    generate = make_generator(counted, Mesh(np.array(jax.devices()[:1]), ("data",)), 2)
    images, labels, results = pictures(2), np.array([1, 2], np.int32), []
    for strength, guidance, seed in [(0.5, 2, 0), (1.0, 2, 0), (0.5, 3, 0), (0.5, 2, 5)]:
        knobs = make_knobs(SCHEDULE, dataclasses.replace(settings, guidance=guidance), strength)
        results.append(next(generate(np.float32(0), np.arange(seed, seed + 2), Request(labels, images), knobs)))
    assert len(traces) == 1
    assert all(not np.array_equal(results[0], other) for other in results[1:])


def test_the_same_settings_compile_once():
    model, settings = gaussian_model(), GaussianPipeline().settings
    changed = dataclasses.replace(settings, guidance=7.0, eta=0.5, guidance_rescale=0.0, batch_per_device=4)
    assert make_sample(model, settings, True) is make_sample(model, changed, True)
    for other in ({"steps": 11}, {"sampler": "heun"}, {"guidance_rescale": 0.5}, {"guidance_end": 0.9}):
        assert make_sample(model, settings, True) is not make_sample(
            model, dataclasses.replace(settings, **other), True
        )


# Inpainting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_pixels_come_back_exactly(pixels, sampler, strength):
    """Without pasting: putting them back after each step is enough for a pixel model."""
    images, mask = pictures(2), left_half()
    found = inpaint(pixels, None, images, mask, [0, 1], strength=strength, paste=False, sampler=sampler)
    kept = mask[..., 0] == 0
    np.testing.assert_array_equal(found[:, kept], images[:, kept])
    assert (found[:, ~kept] != images[:, ~kept]).mean() > 0.9


def test_independent_pixels_are_made_as_if_nothing_were_known(pixels):
    """The exact denoiser sees no neighbours: what is made anew is what the same seed makes from nothing."""
    mask = left_half()
    found = inpaint(pixels, None, pictures(1)[0], mask, [7], sampler="ddpm")
    plain = text_to_image(pixels, None, [7], sampler="ddpm")
    made = mask[..., 0] > 0
    np.testing.assert_array_equal(found[:, made], plain[:, made])


def test_what_is_known_is_at_every_step_noised_to_its_time(pixels):
    """A denoiser that reads the known half: it must find alpha x0 + sigma noise of the very noise that x_T is."""
    seen, images, keys = [], pictures(1), jax.vmap(jax.random.key)(np.arange(1))
    settings = dataclasses.replace(pixels.settings, steps=5)

    def network(params, x, time, condition):
        seen.append((float(time[0]) + 1, np.asarray(x)))
        return jnp.zeros_like(x)

    model = gaussian_model(network=network)
    request, knobs = Request(image=images, mask=left_half()[None]), make_knobs(SCHEDULE, settings, 0.6)
    with jax.disable_jit():
        make_sample(model, settings, False)(np.float32(0), keys, request, knobs)
    assert [t for t, _ in seen] == list(make_timesteps(SCHEDULE, 5, settings.spacing)[2:5])
    noise = initial_noise(SCHEDULE, keys, images.shape)
    for t, x in seen:
        expected = SCHEDULE.alpha(t) * from_uint8(images) + SCHEDULE.sigma(t) * noise
        np.testing.assert_allclose(x[:, :, SIDE // 2 :], expected[:, :, SIDE // 2 :], atol=1e-6)


def test_latents_are_kept_where_their_first_pixel_is(latent):
    images, mask = pictures(1), np.zeros((SIDE, SIDE, 1), np.uint8)
    mask[1:, 1:] = 255  # the first row and column of latents are known, though most of their pixels are not
    found = inpaint(latent, None, images, mask, [0], paste=False)
    expected = np.asarray(spread(None, pooled(None, from_uint8(images), None)))
    known = np.abs(from_uint8(found) - expected).max((0, -1)) <= 1 / 255 + 1e-6
    assert known[:2].all() and known[:, :2].all() and not known[2:, 2:].all()


@pytest.mark.parametrize("kind", ["put back", "channels"])
def test_a_mask_that_no_latent_would_see_is_refused(latent, kind):
    """As diffusers does it, by the first pixel: all would be kept, and nobody told."""
    pipeline = dataclasses.replace(latent, model=dataclasses.replace(latent.model, mask_channels=kind == "channels"))
    images, masks = pictures(2), np.zeros((2, SIDE, SIDE, 1), np.uint8)
    masks[:, :, 3] = 255  # the second column of its blocks
    assert edit_request(GaussianPipeline(), None, images, masks, [0, 1]).mask.any(), "pixels are all seen"
    with pytest.raises(ValueError, match="too thin for this model: of every 2x2 pixels the upper left one"):
        edit_request(pipeline, None, images, masks, [0, 1])
    masks[0, 4, 4] = 255
    with pytest.raises(ValueError, match="too thin"):  # the other still is
        edit_request(pipeline, None, images, masks, [0, 1])
    masks[1, 4, 4] = 255
    np.testing.assert_array_equal(edit_request(pipeline, None, images, masks, [0, 1]).mask, masks)


def test_pasting_keeps_pixels_behind_a_first_stage(latent):
    images, mask = pictures(2), left_half()
    found, raw = (inpaint(latent, None, images, mask, [0, 1], paste=paste) for paste in (True, False))
    kept = mask[..., 0] == 0
    np.testing.assert_array_equal(found[:, kept], images[:, kept])
    np.testing.assert_array_equal(found[:, ~kept], raw[:, ~kept])
    assert not np.array_equal(raw[:, kept], images[:, kept])


def test_nothing_of_what_the_mask_covers_shines_through(pixels):
    a, b = pictures(1, seed=0), pictures(1, seed=1)
    b[:, :, SIDE // 2 :] = a[:, :, SIDE // 2 :]
    mask = left_half()
    np.testing.assert_array_equal(inpaint(pixels, None, a, mask, [0]), inpaint(pixels, None, b, mask, [0]))
    near = [inpaint(pixels, None, images, mask, [0], strength=0.5) for images in (a, b)]
    assert not np.array_equal(*near), "with strength below 1 it is begun from what is there"


@pytest.mark.parametrize("guided", [False, True])
def test_mask_channels_show_the_network_mask_and_known_image(guided):
    def network(params, x, time, condition):
        assert isinstance(condition, Known) and condition.channels.shape == (*x.shape[:3], 2)
        mask, known = condition.channels[..., :1], condition.channels[..., 1:]
        return known + 0.5 * mask

    pipeline = GaussianPipeline(gaussian_model(network=network, mask_channels=True))
    images, mask, labels = pictures(2), left_half(), np.array([1, 2]) if guided else None
    found = inpaint(pipeline, labels, images, mask, [0, 1], paste=False, guidance=2.0)
    made = mask[..., 0] > 0
    np.testing.assert_array_equal(found[:, ~made], images[:, ~made])
    np.testing.assert_array_equal(found[:, made], 191)
    np.testing.assert_array_equal(text_to_image(pipeline, labels, [0, 1]), 191)


# Interpolation -----------------------------------------------------------------------------------------------------


def test_ends_of_an_interpolation_are_the_plain_images(pixels, reader):
    between = interpolate(pixels, None, [4, 5], 4)
    np.testing.assert_array_equal(between[[0, -1]], text_to_image(pixels, None, [4, 5]))
    assert len(np.unique(between.reshape(4, -1), axis=0)) == 4
    prompts = ["", "abcd"]
    between = interpolate(reader, prompts, [3], 5, guidance=2.0)
    np.testing.assert_array_equal(between[[0, -1]], text_to_image(reader, prompts, [3, 3], guidance=2.0))
    brightness = between.mean((1, 2, 3))
    assert (np.diff(brightness) > 0).all()


def test_one_key_and_two_prompts(reader):
    key = jax.random.key(9)
    np.testing.assert_array_equal(interpolate(reader, ["a", "abc"], key, 2)[0], text_to_image(reader, "a", key)[0])


@pytest.mark.parametrize(
    ("prompts", "key", "num", "message"),
    [
        (None, [0, 1], 1, "at least 2"),
        (None, [0], 3, "two seeds or two prompts"),
        (None, [0, 1, 2], 3, "two seeds or two prompts"),
        (np.array([1, 2]), [0], 3, "between two labels there is nothing"),
    ],
)
def test_interpolations_that_make_no_sense(pixels, prompts, key, num, message):
    with pytest.raises(ValueError, match=message):
        interpolate(pixels, prompts, key, num)


# Keys, devices, requests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "batch"), [(1, 1), (1, 3), (8, 2)])
def test_an_edited_image_depends_on_its_own_seed_alone(pixels, devices, batch):
    images, mask = pictures(5), left_half()
    pipeline = dataclasses.replace(pixels, settings=dataclasses.replace(pixels.settings, batch_per_device=batch))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    for sampler in ("ddim", "ddpm"):
        found = inpaint(pipeline, None, images, mask, range(5), strength=0.7, sampler=sampler, mesh=mesh)
        alone = inpaint(pixels, None, images[3], mask, [3], strength=0.7, sampler=sampler)
        np.testing.assert_array_equal(found[3], alone[0])


def test_a_key_a_key_each_and_seeds(pixels):
    key = jax.random.key(3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(3))
    labels = np.array([1, 2, 3])
    together = text_to_image(pixels, labels, key)
    np.testing.assert_array_equal(together, text_to_image(pixels, labels, keys))
    np.testing.assert_array_equal(together[1:], text_to_image(pixels, labels[1:], keys[1:]))
    seeds = jax.vmap(jax.random.key)(jnp.arange(3))
    np.testing.assert_array_equal(text_to_image(pixels, None, range(3)), text_to_image(pixels, None, seeds))


def test_guidance_leads_away_from_the_negative_prompt(reader):
    """Gaussians of one width: guidance moves the mean to negative + scale (prompt - negative), in tenths of letters."""
    found = [
        text_to_image(reader, ["abc"], [0], steps=100, guidance=scale, negative=negative).astype(int)
        for scale, negative in [(1.0, ""), (1.0, "ab"), (2.0, ""), (2.0, "ab")]
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[2].mean() - found[0].mean()) / 127.5 == pytest.approx(0.3, abs=0.05)
    assert (found[3].mean() - found[0].mean()) / 127.5 == pytest.approx(0.1, abs=0.05)


def test_images_of_another_size_are_scaled_and_cropped(pixels):
    large = np.full((20, 40, 3), 100, np.uint8)
    found = image_to_image(pixels, None, large, [0, 1], strength=0)
    np.testing.assert_array_equal(found, np.full((2, SIDE, SIDE, 1), 100))
    white = np.ones((20, 40), bool)
    assert inpaint(pixels, None, large, white, [0]).shape == (1, SIDE, SIDE, 1)


def test_wrong_requests_are_named(pixels, reader):
    image, key = pictures(1)[0], jax.random.key(0)
    for call, message in [
        (lambda: text_to_image(pixels, ["a cat"], key), "trained without captions"),
        (lambda: text_to_image(reader, [], key), "no prompt was given"),
        (lambda: text_to_image(reader, np.array([1]), key), "must be strings"),
        (lambda: text_to_image(pixels, np.array([1, 2]), [0]), "1 seeds or keys for 2 images"),
        (lambda: text_to_image(pixels, None, key, sampler="eular"), "unknown sampler 'eular': use one of ddpm"),
        (lambda: image_to_image(pixels, None, image / 255, key), "must be uint8"),
        (lambda: image_to_image(pixels, None, [image, image], [0, 1, 2]), "2 images for 3 results"),
        (lambda: inpaint(pixels, None, image, np.zeros((SIDE, SIDE), bool), key), "black all over"),
        (lambda: inpaint(pixels, None, image, np.ones((4, 6), bool), key), "6x4 pixels, the image 8x8"),
        (lambda: image_to_image(pixels, None, image, key, strength=2), "strength 2 must lie from 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_functions_are_the_packages():
    assert jaxdiff.text_to_image is text_to_image
