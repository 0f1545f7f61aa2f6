"""Diffusion losses: weightings against their papers, and minima at the optimal predictor of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import losses
from jaxdiff.diffusion import likelihood as lik
from jaxdiff.diffusion import predictions as p
from jaxdiff.diffusion import scheduler as s

MEAN, STD = 0.1, 0.3
DISCRETE = s.DiscreteSchedule.from_betas(s.linear_betas(20, 0.01, 0.4))
ZERO_SNR = s.DiscreteSchedule.from_betas(s.rescale_zero_terminal_snr(s.linear_betas(20, 0.01, 0.4)))
FLOW, EDM = s.FlowSchedule(), s.EDMSchedule()
CASES = [
    ("noise", DISCRETE), ("x0", DISCRETE), ("v", DISCRETE), ("edm", DISCRETE), ("v", ZERO_SNR), ("x0", ZERO_SNR),
    ("velocity", FLOW), ("v", FLOW), ("x0", FLOW), ("edm", EDM), ("noise", EDM), ("edm", FLOW),
]  # fmt: skip
IDS = [f"{prediction}-{type(schedule).__name__}-{i}" for i, (prediction, schedule) in enumerate(CASES)]


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(desired), rtol=rtol, atol=atol)


def test_the_weighted_mean_is_that_of_the_examples_that_count():
    """Of a batch as a whole, and as the mean of what two devices find, of which one has nothing that counts."""
    values = jnp.asarray([[1.0, 3.0], [4.0, 6.0], [100.0, 100.0], [7.0, 7.0]])
    weight = jnp.asarray([2.0, 2.0, 0.0, 0.0])
    close(losses.batch_mean(values, weight), values[:2].mean())
    halves = [losses.batch_mean(values[part], weight[part]) for part in (slice(0, 2), slice(2, 4))]
    close(sum(halves) / 2, values[:2].mean())
    close(losses.batch_mean(values), values.mean())


def gaussian_images(count, seed=0):
    return MEAN + STD * jax.random.normal(jax.random.key(seed), (count, 1, 2, 1))


def optimal_network(schedule, prediction, params, learned_variance=False):
    """The network whose x0 is E[x0 | x_t], with params (0, 0); else x0 is off by a gain, an offset, a variance."""

    def network(x, time, condition):
        t = time + 1 if isinstance(schedule, s.DiscreteSchedule) else time / 1000
        t = t.astype(jnp.int32) if isinstance(schedule, s.DiscreteSchedule) else t
        t = jnp.exp(4 * time) if isinstance(schedule, s.EDMSchedule) else t
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_t = x / s.expand_like(losses.input_scale(prediction, schedule, alpha, sigma, 0.5), x)
        a, b = s.expand_like(alpha, x), s.expand_like(sigma, x)
        centred = (x_t - a * MEAN) / ((a * STD) ** 2 + b**2)
        x0 = MEAN + a * STD**2 * centred
        output = p.from_x0_noise(prediction, x0, b * centred, alpha, sigma)
        # Errors of x0 that keep x_t: d x0 = b e, d noise = -a e.
        error = params[0] * centred + params[1]
        output += p.from_x0_noise(prediction, b * error, -a * error, alpha, sigma)
        if not learned_variance:
            return output
        uncertainty = (STD * b) ** 2 / ((a * STD) ** 2 + b**2)
        row = s.expand_like(t, x)
        exact = (
            jnp.asarray(schedule.posterior_variance_table)[row]
            + jnp.asarray(schedule.posterior_x0_table)[row] ** 2 * uncertainty
        )
        small, large = schedule.posterior_log_variance(row), jnp.log(schedule.beta(row))
        fraction = jnp.broadcast_to((jnp.log(exact) - small) / (large - small + 1e-9), x.shape)
        return jnp.concatenate([output, 2 * fraction - 1 + params[2]], axis=-1)

    return network


def gradients(prediction, schedule, loss, *points, learned_variance=False, count=4096):
    """At each point (values of params): mean over images of the loss's gradient, and its standard error."""
    x0, keys = gaussian_images(count), jax.random.split(jax.random.key(1), count)

    @jax.jit
    @jax.jacfwd
    def jacobian(params):
        network = optimal_network(schedule, prediction, params, learned_variance)
        return losses.diffusion_loss(
            network, schedule, x0, None, keys, prediction=prediction, loss=loss, learned_variance=learned_variance
        )[0]

    per_image = [np.asarray(jacobian(jnp.array(params)), np.float64) for params in points]
    return [(values.mean(0), values.std(0) / np.sqrt(count)) for values in per_image]


# Weightings


@pytest.mark.parametrize(("prediction", "schedule"), CASES, ids=IDS)
def test_weights_of_x0s_error(prediction, schedule):
    # Whatever is predicted, the plain loss is x0_weight * mse(x0), the min-SNR one min(SNR, gamma) * mse(x0).
    x0, noise, error = jax.random.normal(jax.random.key(0), (3, 5, 2, 2, 1))
    fractions = jnp.array([0.05, 0.3, 0.6, 0.8, 0.95])
    t = fractions * (schedule.t_max if schedule is not EDM else 3.0)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = s.q_sample(schedule, x0, t, noise)
    target = p.from_x0_noise(prediction, x0, noise, alpha, sigma)
    guess, _ = p.to_x0_noise(prediction, target + 0.3 * error, x_t, alpha, sigma)
    plain = losses.squared_error(target + 0.3 * error, target)
    of_x0 = losses.squared_error(guess, x0)
    close(plain, losses.x0_weight(prediction, alpha, sigma) * of_x0, rtol=1e-3)
    weighted = plain * losses.min_snr_weight(prediction, alpha, sigma, gamma=5.0)
    close(weighted, jnp.minimum((alpha / sigma) ** 2, 5.0) * of_x0, rtol=1e-3)


def test_min_snr_is_the_papers_for_every_snr():
    snr = np.array([1e-4, 0.5, 4.9, 5.1, 300.0])
    alpha, sigma = jnp.asarray(np.sqrt([snr / (1 + snr), 1 / (1 + snr)]), jnp.float32)
    close(losses.min_snr_weight("noise", alpha, sigma), np.minimum(snr, 5) / snr)
    close(losses.min_snr_weight("x0", alpha, sigma, floor=1.0), np.clip(snr, 1, 5))
    close(losses.min_snr_weight("v", alpha, sigma, floor=1.0), np.clip(snr, 1, 5) / (snr + 1))
    close(losses.min_snr_weight("x0", alpha, sigma), np.minimum(snr, 5))
    close(losses.min_snr_weight("v", alpha, sigma), np.minimum(snr, 5) / (snr + 1))
    for prediction in p.PREDICTIONS:
        ends = losses.min_snr_weight(prediction, jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]))
        assert np.isfinite(ends).all()


def test_edm_weight_is_karras_lambda():
    sigma, sigma_data = jnp.array([0.01, 0.5, 10.0]), 0.7
    expected = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    close(losses.x0_weight("edm", jnp.ones(3), sigma, sigma_data), expected)


def test_noise_mse_is_l_simple():
    noise, guess = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2))
    close(losses.noise_mse(jnp.asarray(guess), jnp.asarray(noise)), ((noise - guess) ** 2).reshape(3, -1).mean(1))


# The loss


@pytest.mark.parametrize(("prediction", "schedule"), CASES, ids=IDS)
def test_minimum_is_the_optimal_predictor(prediction, schedule):
    loss = "min_snr" if schedule is FLOW else "simple"
    (mean, error), off = gradients(prediction, schedule, loss, (0.0, 0.0), (0.3, -0.3))
    assert (np.abs(mean) < 4 * error).all()
    mean, error = off
    assert (mean * [1, -1] > 8 * error).all()


def test_minimum_of_the_bound_and_of_the_hybrid():
    best, off = (0.0, 0.0, 0.0), (0.3, -0.3, 2.0)
    vlb, hybrid = (gradients("noise", DISCRETE, loss, best, off, learned_variance=True) for loss in ("vlb", "hybrid"))
    for (mean, error), (mean_off, error_off) in (vlb, hybrid):
        assert (np.abs(mean) < 4 * error + 1e-6).all()
        assert (np.abs(mean_off) > 6 * error_off).all()
    # In the hybrid the bound trains the variance alone: the mean's gradient is L_simple's.
    ((simple, _),) = gradients("noise", DISCRETE, "simple", off[:2])
    vlb, hybrid = vlb[1][0], hybrid[1][0]
    close(hybrid[:2], simple, rtol=1e-4)
    assert np.abs(vlb[:2] * losses.HYBRID_WEIGHT).max() > 1e-3 * np.abs(simple).max()


def test_bound_is_estimated_without_bias():
    # The training loss draws one term of the bound; its mean over draws is the sum of all terms.
    count, network = 8000, optimal_network(DISCRETE, "v", (0.1, 0.1, 0.2), True)
    x0, keys = jnp.tile(gaussian_images(1), (count, 1, 1, 1)), jax.random.split(jax.random.key(0), count)
    settings = {"prediction": "v", "loss": "vlb", "learned_variance": True}
    run = jax.jit(lambda x0, keys: losses.diffusion_loss(network, DISCRETE, x0, None, keys, **settings))
    _, metrics = run(x0, keys)
    denoise = p.make_denoiser(network, DISCRETE, "v", learned_variance=True)
    full = losses.elbo(denoise, DISCRETE, x0[:2000], jax.random.key(1), "learned")
    by_level = [np.asarray(metrics["vlb"])[np.asarray(metrics["t"]) == t] for t in range(1, 21)]
    drawn = np.mean([values.mean() for values in by_level])
    variance = np.mean([values.var() / len(values) for values in by_level]) / 20 + float(full.var()) / 2000
    assert abs(drawn - float(full.mean())) < 4 * np.sqrt(variance)
    assert np.sqrt(variance) < 0.02 * drawn


def test_flow_and_noise_losses_are_their_definitions():
    x0, keys = gaussian_images(3), jax.random.split(jax.random.key(0), 3)
    seen = {}

    def network(x, time, condition):
        seen.update(x=x, time=time, condition=condition)
        return jnp.sin(x)

    loss, metrics = losses.diffusion_loss(network, FLOW, x0, jnp.arange(3), keys, prediction="velocity")
    t = np.asarray(metrics["t"]).reshape(-1, 1, 1, 1)
    noise = (np.asarray(seen["x"]) - (1 - t) * np.asarray(x0)) / t
    close(loss, ((np.sin(np.asarray(seen["x"])) - (noise - np.asarray(x0))) ** 2).mean((1, 2, 3)), rtol=1e-4)
    close(seen["time"], 1000 * metrics["t"])
    np.testing.assert_array_equal(seen["condition"], [0, 1, 2])
    loss, metrics = losses.diffusion_loss(network, DISCRETE, x0, None, keys, prediction="noise")
    t = metrics["t"].astype(jnp.int32)
    alpha, sigma = (np.asarray(f(t)).reshape(-1, 1, 1, 1) for f in (DISCRETE.alpha, DISCRETE.sigma))
    noise = (np.asarray(seen["x"]) - alpha * np.asarray(x0)) / sigma
    close(loss, losses.noise_mse(jnp.sin(seen["x"]), jnp.asarray(noise)), rtol=1e-4)
    close(seen["time"], metrics["t"] - 1)


def test_an_images_loss_depends_on_its_own_key_only():
    x0, keys = jnp.tile(gaussian_images(1), (6, 1, 1, 1)), jax.random.split(jax.random.key(3), 6)
    network = optimal_network(DISCRETE, "noise", (0.3, 0.1))
    run = jax.jit(lambda x0, keys: losses.diffusion_loss(network, DISCRETE, x0, None, keys, prediction="noise"))
    whole, metrics = run(x0, keys)
    part, _ = run(x0[4:], keys[4:])
    close(part, whole[4:])
    assert len(set(np.asarray(whole).tolist())) == 6  # the same image with another key: another time, another noise
    assert all(value.shape == (6,) and value.dtype == jnp.float32 for value in metrics.values())


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_finite_at_both_ends_of_the_schedule(loss):
    # T = 2 with zero terminal SNR: every draw is the first or the last noise level. A bf16 network, a float32 loss.
    schedule = s.DiscreteSchedule.from_betas(s.rescale_zero_terminal_snr(s.linear_betas(2, 0.1, 0.5)))
    learned = loss == "hybrid"
    x0, keys = gaussian_images(8), jax.random.split(jax.random.key(0), 8)

    @jax.jit
    @jax.value_and_grad
    def run(weight):
        def network(x, time, condition):
            return jnp.concatenate([weight * x] * (1 + learned), -1).astype(jnp.bfloat16)

        value, metrics = losses.diffusion_loss(
            network, schedule, x0, None, keys, prediction="v", loss=loss, learned_variance=learned
        )
        return value.mean()

    value, gradient = run(0.5)
    assert np.isfinite(value) and np.isfinite(gradient) and gradient != 0
    assert value.dtype == jnp.float32


def test_elbo_is_the_bounds_total():
    x0 = gaussian_images(2)
    denoise = p.make_denoiser(optimal_network(DISCRETE, "noise", (0.0, 0.0)), DISCRETE, "noise")
    total = losses.elbo(denoise, DISCRETE, x0, jax.random.key(0))
    bound = lik.variational_bound(denoise, DISCRETE, x0, jax.random.key(0))
    close(total, lik.prior_term(DISCRETE, x0) + bound.terms.sum(1))


def test_refusals():
    def refuse(match, loss, schedule, prediction, learned_variance=False):
        with pytest.raises(ValueError, match=match):
            losses.check_loss(loss, schedule, prediction, learned_variance)

    refuse("unknown loss 'l2'", "l2", DISCRETE, "noise")
    refuse("needs a DiscreteSchedule", "vlb", FLOW, "velocity")
    refuse("set learned_variance", "hybrid", DISCRETE, "noise")
    refuse("does not train a learned variance", "simple", DISCRETE, "noise", True)
    refuse("cannot tell x0", "simple", ZERO_SNR, "noise")
    with pytest.raises(ValueError, match="unknown loss"):
        losses.diffusion_loss(None, DISCRETE, gaussian_images(1), None, jax.random.split(jax.random.key(0), 1),
                              prediction="noise", loss="l2")  # fmt: skip
    with pytest.raises(ValueError, match="unknown prediction 'eps'"):
        losses.min_snr_weight("eps", jnp.ones(()), jnp.ones(()))
