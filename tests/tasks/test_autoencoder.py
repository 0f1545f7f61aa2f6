"""The first stage of latent diffusion: its two players, its scores, and what it leaves for others to use."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses
from jaxdiff.config import ConfigError, ShardingConfig
from jaxdiff.evaluation.images import open_images
from jaxdiff.evaluation.reconstruction import peak_signal_to_noise_ratio
from jaxdiff.generation.generate import from_uint8, to_uint8
from jaxdiff.tasks import autoencoder
from jaxdiff.tasks.autoencoder import AutoencoderTask
from jaxdiff.tasks.evaluate import evaluate_likelihood, evaluate_reconstructions
from jaxdiff.tasks.first_stage import load_first_stage
from jaxdiff.tasks.perceptual import Perceptual, efficientnet_distance, load_perceptual, lpips_distance
from jaxdiff.tasks.run import Run, load_run
from jaxdiff.tasks.score import Scorer
from jaxdiff.tasks.train import train_run
from jaxdiff.training.log import read_metrics
from jaxdiff.training.loop import init_sharded
from jaxdiff.training.sharding import make_mesh, make_runner
from jaxdiff.weights.lpips import LPIPSWeights
from tests.evaluation.tiny_extractor import tiny_extractor
from tests.tiny import tiny_batch, tiny_config

TINY = {
    "task": "autoencoder",
    "model.num_classes": 0,
    "autoencoder_kl.channels": 8,
    "autoencoder_kl.channel_multipliers": (1, 2),
    "autoencoder_kl.num_res_blocks": 1,
    "autoencoder_kl.latent_channels": 2,
    "autoencoder_kl.discriminator_channels": 8,
    "autoencoder_kl.discriminator_layers": 1,
    "autoencoder_kl.discriminator_start": 0,
    "sampling.batch_per_device": 8,
}
FIVE = {
    "autoencoder_kl.discriminator_start": 2,
    "autoencoder_kl.kl_weight": 0.1,
    "autoencoder_kl.perceptual_weight": 0.7,
}
MODES = {
    "jit": (ShardingConfig(), 8),
    "pmap": (ShardingConfig(mode="pmap"), 8),
    "fsdp": (ShardingConfig(fsdp=4), 8),
}


def config_of(**changes):
    return tiny_config(**{**TINY, **changes})


def steps_of(config, count, sharding=None, devices=1, perceptual=None):
    """States before and after each of `count` steps, on the host, and the metrics of each."""
    sharding = sharding or ShardingConfig()
    mesh, task, key = make_mesh(sharding, jax.devices()[:devices]), AutoencoderTask(config), jax.random.key(1)
    if perceptual is not None:
        task.__dict__["perceptual"] = perceptual
    trainable = task.trainable(mesh)
    shapes = jax.eval_shape(trainable.init, key)
    runner = make_runner(trainable.make_update, shapes, mesh, sharding.mode, trainable.frozen)
    state = init_sharded(trainable.init, key, runner.state_shardings)
    states, metrics = [jax.device_get(state)], []
    for step in range(count):
        state, found = runner.step(state, runner.put_batch(tiny_batch(config, seed=step)), key, *runner.frozen)
        states.append(jax.device_get(state))
        metrics.append({name: float(value) for name, value in found.items()})
    return states, metrics


def blurred(params, x, y):
    """A perceptual distance that has parameters."""
    return ((x - y).mean((1, 2)) ** 2 * params["weight"][None]).sum(-1)


PERCEPTUAL = Perceptual({"weight": np.full(1, 3.0, np.float32)}, blurred)


def relative_distance(a, b):
    difference = sum(
        np.sum((np.float64(x) - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    return np.sqrt(difference / sum(np.sum(np.float64(y) ** 2) for y in jax.tree.leaves(b)))


def trained(state):
    return state.params, state.ema_params, state.discriminator_params


@pytest.fixture(scope="module")
def one_device():
    """Five steps, the discriminator beginning at the third."""
    return steps_of(config_of(**FIVE), 5, perceptual=PERCEPTUAL)


@pytest.mark.parametrize("mode", ["pmap", *(pytest.param(m, marks=pytest.mark.slow) for m in ("jit", "fsdp"))])
def test_five_steps_agree_with_one_device(one_device, mode):
    states, metrics = steps_of(config_of(**FIVE), 5, *MODES[mode], perceptual=PERCEPTUAL)
    for name in metrics[-1]:
        ours, theirs = ([m[name] for m in history] for history in (metrics, one_device[1]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
    for found, expected in zip(trained(states[-1]), trained(one_device[0][-1]), strict=True):
        assert relative_distance(found, expected) < 1e-5


def test_the_discriminator_begins_at_its_step(one_device):
    states, metrics = one_device
    for before, after, found in zip(states, states[1:], metrics, strict=False):
        moved = relative_distance(after.discriminator_params, before.discriminator_params) > 0
        assert moved == (before.step >= 2) == (found["adversarial_weight"] > 0) == (found["discriminator_loss"] > 0)
        assert relative_distance(after.params, before.params) > 0
    counts = [{int(n) for n in jax.tree.leaves(s.discriminator_opt_state) if n.dtype == np.int32} for s in states]
    assert counts == [{0}, {0}, {0}, {1}, {2}, {3}]


def terms(config, state, key, batch):
    """The parts of the loss, each a function of the parameters, written out once more."""
    task, settings = AutoencoderTask(config), config.autoencoder_kl
    x = from_uint8(batch["image"])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, state.step), batch["index"])

    def both(params):
        posterior = task.encode(params, x)
        return task.decode(params, posterior.sample(keys)), posterior

    def summed(params):
        """Reconstruction and KL as latent diffusion's code has them: sums over an image."""
        x_hat, posterior = both(params)
        kl = 0.5 * (posterior.mean**2 + posterior.std**2 - 1 - posterior.log_variance).sum((1, 2, 3))
        perceptual = blurred(PERCEPTUAL.params, x_hat, x)[:, None, None, None]
        error = (jnp.abs(x - x_hat) + settings.perceptual_weight * perceptual).sum((1, 2, 3))
        return error.mean(), settings.kl_weight * kl.mean()

    def adversarial(params):
        assert task.discriminator is not None
        return -task.discriminator.apply({"params": state.discriminator_params}, both(params)[0]).mean()

    return summed, adversarial


def test_the_loss_is_latent_diffusions_by_the_numbers_of_an_image(one_device):
    """And lambda is the ratio of the last kernel's gradients, each of them made by itself."""
    config, dimensions = config_of(**FIVE), 64
    state, found, batch = one_device[0][3], one_device[1][3], tiny_batch(config, seed=3)
    summed, adversarial = terms(config, state, jax.random.key(1), batch)
    error, kl = summed(state.params)
    norms = []
    for function in (lambda params: summed(params)[0] / dimensions, adversarial):
        norms.append(np.linalg.norm(jax.grad(function)(state.params)["decoder"]["conv_out"]["kernel"]))
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    assert found["adversarial_weight"] == pytest.approx(weight, rel=1e-4)
    assert found["adversarial"] == pytest.approx(float(adversarial(state.params)), rel=1e-4)
    total = (error + kl) / dimensions + weight * adversarial(state.params)
    assert found["loss"] == pytest.approx(float(total), rel=1e-4)

    def whole(params):
        return sum(summed(params)) / dimensions + weight * adversarial(params)

    assert found["grad_norm"] == pytest.approx(float(optax.tree.norm(jax.grad(whole)(state.params))), rel=1e-4)
    assert found["kl"] == pytest.approx(float(kl) / 0.1 / (4 * 4 * 2), rel=1e-4)


def test_the_discriminator_learns_from_the_same_reconstruction(one_device):
    config = config_of(**FIVE)
    state, found, batch = one_device[0][2], one_device[1][2], tiny_batch(config, seed=2)
    task = AutoencoderTask(config)
    (x_hat, _), (x, _) = task.objective().reconstruct(state.params, batch, jax.random.fold_in(jax.random.key(1), 2))
    judge = jax.jit(lambda params, x: task.discriminator.apply({"params": params}, x))
    real, fake = (judge(state.discriminator_params, images) for images in (x, x_hat))
    expected = losses.hinge_discriminator_loss(real, fake).mean()
    assert found["discriminator_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["logits_real"] == pytest.approx(float(real.mean()), rel=1e-4)
    assert found["logits_fake"] == pytest.approx(float(fake.mean()), rel=1e-4)


@pytest.mark.slow
def test_without_a_discriminator_there_is_no_trace_of_one():
    """Nor of a perceptual network; what is left is the error and the divergence."""
    changes = {"discriminator_weight": 0.0, "reconstruction": "l2", "kl_weight": 1.0}
    config = config_of(**{f"autoencoder_kl.{name}": value for name, value in changes.items()})
    states, metrics = steps_of(config, 1)
    assert metrics[0]["loss"] - metrics[0]["reconstruction"] == pytest.approx(metrics[0]["kl"] * 32 / 64, rel=1e-4)
    assert states[1].discriminator_params == {} and not [name for name in metrics[0] if "adv" in name or "disc" in name]
    (x_hat, _), (x, _) = (
        AutoencoderTask(config)
        .objective()
        .reconstruct(states[0].params, tiny_batch(config), jax.random.fold_in(jax.random.key(1), 0))
    )
    assert metrics[0]["reconstruction"] == pytest.approx(float(((x_hat - x) ** 2).mean()), rel=1e-5)
    exact = peak_signal_to_noise_ratio(np.asarray(to_uint8(x_hat)), tiny_batch(config)["image"]).mean()
    assert metrics[0]["psnr"] == pytest.approx(exact, abs=0.05)


def test_the_moving_average(one_device):
    """With warm-up the decay of step n is (1 + n) / (10 + n)."""
    states, _ = one_device
    for n in range(3):
        decay = (1 + n) / (10 + n)
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, states[n].ema_params, states[n + 1].params)
        assert relative_distance(states[n + 1].ema_params, expected) < 1e-6


@pytest.mark.slow
def test_another_place_in_the_batch_is_another_draw():
    config = config_of()
    task, batch, key = AutoencoderTask(config), tiny_batch(config), jax.random.key(0)
    params, reconstruct = jax.jit(task.init)(key), jax.jit(task.objective().reconstruct)
    whole = reconstruct(params, batch, key)[0][0]
    half = reconstruct(params, {name: value[8:] for name, value in batch.items()}, key)[0][0]
    np.testing.assert_allclose(half, whole[8:], rtol=1e-4, atol=1e-5)
    moved = reconstruct(params, batch | {"index": batch["index"] + 1}, key)[0][0]
    assert np.abs(moved - whole).max() > 1e-3


RUN = {"training.log_every": 2, "autoencoder_kl.discriminator_start": 3, "training.checkpoint_every": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps."""
    config, workdir = config_of(**RUN), tmp_path_factory.mktemp("runs") / "straight"
    return config, workdir, train_run(config, workdir).state


def test_a_run_leaves_pictures_and_curves(finished):
    _, workdir, _ = finished
    assert (workdir / "reconstructions" / "step_0000008.png").is_file() and (workdir / "curves.png").is_file()
    wanted = {"reconstruction", "kl", "psnr", "adversarial", "discriminator_loss", "adversarial_weight", "grad_norm"}
    assert wanted <= set(read_metrics(workdir / "metrics.jsonl")[0])


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_same_run(finished, tmp_path):
    """To the bit: the discriminator and its moments, too."""
    config, _, state = finished
    half = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=5))
    train_run(half, tmp_path / "run")
    again = train_run(config, tmp_path / "run").state
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_what_is_published_reconstructs_the_same_and_is_of_unit_variance(finished):
    config, workdir, _ = finished
    stage, run = load_first_stage(workdir), load_run(workdir)
    images = open_images("digits", num=1797)
    pixels = np.concatenate([part for part, _ in images.batches(500)])[:1000]
    ours = run.task.reconstruct(run.params, pixels[:20])
    latents = stage.scaled(stage.posterior(stage.params, from_uint8(jnp.asarray(pixels[:20]))).mean)
    assert np.abs(np.asarray(to_uint8(stage.decode(stage.params, latents)), int) - np.asarray(ours)).max() <= 1
    x = from_uint8(jnp.asarray(pixels))
    drawn = stage.posterior(stage.params, x).sample(jax.random.split(jax.random.key(0), len(x)))
    # Of 16,000 numbers a channel.
    np.testing.assert_allclose(stage.latents_mean, drawn.mean((0, 1, 2)), atol=0.05 * np.max(stage.latents_std))
    np.testing.assert_allclose(stage.latents_std, drawn.std((0, 1, 2)), rtol=0.05)
    assert float(stage.scaled(drawn).std()) == pytest.approx(1, rel=0.05)
    assert stage.model.norm_groups == 2


def test_it_makes_no_images_and_has_no_likelihood(finished):
    run = load_run(finished[1])
    for ask in (lambda: run.task.describe_sampling(run.task.config.sampling), lambda: run.make([0])):
        with pytest.raises(ConfigError, match="makes no images of its own: train a diffusion model in its latents"):
            ask()
    with pytest.raises(ConfigError, match="ask for psnr, ssim, rfid"):
        evaluate_likelihood(run, num=4)


def scorer():
    return Scorer(tiny_extractor(), make_mesh(ShardingConfig(), jax.devices()[:2]), 8)


def test_scores_are_those_of_the_pixels(finished, tmp_path):
    run = load_run(finished[1])
    found = evaluate_reconstructions(["rfid", "psnr"], run, scorer, num=50)
    images = open_images("digits", num=1797)
    pixels = np.concatenate([part for part, _ in images.batches(500)])[:50]
    psnr = peak_signal_to_noise_ratio(np.asarray(run.task.reconstruct(run.params, pixels)), pixels)
    values = {s.name: s for s in found.scores}
    assert values["psnr"].value == pytest.approx(psnr.mean(), abs=1e-3)
    assert values["psnr"].error == pytest.approx(psnr.std(ddof=1) / math.sqrt(50), rel=1e-2)
    (rfid,) = (s for s in found.scores if s.name.startswith("rfid["))
    assert rfid.value > 0
    assert found.images.num_images == 50 and "reconstructions of" in found.images.data
    assert found.preview.shape == (64, 8, 8, 1)
    np.testing.assert_array_equal(found.preview[:8], pixels[:8])
    assert any("which the model has seen" in line for line in found.warnings)
    found.save(tmp_path / "results.json")
    assert (tmp_path / "evaluation.png").is_file()
    with pytest.raises(ValueError, match="images of 8 are too small"):
        evaluate_reconstructions(["ssim"], run, scorer, num=50)


def test_a_perfect_autoencoder_has_perfect_scores(finished, monkeypatch):
    run = load_run(finished[1])
    monkeypatch.setattr(AutoencoderTask, "reconstruct", lambda self, params, images: images)
    found = {
        s.name.split("[")[0]: s.value for s in evaluate_reconstructions(["rfid", "psnr"], run, scorer, num=60).scores
    }
    assert found["psnr"] == math.inf and found["rfid"] == pytest.approx(0, abs=1e-6)


def test_only_an_autoencoder_reconstructs():
    from jaxdiff.tasks.diffusion import DiffusionTask

    with pytest.raises(ValueError, match="only an autoencoder reconstructs, and this is a diffusion"):
        evaluate_reconstructions(["psnr"], Run(DiffusionTask(tiny_config()), None, 0, ()), scorer)


@pytest.mark.slow
def test_scores_during_training(tmp_path, monkeypatch):
    from jaxdiff.tasks import reconstruct

    monkeypatch.setattr(reconstruct, "load_extractor", lambda *_: tiny_extractor())
    config = config_of(**RUN, **{"training.num_steps": 2, "evaluation.every": 1, "evaluation.num_images": 30})
    train_run(config, tmp_path / "run")
    scored = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if any(name.startswith("rfid") for name in m)]
    assert [m["step"] for m in scored] == [1, 2] and all(np.isfinite(m["psnr"]) for m in scored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder_kl.channel_multipliers": ()}, "must hold positive integers"),
        ({"autoencoder_kl.channel_multipliers": (1,) * 5}, "data.image_size = 8 must be divisible by 16"),
        ({"autoencoder_kl.discriminator_layers": 2}, "must be at least 12 for 2 discriminator_layers"),
        ({"autoencoder_kl.perceptual": "lpips"}, "needs the folder of its weights"),
        ({"autoencoder_kl.kl_weight": -1.0}, "must not be negative"),
        ({"training.accumulation_steps": 2}, "must be 1"),
        ({"model.num_classes": 10}, "an autoencoder has no condition"),
        ({"text.enabled": True}, "an autoencoder has no condition"),
        ({"autoencoder": "runs/x"}, "is for task 'diffusion'"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)


def test_missing_weights_are_told_before_anything_compiles(tmp_path):
    config = config_of(**{"autoencoder_kl.perceptual": "lpips", "autoencoder_kl.perceptual_files": str(tmp_path)})
    with pytest.raises(
        ConfigError, match=r"perceptual = 'lpips': LPIPS needs .*vgg16-397923af.pth, which is not there"
    ):
        train_run(config, tmp_path / "run")


@pytest.mark.parametrize("files", ["", "somewhere"])
def test_auto_is_lpips_where_its_files_are_given(monkeypatch, files):
    weights = LPIPSWeights({"conv": 1}, [2])
    monkeypatch.setattr("jaxdiff.tasks.perceptual.lpips_weights", lambda folder, _: {"somewhere": weights}[folder])
    monkeypatch.setattr("jaxdiff.tasks.perceptual.efficientnet_lite_params", lambda: ({"stem": 3, "head": 4}, "0" * 64))
    config = config_of(**{"autoencoder_kl.perceptual": "auto", "autoencoder_kl.perceptual_files": files})
    found = load_perceptual(config.autoencoder_kl)
    if files:
        assert found.distance is lpips_distance and found.params == {"vgg16": {"conv": 1}, "channels": [2]}
    else:
        assert found.distance is efficientnet_distance and found.params == {"stem": 3}
    assert f"1 {'lpips' if files else 'efficientnet-lite0'}" in AutoencoderTask(config).describe()["loss"]


@pytest.fixture(scope="module")
def efficientnet():
    try:
        return load_perceptual(config_of(**{"autoencoder_kl.perceptual": "efficientnet-lite0"}).autoencoder_kl)
    except ConfigError as error:
        pytest.skip(str(error))


def test_efficientnet_sees_more_in_a_blur_than_in_noise(efficientnet):
    """Of the same squared error: what pixels cannot tell apart. Of equal images nothing."""
    data = pytest.importorskip("skimage.data")
    x = from_uint8(jnp.asarray(data.chelsea()[None, 60:124, 180:244]))
    distance = jax.jit(efficientnet_distance)
    assert distance(efficientnet.params, x, x) < 1e-9  # the two are compiled apart
    blur = jax.image.resize(jax.image.resize(x, (1, 16, 16, 3), "linear"), x.shape, "linear") - x
    brighter = jnp.full(x.shape, jnp.sqrt((blur**2).mean()))
    far, near = (float(distance(efficientnet.params, x, x + change)[0]) for change in (blur, brighter))
    assert far > 2 * near > 0
    grey = x.mean(-1, keepdims=True)
    assert np.isfinite(distance(efficientnet.params, grey, -grey)).all()


def test_the_maps_are_those_of_the_network(efficientnet):
    """On its own size the last map goes on to the same features."""
    from jaxdiff.models.efficientnet_lite import EfficientNetLite0, EfficientNetLite0Maps

    x = jnp.zeros((1, 224, 224, 3))
    full, maps = (
        jax.eval_shape(n.init, jax.random.key(0), x)["params"] for n in (EfficientNetLite0(), EfficientNetLite0Maps())
    )
    assert all(
        jax.tree.map(lambda a: a.shape, full[name]) == jax.tree.map(lambda a: a.shape, maps[name]) for name in maps
    )
    assert set(maps) <= set(efficientnet.params)
    shapes = jax.eval_shape(lambda p: EfficientNetLite0Maps().apply({"params": p}, jnp.zeros((2, 64, 64, 3))), maps)
    assert [s.shape for s in shapes] == [(2, 32, 32, 16), (2, 16, 16, 24), (2, 8, 8, 40), (2, 4, 4, 80), (2, 4, 4, 112)]


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_diffusers_reconstructs_the_same(finished):
    from tests.any_torchvision import import_torchvision

    import_torchvision()
    import torch
    from diffusers import AutoencoderKL

    _, workdir, _ = finished
    module, info = AutoencoderKL.from_pretrained(workdir / autoencoder.FOLDER, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    stage = load_first_stage(workdir)
    assert module.config.scaling_factor == pytest.approx(stage.scaling_factor)
    x = from_uint8(jnp.asarray(tiny_batch(config_of())["image"]))
    with torch.no_grad():
        theirs = module(torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())).sample.numpy()
    ours = np.asarray(stage.model.apply({"params": stage.params}, x)[0])
    assert np.abs(ours - theirs.transpose(0, 2, 3, 1)).max() < 2e-5 * np.abs(ours).max()
