"""The progressive GAN as a task: the same run on any devices and after any interruption; images of a seed; impossible configs."""

import dataclasses
import functools
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaxdiff.config import ConfigError, ShardingConfig
from jaxdiff.data.sources import open_source
from jaxdiff.evaluation.scores import Options
from jaxdiff.generation.pictures import image_grid
from jaxdiff.models.progressive_gan import fade_images, halve_pixels
from jaxdiff.tasks.evaluate import Reference, evaluate_samples
from jaxdiff.tasks.progressive_gan import ProgressiveGANTask, growth_of, latents, resolve_length
from jaxdiff.tasks.run import Run, load_run
from jaxdiff.tasks.score import make_training_scores
from jaxdiff.tasks.train import open_run, train_run
from jaxdiff.training.collectives import collectives, instructions
from jaxdiff.training.log import read_metrics
from jaxdiff.training.loop import init_sharded
from jaxdiff.training.sharding import make_mesh, make_runner
from tests.tiny import tiny_batch, tiny_config
from tests.training.test_loop import final_state, log_of, start, wait_for
from tests.training.test_sharding import relative_distance

GAN = {
    "task": "progressive_gan",
    "model.num_classes": 0,
    "progressive_gan.latent_dim": 6,
    "progressive_gan.channel_base": 32,
    "progressive_gan.channel_max": 8,
    "progressive_gan.stable_kimg": 0.048,  # 3 steps, looked at every second
    "progressive_gan.fade_kimg": 0.096,
    "progressive_gan.total_kimg": 0.224,
    "progressive_gan.hold_steps": 2,
    "optimizer.learning_rate": 1e-3,
    "optimizer.beta1": 0.0,
    "optimizer.beta2": 0.99,
    "optimizer.clip_norm": 0.0,
    "training.log_every": 2,
    "training.sample_every": 0,
    "sampling.batch_per_device": 8,
}
ONE = make_mesh(ShardingConfig(), jax.devices()[:1])


def gan_config(**changes):
    return resolve_length(tiny_config(**{**GAN, **changes}))


def run_of(step=100, **changes):
    """A run of random parameters."""
    task = ProgressiveGANTask(gan_config(**changes), step)
    return Run(task, jax.jit(task.init)(jax.random.key(0)), step, ())


# The same run, whatever the machine and whatever happens to it ---------------------------------------------------------


def states_after(sharding, num_devices, parts, steps=3, folded="auto"):
    """Both networks after some steps in a fade, the losses, the last state where it lives, and the compiled program."""
    config = gan_config(
        **{
            "progressive_gan.channel_base": 128,
            "progressive_gan.channel_max": 24,  # wide enough for FSDP to split kernels
            "progressive_gan.stddev_parts": parts,
            "progressive_gan.folded": folded,
            "sharding.mode": sharding.mode,
            "optimizer.epsilon": 1e-3,  # else a gradient that is nearly 0 makes as large a step as any
        }
    )
    mesh = make_mesh(sharding, jax.devices()[:num_devices])
    task = ProgressiveGANTask(config).trainable(mesh)
    key, begin = jax.random.key(1), task.stages[1].first_step + 2
    shapes = jax.eval_shape(task.init, key)
    runner = make_runner(functools.partial(task.make_update, number=1), shapes, mesh, sharding.mode)
    state = init_sharded(task.init, key, runner.state_shardings)
    state = dataclasses.replace(state, step=jax.device_put(jnp.int32(begin), runner.state_shardings.step))
    losses, program = [], runner.step.lower(state, runner.put_batch(tiny_batch(config)), key).compile()
    for step in range(steps):
        state, metrics = program(state, runner.put_batch(tiny_batch(config, seed=step)), key)
        losses.append([float(metrics[name]) for name in ("discriminator_loss", "generator_loss", "penalty")])
        assert 0 < float(metrics["alpha"]) < 1
    trees = jax.device_get((state.params, state.ema_params, state.discriminator_params))
    return trees, losses, state, program.as_text()


@pytest.fixture(scope="module")
def one_device():
    return states_after(ShardingConfig(), 1, parts=8)


MODES = {"jit": ShardingConfig(), "pmap": ShardingConfig(mode="pmap"), "fsdp": ShardingConfig(fsdp=4)}


@pytest.mark.parametrize("mode", MODES)
def test_steps_in_a_fade_agree_with_one_device(one_device, mode):
    trees, losses, state, text = states_after(MODES[mode], 8, parts=8)
    np.testing.assert_allclose(losses, one_device[1], rtol=2e-4, atol=1e-5)
    assert relative_distance(trees, one_device[0]) < 1e-5
    if mode == "fsdp":
        # Both networks, the average and the moments are split, and no activation travels: what is gathered are the parameters,
        # the discriminator's once as they were and once as they have become.
        large = [leaf for leaf in jax.tree.leaves(state) if leaf.size >= 4096]
        assert all(4 * leaf.addressable_shards[0].data.size == leaf.size for leaf in large)
        params = (state.params, state.discriminator_params, state.discriminator_params)
        used = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.size >= 4096]
        assert len(used) > 8 and len(large) > len(used)
        assert sorted(s for one in instructions(text) if one.kind == "all-gather" for s in one.shapes) == sorted(used)
        assert set(collectives(text)) <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_steps_with_folded_features_and_images_agree(one_device):
    """What a TPU does where channels are few; the program is another one."""
    trees, losses, _, text = states_after(ShardingConfig(), 1, parts=8, folded="always")
    np.testing.assert_allclose(losses, one_device[1], rtol=2e-4, atol=1e-5)
    assert relative_distance(trees, one_device[0]) < 1e-5
    assert "[3,3,96,96]" in text and "[3,3,96,96]" not in one_device[3]


@pytest.mark.slow
def test_the_comparison_notices_other_groups(one_device):
    """The bounds above mean something: with other groups of the minibatch standard deviation the run is another one.

    The groups are the discriminator's, whose parameters tell; the averages of the generator have hardly moved.
    """
    trees, losses, *_ = states_after(ShardingConfig(), 1, parts=1)
    assert relative_distance(trees[2], one_device[0][2]) > 1e-4
    assert np.abs(np.subtract(losses, one_device[1])).max() > 0.01


def step_at_the_edge(task, number, state):
    """The state after the last step of 4x4 (number 0), or the first of 8x8."""
    trainable, key, batch = task.trainable(ONE), jax.random.key(1), tiny_batch(task.config)
    if state is None:
        state = dataclasses.replace(jax.jit(trainable.init)(key), step=jnp.int32(trainable.stages[1].first_step - 1))
    shrunk = {**batch, "image": batch["image"][:, :: 4 // (number + 1), :: 4 // (number + 1)]}
    state, metrics = jax.jit(trainable.make_update(None, number))(state, shrunk, key)
    assert (metrics["alpha"] < 1) == number and metrics["skipped"] == 0 and metrics["generator_grad_norm"] > 0
    return state


@functools.cache
def before_the_edge():
    return step_at_the_edge(ProgressiveGANTask(gan_config(**{"data.image_size": 16})), 0, None)


def over_the_edge(rate):
    """The state after the last step of 4x4 and after the first of 8x8, which has this learning rate."""
    task = ProgressiveGANTask(gan_config(**{"data.image_size": 16}))
    vars(task)["growth"] = dataclasses.replace(task.growth, learning_rates={8: rate})
    return before_the_edge(), step_at_the_edge(task, 1, before_the_edge())


NETWORKS = ("params", "discriminator_params")


def test_growing_leaves_all_parameters_as_they_were():
    """Nothing is drawn anew, copied or converted: with a learning rate of 0 the first step of a stage changes no bit."""
    before, after = over_the_edge(0.0)
    for field in NETWORKS:
        same(getattr(after, field), getattr(before, field))


def test_a_stages_step_changes_no_bit_of_what_is_still_to_come():
    before, after = over_the_edge(1e-3)
    for field in (*NETWORKS, "ema_params"):
        old, new = getattr(before, field), getattr(after, field)
        later = {name for name in old if name.endswith("_16")}
        assert len(later) == 2 and old.keys() == new.keys()
        same({name: new[name] for name in later}, {name: old[name] for name in later})
        moved = {name for name in old if any((a != b).any() for a, b in leaves_of_both(old[name], new[name]))}
        assert moved == old.keys() - later or field == "ema_params"
    for field in ("opt_state", "discriminator_opt_state"):
        moments = optax.tree.get(getattr(after, field), "nu")
        assert {name for name, part in moments.items() if any(leaf.any() for leaf in jax.tree.leaves(part))} == {
            name for name in moments if not name.endswith("_16")
        }


def leaves_of_both(one, other):
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


def same(state, expected):
    for ours, theirs in leaves_of_both(state, expected):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run through growth and fade, and what it was."""
    config, workdir = gan_config(**{"training.sample_every": 7}), tmp_path_factory.mktemp("gan") / "run"
    return config, workdir, train_run(config, workdir)


def assert_grid_is_of_fixed_latents(workdir):
    """The newest grid shows the images of the seeds 0, 1, ..., as anybody can make them of the newest checkpoint."""
    run = load_run(workdir)
    with Image.open(workdir / "samples" / f"step_{run.step:07d}.png") as grid:
        expected = image_grid(run.make(np.arange(run.task.config.sampling.num_images)), min_side=32)
        np.testing.assert_array_equal(np.asarray(grid)[..., None], expected)


def test_stopped_in_a_fade_and_resumed_is_bit_identical(straight, tmp_path):
    config, workdir, outcome = straight
    shorter = gan_config(**{"progressive_gan.total_kimg": 0.128})
    middle = train_run(shorter, tmp_path / "run")
    alpha = growth_of(config).at_step(middle.step - 1).alpha
    assert 0 < alpha < 1 and growth_of(config).at_step(middle.step).alpha < 1, "this was to be in a fade"
    assert_grid_is_of_fixed_latents(tmp_path / "run")
    resumed = train_run(config, tmp_path / "run")
    assert (resumed.step, outcome.step) == (config.training.num_steps,) * 2
    same(resumed.state, outcome.state)


@pytest.mark.slow
def test_killed_in_a_fade_and_resumed_is_bit_identical(tmp_path):
    long = {"progressive_gan.stable_kimg": 0.08, "progressive_gan.fade_kimg": 3.2, "progressive_gan.total_kimg": 3.6}
    config = gan_config(**long, **{"training.checkpoint_every": 25})
    processes = [start(config, tmp_path / name) for name in ("straight", "run")]
    wait_for(tmp_path / "run" / "checkpoints" / "50", processes[1], tmp_path / "run")
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait()
    reached = final_state(config, tmp_path / "run")[0]
    assert 0 < growth_of(config).at_step(reached).alpha < 1, "it was not killed in a fade: the test shows nothing"
    processes[1] = start(config, tmp_path / "run")
    for name, process in zip(("straight", "run"), processes, strict=True):
        assert process.wait(600) == 0, log_of(tmp_path / name).read_text()
    (step, state), (_, expected) = (final_state(config, tmp_path / name) for name in ("run", "straight"))
    assert step == config.training.num_steps
    same(state, expected)


# What a run leaves -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_pictures_of_its_growth_and_numbers(straight):
    config, workdir, outcome = straight
    records = [record for record in read_metrics(workdir / "metrics.jsonl") if "loss" in record]
    names = {"discriminator_loss", "generator_loss", "penalty", "wasserstein", "alpha", "skipped"}
    assert all(names <= set(record) for record in records)
    alphas = [record["alpha"] for record in records]
    assert alphas[0] == alphas[-1] == 1 and any(0 < alpha < 1 for alpha in alphas)
    curves = ProgressiveGANTask(config).trainable(ONE).curves
    assert (workdir / "curves.png").is_file() and names <= set(curves)
    assert_grid_is_of_fixed_latents(workdir)
    for step in (7, outcome.step):
        assert (workdir / "samples" / f"step_{step:07d}.png").is_file()
        with Image.open(workdir / "interpolation" / f"step_{step:07d}.gif") as gif:
            assert gif.n_frames > 20 and gif.size == (32, 32)


def test_a_finished_run_makes_images_of_its_seeds(straight):
    _, workdir, outcome = straight
    run = load_run(workdir)
    assert run.step == outcome.step
    images = run.make(np.arange(5))
    assert images.shape == (5, 8, 8, 1) and len(np.unique(images.reshape(5, -1), axis=0)) == 5
    np.testing.assert_array_equal(run.make([3])[0], images[3])


def test_samples_are_those_of_the_stage_reached():
    config = gan_config()
    first, (fade, _) = 3, growth_of(config).resets(1)
    for step, side in ((first, 4), (fade, 4), (fade + 1, 8), (100, 8)):
        assert run_of(step).make([0], mesh=ONE).shape == (1, side, side, 1)
    early = Run(ProgressiveGANTask(config, first), None, first, ())
    with pytest.raises(ConfigError, match="at step 3 this run has grown to 4x4 pixels"):
        early.task.describe_sampling(dataclasses.replace(config.sampling, resolution=8))


def test_training_scores_images_of_the_size_grown_to(tmp_path):
    """Pixels' scores without an extractor: those of the finished run's samples, and none of images that are too small yet."""
    changes = {"data.image_size": 16, "sampling.batch_per_device": 4, "sampling.resolution": 8}
    changes |= {"evaluation.metrics": ("swd", "ms_ssim"), "evaluation.num_images": 10}
    changes |= {"progressive_gan.total_kimg": 0.4}
    config = gan_config(**changes)
    source = open_source("digits", None, "train")
    task, last = ProgressiveGANTask(config), config.training.num_steps
    scores = make_training_scores(task, source, (), config.evaluation, ONE, tmp_path)
    params = jax.jit(task.init)(jax.random.key(0))
    names = []
    for stage in task.stages():
        found = scores(SimpleNamespace(step=jnp.int32(stage.first_step + 1), ema_params=params))
        names.append(set(found))
    assert names == [set(), {"swd_8", "swd"}, {"swd_16", "swd", "ms_ssim"}]
    run = Run(dataclasses.replace(task, step=last), params, last, ())
    settings = dataclasses.replace(config.sampling, resolution=0)
    where = Reference(split="train")
    alone = evaluate_samples(["swd", "ms_ssim"], run, tmp_path, where, None, Options(), 10, 0, settings)
    assert scores(SimpleNamespace(step=jnp.int32(last), ema_params=params)) == {s.name: s.value for s in alone.scores}


def test_sizes_that_pixels_scores_cannot_be_told_of(tmp_path):
    config = gan_config(**{"evaluation.metrics": ("ms_ssim",), "evaluation.every": 2})
    with pytest.raises(ConfigError, match=r"config.evaluation: ms_ssim halves images 4 times: 8x8"):
        train_run(config, tmp_path / "run")


def test_truncation_keeps_the_latents_small_and_a_small_resolution_shows_means():
    run = run_of()
    settings = run.task.config.sampling
    plain = run.task.make_sample(settings, False)
    keys = jax.vmap(jax.random.key)(jnp.arange(64))
    z = latents(keys, 50, jnp.float32(1.0))
    np.testing.assert_array_equal(z, jax.vmap(lambda key: jax.random.normal(key, (50,)))(keys))
    knobs = run.task.make_knobs(dataclasses.replace(settings, truncation=0.7))
    small = latents(keys, 50, knobs["within"])
    assert 0.69 < float(jnp.abs(small).max()) < 0.70001
    assert (jnp.sign(small) == jnp.sign(z)).all() and (jnp.argsort(small) == jnp.argsort(z)).all()
    coarse = run.task.make_sample(dataclasses.replace(settings, resolution=4), False)
    knobs = run.task.make_knobs(settings)
    images = plain(run.params, keys[:3], None, knobs)
    np.testing.assert_allclose(coarse(run.params, keys[:3], None, knobs), halve_pixels(images), rtol=1e-5, atol=1e-6)


def test_an_interpolation_goes_from_one_seed_to_another():
    run = run_of()
    images = run.interpolate(5, [3, 8])
    np.testing.assert_allclose(images[[0, -1]].astype(int), run.make([3, 8]).astype(int), atol=1)
    assert len(np.unique(images.reshape(5, -1), axis=0)) == 5


def networks(task):
    """Random parameters of both."""
    image = jnp.zeros((4, 8, 8, 1))
    judge = jax.jit(task.discriminator().init)(jax.random.key(1), image)["params"]
    return jax.jit(task.init)(jax.random.key(0)), judge


def test_reals_fade_as_the_generators_images_do():
    task, alpha = ProgressiveGANTask(gan_config()), jnp.float32(0.25)
    (params, judge), batch = networks(task), tiny_batch(task.config)
    x = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1

    @jax.jit
    def difference(x):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.split(jax.random.key(2))[0], i))(batch["index"])
        z = jax.vmap(lambda key: jax.random.normal(key, (6,)))(keys)
        fake = task.generator().apply({"params": params}, z, stage=1, alpha=alpha)
        scores = [task.discriminator().apply({"params": judge}, y, stage=1, alpha=alpha)[0] for y in (x, fake)]
        return (scores[0] - scores[1]).mean()

    _, metrics = jax.jit(task.game(1).discriminator)(judge, params, batch, jax.random.key(2), alpha)
    np.testing.assert_allclose(metrics["wasserstein"], difference(fade_images(x, alpha)), rtol=1e-4)
    assert abs(difference(x) - metrics["wasserstein"]) > 1e-3 * abs(metrics["wasserstein"])


@pytest.mark.parametrize("loss", ["wgan_gp", "r1"])
def test_classes_make_both_networks_conditional(loss):
    def losses(weight):
        changes = {"model.num_classes": 10, "progressive_gan.loss": loss, "progressive_gan.class_weight": weight}
        task = ProgressiveGANTask(gan_config(**changes), 100)
        params, judge = networks(task)
        rest = (tiny_batch(task.config), jax.random.key(2), jnp.float32(1.0))
        of_both = (
            jax.jit(task.game(1).discriminator)(judge, params, *rest),
            jax.jit(task.game(1).generator)(params, judge, *rest),
        )
        return task, params, of_both

    _, _, ((plain, _), (plain_generator, _)) = losses(0.0)
    task, params, ((value, metrics), (generator, _)) = losses(1.0)
    of_fakes = generator - plain_generator
    assert np.isfinite(value) and metrics["class_loss"] > 0 and of_fakes > 0
    np.testing.assert_allclose(value - plain, metrics["class_loss"] + of_fakes, rtol=1e-3)
    run = Run(task, params, 100, ())
    images = run.make([0, 0], run.labels(["3", "4"], 2), mesh=ONE)
    assert (images[0] != images[1]).any()


def test_rates_and_batches_by_resolution():
    config = gan_config(**{"progressive_gan.batch_sizes": (16, 8), "progressive_gan.learning_rates": (1e-3, 2e-3)})
    growth = growth_of(config)
    assert growth.batch_sizes == {4: 16, 8: 8} and growth.learning_rates == {4: 1e-3, 8: 2e-3}
    stages = ProgressiveGANTask(config).stages()
    assert [(stage.name, stage.batch_size) for stage in stages] == [("4x4", 16), ("8x8", 8)]
    seen = [options for _, options in ProgressiveGANTask(config).loading()]
    assert seen == [{"shrink_by": 2, "begin": (0, 0)}, {"shrink_by": 1, "begin": (stages[1].first_step, 64)}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.image_size": 12}, "data.image_size = 12 must be one of 4, 8, 16"),
        ({"progressive_gan.batch_sizes": (16, 8, 4)}, "3 numbers for 2 resolutions, 4 to 8"),
        ({"progressive_gan.batch_sizes": (16, 0)}, "must hold positive numbers"),
        ({"progressive_gan.learning_rates": (0.0,)}, "must hold positive numbers"),
        ({"training.batch_size": 5}, "5 images cannot be split into groups of 2 to 4"),
        ({"progressive_gan.stddev_parts": 3}, "stddev_parts = 3 must divide every batch, and one is of 16"),
        ({"progressive_gan.gamma": 0.0}, "gamma = 0.0 must be positive"),
        ({"progressive_gan.stable_kimg": 0.0, "progressive_gan.fade_kimg": 0.0}, "must not both be 0"),
        ({"optimizer.schedule": "cosine"}, "optimizer.schedule must be 'constant'"),
        ({"training.accumulation_steps": 2}, "a GAN's step is not split"),
        ({"text.enabled": True}, "a progressive GAN reads no text"),
        ({"sampling.resolution": 5}, "sampling.resolution = 5 must be 0 or one of 4, 8"),
        ({"progressive_gan.loss": "hinge"}, "must be one of 'wgan_gp', 'r1'"),
        ({"task": "vae", "sampling.truncation": 0.7}, "is for task 'progressive_gan'"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**{**GAN, **changes})


def test_devices_that_cannot_share(tmp_path):
    changes = {"progressive_gan.batch_sizes": (16, 12)}
    with pytest.raises(ConfigError, match="progressive_gan.batch_sizes at 8x8 = 12 must be divisible by 8 devices"):
        train_run(gan_config(**changes), tmp_path / "run")
    with pytest.raises(ConfigError, match="stddev_parts = 1 must be divisible by the 8 devices of pmap"):
        train_run(gan_config(**{"sharding.mode": "pmap"}), tmp_path / "run")


def test_a_note_says_where_devices_send_each_other_features(tmp_path, capsys):
    eight = make_mesh(ShardingConfig())
    for parts, mesh, told in ((1, eight, True), (4, eight, True), (8, eight, False), (1, ONE, False)):
        open_run(gan_config(**{"progressive_gan.stddev_parts": parts}), tmp_path, mesh)
        error = capsys.readouterr().err
        note = f"note: config.progressive_gan.stddev_parts = {parts} is no multiple of the 8 devices"
        assert error.startswith(note) and error.count("\n") == 1 if told else error == ""


def test_what_a_gan_cannot_do():
    run = run_of()
    with pytest.raises(ConfigError, match="no likelihood"):
        run.task.likelihoods(10)
    with pytest.raises(ConfigError, match="only a diffusion model can do that"):
        run.inpaint(np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 8, 8, 1), np.uint8), [0])
