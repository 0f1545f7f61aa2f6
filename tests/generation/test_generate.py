"""Image i depends on its seed alone, and changing a knob compiles nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxdiff.config import ShardingConfig
from jaxdiff.generation.generate import make_generator, to_uint8
from jaxdiff.generation.pictures import image_grid
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.training.sharding import make_mesh
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def task():
    return DiffusionTask(tiny_config())


@pytest.fixture(scope="module")
def params(task):
    """Random in every leaf: freshly initialised, the network would answer zero whatever it is shown."""
    leaves, tree = jax.tree.flatten(task.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)])


def images(task, params, seeds, devices=1, batch_per_device=4, **changes):
    settings = dataclasses.replace(task.config.sampling, guidance=2.0, **changes)
    mesh = make_mesh(ShardingConfig(), jax.devices()[:devices])
    generate = make_generator(task.make_sample(settings, guided=True), mesh, batch_per_device)
    labels = np.asarray(seeds, np.int32) % 10
    return np.concatenate(list(generate(params, seeds, labels, task.make_knobs(settings))))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize(("devices", "batch_per_device"), [(1, 1), (1, 8), (4, 2), (8, 4)])
def test_an_image_is_its_seed(task, params, devices, batch_per_device, sampler):
    seeds = np.arange(5, 18)
    expected = images(task, params, seeds, sampler=sampler)
    assert len(np.unique(expected.reshape(13, -1), axis=0)) == 13
    np.testing.assert_array_equal(images(task, params, seeds, devices, batch_per_device, sampler=sampler), expected)


def test_a_part_of_the_request_is_the_same(task, params):
    np.testing.assert_array_equal(images(task, params, np.arange(3, 6)), images(task, params, np.arange(8))[3:6])


def test_knobs_do_not_recompile(task, params):
    traces = []
    settings = dataclasses.replace(task.config.sampling, guidance=2.0, guidance_rescale=0.5, guidance_end=0.9)
    sample = task.make_sample(settings, guided=True)

    def counted(*args):
        traces.append(1)
        return sample(*args)

    generate = make_generator(counted, make_mesh(ShardingConfig(), jax.devices()[:1]), 2)
    results = []
    for seed, guidance, eta in [(0, 2.0, 0.0), (0, 5.0, 0.0), (0, 2.0, 1.0), (7, 2.0, 0.0)]:
        knobs = task.make_knobs(dataclasses.replace(settings, guidance=guidance, eta=eta))
        results.append(next(generate(params, np.array([seed]), np.array([1], np.int32), knobs)))
    assert len(traces) == 1
    assert all(not np.array_equal(results[0], other) for other in results[1:])


def test_to_uint8_rounds_to_the_nearest_level():
    levels = np.arange(256)
    np.testing.assert_array_equal(to_uint8(np.float32(levels / 127.5 - 1)), levels)
    np.testing.assert_array_equal(to_uint8(np.float32([-2, -1, 0, 1, 2])), [0, 0, 128, 255, 255])


def test_image_grid_places_images_row_by_row():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, 1).repeat(2, 2)
    grid = image_grid(images, columns=2, min_side=2)
    assert grid.shape == (7, 7, 1)
    assert grid[1, 1, 0] == 0 and grid[1, 4, 0] == 1 and grid[4, 1, 0] == 2 and grid[4, 4, 0] == 255
    assert image_grid(images, min_side=8).shape == (2 * 9 + 1, 2 * 9 + 1, 1)
