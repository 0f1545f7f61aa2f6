"""Conversions between predictions: round trips, the definitions, EDM's published preconditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion import predictions as p
from jaxdiff.diffusion import scheduler as s

DISCRETE = s.DiscreteSchedule.from_betas(s.linear_betas(1000))
ZERO_SNR = s.DiscreteSchedule.from_betas(s.rescale_zero_terminal_snr(s.linear_betas(1000)))
FLOW, EDM = s.FlowSchedule(), s.EDMSchedule()
TIMES = {
    "discrete": (DISCRETE, jnp.array([1, 10, 400, 1000])),
    "zero_snr": (ZERO_SNR, jnp.array([1, 10, 400, 1000])),
    "flow": (FLOW, jnp.array([0.01, 0.3, 0.9, 1.0])),
    "edm": (EDM, jnp.array([0.002, 0.5, 3.0, 80.0])),
}


def close(actual, desired, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(desired), rtol=rtol, atol=atol)


def data(shape=(4, 2, 2, 3)):
    x0, noise = jax.random.normal(jax.random.key(0), (2, *shape))
    return 0.5 * x0, noise


def supported(prediction, schedule):
    try:
        p.check_prediction(prediction, schedule)
    except ValueError:
        return False
    return True


# The other pairs are refused: see test_refusals.
SUPPORTED = [
    (prediction, kind) for prediction in p.PREDICTIONS for kind in TIMES if supported(prediction, TIMES[kind][0])
]


@pytest.mark.parametrize(("prediction", "kind"), SUPPORTED)
def test_round_trip(prediction, kind):
    schedule, t = TIMES[kind]
    x0, noise = data()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = s.q_sample(schedule, x0, t, noise)
    output = p.from_x0_noise(prediction, x0, noise, alpha, sigma)
    got_x0, got_noise = jax.jit(p.to_x0_noise, static_argnums=0)(prediction, output, x_t, alpha, sigma)
    # A float32 x_t holds x0 to about 1e-7 sigma / alpha, noise to 1e-7 alpha / sigma.
    ratio = s.expand_like(sigma / jnp.maximum(alpha, 1e-3), x_t)
    assert float((jnp.abs(got_x0 - x0) / (1 + ratio)).max()) < 2e-5
    close(got_noise, noise, atol=2e-3 if kind == "edm" else 2e-4)
    again = p.from_x0_noise(prediction, got_x0, got_noise, alpha, sigma)
    close(again, output, atol=3e-3)


def test_definitions():
    x0, noise = data()
    t = TIMES["discrete"][1]
    alpha, sigma = (s.expand_like(f(t), x0) for f in (DISCRETE.alpha, DISCRETE.sigma))
    # v is minus the derivative of x_t with respect to the angle: x_t = cos(angle) x0 + sin(angle) noise.
    angle = jnp.arctan2(sigma, alpha)
    _, v = jax.jvp(lambda angle: jnp.cos(angle) * x0 + jnp.sin(angle) * noise, (angle,), (jnp.ones_like(angle),))
    close(p.from_x0_noise("v", x0, noise, DISCRETE.alpha(t), DISCRETE.sigma(t)), v)
    # velocity is the time derivative of x_t.
    t = TIMES["flow"][1]
    _, velocity = jax.jvp(lambda t: s.q_sample(FLOW, x0, t, noise), (t,), (jnp.ones_like(t),))
    close(p.from_x0_noise("velocity", x0, noise, FLOW.alpha(t), FLOW.sigma(t)), velocity)


def test_edm_preconditioning_is_karras_table_1():
    sigma_data, t = 0.6, TIMES["edm"][1]
    schedule = s.EDMSchedule(sigma_data=sigma_data)
    x0, noise = data()
    x = s.q_sample(schedule, x0, t, noise)
    seen = {}

    def network(x, time, condition):
        seen.update(x=x, time=time)
        return jnp.sin(x)

    out = p.make_denoiser(network, schedule, "edm")(x, t)
    sigma = np.asarray(t, np.float64).reshape(-1, 1, 1, 1)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    c_in = 1 / np.sqrt(sigma**2 + sigma_data**2)
    close(seen["x"], c_in * np.asarray(x, np.float64))
    close(seen["time"], np.log(np.asarray(t)) / 4)
    close(out.x0, c_skip * np.asarray(x, np.float64) + c_out * np.sin(c_in * np.asarray(x, np.float64)))
    # A network that tells x0 itself sees the same input, and its answer is taken as it is.
    out = p.make_denoiser(network, schedule, "x0")(x, t)
    close(seen["x"], c_in * np.asarray(x, np.float64))
    close(out.x0, np.sin(c_in * np.asarray(x, np.float64)))
    # The training target has unit variance at every noise level for data of variance sigma_data^2 (their eq. 16).
    x0, noise = sigma_data * 2 * x0[:1], noise[:1]
    many = jax.random.normal(jax.random.key(3), (2, 4, 50, 50, 2))
    target = p.from_x0_noise("edm", sigma_data * many[0], many[1], schedule.alpha(t), schedule.sigma(t), sigma_data)
    close(target.std((1, 2, 3)), np.ones(4), atol=0.05)


def test_edm_with_unit_data_is_minus_v():
    # On a variance-preserving schedule and data of unit variance the two agree up to sign.
    x0, noise = data()
    alpha, sigma = DISCRETE.alpha(TIMES["discrete"][1]), DISCRETE.sigma(TIMES["discrete"][1])
    close(p.from_x0_noise("edm", x0, noise, alpha, sigma, 1.0), -p.from_x0_noise("v", x0, noise, alpha, sigma))


ENDS = [(prediction, end) for prediction in p.PREDICTIONS for end in ("clean", "pure_noise")]
ENDS.remove(("noise", "pure_noise"))  # refused: see test_refusals


@pytest.mark.parametrize(("prediction", "end"), ENDS)
def test_ends_are_finite(prediction, end):
    alpha, sigma = (jnp.ones(4), jnp.zeros(4)) if end == "clean" else (jnp.zeros(4), jnp.ones(4))
    x0, noise = data()
    x_t = x0 if end == "clean" else noise

    def loss(output):
        got_x0, got_noise = p.to_x0_noise(prediction, output, x_t, alpha, sigma)
        return (got_x0**2).sum() + (got_noise**2).sum()

    output = p.from_x0_noise(prediction, x0, noise, alpha, sigma)
    assert np.isfinite(output).all() and np.isfinite(jax.grad(loss)(output)).all()
    got_x0, got_noise = p.to_x0_noise(prediction, output, x_t, alpha, sigma)
    close(got_x0, x0)
    close(got_noise, jnp.zeros_like(noise) if (prediction, end) == ("x0", "clean") else noise)


def test_refusals():
    def network(x, time, condition):
        return x

    for schedule in (ZERO_SNR, FLOW):
        with pytest.raises(ValueError, match="cannot tell x0 where alpha = 0"):
            p.make_denoiser(network, schedule, "noise")
    for schedule in (DISCRETE, EDM):
        with pytest.raises(ValueError, match="velocity"):
            p.make_denoiser(network, schedule, "velocity")
    with pytest.raises(ValueError, match="unknown prediction 'eps'"):
        p.make_denoiser(network, DISCRETE, "eps")
    with pytest.raises(ValueError, match="unknown prediction 'eps'"):
        p.to_x0_noise("eps", jnp.ones(1), jnp.ones(1), jnp.ones(()), jnp.ones(()))
    with pytest.raises(ValueError, match="learned variance needs"):
        p.make_denoiser(network, FLOW, "v", learned_variance=True)
    with pytest.raises(ValueError, match="answered 3 channels for 3"):
        p.make_denoiser(network, DISCRETE, "v", learned_variance=True)(jnp.ones((1, 2, 2, 3)), jnp.array([5]))


def test_learned_variance_of_improved_ddpm():
    def network(x, time, condition):
        return jnp.concatenate([x, jnp.full_like(x, -1), jnp.full_like(x, 1)][: 1 + condition], axis=-1)

    x, t = jnp.ones((2, 2, 2, 3)), jnp.array([5, 700])
    denoised = p.make_denoiser(network, DISCRETE, "noise", learned_variance=True)(x, t, 1)
    assert denoised.variance_fraction.shape == x.shape
    close(denoised.variance_fraction, jnp.zeros_like(x))
    assert p.make_denoiser(network, DISCRETE, "noise")(x, t, 0).variance_fraction is None
    # Output -1 is the smallest variance, beta-tilde; +1 the largest, beta (their eq. 15).
    log_beta, log_beta_tilde = jnp.log(DISCRETE.beta(t)), DISCRETE.posterior_log_variance(t)
    for o, expected in ((-1.0, log_beta_tilde), (1.0, log_beta), (0.0, (log_beta + log_beta_tilde) / 2)):
        _, fraction = p.split_variance(jnp.full(4, o), True)
        close(p.learned_log_variance(fraction, log_beta, log_beta_tilde), expected)


def test_denoiser_tells_the_network_its_time_and_condition():
    seen = {}

    def network(x, time, condition):
        seen.update(x=x, time=time, condition=condition)
        return jnp.zeros_like(x, jnp.bfloat16)

    x = jnp.ones((2, 2, 2, 1))
    out = p.make_denoiser(network, DISCRETE, "noise")(x, jnp.array([1, 1000]), {"label": jnp.array([3, 4])})
    np.testing.assert_array_equal(seen["time"], [0.0, 999.0])
    np.testing.assert_array_equal(seen["x"], x)
    np.testing.assert_array_equal(seen["condition"]["label"], [3, 4])
    assert out.x0.dtype == out.noise.dtype == jnp.float32
