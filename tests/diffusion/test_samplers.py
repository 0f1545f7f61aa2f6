"""Samplers against the truth: a Gaussian mixture with its exact denoiser, and the papers' own formulas in NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.guidance import clip_x0
from jaxdiff.diffusion.predictions import Denoised
from jaxdiff.diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    heun,
    initial_noise,
    lcm,
    pndm,
)
from jaxdiff.diffusion.scheduler import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    linear_betas,
    rescale_zero_terminal_snr,
)
from jaxdiff.diffusion.timesteps import make_timesteps

MEANS, WEIGHTS, STD = np.array([-0.9, 0.1, 0.8]), np.array([0.3, 0.3, 0.4]), 0.15
MIXTURE_MEAN = WEIGHTS @ MEANS
MIXTURE_VARIANCE = WEIGHTS @ (MEANS - MIXTURE_MEAN) ** 2 + STD**2

SCHEDULES = {
    "discrete": DiscreteSchedule.from_betas(linear_betas(1000)),
    "zero_terminal_snr": DiscreteSchedule.from_betas(rescale_zero_terminal_snr(linear_betas(1000))),
    "flow": FlowSchedule(),
    "edm": EDMSchedule(),
}


# These programs are tiny: leaving them unoptimised halves the time of the tests.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Continuous:
    """A schedule in the precision of its argument: "vp" (Song et al. 2021, linear betas), "flow" or "edm"."""

    kind: str

    @property
    def zero_terminal_snr(self):
        return self.kind == "flow"

    def alpha(self, t):
        t = jnp.asarray(t)
        return {"vp": lambda: jnp.exp(-(0.1 * t + 9.95 * t**2) / 2), "flow": lambda: 1 - t, "edm": lambda: t * 0 + 1}[
            self.kind
        ]()

    def sigma(self, t):
        t = jnp.asarray(t)
        return jnp.sqrt(-jnp.expm1(-(0.1 * t + 9.95 * t**2))) if self.kind == "vp" else t

    def log_snr(self, t):
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))


def mixture_x0_noise(x, alpha, sigma, np=jnp):
    """E[x0 | x_t] and E[noise | x_t] of the mixture, elementwise; finite for every alpha and sigma."""
    x = x[..., None]
    means, weights = np.asarray(MEANS, x.dtype), np.asarray(WEIGHTS, x.dtype)
    means = means.reshape((1,) * (x.ndim - 1) + (-1,))
    variance = (alpha * STD) ** 2 + sigma**2
    distance = x - alpha * means
    logits = -(distance**2) / (2 * variance) + np.log(weights).reshape(means.shape)
    p = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    p = p / np.sum(p, axis=-1, keepdims=True)
    return np.sum(p * (means + alpha * STD**2 / variance * distance), -1), np.sum(p * sigma / variance * distance, -1)


def mixture(schedule):
    """The mixture's exact denoiser."""

    def denoise(x, t, condition=None):
        alpha, sigma = (a.reshape(-1, 1, 1, 1, 1) for a in (schedule.alpha(t), schedule.sigma(t)))
        return Denoised(*mixture_x0_noise(x, alpha, sigma))

    return denoise


def tables(schedule, timesteps):
    """The tables alpha, sigma at each time as NumPy float64."""
    return tuple(np.asarray(a, np.float64) for a in _tables(schedule, timesteps))


@jit
def _tables(schedule, timesteps):
    return schedule.alpha(timesteps), schedule.sigma(timesteps)


NUM, SHAPE = 16, (2, 4, 4, 1)  # most tests share these, and so their compiled samplers


@functools.cache
def compiled(sampler, name):
    """sampler(x_T, timesteps, key, start, eta) on the mixture, compiled once for all tests of one shape."""
    schedule = SCHEDULES[name]

    @jit
    def run(x_T, timesteps, key, start, eta):
        options = {"eta": eta} if sampler in (ddim, euler_ancestral) else {}
        return sampler(mixture(schedule), schedule, x_T, timesteps, key, start=start, **options)

    return run


def sample(sampler, name, x_T, timesteps, key=None, start=0, eta=None):
    """x_0 by the compiled sampler, with its own default eta."""
    eta = (0.0 if sampler is ddim else 1.0) if eta is None else eta
    return compiled(sampler, name)(x_T, timesteps, jax.random.key(1) if key is None else key, start, eta)


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def times_for(name, num=NUM, end=None):
    """Usable timesteps of each kind of schedule."""
    schedule = SCHEDULES[name]
    timesteps = make_timesteps(schedule, num, "karras" if name == "edm" else "trailing")
    return timesteps if end is None else np.append(timesteps[:-1], end)


def noises(key, num, shape):
    """The standard normal noise of steps 0 .. num - 1, drawn apart from the samplers."""
    draw = jit(jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape)))
    return np.asarray(draw(jnp.arange(num)), np.float64)


# Convergence --------------------------------------------------------------------------------------------------------


SPANS = {"vp": (1.0, 0.05), "flow": (1.0, 0.05), "edm": (10.0, 0.05)}


@functools.cache
def exact_flow(kind):
    """Noise x_T, and the probability-flow ODE from there solved by SciPy to about 1e-10."""
    schedule, (t_max, t_end) = Continuous(kind), SPANS[kind]
    x_T = (t_max if kind == "edm" else 1.0) * np.random.default_rng(0).standard_normal(24)
    if kind == "flow":

        def slope(t, x):
            x0, noise = mixture_x0_noise(x, 1 - t, t, np)
            return noise - x0

        span, y, scale = (t_max, t_end), x_T, 1.0
    else:  # d(x / alpha) = noise d(sigma / alpha), along the logarithm of sigma / alpha

        def slope(log_ratio, y):
            return mixture_x0_noise(y, 1.0, math.exp(log_ratio), np)[1] * math.exp(log_ratio)

        (a_T, a), (s_T, s) = tables(schedule, np.array([t_max, t_end]))
        span, y, scale = (math.log(s_T / a_T), math.log(s / a)), x_T / a_T, a
    solution = scipy.integrate.solve_ivp(slope, span, y, method="DOP853", rtol=1e-10, atol=1e-11)
    return x_T, solution.y[:, -1] * scale


@pytest.mark.parametrize("kind", SPANS)
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (ddim, 1), (heun, 2), (dpmpp_2m, 2), (pndm, 2)])
def test_order_of_convergence(sampler, order, kind):
    """The error against the exact solution falls as N^-order (DDIM, Euler: 1; Heun, DPM-Solver++(2M), PNDM: 2)."""
    errors, (t_max, t_end) = [], SPANS[kind]
    with jax.enable_x64(True):
        x_T, expected = exact_flow(kind)
        schedule = Continuous(kind)
        run = jit(lambda x_T, times, start: sampler(mixture(schedule), schedule, x_T, times, None, start=start))
        for num in (256, 512):
            times = np.linspace(t_max, t_end, num + 1)
            if kind == "edm":
                times = np.linspace(t_max ** (1 / 7), t_end ** (1 / 7), num + 1) ** 7
            times = np.append(np.full(512 - num, t_max), times)  # skipped by start: one program for both
            x = run(x_T.reshape(1, 4, 6, 1), times, 512 - num)
            assert x.dtype == jnp.float64
            errors.append(np.abs(np.asarray(x).reshape(-1) - expected).mean())
    measured = math.log2(errors[0] / errors[1])
    if (sampler, kind) == (pndm, "flow"):  # even steps in sigma / (alpha + sigma), too: better than its order
        assert measured > 3
    else:
        assert measured == pytest.approx(order, abs=0.08)
    assert errors[1] < (5e-3 if order == 1 else 5e-5)


# The papers' formulas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_ddim_is_euler_in_sigma_space(sampler):
    """With y = x / alpha and r = sigma / alpha, y += (r_s - r_t) noise gives DDIM's numbers."""
    x_T, timesteps = normal(0), times_for("discrete")
    alpha, sigma = tables(SCHEDULES["discrete"], timesteps)
    y = np.asarray(x_T, np.float64) / alpha[0]
    for i in range(NUM):
        noise = mixture_x0_noise(alpha[i] * y, alpha[i], sigma[i], np)[1]
        y = y + (sigma[i + 1] / alpha[i + 1] - sigma[i] / alpha[i]) * noise
    np.testing.assert_allclose(sample(sampler, "discrete", x_T, timesteps), y, atol=2e-5)


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_euler_ancestral_is_sigma_down_and_up(eta):
    """k-diffusion's step in x / alpha: to sigma_down by Euler, then noise of sigma_up."""
    x_T, timesteps, key = normal(0), times_for("discrete", end=1.0), jax.random.key(3)
    alpha, sigma = tables(SCHEDULES["discrete"], timesteps)
    ratio = sigma / alpha
    y = np.asarray(x_T, np.float64) / alpha[0]
    for i, z in enumerate(noises(key, NUM, SHAPE)):
        x0 = mixture_x0_noise(alpha[i] * y, alpha[i], sigma[i], np)[0]
        up = eta * math.sqrt(ratio[i + 1] ** 2 * (ratio[i] ** 2 - ratio[i + 1] ** 2) / ratio[i] ** 2)
        down = math.sqrt(ratio[i + 1] ** 2 - up**2)
        y = y + (y - x0) / ratio[i] * (down - ratio[i]) + up * z
    x = sample(euler_ancestral, "discrete", x_T, timesteps, key, eta=eta)
    np.testing.assert_allclose(x, alpha[-1] * y, atol=2e-5)


def test_heun_is_karras_algorithm_1():
    """On the EDM schedule, with the last step to sigma = 0."""
    timesteps = times_for("edm")
    x_T = 80 * normal(0)
    x = np.asarray(x_T, np.float64)
    for t, s in zip(timesteps[:-1], timesteps[1:], strict=True):
        d = (x - mixture_x0_noise(x, 1.0, t, np)[0]) / t
        x_s = x + (s - t) * d
        if s > 0:
            x_s = x + (s - t) * (d + (x_s - mixture_x0_noise(x_s, 1.0, s, np)[0]) / s) / 2
        x = x_s
    np.testing.assert_allclose(sample(heun, "edm", x_T, timesteps), x, atol=1e-4)


def test_heun_is_heun_in_time_for_flow():
    """Step x_s = x_t + (s - t) (v_t + v_s) / 2 with the velocity v = noise - x0, from t = 1 on."""
    x_T, timesteps = normal(0), times_for("flow")
    x = np.asarray(x_T, np.float64)
    for t, s in zip(timesteps[:-1], timesteps[1:], strict=True):
        x0, noise = mixture_x0_noise(x, 1 - t, t, np)
        v = noise - x0
        x_s = x + (s - t) * v
        if s > 0:
            x0, noise = mixture_x0_noise(x_s, 1 - s, s, np)
            x_s = x + (s - t) * (v + noise - x0) / 2
        x = x_s
    np.testing.assert_allclose(sample(heun, "flow", x_T, timesteps), x, atol=1e-5)


def test_dpmpp_2m_is_algorithm_2():
    """Step sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D, D = (1 + 1 / 2r) x0 - x0_previous / 2r (Lu et al. 2022)."""
    x_T, timesteps = normal(0), times_for("discrete", end=1.0)
    alpha, sigma = tables(SCHEDULES["discrete"], timesteps)
    lambdas = np.log(alpha / sigma)
    x, previous = np.asarray(x_T, np.float64), None
    for i in range(NUM):
        x0 = d = mixture_x0_noise(x, alpha[i], sigma[i], np)[0]
        h = lambdas[i + 1] - lambdas[i]
        if i > 0:
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - previous / (2 * r)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * d
        previous = x0
    np.testing.assert_allclose(sample(dpmpp_2m, "discrete", x_T, timesteps), x, atol=2e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_with_eta_1_is_ddpm(name):
    """The same key gives the same image, on every schedule."""
    timesteps, key = times_for(name), jax.random.key(3)
    x_T = SCHEDULES[name].prior_std * normal(0)
    ancestral = sample(ddpm, name, x_T, timesteps, key)
    np.testing.assert_allclose(sample(ddim, name, x_T, timesteps, key, eta=1.0), ancestral, atol=2e-5)
    assert np.abs(sample(ddim, name, x_T, timesteps, key, eta=0.0) - ancestral).max() > 0.1


# Variances ----------------------------------------------------------------------------------------------------------


@functools.cache
def one_step(variance):
    """One DDPM step from x_t = 0 with a constant x0 = 0.3; `fraction` is what the network says of its variance."""
    schedule = SCHEDULES["discrete"]

    @jit
    def run(timesteps, key, fraction):
        alpha, sigma = schedule.alpha(timesteps[0]), schedule.sigma(timesteps[0])

        def denoise(x, t, condition=None):
            x0 = jnp.full(SHAPE, 0.3)
            return Denoised(x0, (x - alpha * x0) / sigma, fraction)

        return ddpm(denoise, schedule, jnp.zeros(SHAPE), timesteps, key, variance=variance)

    return run


def one_step_std(variance, t, s, fraction=None):
    """Standard deviation that the step adds, elementwise, read off the difference of two keys."""
    keys = jax.random.key(0), jax.random.key(1)
    x = [one_step(variance)(np.array([t, s]), key, fraction) for key in keys]
    z = [noises(key, 1, SHAPE)[0] for key in keys]
    return np.asarray(x[0] - x[1], np.float64) / (z[0] - z[1])


FRACTION = jnp.linspace(0.0, 1.0, 32).reshape(SHAPE)


@pytest.mark.parametrize(("t", "s"), [(1000, 999), (500, 499), (2, 1), (700, 650), (50, 1)])
def test_variances_are_the_closed_forms(t, s):
    """beta_t and beta-tilde_t of DDPM, from betas in float64; for strides with beta = 1 - alpha_bar_t / alpha_bar_s."""
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - linear_betas(1000))])
    beta = 1 - alpha_bar[t] / alpha_bar[s]
    beta_tilde = (1 - alpha_bar[s]) / (1 - alpha_bar[t]) * beta
    np.testing.assert_allclose(one_step_std("fixed_large", t, s) ** 2, beta, rtol=2e-3)
    np.testing.assert_allclose(one_step_std("fixed_small", t, s) ** 2, beta_tilde, rtol=2e-3)
    expected = np.exp(FRACTION * np.log(beta) + (1 - FRACTION) * np.log(beta_tilde))
    np.testing.assert_allclose(one_step_std("learned", t, s, FRACTION) ** 2, expected, rtol=2e-3)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_step_to_clean_data_adds_no_noise(variance):
    """Whatever the variance, and 0 log 0 makes no NaN."""
    x_0 = one_step(variance)(np.array([1, 0]), jax.random.key(0), FRACTION)
    np.testing.assert_allclose(x_0, np.full(SHAPE, 0.3), atol=1e-6)


# Moments ------------------------------------------------------------------------------------------------------------

DDPM_LARGE = functools.partial(ddpm, variance="fixed_large")


@pytest.mark.parametrize(
    ("sampler", "eta", "name"),
    [(ddpm, None, name) for name in SCHEDULES]
    # Right only where beta and beta-tilde are close: not a variance for the long steps of flow and EDM.
    + [(DDPM_LARGE, None, "discrete"), (ddim, 0.5, "flow"), (euler_ancestral, 1.0, "edm")],
)
def test_ancestral_samplers_reproduce_the_mixture(sampler, eta, name):
    """Mean, variance and the middle component's share, within five standard errors and the bias of 250 steps."""
    b = 4096
    x_T = SCHEDULES[name].prior_std * normal(0, (b, 1, 1, 1))
    x = np.asarray(sample(sampler, name, x_T, times_for(name, 250), eta=eta), np.float64)
    bias = 0.03 if sampler is DDPM_LARGE else 0.01
    assert x.mean() == pytest.approx(MIXTURE_MEAN, abs=5 * math.sqrt(MIXTURE_VARIANCE / b) + bias)
    assert x.var() == pytest.approx(MIXTURE_VARIANCE, abs=5 * MIXTURE_VARIANCE * math.sqrt(1 / b) + bias)
    assert np.mean((x > -0.4) & (x < 0.45)) == pytest.approx(WEIGHTS[1], abs=0.05)


# Ends of the schedule, precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "name"), [(s, n) for s in SAMPLERS for n in SCHEDULES if (s, n) != ("lcm", "edm")])
def test_both_ends_of_the_schedule(sampler, name):
    """From t_max (alpha may be 0) straight to clean data is the denoiser's x0; many steps land on the mixture."""
    schedule, sampler = SCHEDULES[name], SAMPLERS[sampler]
    x_T, timesteps = schedule.prior_std * normal(0), times_for(name)
    straight = np.append(np.full(NUM, schedule.t_max), schedule.t_min)
    x0 = mixture_x0_noise(np.asarray(x_T, np.float64), *tables(schedule, schedule.t_max), np)[0]
    np.testing.assert_allclose(sample(sampler, name, x_T, straight, start=NUM - 1), x0, atol=1e-5)
    if sampler is lcm:  # it lands there with a network distilled for it only
        return
    x_0 = np.asarray(sample(sampler, name, x_T, timesteps))
    assert np.all(np.abs(x_0[..., None] - MEANS).min(-1) < 5 * STD)
    assert x_0.std() == pytest.approx(math.sqrt(MIXTURE_VARIANCE), rel=0.3)


@pytest.mark.parametrize("sampler", [ddpm, ddim, heun, dpmpp_2m, pndm])
def test_float32_agrees_with_float64(sampler, monkeypatch):
    """A hundred steps lose less than 1e-4 in float32, and the noise has the state's precision."""
    # JAX draws other numbers in float64, so both runs are given the same.
    monkeypatch.setattr(
        samplers,
        "step_noise",
        lambda key, index, shape, dtype: jnp.sin(1e3 * jnp.arange(32) + index).reshape(shape).astype(dtype),
    )
    schedule, results = Continuous("vp"), []
    timesteps = np.append(np.linspace(1.0, 0.01, 100), 0.0)
    options = {"eta": 0.5} if sampler is ddim else {}
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype is np.float64):
            run = jit(lambda x: sampler(mixture(schedule), schedule, x, timesteps, None, **options))
            x = run(np.sin(np.arange(32)).reshape(SHAPE).astype(dtype))
            assert x.dtype == dtype
            results.append(np.asarray(x, np.float64))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_denoisers_keep_the_state_in_float32(sampler):
    """bfloat16 x_T and answers do not make the state bfloat16."""
    schedule = SCHEDULES["discrete"]

    def run(x_T, timesteps, key):
        def denoise(x, t, condition=None):
            return jax.tree.map(lambda a: a.astype(jnp.bfloat16), mixture(schedule)(x, t))

        return SAMPLERS[sampler](denoise, schedule, x_T, timesteps, key)

    x_T = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    assert jax.eval_shape(run, x_T, times_for("discrete"), jax.random.key(1)).dtype == jnp.float32


# Randomness, start, compilation -------------------------------------------------------------------------------------


def test_image_depends_on_its_own_key_only():
    """Image i of batches of 1, 2 and 5 is the same, and its key matters."""
    all_keys = jax.random.split(jax.random.key(0), 5)

    @jit
    def draw(keys):
        schedule = SCHEDULES["discrete"]
        x_T = initial_noise(schedule, keys, (len(keys), 4, 4, 1))
        return ddpm(mixture(schedule), schedule, x_T, times_for("discrete"), keys)

    def images(seeds):
        return np.asarray(draw(all_keys[np.array(seeds)]))

    five = images([0, 1, 2, 3, 4])
    np.testing.assert_allclose(images([3, 4]), five[3:], atol=1e-6)
    for seed in range(5):
        np.testing.assert_allclose(images([seed])[0], five[seed], atol=1e-6)
    assert np.abs(np.diff(five, axis=0)).max(axis=(1, 2, 3)).min() > 0.1


def test_step_noise_depends_on_the_images_own_key():
    """From one x_T for all, another key changes its own image alone."""
    three = jax.random.split(jax.random.key(0), 3)
    keys, others = three[:2], three[::2]
    x_T, timesteps = normal(0), times_for("discrete")
    one, other = (np.asarray(sample(ddpm, "discrete", x_T, timesteps, k)) for k in (keys, others))
    np.testing.assert_array_equal(one[0], other[0])
    assert np.abs(one[1] - other[1]).max() > 0.1


def test_image_does_not_depend_on_the_devices():
    """The batch sharded over 8 devices gives the images of one device."""
    keys = jax.random.split(jax.random.key(0), 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x_T = normal(0, (8, 4, 4, 1))
    one = sample(ddpm, "discrete", x_T, times_for("discrete"), keys)
    x_T, keys = jax.device_put((x_T, keys), sharding)
    eight = sample(ddpm, "discrete", x_T, times_for("discrete"), keys)
    assert len(eight.sharding.device_set) == 8
    np.testing.assert_allclose(one, eight, atol=1e-6)


def test_initial_noise_and_step_noise_differ():
    """One key serves both x_T and the steps; x_T has the schedule's standard deviation."""
    key = jax.random.key(0)
    x_T = initial_noise(SCHEDULES["edm"], key, (1, 64, 64, 1))
    assert float(x_T.std()) == pytest.approx(80, rel=0.05)
    for z in noises(key, 3, (1, 64, 64, 1)):
        assert abs(np.corrcoef(z.ravel(), np.asarray(x_T).ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("sampler", [euler, heun, dpmpp_2m, pndm])
def test_start_continues_from_the_middle(sampler):
    """From x at timesteps[10], start = 10 is the last 6 steps, with no history before them."""
    x, timesteps = normal(0), times_for("discrete")
    started = sample(sampler, "discrete", x, timesteps, start=10)
    np.testing.assert_allclose(started, sample(sampler, "discrete", x, timesteps[10:]), atol=1e-5)
    np.testing.assert_array_equal(sample(sampler, "discrete", x, timesteps, start=NUM), x)


@pytest.mark.parametrize("sampler", [ddpm, euler_ancestral])
def test_start_does_not_shift_the_noise(sampler):
    """Running steps 0..9 (the times after repeat the tenth: they change nothing) and then 10..15 is running 0..15."""
    x, timesteps, key = normal(0), times_for("discrete"), jax.random.key(3)
    head = np.where(np.arange(NUM + 1) <= 10, timesteps, timesteps[10])
    middle = sample(sampler, "discrete", x, head, key)
    whole = sample(sampler, "discrete", x, timesteps, key)
    np.testing.assert_allclose(sample(sampler, "discrete", middle, timesteps, key, start=10), whole, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_trace_and_free_skips(sampler):
    """Key, start, eta and times are traced; the denoiser runs on the steps left only (Heun: twice on each, PNDM: once more)."""
    schedule, timesteps, traces, calls = SCHEDULES["discrete"], times_for("discrete", 6), [], []

    def denoise(x, t, condition=None):
        jax.debug.callback(lambda t: calls.append(float(t)), t[0])
        return mixture(schedule)(x, t)

    @jit
    def run(key, timesteps, start, eta):
        traces.append(1)
        options = {"eta": eta} if sampler in ("ddim", "euler_ancestral") else {}
        x_T = initial_noise(schedule, key, (1, 2, 2, 1))
        return SAMPLERS[sampler](denoise, schedule, x_T, timesteps, key, start=start, **options)

    def count(*arguments):
        calls.clear()
        x = run(*arguments).block_until_ready()
        jax.effects_barrier()
        return x, len(calls), max(calls)

    whole, *full = count(jax.random.key(0), timesteps, 0, 1.0)
    late, *rest = count(jax.random.key(0), timesteps, 4, 1.0)
    other, *_ = count(jax.random.key(1), timesteps, 0, 1.0)
    elsewhere, *_ = count(jax.random.key(0), np.append(timesteps[:-1], 1.0), 0, 0.5)
    assert len(traces) == 1
    assert all(np.abs(whole - x).max() > 1e-3 for x in (late, other, elsewhere))
    assert full == [{"heun": 11, "pndm": 7}.get(sampler, 6), timesteps[0]]
    assert rest == [{"heun": 3, "pndm": 3}.get(sampler, 2), timesteps[4]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_state_is_constrained_after_every_step(sampler):
    """The constraint is told the time just reached, and the next step begins from what it answers."""
    schedule, seen = SCHEDULES["discrete"], []
    timesteps = make_timesteps(schedule, 4, "trailing")

    def denoise(x_t, t, condition=None):
        seen.append((float(t[0]), np.asarray(x_t)))
        return Denoised(0.5 * x_t, x_t)

    def constrain(x, s):
        return jnp.full_like(x, s / 1000)

    with jax.disable_jit():
        x_0 = SAMPLERS[sampler](
            denoise, schedule, jnp.ones((1, 2, 2, 1)), timesteps, jax.random.key(0), start=1, constrain=constrain
        )
    np.testing.assert_array_equal(x_0, timesteps[-1] / 1000)
    looks = {"heun": [1, 2, 2, 3, 3], "pndm": [1, 2, 2, 3]}.get(sampler, [1, 2, 3])  # all after the first constrained
    assert [t for t, _ in seen] == [timesteps[i] for i in looks]
    np.testing.assert_array_equal(seen[0][1], 1)
    for t, x in seen[1:]:
        np.testing.assert_allclose(x, t / 1000, rtol=1e-6)


def test_pndm_is_plms():
    """The noise of four looks back, the second made from the first step's ends, in the transfer of PNDM's eq. 9."""
    x_T, timesteps = normal(0), make_timesteps(SCHEDULES["discrete"], NUM, "leading")
    alpha, sigma = tables(SCHEDULES["discrete"], timesteps)

    def transfer(x, e, i):
        a, a_s = alpha[i] ** 2, alpha[i + 1] ** 2
        denominator = a * sigma[i + 1] + math.sqrt(a * (1 - a) * a_s)
        return math.sqrt(a_s / a) * x - (a_s - a) / denominator * e

    def noise(x, i):
        return mixture_x0_noise(x, alpha[i], sigma[i], np)[1]

    x = np.asarray(x_T, np.float64)
    e = [noise(x, 0)]
    x = transfer(x, (e[0] + noise(transfer(x, e[0], 0), 1)) / 2, 0)
    for i in range(1, NUM):
        e = [noise(x, i), *e]
        if i == 1:
            mean = (3 * e[0] - e[1]) / 2
        elif i == 2:
            mean = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            mean = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x = transfer(x, mean, i)
    np.testing.assert_allclose(sample(pndm, "discrete", x_T, timesteps), x, atol=3e-5)


@pytest.mark.parametrize(("average", "order"), [("v", 1), ("velocity", 2)])
def test_pndm_of_other_averages(average, order):
    """Not the same method, but it converges to the same image."""
    schedule, x_T, differences = SCHEDULES["discrete"], normal(0), []
    for num in (25, 100):
        times = make_timesteps(schedule, num, "leading")
        run = jit(lambda times: [pndm(mixture(schedule), schedule, x_T, times, average=a) for a in ("noise", average)])
        differences.append(np.abs(np.subtract(*run(times))).max())
    assert 1e-4 < differences[1] < differences[0] / (3 if order == 1 else 8)


def test_lcm_renoises_a_consistent_answer():
    """With f = c_skip x + c_out x0 with c of 10 times the network's time, x_s = alpha_s f + sigma_s z; x_0 = f."""
    x_T, timesteps, key = normal(0), np.array([1000.0, 600, 200, 2, 0]), jax.random.key(3)
    alpha, sigma = tables(SCHEDULES["discrete"], timesteps)
    x = np.asarray(x_T, np.float64)
    for i, z in enumerate(noises(key, 4, SHAPE)):
        scaled = 10 * (timesteps[i] - 1)
        x0 = mixture_x0_noise(x, alpha[i], sigma[i], np)[0]
        f = 0.25 / (scaled**2 + 0.25) * x + scaled / math.sqrt(scaled**2 + 0.25) * x0
        x = alpha[i + 1] * f + sigma[i + 1] * z
    np.testing.assert_allclose(sample(lcm, "discrete", x_T, timesteps, key), x, atol=2e-5)
    assert np.abs(x - mixture_x0_noise(x, alpha[3], sigma[3], np)[0]).max() > 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pairs_that_join_are_the_times(sampler):
    """[(t, s), ...] is the same as the times, and what they constrain to is the next step's t."""
    x_T, timesteps = normal(0), make_timesteps(SCHEDULES["discrete"], NUM, "leading")
    pairs = np.stack([timesteps[:-1], timesteps[1:]], axis=1)
    pairs[-1] = timesteps[-2:]
    run = SAMPLERS[sampler]
    whole = sample(run, "discrete", x_T, timesteps)
    np.testing.assert_allclose(sample(run, "discrete", x_T, pairs), whole, atol=1e-5)
    apart = pairs.copy()
    apart[-4:-1, 1] += 5
    assert np.abs(np.asarray(sample(run, "discrete", x_T, apart)) - whole).max() > 1e-4


def test_pairs_are_constrained_to_the_time_of_the_next_step():
    schedule, told = SCHEDULES["discrete"], []

    def constrain(x, s):
        told.append(float(s))
        return x

    with jax.disable_jit():
        pairs = np.array([[999, 950], [900, 850], [100, 1]])
        ddim(mixture(schedule), schedule, normal(0), pairs, None, constrain=constrain)
        assert told == [900, 100, 1]


def test_clipped_denoiser_samples_within_range():
    """A denoiser that overshoots gives images in [-1, 1] once clipped."""
    schedule = SCHEDULES["discrete"]

    def overshoot(x, t, condition=None):
        x0, noise, _ = mixture(schedule)(x, t)
        alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in (schedule.alpha(t), schedule.sigma(t)))
        return Denoised(2 * x0, noise - alpha / sigma * x0)

    def run(denoise):
        return jit(lambda x: euler(denoise, schedule, x, times_for("discrete")))(normal(0))

    assert np.abs(run(overshoot)).max() > 1
    assert np.abs(run(clip_x0(overshoot, schedule))).max() <= 1


@pytest.mark.parametrize(
    ("sampler", "timesteps", "key", "message"),
    [
        (functools.partial(ddpm, variance="fixed"), [2, 0], jax.random.key(0), "unknown variance 'fixed'"),
        (functools.partial(ddpm, variance="learned"), [2, 0], jax.random.key(0), "learned variance"),
        (ddim, [2], None, "at least 2 times"),
        (ddim, [[2, 1, 0]], None, "pairs"),
        (functools.partial(pndm, average="x0"), [2, 0], None, "unknown average 'x0'"),
        (ddpm, [2, 0], None, "one key per image"),
        (ddpm, [2, 0], jax.random.split(jax.random.key(0), 3), "2 images need one key or 2 keys"),
    ],
)
def test_mistakes_are_named(sampler, timesteps, key, message):
    schedule = SCHEDULES["discrete"]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: sampler(mixture(schedule), schedule, x, np.array(timesteps), key), normal(0))


def test_lcm_refuses_edm():
    with pytest.raises(ValueError, match="0 on clean data"):
        jax.eval_shape(lambda x: lcm(mixture(EDMSchedule()), EDMSchedule(), x, np.array([2, 0]), None), normal(0))
