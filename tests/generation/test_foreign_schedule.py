"""Schedules, times and samplers of diffusers' files against diffusers itself (kept numbers, and live as a peer)."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.predictions import make_denoiser
from jaxdiff.diffusion.samplers import SAMPLERS, initial_noise
from jaxdiff.generation.foreign_schedule import CLASSES, DEFAULTS, foreign_sampling, training_schedule
from tests.golden import make_samplers as peers

CASES = peers.cases()
TOLERANCE = 1e-4  # relative to the largest number, after 20 steps
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def ours(case):
    """The last x, in the scale of the scheduler that the file names."""
    config, start = case["config"], case["start"]
    sampling = foreign_sampling(config, case["num"])
    schedule = sampling.schedule

    @jit
    def run():
        def network(x, time, condition):
            return peers.network(x, time.reshape(-1, 1, 1, 1), jnp)

        key = jax.random.key(peers.KEY)
        denoise = sampling.limit(make_denoiser(network, schedule, sampling.prediction))
        x = noise = initial_noise(schedule, key, peers.SHAPE)
        if start:
            t = sampling.start_times[start]
            x = schedule.alpha(t) * peers.image() + schedule.sigma(t) * noise / schedule.prior_std
        options = sampling.options | ({"eta": case["eta"]} if sampling.sampler == "ddim" else {})
        x = SAMPLERS[sampling.sampler](denoise, schedule, x, sampling.timesteps, key, start=start, **options)
        return x / schedule.alpha(sampling.start_times[-1]) if "Discrete" in config["_class_name"] else x

    return np.asarray(run())


def relative_error(x, expected):
    assert x.shape == expected.shape and np.isfinite(x).all()
    return float(np.abs(x - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", peers.KEPT)
def test_samples_are_the_golden_ones(golden_dir, name):
    golden = np.load(golden_dir / "samplers.npz")
    assert set(golden.files) == set(peers.KEPT)
    assert relative_error(ours(CASES[name]), golden[name]) < TOLERANCE


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_golden_numbers_are_those_of_the_peer_here(golden_dir):
    golden, noise = np.load(golden_dir / "samplers.npz"), peers.noises(peers.NUM)
    for name in peers.KEPT:
        np.testing.assert_allclose(peers.theirs(CASES[name], noise), golden[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_samples_are_those_of_diffusers(name):
    case = CASES[name]
    assert relative_error(ours(case), peers.theirs(case, peers.noises(peers.NUM))) < TOLERANCE


@pytest.mark.peer
@pytest.mark.parametrize("name", CLASSES)
def test_options_and_defaults_are_those_of_diffusers(name):
    import diffusers

    parameters = inspect.signature(getattr(diffusers, CLASSES[name]).__init__).parameters
    theirs = {key: p.default for key, p in parameters.items() if key not in ("self", "kwargs")}
    assert theirs == DEFAULTS[name]


# What a file means ------------------------------------------------------------------------------------------------


def sampling(num=20, sampler=None, stable_diffusion=False, **changes):
    config = peers.SD1 | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0"} | changes
    return foreign_sampling(config, num, sampler, stable_diffusion=stable_diffusion)


def told(s):
    """What the network is told at each of the steps."""
    timesteps = np.asarray(s.timesteps)
    return np.asarray(s.schedule.network_time(timesteps[:, 0] if timesteps.ndim == 2 else timesteps[:-1]))


def test_stable_diffusion_1_is_plms_from_981():
    """N + 1 network calls; image to image begins at the time that the call told first is at, the second one doubled."""
    s = sampling()
    assert (s.sampler, s.prediction) == ("pndm", "noise")
    np.testing.assert_array_equal(told(s), np.arange(951, 0, -50))
    assert s.timesteps[-1] == 1  # set_alpha_to_one is off: it ends at the first noise level
    np.testing.assert_array_equal(s.start_times[:4] - 1, [951, 901, 901, 851])
    assert len(s.start_times) == 21 and s.start_times[-1] == 1


@pytest.mark.parametrize("sampler", CLASSES)
def test_another_sampler_takes_what_the_file_says_of_the_network(sampler):
    """Betas and prediction stay; each has its own spacing; a name answers with the sampler of that name."""
    s = sampling(sampler=sampler, prediction_type="v_prediction")
    assert (s.sampler, s.prediction) == (sampler, "v")
    first = {"euler": 999, "euler_ancestral": 999, "heun": 999, "dpm++2m": 999, "lcm": 999}.get(sampler, 951)
    assert told(s)[0] == first
    alpha = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))[first]
    assert float(s.schedule.alpha(s.start_times[0])) == pytest.approx(alpha, rel=1e-6)


def test_x_T_of_euler_is_noise_alone_where_it_starts_at_the_last_level():
    """There diffusers' x_T is sigma_max times the noise, elsewhere sqrt(sigma_max^2 + 1) times: alpha_T x_T here."""
    alpha = float(sampling(sampler="euler").schedule.alpha(20))
    assert sampling(sampler="euler").schedule.prior_std == pytest.approx(math.sqrt(1 - alpha**2), rel=1e-6)
    assert sampling(sampler="euler", timestep_spacing="leading").schedule.prior_std == 1


def test_stable_diffusion_pipelines_overrule_the_file():
    """An old file's steps_offset 0 becomes 1, and latents are never clipped."""
    for flag, first in ((False, 950), (True, 951)):
        s = sampling(sampler="ddim", steps_offset=0, clip_sample=True, stable_diffusion=flag)
        assert told(s)[0] == first
        assert s.limit(told) is told if flag else s.limit(told) is not told


def test_zero_terminal_snr_is_finite_for_ratios_only():
    assert sampling(sampler="ddim", rescale_betas_zero_snr=True).schedule.zero_terminal_snr
    s = sampling(sampler="euler", rescale_betas_zero_snr=True)
    assert not s.schedule.zero_terminal_snr and float(s.schedule.alpha(20)) == pytest.approx(2**-12, rel=1e-6)


def test_ratios_are_linear_between_the_levels():
    """Euler's "linspace" goes where there is no level; the end is clean."""
    s = sampling(3, "euler", num_train_timesteps=10, beta_start=0.01, beta_end=0.4)
    np.testing.assert_array_equal(told(s), [9, 4.5, 0])
    alpha_squared = np.cumprod(1 - np.linspace(0.1, 0.4**0.5, 10) ** 2)
    ratios = np.sqrt(1 / alpha_squared - 1)
    expected = [ratios[9], (ratios[4] + ratios[5]) / 2, ratios[0], 0]
    np.testing.assert_allclose(s.schedule.sigma(s.timesteps) / s.schedule.alpha(s.timesteps), expected, rtol=1e-5)


def test_training_schedule_is_the_whole_one():
    schedule, prediction = training_schedule(peers.ZERO | {"_class_name": "DDIMScheduler"})
    assert (schedule.num_steps, prediction, schedule.zero_terminal_snr) == (1000, "v", True)
    assert float(schedule.beta(1)) == pytest.approx(0.00085, rel=1e-5)


def test_options_of_other_schedulers_are_without_effect():
    assert sampling(solver_p=None, predict_x0=True, use_karras_sigmas=True, algorithm_type="x").sampler == "pndm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "unknown scheduler class 'UniPCMultistepScheduler'"),
        ({"_class_name": None}, "unknown scheduler class None"),
        ({"sampler": "unipc"}, "unknown sampler 'unipc'"),
        ({"shift": 3.0}, "option 'shift' that no supported"),
        ({"skip_prk_steps": False}, "PNDMScheduler's skip_prk_steps = False is not supported"),
        ({"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction' is not supported"),
        ({"prediction_type": "sample"}, "PNDMScheduler's prediction_type = 'sample'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid' is not supported"),
        ({"timestep_spacing": "even"}, "timestep_spacing = 'even'"),
        ({"rescale_betas_zero_snr": True}, "PNDMScheduler has no rescale_betas_zero_snr"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps = '1000' must be an integer"),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0 must lie in"),
        ({"beta_end": None}, "beta_end = None must be a number"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one = 1 must be a bool"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must be 1000 numbers"),
        ({"trained_betas": "x"}, "trained_betas = 'x' must be a list"),
        ({"num": 0}, "0 sampling steps"),
        ({"num": 1001}, "from 1 to its 1000"),
        ({"num": 1000}, "'leading' with steps_offset 1 leaves 0..999"),
        ({"sampler": "lcm", "num": 51}, "original_inference_steps = 50"),
        ({"sampler": "euler", "use_beta_sigmas": True}, "EulerDiscreteScheduler's use_beta_sigmas = True"),
        ({"sampler": "euler", "interpolation_type": "log_linear"}, "interpolation_type = 'log_linear'"),
        ({"sampler": "euler", "timestep_type": "continuous"}, "timestep_type = 'continuous'"),
        ({"sampler": "dpm++2m", "algorithm_type": "sde-dpmsolver++"}, "algorithm_type = 'sde-dpmsolver\\+\\+'"),
        ({"sampler": "dpm++2m", "solver_order": 3}, "solver_order = 3 is not supported"),
        ({"sampler": "dpm++2m", "solver_type": "heun"}, "solver_type = 'heun'"),
        ({"sampler": "dpm++2m", "variance_type": "learned"}, "variance_type = 'learned'"),
        ({"sampler": "ddpm", "variance_type": "learned_range"}, "variance_type = 'learned_range'"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        sampling(**changes)
