"""The growing schedule at the paper's settings, which the shipped configs have, and against a loop that counts images."""

import dataclasses
import importlib
import itertools

import jax
import numpy as np
import pytest

from jaxdiff.config import flatten, to_config
from jaxdiff.tasks.progressive_gan import growth_of
from jaxdiff.training.growth import Growth

CELEBA_HQ = Growth(
    resolution=1024,
    total_images=19_000_000,
    stable_images=800_000,
    fade_images=800_000,
    batch_sizes={256: 14, 512: 6, 1024: 3},
    learning_rates={128: 0.0015, 256: 0.002, 512: 0.003, 1024: 0.003},
)
CIFAR10 = Growth(resolution=32, total_images=20_000_000, stable_images=400_000, fade_images=400_000)
SMALL = Growth(32, 9_000, stable_images=700, fade_images=900, batch_size=16, batch_sizes={8: 12, 16: 6, 32: 3})


@pytest.mark.parametrize(
    ("images", "resolution", "lod", "alpha", "batch_size", "learning_rate", "leg"),
    [
        (0, 4, 8.0, 1.0, 16, 0.001, 0),
        (800_000, 4, 8.0, 1.0, 16, 0.001, 0),  # the fade begins after them
        (800_016, 8, 7.99998, 0.00002, 16, 0.001, 1),
        (1_200_000, 8, 7.5, 0.5, 16, 0.001, 1),
        (1_600_000, 8, 7.0, 1.0, 16, 0.001, 2),
        (2_400_000, 8, 7.0, 1.0, 16, 0.001, 2),
        (2_800_000, 16, 6.5, 0.5, 16, 0.001, 3),
        (7_400_000, 128, 3.75, 0.25, 16, 0.0015, 9),
        (9_000_000, 256, 2.75, 0.25, 14, 0.002, 11),
        (10_000_000, 256, 2.0, 1.0, 14, 0.002, 12),
        (11_000_000, 512, 1.25, 0.75, 6, 0.003, 13),
        (12_000_000, 512, 1.0, 1.0, 6, 0.003, 14),
        (12_600_000, 1024, 0.25, 0.75, 3, 0.003, 15),
        (12_800_000, 1024, 0.0, 1.0, 3, 0.003, 16),
        (19_000_000, 1024, 0.0, 1.0, 3, 0.003, 16),
    ],
)
def test_celeba_hq_as_the_paper_has_it(images, resolution, lod, alpha, batch_size, learning_rate, leg):
    phase = CELEBA_HQ.at(images)
    assert (phase.resolution, phase.batch_size, phase.learning_rate) == (resolution, batch_size, learning_rate)
    assert (phase.lod, phase.alpha, phase.leg) == (pytest.approx(lod), pytest.approx(alpha), leg)
    assert phase.resolution == 4 * 2**phase.stage


def test_cifar10_as_the_paper_has_it():
    thousands = (0, 400, 600, 800, 1_400, 2_000, 2_200, 2_400, 20_000)
    phases = [CIFAR10.at(1000 * number) for number in thousands]
    assert [phase.resolution for phase in phases] == [4, 4, 8, 8, 16, 16, 32, 32, 32]
    assert [phase.lod for phase in phases] == [3.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    assert {(phase.batch_size, phase.learning_rate) for phase in phases} == {(16, 0.001)}
    assert CIFAR10.num_steps == 20_000_000 // 16
    assert CIFAR10.at_step(25_000).resolution == 4 and CIFAR10.at_step(25_004).resolution == 8


ADAM = {"optimizer.beta1": 0.0, "optimizer.beta2": 0.99, "optimizer.epsilon": 1e-8, "optimizer.clip_norm": 0.0}
AVERAGE = {"optimizer.ema_decay": 0.999, "optimizer.ema_warmup": False}
WGAN_GP = {"loss": "wgan_gp", "penalty_weight": 10.0, "drift": 1e-3, "stddev_parts": 1, "hold_steps": 4}
# What Growth does not say of the recipes: penalty, groups, order of the updates, networks, mirroring.
RECIPES = {
    "celeba_hq": {
        **{"gamma": 1.0, "stddev_group": 4, "together": False},
        **{"latent_dim": 512, "channel_base": 8192, "channel_max": 512},
    },
    "cifar10": {
        **{"gamma": 750.0, "stddev_group": 0, "together": True},
        **{"latent_dim": 128, "channel_base": 4096, "channel_max": 128},
    },
}


# As the configs say it: a batch size for every resolution; the learning rate grows on the authors' eight devices only.
SIXTEEN = dict.fromkeys((4, 8, 16, 32, 64, 128), 16)
ON_ONE_DEVICE = dataclasses.replace(CELEBA_HQ, batch_sizes=SIXTEEN | dict(CELEBA_HQ.batch_sizes), learning_rates={})


@pytest.mark.parametrize(("name", "growth", "flip"), [("celeba_hq", ON_ONE_DEVICE, True), ("cifar10", CIFAR10, False)])
def test_the_shipped_configs_are_the_papers_recipes(name, growth, flip):
    config = to_config(importlib.import_module(f"configs.{name}_progressive_gan").get_config())
    assert growth_of(config) == growth
    expected = {f"progressive_gan.{key}": value for key, value in {**WGAN_GP, **RECIPES[name]}.items()}
    expected |= {**ADAM, **AVERAGE, "data.flip": flip, "model.num_classes": 0, "task": "progressive_gan"}
    keys = flatten(config)
    assert {key: keys[key] for key in expected} == expected


def walk(growth):
    """Of each step the phase and the images seen before it, by counting."""
    images = 0
    while images < growth.total_images:
        phase = growth.at(images)
        for _ in range(growth.hold_steps):
            yield phase, images
            images += phase.batch_size


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hold_steps": 1},
        {"fade_images": 0},
        {"stable_images": 0},
        {"stable_images": 10, "fade_images": 20},  # a look may then pass a whole stage by
        {"total_images": 1_500},  # ends in a fade
        {"resolution": 4, "batch_sizes": {}},
    ],
)
def test_every_step_is_what_counting_gives(changes):
    settings = {"resolution": 32, "total_images": 9_000, "stable_images": 700, "fade_images": 900}
    growth = Growth(**{**settings, "batch_sizes": {8: 12, 16: 6, 32: 3}, **changes})
    steps = list(walk(growth))
    assert growth.num_steps == len(steps)
    for step, (phase, images) in enumerate(steps):
        assert growth.at_step(step) == phase
        assert growth.images_before(step) == images
    assert growth.images_before(len(steps)) >= growth.total_images
    for stage in {phase.stage for phase, _ in steps}:
        assert growth.first_step(stage) == next(step for step, (phase, _) in enumerate(steps) if phase.stage == stage)


@pytest.mark.parametrize("changes", [{}, {"hold_steps": 1}, {"fade_images": 0}, {"stable_images": 0}])
def test_a_compiled_program_sees_the_same_schedule(changes):
    settings = {"resolution": 32, "total_images": 9_000, "stable_images": 700, "fade_images": 900}
    growth = Growth(**{**settings, "batch_sizes": {8: 12, 16: 6, 32: 3}, **changes})
    phases = [phase for phase, _ in walk(growth)]
    stages = np.array([phase.stage for phase in phases])
    for stage in range(growth.last_stage + 1):
        steps = np.flatnonzero(stages == stage)
        alphas = jax.jit(jax.vmap(lambda step, stage=stage: growth.traced_alpha(stage, step)))(steps)
        np.testing.assert_allclose(alphas, [phases[step].alpha for step in steps], rtol=1e-6)
    resets = {step for stage in range(growth.last_stage + 1) for step in growth.resets(stage) if stages[step] == stage}
    edges = {step for step in range(1, len(phases)) if phases[step].leg != phases[step - 1].leg}
    assert resets == {0} | edges


def test_lod_falls_and_the_optimiser_is_reset_at_both_edges_of_every_fade():
    phases = [phase for phase, _ in walk(SMALL)]
    lods = [phase.lod for phase in phases]
    assert lods == sorted(lods, reverse=True) and lods[0] == 3 and lods[-1] == 0
    edges = [(a, b) for a, b in itertools.pairwise(phases) if a.leg != b.leg]
    assert [(a.leg, b.leg) for a, b in edges] == [(i, i + 1) for i in range(6)]
    for before, after in edges:
        assert (before.alpha == 1) != (after.alpha == 1)  # into a fade or out of it
        assert int(before.lod // 1) != int(after.lod // 1) or -(-before.lod // 1) != -(-after.lod // 1)
    assert all(0 < phase.alpha < 1 for phase in phases if phase.leg % 2)
    assert all(phase.alpha == 1 for phase in phases if not phase.leg % 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 48}, "48 is not 4 doubled some times"),
        ({"stable_images": 0, "fade_images": 0}, "nor both 0"),
        ({"fade_images": -1}, "not be negative"),
        ({"batch_sizes": {8: 0}}, "at least 1"),
        ({"batch_sizes": {64: 3}}, r"\[64\], which are no resolutions"),
        ({"learning_rates": {2: 1.0}}, r"\[2\], which are no resolutions"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        Growth(**{"resolution": 32, "total_images": 100, **changes})
