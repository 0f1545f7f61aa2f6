"""Guidance and thresholding: identities at special scales, the papers' formulas in NumPy, consistent (x0, noise)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.guidance import classifier_free_guidance, clip_x0, dynamic_threshold
from jaxdiff.diffusion.predictions import Denoised, make_denoiser
from jaxdiff.diffusion.samplers import ddim
from jaxdiff.diffusion.scheduler import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    expand_like,
    linear_betas,
    rescale_zero_terminal_snr,
)

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

DISCRETE = DiscreteSchedule.from_betas(linear_betas(1000))
SCHEDULES = {"discrete": (DISCRETE, 300.0), "flow": (FlowSchedule(), 0.6), "edm": (EDMSchedule(), 1.5)}
SHAPE = (3, 4, 4, 2)
LABEL, NULL = {"label": jnp.array([0, 1, 2])}, {"label": jnp.full(3, 3)}


def network(x, time, condition):
    """Something that depends on all its arguments."""
    shift = jnp.array([0.8, -0.5, 0.3, 0.0])[condition["label"]]
    return jnp.tanh(1.5 * x + expand_like(shift + 1e-3 * time, x))


def denoiser(schedule, prediction="v"):
    return make_denoiser(network, schedule, prediction)


def x_t(seed=0):
    return 1.3 * jax.random.normal(jax.random.key(seed), SHAPE)


def consistent(denoised, schedule, x, t, atol=2e-6):
    """Check alpha x0 + sigma noise = x_t."""
    alpha, sigma = expand_like(schedule.alpha(t), x), expand_like(schedule.sigma(t), x)
    np.testing.assert_allclose(alpha * denoised.x0 + sigma * denoised.noise, x, atol=atol)


@pytest.mark.parametrize("name", SCHEDULES)
def test_special_scales(name):
    """Scale 1 is the conditional model to the bit, 0 the unconditional one, 3 goes three times as far."""
    schedule, time = SCHEDULES[name]
    denoise, x, t = denoiser(schedule), x_t(), jnp.full(3, time)
    conditional, unconditional = denoise(x, t, LABEL), denoise(x, t, NULL)

    def guided(scale):
        denoised = classifier_free_guidance(denoise, LABEL, NULL, scale)(x, t)
        consistent(denoised, schedule, x, t, atol=1e-5)
        return denoised

    for field in ("x0", "noise"):
        on, off = getattr(conditional, field), getattr(unconditional, field)
        assert np.abs(on - off).max() > 0.1
        np.testing.assert_array_equal(getattr(guided(1.0), field), on)
        np.testing.assert_allclose(getattr(guided(0.0), field), off, atol=1e-6)
        np.testing.assert_allclose(getattr(guided(3.0), field), off + 3 * (on - off), atol=1e-5)
        each = getattr(guided(jnp.array([1.0, 0.0, 3.0])), field)
        np.testing.assert_allclose(each, jnp.stack([on[0], off[1], (off + 3 * (on - off))[2]]), atol=1e-5)


def test_one_call_on_the_doubled_batch():
    """The network runs once, on 2 b images; learned variance stays the conditional one."""
    batches = []

    def denoise(x, t, condition=None):
        batches.append(x.shape[0])
        return Denoised(x, x, expand_like(condition["label"], x) + 0 * x)

    guided = classifier_free_guidance(denoise, LABEL, NULL, 4.0)(x_t(), jnp.full(3, 5.0))
    assert batches == [6]
    np.testing.assert_array_equal(guided.variance_fraction[:, 0, 0, 0], [0, 1, 2])


def test_interval_guides_inside_only():
    """(low, high]: outside, images get the conditional model to the bit; inside, full guidance, image by image."""
    denoise, x = denoiser(DISCRETE), x_t()
    t = jnp.array([200.0, 201.0, 600.0])
    plain = denoise(x, t, LABEL)
    whole = classifier_free_guidance(denoise, LABEL, NULL, 3.0)(x, t)
    limited = classifier_free_guidance(denoise, LABEL, NULL, 3.0, interval=(200.0, 600.0))(x, t)
    for field in ("x0", "noise"):
        expected = jnp.concatenate([getattr(plain, field)[:1], getattr(whole, field)[1:]])
        np.testing.assert_allclose(getattr(limited, field), expected, atol=1e-6)
        assert np.abs(getattr(plain, field) - getattr(whole, field))[1:].max() > 0.1
    outside = classifier_free_guidance(denoise, LABEL, NULL, 3.0, interval=(600.0, 900.0))(x, t)
    np.testing.assert_allclose(outside.x0, plain.x0, atol=1e-6)


def test_outside_the_interval_the_batch_is_not_doubled():
    """Sampling pays for the second half only where it guides."""
    sizes = []
    exact = denoiser(DISCRETE)

    def denoise(x, t, condition=None):
        jax.debug.callback(lambda t: sizes.append(len(t)), t)
        return exact(x, t, condition)

    guided = classifier_free_guidance(denoise, LABEL, NULL, 3.0, interval=(100.0, 500.0))
    timesteps = np.array([1000.0, 700.0, 500.0, 200.0, 100.0, 0.0])
    jit(lambda x: ddim(guided, DISCRETE, x, timesteps, None))(x_t()).block_until_ready()
    jax.effects_barrier()
    assert sorted(sizes) == [3, 3, 3, 6, 6]


@pytest.mark.parametrize(
    ("name", "prediction"), [("discrete", "noise"), ("discrete", "v"), ("discrete", "x0"), ("flow", "velocity")]
)
def test_rescale_restores_the_standard_deviation(name, prediction):
    """Lin et al. 2024, eq. 14 to 16 in NumPy on the network's output; rescale = 1 restores each image's std."""
    schedule, time = SCHEDULES[name]
    x, t = x_t(), jnp.full(3, time)
    told = schedule.network_time(t)
    pos, neg = (np.asarray(network(x, told, c), np.float64) for c in (LABEL, NULL))
    cfg = neg + 4 * (pos - neg)
    axes = (1, 2, 3)
    rescaled = cfg * pos.std(axes, keepdims=True) / cfg.std(axes, keepdims=True)
    assert np.abs(cfg.std(axes) / pos.std(axes) - 1).min() > 0.02
    for rescale in (1.0, 0.7, jnp.float32(0.0)):
        guided = classifier_free_guidance(
            denoiser(schedule, prediction), LABEL, NULL, 4.0, rescale=rescale, schedule=schedule, prediction=prediction
        )(x, t)
        consistent(guided, schedule, x, t, atol=1e-5)
        alpha, sigma = float(schedule.alpha(time)), float(schedule.sigma(time))
        output = {
            "noise": guided.noise,
            "x0": guided.x0,
            "v": alpha * guided.noise - sigma * guided.x0,
            "velocity": guided.noise - guided.x0,
        }[prediction]
        np.testing.assert_allclose(output, rescale * rescaled + (1 - rescale) * cfg, atol=1e-5)


def test_rescale_at_zero_terminal_snr():
    """At alpha = 0 with prediction v nothing is divided by alpha."""
    schedule = DiscreteSchedule.from_betas(rescale_zero_terminal_snr(linear_betas(1000)))
    x, t = x_t(), jnp.full(3, 1000.0)
    guided = classifier_free_guidance(
        denoiser(schedule), LABEL, NULL, 4.0, rescale=0.7, schedule=schedule, prediction="v"
    )(x, t)
    assert np.all(np.isfinite(guided.x0))
    consistent(guided, schedule, x, t)


def test_guidance_settings_do_not_recompile():
    """Scale, interval ends and rescale are traced: one trace, other images."""
    traces = []

    @jit
    def sample(x, scale, interval, rescale):
        traces.append(1)
        guided = classifier_free_guidance(
            denoiser(DISCRETE), LABEL, NULL, scale, interval, rescale, schedule=DISCRETE, prediction="v"
        )
        return ddim(guided, DISCRETE, x, np.array([1000.0, 600.0, 300.0, 0.0]), None)

    settings = [(1.0, (0, 1000), 0.0), (3.0, (0, 1000), 0.0), (3.0, (0, 600), 0.0), (3.0, (0, 1000), 0.7)]
    images = [np.asarray(sample(x_t(), *setting)) for setting in settings]
    assert len(traces) == 1
    for i in range(1, 4):
        assert np.abs(images[0] - images[i]).max() > 1e-2
        assert np.abs(images[i] - images[i % 3 + 1]).max() > 1e-2


@pytest.mark.parametrize("name", SCHEDULES)
def test_clip_keeps_x_t(name):
    """x0 within [-1, 1], alpha x0 + sigma noise = x_t; pixels that were inside keep their noise to the bit."""
    schedule, time = SCHEDULES[name]
    denoise = denoiser(schedule)
    x, t = 2 * x_t(), jnp.full(3, time)
    plain, clipped = denoise(x, t, LABEL), clip_x0(denoise, schedule)(x, t, LABEL)
    inside = np.abs(plain.x0) <= 1
    assert 0 < inside.mean() < 1
    np.testing.assert_array_equal(clipped.x0, np.clip(plain.x0, -1, 1))
    np.testing.assert_array_equal(clipped.noise[inside], plain.noise[inside])
    assert np.all(clipped.noise[~inside] != plain.noise[~inside])
    consistent(clipped, schedule, x, t, atol=1e-5)


def test_clip_at_sigma_zero_is_finite():
    x, t = 2 * x_t(), jnp.zeros(3)
    clipped = clip_x0(denoiser(FlowSchedule(), "velocity"), FlowSchedule())(x, t, LABEL)
    assert np.all(np.isfinite(clipped.noise)) and np.abs(clipped.x0).max() <= 1


def test_dynamic_threshold_is_imagens():
    """Each image by its own quantile, never below 1; an image inside [-1, 1] is left alone."""
    x = x_t() * jnp.array([3.0, 1.5, 0.05]).reshape(3, 1, 1, 1)
    t = jnp.full(3, 200.0)

    def denoise(x, t, condition=None):
        alpha, sigma = expand_like(DISCRETE.alpha(t), x), expand_like(DISCRETE.sigma(t), x)
        return Denoised(x, (x - alpha * x) / sigma)

    thresholded = dynamic_threshold(denoise, DISCRETE, 0.9)(x, t)
    for i in range(3):
        s = max(1.0, float(np.quantile(np.abs(np.asarray(x[i], np.float64)), 0.9)))
        np.testing.assert_allclose(thresholded.x0[i], np.clip(x[i], -s, s) / s, atol=1e-6)
    np.testing.assert_array_equal(thresholded.x0[2], x[2])
    assert np.abs(thresholded.x0).max() <= 1
    consistent(thresholded, DISCRETE, x, t, atol=1e-5)


def test_wrappers_nest():
    """Clipping after guidance keeps the guided x0 in range; clipping before does not."""
    x, t = x_t(), jnp.full(3, 300.0)
    denoise = denoiser(DISCRETE)
    outer = clip_x0(classifier_free_guidance(denoise, LABEL, NULL, 8.0), DISCRETE)(x, t)
    inner = classifier_free_guidance(clip_x0(denoise, DISCRETE), LABEL, NULL, 8.0)(x, t)
    assert np.abs(outer.x0).max() <= 1 < np.abs(inner.x0).max()
    consistent(outer, DISCRETE, x, t, atol=1e-5)
    consistent(inner, DISCRETE, x, t, atol=1e-5)


def test_mistakes_are_named():
    denoise = denoiser(DISCRETE)
    with pytest.raises(ValueError, match="pass schedule= and prediction="):
        classifier_free_guidance(denoise, LABEL, NULL, 2.0, rescale=0.5)
    with pytest.raises(ValueError, match="same shapes"):
        classifier_free_guidance(denoise, LABEL, {"label": jnp.zeros(1, int)}, 2.0)
    with pytest.raises(ValueError, match="bound its condition"):
        classifier_free_guidance(denoise, LABEL, NULL, 2.0)(x_t(), jnp.full(3, 5.0), LABEL)
