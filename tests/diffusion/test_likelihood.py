"""Likelihoods against Gaussian data, where the optimal denoiser, every term of the bound and log p(x0) are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff.diffusion import likelihood as lik
from jaxdiff.diffusion import scheduler as s
from jaxdiff.diffusion.predictions import Denoised

MEAN, STD = 0.1, 0.2
LEVELS = np.arange(256) / 127.5 - 1


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(desired), rtol=rtol, atol=atol)


def optimal_denoiser(schedule, mean=MEAN, std=STD, gain=1.0):
    """E[x0 | x_t] for x0 ~ N(mean, std^2) (times `gain`: a worse one), with the exact reverse variance."""

    def denoise(x_t, t, condition=None):
        alpha, sigma = (s.expand_like(f(t), x_t) for f in (schedule.alpha, schedule.sigma))
        centred = (x_t - alpha * mean) / ((alpha * std) ** 2 + sigma**2)
        fraction = None
        if isinstance(schedule, s.DiscreteSchedule) and jnp.issubdtype(t.dtype, jnp.integer):
            # q(x_{t-1} | x_t) is Gaussian, of variance beta-tilde + (posterior's weight of x0)^2 Var(x0 | x_t).
            uncertainty = (std * sigma) ** 2 / ((alpha * std) ** 2 + sigma**2)
            row = s.expand_like(t, x_t)
            exact = (
                jnp.asarray(schedule.posterior_variance_table)[row]
                + jnp.asarray(schedule.posterior_x0_table)[row] ** 2 * uncertainty
            )
            small, large = schedule.posterior_log_variance(row), jnp.log(schedule.beta(row))
            fraction = jnp.broadcast_to((jnp.log(exact) - small) / (large - small + 1e-9), x_t.shape)
        return Denoised(mean + gain * alpha * std**2 * centred, sigma * centred, fraction)

    return denoise


def images(count, seed=0, mean=MEAN, std=STD):
    """Gaussian images [count 2 2 1], rounded to the 256 levels, and their exact bits/dim."""
    x = mean + std * jax.random.normal(jax.random.key(seed), (count, 2, 2, 1))
    levels = np.clip(np.round((np.asarray(x, np.float64) + 1) * 127.5), 0, 255)
    edges = stats.norm(mean, std).cdf(np.concatenate([[-np.inf], LEVELS[:-1] + 1 / 255, [np.inf]]))
    bits = -np.log2(np.diff(edges))[levels.astype(int)].mean((1, 2, 3))
    return jnp.asarray(levels / 127.5 - 1, jnp.float32), bits


def bound(schedule, x0, variance, seed=1, **denoiser):
    run = jax.jit(lik.variational_bound, static_argnums=(0, 4))
    return run(optimal_denoiser(schedule, **denoiser), schedule, x0, jax.random.key(seed), variance)


# Densities


@pytest.mark.parametrize("mean", [-1.3, 0.013, 1.0])
@pytest.mark.parametrize("std", [0.003, 0.01, 1.0])
def test_discretized_gaussian(mean, std):
    x = jnp.asarray(LEVELS, jnp.float32)
    log_p = lik.discretized_gaussian_log_likelihood(x, jnp.full(256, mean), jnp.full(256, math.log(std)))
    close(np.exp(np.asarray(log_p, np.float64)).sum(), 1, rtol=2e-5)
    # In float64, on the side of the mean where the masses are small; the end levels reach to infinity.
    edges = np.concatenate([[-1e3], LEVELS[:-1] + 1 / 255, [1e3]])
    z, right = (edges - mean) / std, mean < LEVELS
    far, near = np.where(right, -z[1:], z[:-1]), np.where(right, -z[:-1], z[1:])
    log_far, log_near = stats.norm.logcdf(far), stats.norm.logcdf(near)
    exact = log_near + np.log(-np.expm1(log_far - log_near))
    close(log_p, exact, rtol=1e-3, atol=1e-4)  # far in the tail z^2 / 2 carries float32's error of z


def test_discretized_gaussian_has_finite_gradients():
    x = jnp.asarray(LEVELS, jnp.float32)
    for mean, std in ((0.0, 0.001), (5.0, 0.01), (0.3, 3.0)):
        gradients = jax.grad(lambda *args: lik.discretized_gaussian_log_likelihood(x, *args).sum(), (0, 1))(
            jnp.full(256, mean), jnp.full(256, math.log(std))
        )
        assert all(np.isfinite(g).all() for g in gradients)


def test_gaussian_kl():
    rng = np.random.default_rng(0)
    mean_q, log_q, mean_p, log_p = rng.normal(size=(4, 50))
    log_q[:10] = log_p[:10] + 1e-3  # nearly equal variances must not cancel
    exact = (log_p - log_q + np.exp(log_q - log_p) - 1 + (mean_q - mean_p) ** 2 * np.exp(-log_p)) / 2
    close(lik.gaussian_kl(*jnp.asarray([mean_q, log_q, mean_p, log_p], jnp.float32)), exact)
    same = lik.gaussian_kl(*jnp.asarray([mean_p[:10], log_q[:10], mean_p[:10], log_p[:10]], jnp.float32))
    close(same, ((np.exp(log_q - log_p) - 1 - (log_q - log_p)) / 2)[:10], rtol=1e-2, atol=0)
    close(lik.gaussian_kl(*jnp.asarray([mean_p, log_p, mean_p, log_p], jnp.float32)), np.zeros(50))


# The variational bound


@pytest.mark.parametrize("betas", [s.linear_betas(50, 1e-3, 0.3), s.cosine_betas(30)], ids=["linear", "cosine"])
def test_prior_term(betas):
    schedule = s.DiscreteSchedule.from_betas(betas[:20])
    x0, _ = images(3)
    alpha, variance = np.sqrt(np.prod(1 - betas[:20])), 1 - np.prod(1 - betas[:20])
    mean = alpha * np.asarray(x0, np.float64)
    exact = (mean**2 + variance - 1 - np.log(variance)) / 2 / np.log(2)
    close(lik.prior_term(schedule, x0), exact.mean((1, 2, 3)))
    zero = s.DiscreteSchedule.from_betas(s.rescale_zero_terminal_snr(betas))
    close(lik.prior_term(zero, x0), np.zeros(3))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_each_kl_term_equals_its_closed_form(variance):
    # Over data and noise, E |x0 - E[x0 | x_t]|^2 = Var(x0 | x_t), so E KL has a closed form (in float64).
    betas = s.linear_betas(20, 0.01, 0.5)
    schedule = s.DiscreteSchedule.from_betas(betas)
    x0 = MEAN + STD * jax.random.normal(jax.random.key(5), (6000, 2, 2, 1))
    terms = np.asarray(bound(schedule, x0, variance).terms, np.float64)[:, 1:]
    alpha2 = np.cumprod(1 - betas)
    before, after, beta = alpha2[:-1], alpha2[1:], betas[1:]
    tilde = beta * (1 - before) / (1 - after)
    weight2 = before * beta**2 / (1 - after) ** 2
    uncertainty = STD**2 * (1 - after) / (after * STD**2 + 1 - after)
    p = {"fixed_small": tilde, "fixed_large": beta, "learned": tilde + weight2 * uncertainty}[variance]
    exact = (np.log(p / tilde) + tilde / p - 1 + weight2 * uncertainty / p) / 2 / np.log(2)
    close(terms.mean(0) / exact, np.ones(19), atol=5 / math.sqrt(2 * 6000))


def test_terms_of_one_image_equal_float64():
    betas = s.linear_betas(10, 0.01, 0.5)
    schedule = s.DiscreteSchedule.from_betas(betas)
    x0, _ = images(1)
    rng = np.random.default_rng(0)
    guess, alpha2 = np.asarray(x0, np.float64) + 0.05 * rng.normal(size=x0.shape), np.cumprod(1 - betas)
    denoised = Denoised(jnp.asarray(guess, jnp.float32), x0, jnp.full(x0.shape, 0.25))
    term = jax.jit(lik.variational_term, static_argnums=4)
    for t in range(1, 11):
        small = betas[t - 1] * (1 - alpha2[t - 2]) / (1 - alpha2[t - 1]) if t > 1 else None
        clipped = small if t > 1 else betas[1] * (1 - alpha2[0]) / (1 - alpha2[1])
        for variance, p in (
            ("fixed_small", clipped),
            ("fixed_large", betas[t - 1]),
            ("learned", math.exp(0.25 * math.log(betas[t - 1]) + 0.75 * math.log(clipped))),
        ):
            if t > 1:
                weight = math.sqrt(alpha2[t - 2]) * betas[t - 1] / (1 - alpha2[t - 1])
                squared = (weight * (np.asarray(x0, np.float64) - guess)) ** 2
                exact = (np.log(p / small) + small / p - 1 + squared / p).mean() / 2
            else:
                decoder = stats.norm(guess, math.sqrt(p))
                exact = -np.log(decoder.cdf(np.asarray(x0) + 1 / 255) - decoder.cdf(np.asarray(x0) - 1 / 255)).mean()
            got = term(denoised, schedule, x0, jnp.array([t]), variance)
            close(got, [exact / math.log(2)], rtol=2e-5)


def test_bound_is_tight_with_the_exact_reverse_process():
    # The reverse process of Gaussian data is Gaussian: with its mean and variance the bound is the likelihood.
    schedule = s.DiscreteSchedule.from_betas(s.linear_betas(100, 1e-3, 0.2))
    x0, exact = images(6000)
    gap = np.asarray(bound(schedule, x0, "learned").total) - exact
    error = gap.std() / math.sqrt(len(gap))
    assert error < 0.012
    assert abs(gap.mean()) < 4 * error
    # With another variance, or another mean, it is not.
    assert (np.asarray(bound(schedule, x0, "fixed_small").total) - exact).mean() > 0.5
    worse = np.asarray(bound(schedule, x0, "learned", std=1.5 * STD).total) - exact
    assert worse.mean() > gap.mean() + 0.05


def test_bound_tightens_with_more_steps():
    x0, exact = images(2000)
    gaps = []
    for steps in (4, 12, 36):
        schedule = s.DiscreteSchedule.from_betas(refined(steps))  # the same fall of alpha, in more steps
        gap = np.asarray(bound(schedule, x0, "fixed_large").total) - exact
        gaps.append(gap.mean())
        assert gap.mean() > 4 * gap.std() / math.sqrt(len(gap))  # a bound: never below the truth
    assert gaps[0] > 1.5 * gaps[1] > 1.5**2 * gaps[2]


def refined(steps):
    """Betas of `steps` levels along one curve alpha^2 = exp(-10 u^2 - u / 50), u = t / steps."""
    u = np.arange(steps + 1) / steps
    return -np.expm1(-np.diff(10 * u**2 + u / 50))


def test_an_images_terms_depend_on_its_own_key_only():
    schedule = s.DiscreteSchedule.from_betas(s.linear_betas(5, 0.01, 0.5))
    x0, _ = images(4)
    keys = jax.random.split(jax.random.key(0), 4)
    denoise = optimal_denoiser(schedule)
    together = lik.variational_bound(denoise, schedule, x0, keys)
    alone = lik.variational_bound(denoise, schedule, x0[2:3], keys[2:3])
    close(together.terms[2:3], alone.terms)
    close(together.total, together.prior + together.terms.sum(1))
    assert together.terms.shape == together.noise_mse.shape == (4, 5)
    assert np.unique(np.asarray(together.noise_mse)).size == 20  # fresh noise at every level


# The probability-flow ODE

ODE_SCHEDULES = {
    "linear": s.DiscreteSchedule.from_betas(s.linear_betas(1000)),
    "cosine_zero_snr": s.DiscreteSchedule.from_betas(s.rescale_zero_terminal_snr(s.cosine_betas(1000))),
    "flow": s.FlowSchedule(),
    "edm": s.EDMSchedule(),
}


def gaussian_bits(x0):
    density = stats.norm(MEAN, STD).logpdf(np.asarray(x0, np.float64)).mean((1, 2, 3))
    return -density / np.log(2) + np.log2(127.5)


def model_bits(x0, schedule, first, last):
    """Closed form of the ODE between two noise levels, with the prior N(0, ..) at its end, in float64."""
    growth = math.sqrt((STD**2 + last**2) / (STD**2 + first**2))
    x_hat = MEAN + growth * (np.asarray(x0, np.float64) - MEAN)
    preserves_variance = isinstance(schedule, s.DiscreteSchedule)  # then x_T ~ N(0, 1), and x^_T = x_T / alpha_T
    density = stats.norm(0, math.sqrt(1 + last**2) if preserves_variance else last).logpdf(x_hat)
    return -(density.mean((1, 2, 3)) + math.log(growth)) / np.log(2) + np.log2(127.5)


@pytest.mark.parametrize("name", ODE_SCHEDULES)
def test_ode_likelihood_is_exact_for_gaussian_data(name):
    schedule = ODE_SCHEDULES[name]
    x0 = MEAN + STD * jax.random.normal(jax.random.key(0), (16, 2, 2, 1))
    run = jax.jit(lik.ode_log_likelihood, static_argnums=(0,))
    result = run(optimal_denoiser(schedule), schedule, x0, jax.random.key(1))
    first = {"flow": 0.002, "edm": 0.002}.get(name) or float(schedule.sigma(1) / schedule.alpha(1))
    ratio = float(schedule.sigma(schedule.t_max) / schedule.alpha(schedule.t_max))
    last = 200.0 if schedule.zero_terminal_snr else ratio
    close(result.bits_per_dim, model_bits(x0, schedule, first, last), rtol=0, atol=2e-4)
    # The data's own density: what is left is the prior's mean (0 instead of alpha_T MEAN), opposite for x and -x.
    assert abs(float(result.bits_per_dim.mean()) - gaussian_bits(x0).mean()) < 1e-3
    close(result.bits_per_dim, gaussian_bits(x0), rtol=0, atol=4e-3)
    close(result.log_likelihood, -4 * math.log(2) * (result.bits_per_dim - math.log2(127.5)), atol=1e-4)
    close(result.x_T / schedule.prior_std, (x0 - MEAN) / STD, rtol=0, atol=5e-3)
    wrong = run(optimal_denoiser(schedule, std=0.4), schedule, x0, jax.random.key(1))
    assert np.abs(np.asarray(wrong.bits_per_dim) - gaussian_bits(x0)).max() > 0.05


def test_ode_prior_of_a_short_schedule():
    # Far from pure noise (sigma_T / alpha_T = 3) it matters that x_T ~ N(0, 1), x^_T ~ N(0, 1 / alpha_T^2).
    schedule = s.DiscreteSchedule.from_betas(s.linear_betas(100, 1e-3, 0.05))
    x0 = MEAN + STD * jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
    result = lik.ode_log_likelihood(optimal_denoiser(schedule), schedule, x0, jax.random.key(1), 64)
    first, last = (float(schedule.sigma(t) / schedule.alpha(t)) for t in (1, 100))
    close(result.bits_per_dim, model_bits(x0, schedule, first, last), rtol=0, atol=2e-4)


def test_ode_converges_at_fourth_order():
    schedule = s.EDMSchedule()
    x0 = MEAN + STD * jax.random.normal(jax.random.key(0), (16, 2, 2, 1))
    errors = []
    for steps in (12, 24):
        rough = lik.ode_log_likelihood(optimal_denoiser(schedule), schedule, x0, jax.random.key(1), steps)
        errors.append(np.abs(rough.bits_per_dim - model_bits(x0, schedule, 0.002, 80.0)).mean())
    assert 2**3.3 < errors[0] / errors[1] < 2**5.5


def full_covariance():
    """A Gaussian over [2 2 1] images with correlated pixels: denoiser on the EDM schedule, covariance."""
    root = np.random.default_rng(0).normal(size=(4, 4)) / 3
    covariance = root @ root.T + 0.02 * np.eye(4)

    variances, axes = np.linalg.eigh(covariance)

    def denoise(x_t, t, condition=None):
        sigma = t.reshape(-1, 1)
        components = x_t.reshape(-1, 4) @ jnp.asarray(axes, jnp.float32)
        scaled = sigma * components / (jnp.asarray(variances, jnp.float32)[None] + sigma**2)
        noise = (scaled @ jnp.asarray(axes.T, jnp.float32)).reshape(x_t.shape)
        return Denoised(x_t - s.expand_like(t, x_t) * noise, noise)

    return denoise, covariance


def test_trace_estimators_on_correlated_pixels():
    denoise, covariance = full_covariance()
    normal = stats.multivariate_normal(np.zeros(4), covariance)
    x0 = normal.rvs(2, random_state=1)
    exact, schedule = normal.logpdf(x0), s.EDMSchedule()
    run = jax.jit(lik.ode_log_likelihood, static_argnums=(0, 4, 5, 6))

    def estimate(copies, *options):
        """`copies` estimates for each of the two images."""
        batch = jnp.asarray(np.repeat(x0, copies, 0), jnp.float32).reshape(-1, 2, 2, 1)
        keys = jax.random.split(jax.random.key(0), len(batch))
        return np.asarray(run(denoise, schedule, batch, keys, 32, *options).log_likelihood).reshape(2, copies)

    close(estimate(1, "exact", 1)[:, 0], exact, rtol=0, atol=8e-3)
    for probe in ("rademacher", "gaussian"):
        one, four = estimate(256, probe, 1), estimate(256, probe, 4)
        error = one.std(1) / math.sqrt(256)
        assert (error > 0.005).all()  # estimates, not the trace itself
        assert (np.abs(one.mean(1) - exact) < 4 * error + 8e-3).all()
        np.testing.assert_allclose(four.std(1) / one.std(1), [0.5, 0.5], rtol=0.25)


def test_dequantized_density_scores_the_levels():
    # E[-log2 p(x0 + u) / D + log2(127.5)] is the levels' own bits/dim, up to the curvature of p within a level.
    x0, exact = images(3000)
    spread = lik.dequantize(x0, jax.random.key(3))
    offset = np.asarray(spread - x0)
    assert np.abs(offset).max() <= 1 / 255 + 1e-6
    close([offset.mean(), offset.std()], [0, 2 / 255 / math.sqrt(12)], atol=2e-4)
    close(gaussian_bits(spread).mean(), exact.mean(), rtol=0, atol=2e-3)


def test_refusals():
    x0, _ = images(1)
    schedule = ODE_SCHEDULES["linear"]
    denoise, key = optimal_denoiser(schedule), jax.random.key(0)
    with pytest.raises(ValueError, match="needs a DiscreteSchedule"):
        lik.variational_bound(denoise, s.FlowSchedule(), x0, key)
    with pytest.raises(ValueError, match="unknown variance"):
        lik.variational_bound(denoise, schedule, x0, key, "small")
    with pytest.raises(ValueError, match="learned_variance=True"):
        lik.variational_bound(lambda x, t: Denoised(x, x), schedule, x0, key, "learned")
    with pytest.raises(ValueError, match="unknown probe"):
        lik.ode_log_likelihood(denoise, schedule, x0, key, probe="normal")
