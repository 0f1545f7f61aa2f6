"""Noise schedules and forward process: against float64, against diffusers' tables, and against themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion import scheduler as s

ALL_BETAS = {
    "linear": s.linear_betas(1000),
    "scaled_linear": s.scaled_linear_betas(1000),
    "cosine": s.cosine_betas(1000),
}
ALL_BETAS |= {f"{name}_zero_snr": s.rescale_zero_terminal_snr(betas) for name, betas in ALL_BETAS.items()}


@pytest.fixture(scope="module", params=ALL_BETAS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def betas(name):
    return ALL_BETAS[name]


@pytest.fixture(scope="module")
def schedule(betas):
    return s.DiscreteSchedule.from_betas(betas)


@pytest.fixture(scope="module")
def peer(golden_dir):
    return np.load(golden_dir / "schedules.npz")


def close(actual, desired, rtol=1e-6, atol=0.0):
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=rtol, atol=atol)


def moments(betas):
    """Alpha and sigma^2 for t = 0..T in float64, sigma^2 by its own recursion."""
    alpha, variance = [1.0], [0.0]
    for beta in betas:
        alpha.append(alpha[-1] * np.sqrt(1 - beta))
        variance.append(variance[-1] * (1 - beta) + beta)
    return np.array(alpha), np.array(variance)


# Discrete schedules


def test_tables_equal_diffusers(name, schedule, peer):
    t = jnp.arange(1, 1001)
    close(schedule.beta(t), peer[f"betas_{name}"], rtol=0, atol=1e-6)
    close(schedule.alpha(t) ** 2, peer[f"alphas_cumprod_{name}"], rtol=0, atol=1e-6)
    close(schedule.posterior_variance_table[1:], peer[f"posterior_variance_fixed_small_{name}"], rtol=0, atol=1e-6)
    close(schedule.beta(t), peer[f"posterior_variance_fixed_large_{name}"], rtol=0, atol=1e-6)


def test_iterated_kernel_has_the_closed_forms_moments(betas, schedule):
    # What q_step multiplies x_{t-1} and the noise by, iterated in float64, against what q_sample does.
    t, one, zero = jnp.arange(1, 1001), jnp.ones((1000, 1, 1, 1)), jnp.zeros((1000, 1, 1, 1))
    keep = np.asarray(s.q_step(schedule, one, t, zero), np.float64).ravel()
    add = np.asarray(s.q_step(schedule, zero, t, one), np.float64).ravel()
    mean, variance = 1.0, 0.0
    for i in range(1000):
        mean, variance = keep[i] * mean, keep[i] ** 2 * variance + add[i] ** 2
        assert abs(mean - schedule.alpha_table[i + 1]) < 1e-5
        assert abs(variance - float(schedule.sigma_table[i + 1]) ** 2) < 1e-5
    alpha, exact_variance = moments(betas)
    close(schedule.alpha_table, alpha, rtol=1e-6, atol=1e-12)
    close(schedule.sigma_table, np.sqrt(exact_variance))
    close(s.q_sample(schedule, one, t, zero).ravel(), alpha[1:], atol=1e-12)
    close(s.q_sample(schedule, zero, t, one).ravel(), np.sqrt(exact_variance[1:]))


def test_iterated_kernel_by_monte_carlo():
    schedule = s.DiscreteSchedule.from_betas(s.linear_betas(6, 0.05, 0.4))
    images, t_end = 20_000, 6
    x0 = jnp.broadcast_to(jnp.array([-0.8, 0.1, 0.9]).reshape(1, 1, 3, 1), (images, 1, 3, 1))

    def step(x, t):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), x.shape)
        return s.q_step(schedule, x, t, noise), None

    chain, _ = jax.lax.scan(step, x0, jnp.arange(1, t_end + 1))
    direct = s.q_sample(schedule, x0, jnp.full(images, t_end), jax.random.normal(jax.random.key(1), x0.shape))
    sigma = float(schedule.sigma(t_end))
    for x in (chain, direct):
        close(x.mean(0).ravel(), schedule.alpha(t_end) * x0[0].ravel(), rtol=0, atol=5 * sigma / np.sqrt(images))
        close(x.std(0).ravel(), sigma * np.ones(3), rtol=5 / np.sqrt(2 * images))


def test_posterior_is_bayes_rule(betas, schedule):
    # q(x_{t-1} | x_t, x0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x0): a product of Gaussians, in float64.
    alpha, variance = moments(betas)
    keep, x0, x_t = np.sqrt(1 - betas[1:]), 0.7, -0.4
    precision = keep**2 / betas[1:] + 1 / variance[1:-1]
    mean = (keep / betas[1:] * x_t + alpha[1:-1] / variance[1:-1] * x0) / precision
    t = jnp.arange(2, 1001)
    image = jnp.ones((999, 1, 1, 1))
    got_mean, got_variance = jax.jit(s.q_posterior)(schedule, x0 * image, x_t * image, t)
    close(got_mean.ravel(), mean, atol=1e-6)
    close(got_variance, 1 / precision)
    close(jnp.exp(schedule.posterior_log_variance(t)), 1 / precision, rtol=1e-5)
    # The last step has no variance and answers x0; its logarithm is clipped to the next one's.
    mean_1, variance_1 = s.q_posterior(schedule, x0 * image[:1], x_t * image[:1], jnp.array([1]))
    close(mean_1.ravel(), [x0])
    assert float(variance_1[0]) == 0
    assert float(schedule.posterior_log_variance(1)) == float(schedule.posterior_log_variance(2))


def test_any_pair_of_times_in_float32(betas, schedule):
    # transition and posterior against float64, adjacent and distant, clean and terminal ends included.
    alpha, variance = moments(betas)
    s_times = np.concatenate([np.arange(0, 1000), np.zeros(1000, int), np.arange(0, 500)])
    t_times = np.concatenate([np.arange(1, 1001), np.arange(1, 1001), np.full(500, 1000)])
    a = alpha[t_times] / alpha[s_times]
    v = variance[t_times] - a**2 * variance[s_times]
    forward = jax.jit(s.transition)(schedule, jnp.array(s_times), jnp.array(t_times))
    close(forward.alpha, a, rtol=1e-5, atol=1e-7)
    close(forward.variance, v, rtol=3e-4)
    back = jax.jit(s.posterior)(schedule, jnp.array(s_times), jnp.array(t_times))
    close(back.x0_weight, alpha[s_times] * v / variance[t_times], rtol=3e-4)
    close(back.x_t_weight, a * variance[s_times] / variance[t_times], rtol=1e-5, atol=1e-7)
    close(back.variance, variance[s_times] * v / variance[t_times], rtol=3e-4)


def test_tiny_steps_do_not_cancel():
    # Steps of 6e-5 in log SNR around 0: float32's sigma_t^2 - alpha_{t|s}^2 sigma_s^2, or 1 - exp, lose three digits.
    schedule = s.DiscreteSchedule.from_betas(s.cosine_betas(100_000))
    t = np.arange(49_500, 50_500)
    alpha, sigma, log_snr = schedule.alpha_table, schedule.sigma_table, schedule.log_snr_table
    exact = schedule.beta_table[t]
    ours = s.transition(schedule, jnp.array(t - 1), jnp.array(t)).variance
    difference = sigma[t] ** 2 - (alpha[t] / alpha[t - 1]) ** 2 * sigma[t - 1] ** 2
    exponential = sigma[t] ** 2 * (1 - np.exp(log_snr[t] - log_snr[t - 1]))
    worst = [np.abs(np.asarray(variance) / exact - 1).max() for variance in (ours, difference, exponential)]
    assert worst[0] < 2e-4 < min(worst[1:])


def test_reads_the_same_at_integer_and_float_times(schedule):
    t = jnp.arange(0, 1001)
    for read in (schedule.alpha, schedule.sigma, schedule.log_snr):
        np.testing.assert_array_equal(read(t), read(t.astype(jnp.float32)))
    assert schedule.alpha(0) == 1 and schedule.sigma(0) == 0 and schedule.log_snr(0) == jnp.inf
    assert schedule.alpha(t).dtype == jnp.float32


def test_fractional_times(schedule):
    t = jnp.linspace(0, 1000, 7919)
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    close(alpha**2 + sigma**2, np.ones(len(t)))
    assert (np.diff(np.asarray(log_snr)) < 0).all()
    inner = np.asarray(t[50:-50])
    # Halfway between two levels log(sigma / alpha) is halfway.
    close(schedule.log_snr(500.5), (schedule.log_snr(500) + schedule.log_snr(501)) / 2, rtol=1e-5)
    close(log_snr[50:-50], 2 * np.log(np.asarray(alpha / sigma)[50:-50]), rtol=1e-4, atol=1e-4)
    close(schedule.time_of_sigma(sigma / alpha)[50:-50], inner, rtol=3e-6, atol=3e-4)
    close(schedule.time_of_sigma(sigma / alpha), t, rtol=1e-5, atol=3e-3)
    assert float(schedule.time_of_sigma(0.0)) == 0 and float(schedule.time_of_sigma(jnp.inf)) == 1000


def test_zero_terminal_snr(name, schedule):
    zero = name.endswith("zero_snr")
    assert schedule.zero_terminal_snr == zero
    assert (float(schedule.alpha(1000)) == 0) == zero
    assert bool(jnp.isneginf(schedule.log_snr(1000))) == zero
    if zero:
        close(schedule.alpha(1), np.sqrt(1 - ALL_BETAS[name.removesuffix("_zero_snr")][0]))


def test_refuses_bad_betas():
    for bad in ([0.1, 1.2], [0.0, 0.1], [1.0, 0.5], [], [[0.1]], [0.1, np.nan]):
        with pytest.raises(ValueError, match="betas must"):
            s.DiscreteSchedule.from_betas(np.array(bad))
    with pytest.raises(ValueError, match="at least 2"):
        s.rescale_zero_terminal_snr(s.linear_betas(1))


# Continuous schedules


def test_flow():
    schedule, t = s.FlowSchedule(), jnp.array([0.0, 0.125, 0.5, 1.0])
    close(schedule.alpha(t) + schedule.sigma(t), np.ones(4))
    close(schedule.log_snr(t), [np.inf, 2 * np.log(7), 0, -np.inf])
    close(schedule.time_of_sigma(schedule.sigma(t) / schedule.alpha(t)), t)
    close(schedule.network_time(t), 1000 * np.asarray(t))
    assert (schedule.t_min, schedule.t_max, schedule.prior_std) == (0, 1, 1)


def test_edm():
    schedule, t = s.EDMSchedule(), jnp.array([0.0, 0.002, 1.0, 80.0])
    close(schedule.alpha(t), np.ones(4))
    close(schedule.sigma(t), t)
    close(schedule.log_snr(t)[1:], -2 * np.log(np.asarray(t[1:])))
    close(schedule.network_time(t)[1:], np.log(np.asarray(t[1:])) / 4)
    assert np.isfinite(schedule.network_time(0.0))
    assert (schedule.t_min, schedule.t_max, schedule.prior_std) == (0, 80, 80)


@pytest.mark.parametrize("schedule", [s.FlowSchedule(), s.EDMSchedule()], ids=["flow", "edm"])
def test_continuous_pairs_of_times(schedule):
    early, late = jnp.array([0.0, 0.1, 0.3, 0.5]), jnp.array([0.2, 0.1001, 0.9, 1.0])
    (a_s, a_t), (v_s, v_t) = (
        [np.asarray(f(t), np.float64) for t in (early, late)]
        for f in (schedule.alpha, lambda t: schedule.sigma(t) ** 2)
    )
    forward, back = s.transition(schedule, early, late), s.posterior(schedule, early, late)
    gained = v_t - (a_t / a_s) ** 2 * v_s
    close(forward.alpha, a_t / a_s, atol=1e-7)
    close(forward.variance, gained, rtol=2e-3)
    close(back.variance, v_s * gained / v_t, rtol=2e-3)
    # The posterior's mean is consistent: q(x_s | x_t, x0) averaged over q(x_t | x0) is q(x_s | x0).
    close(back.x0_weight + back.x_t_weight * a_t, a_s, rtol=1e-4)
    close(back.variance + back.x_t_weight**2 * v_t, v_s, rtol=1e-4)


# Common


def test_training_times():
    keys = jax.random.split(jax.random.key(0), 20_000)
    discrete = jax.vmap(s.DiscreteSchedule.from_betas(s.linear_betas(10)).sample_time)(keys)
    counts = np.bincount(np.asarray(discrete), minlength=11)
    assert counts[0] == 0 and len(counts) == 11
    assert np.abs(counts[1:] / 2000 - 1).max() < 5 / np.sqrt(2000)
    flow = jax.vmap(s.FlowSchedule().sample_time)(keys)
    assert abs(float(flow.mean()) - 0.5) < 0.01 and float(flow.min()) > 0 and float(flow.max()) < 1
    logit = jax.vmap(s.FlowSchedule(logit_normal=(0.5, 2.0)).sample_time)(keys)
    close(jnp.mean(jax.scipy.special.logit(logit)), 0.5, rtol=0, atol=0.06)
    edm = jnp.log(jax.vmap(s.EDMSchedule().sample_time)(keys))
    close(jnp.array([edm.mean(), edm.std()]), [-1.2, 1.2], rtol=0, atol=0.04)


@pytest.mark.parametrize(
    "schedule",
    [s.DiscreteSchedule.from_betas(s.linear_betas(10)), s.FlowSchedule(), s.EDMSchedule()],
    ids=["discrete", "flow", "edm"],
)
def test_schedules_are_pytrees(schedule):
    leaves, structure = jax.tree.flatten(schedule)
    again = jax.tree.unflatten(structure, leaves)
    t = jnp.array([[0.3], [0.9]])
    read = jax.jit(lambda schedule, t: (schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)))
    for got, expected in zip(read(again, t), (schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)), strict=True):
        assert got.shape == t.shape
        close(got, expected)
    x = jnp.ones((2, 1, 1, 3))
    close(s.q_sample(schedule, x, t[0, 0], 2 * x)[0, 0, 0, 0], schedule.alpha(0.3) + 2 * schedule.sigma(0.3))
