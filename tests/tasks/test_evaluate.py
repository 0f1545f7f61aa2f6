"""Scoring a run and any images, from beginning to end, with an extractor that needs no weights."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxdiff.config import ConfigError, ShardingConfig
from jaxdiff.data.sources import open_source
from jaxdiff.diffusion.likelihood import discretized_gaussian_log_likelihood
from jaxdiff.evaluation.images import open_images
from jaxdiff.evaluation.scores import Options
from jaxdiff.evaluation.statistics import NotComparableError, load_statistics
from jaxdiff.files import save_png
from jaxdiff.tasks import score as score_module
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.evaluate import (
    Reference,
    evaluate_images,
    evaluate_likelihood,
    evaluate_samples,
    make_reference,
)
from jaxdiff.tasks.results import read_results
from jaxdiff.tasks.run import Run
from jaxdiff.tasks.score import Scorer, cached_statistics, training_images
from jaxdiff.tasks.train import train_run
from jaxdiff.training.log import read_metrics
from jaxdiff.training.sharding import make_mesh
from tests.evaluation.tiny_extractor import tiny_extractor
from tests.tiny import tiny_config


def scorer(devices=2, extractor=None, batch_per_device=8):
    return Scorer(extractor or tiny_extractor(), make_mesh(ShardingConfig(), jax.devices()[:devices]), batch_per_device)


@pytest.fixture(scope="module")
def run():
    task = DiffusionTask(tiny_config(**{"sampling.steps": 2, "sampling.batch_per_device": 4}))
    return Run(task, task.init(jax.random.key(0)), 7, tuple(map(str, range(10))))


@pytest.fixture(scope="module")
def digits():
    return open_images("digits", num=120)


def values(results):
    return {s.name: s.value for s in results.scores}


def test_a_runs_samples_never_touch_a_file_and_score_as_their_pixels_do(run, tmp_path):
    """Scored on the devices, and once more from the images that sample.py would write: the same numbers."""
    metrics, options = ["fid", "is", "kid", "pr", "sfid"], Options(kid_subsets=3)
    found = evaluate_samples(metrics, run, tmp_path, Reference("digits"), scorer, options, num=30, seed=5)
    images = run.make(np.arange(5, 35), run.labels([], 35)[5:])
    np.savez(tmp_path / "images.npz", images=images)
    again = evaluate_images(
        metrics, open_images(str(tmp_path / "images.npz")), Reference("digits"), lambda: scorer(1), options
    )
    for name, value in values(again).items():
        if not name.startswith(("is", "kid")):  # which depend on the order
            assert values(found)[name] == pytest.approx(value, rel=1e-9)
    assert list(values(found)) == [f"{n}[tiny]" for n in ("fid", "is", "kid", "precision", "recall", "sfid")]
    assert found.images.seed == 5
    assert (found.images.num_images, found.images.data) == (30, "30 samples of step 7")
    np.testing.assert_array_equal(found.preview, images)


def test_a_runs_own_data_are_worked_out_once(run, tmp_path, monkeypatch):
    first = evaluate_samples(["fid"], run, tmp_path, Reference(), scorer, Options(), num=12)
    assert first.reference.num_images == 1797
    monkeypatch.setattr(Scorer, "of_images", None)  # not called again
    assert values(evaluate_samples(["fid"], run, tmp_path, Reference(), scorer, Options(), num=12)) == values(first)


def test_cached_statistics_of_something_else_are_made_anew(run, tmp_path, digits):
    path = tmp_path / "reference.npz"
    cached_statistics(path, digits, scorer(), spatial=False)
    other = tiny_extractor(weights_sha256="1" * 64)
    assert cached_statistics(path, digits, scorer(extractor=other), spatial=False).provenance.weights_sha256 == "1" * 64
    assert cached_statistics(path, digits, scorer(extractor=other), spatial=True).spatial_mean is not None
    path.write_bytes(b"damaged")
    assert cached_statistics(path, digits, scorer(), spatial=False).provenance.num_images == 120


def test_reference_file_is_the_same_reference(tmp_path, digits):
    path = tmp_path / "reference.npz"
    make_reference(digits, scorer(), path)
    images = open_images("digits", num=60, seed=1)
    with_file = evaluate_images(["fid", "kid", "sfid"], images, Reference(str(path)), scorer, Options(kid_subsets=2))
    np.savez(tmp_path / "digits.npz", images=np.stack([digits.image(i) for i in range(120)]))
    with_images = evaluate_images(
        ["fid"], images, Reference(str(tmp_path / "digits.npz")), lambda: scorer(1), Options()
    )
    assert values(with_file)["fid[tiny]"] == pytest.approx(values(with_images)["fid[tiny]"], rel=1e-9)
    assert load_statistics(path).provenance.data.startswith("digits: 1,797 grey images of 8x8")


def test_another_extractors_reference_is_refused_or_marked(tmp_path, digits):
    path = tmp_path / "reference.npz"
    make_reference(digits, scorer(extractor=tiny_extractor(weights_sha256="1" * 64)), path)
    with pytest.raises(NotComparableError, match="weights_sha256 is 000"):
        evaluate_images(["fid"], digits, Reference(str(path)), scorer, Options())
    forced = evaluate_images(["fid"], digits, Reference(str(path)), scorer, Options(force=True))
    assert "not comparable: weights_sha256" in forced.table()


def test_another_tools_file_is_read_with_a_warning(tmp_path, digits):
    path = tmp_path / "their.npz"
    np.savez(path, mu=np.zeros(6), sigma=np.eye(6))
    found = evaluate_images(["fid"], digits, Reference(str(path)), scorer, Options())
    assert "their.npz: a file of another tool: its extractor" in found.warnings[0]
    assert "N unknown" in found.table()


def test_results_and_picture(tmp_path, digits):
    results = evaluate_images(["is"], digits, None, scorer, Options())
    path = tmp_path / "results.json"
    for _ in range(2):
        assert results.save(path) == [path, tmp_path / "evaluation.png"]
    entries = read_results(path)
    assert len(entries) == 2  # added, not replaced
    assert entries[0]["scores"][0]["name"] == "is[tiny]"
    assert entries[0]["images"]["num_images"] == 120
    assert entries[0]["options"]["splits"] == 10
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"results.json: not a results file"):
        results.save(path)


@pytest.mark.slow
def test_bits_per_dim(run, tmp_path):
    """Of a network that predicts nothing: each bound is large, finite, reproducible, and the same on more devices."""
    found = evaluate_likelihood(run, num=6, ode_steps=2)
    assert [s.name for s in found.scores] == ["bpd_bound", "bpd_ode"]
    assert all(np.isfinite(s.value) and s.error > 0 for s in found.scores)
    assert "images of the split 'train', which the model has seen" in found.warnings[0]
    assert "100 levels, variance fixed_small" in found.scores[0].note
    again = evaluate_likelihood(run, num=6, ode_steps=2)
    assert [s.value for s in again.scores] == [s.value for s in found.scores]
    assert [s.value for s in evaluate_likelihood(run, num=6, seed=1, ode_steps=2).scores] != [
        s.value for s in found.scores
    ]
    assert found.save(tmp_path / "results.json") == [tmp_path / "results.json"]


@pytest.mark.slow
def test_the_bound_of_an_ignorant_network_is_known():
    """x0 predicted as 0: every term of the bound is the posterior's weight times the images' mean square, in closed form."""
    config = tiny_config(**{"diffusion.prediction": "x0", "sampling.variance": "fixed_small"})
    task = DiffusionTask(config)
    run = Run(task, jax.tree.map(np.zeros_like, task.init(jax.random.key(0))), 0, ())
    found = evaluate_likelihood(run, num=64, ode_steps=1)
    source = open_source("digits")
    images = training_images(config, source)
    pixels = np.stack([images.image(i) for i in range(64)]) / 127.5 - 1
    schedule, mean_square = task.schedule, (pixels**2).mean()
    t = np.arange(2, 101)
    log_variance = np.asarray(schedule.posterior_log_variance(np.arange(1, 101)), np.float64)
    weights = np.asarray(schedule.posterior_x0_table, np.float64)[t] ** 2 / np.exp(log_variance[1:])
    denoising = 0.5 * weights.sum() * mean_square
    alpha2 = float(schedule.alpha(100)) ** 2
    prior = 0.5 * (alpha2 * mean_square - alpha2 - np.log1p(-alpha2))
    reconstruction = -discretized_gaussian_log_likelihood(pixels, np.zeros_like(pixels), 0.5 * log_variance[0]).mean()
    expected = (prior + denoising + float(reconstruction)) / np.log(2)
    assert found.scores[0].value == pytest.approx(expected, rel=1e-5)


def test_training_scores_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(score_module, "load_extractor", lambda *_: tiny_extractor())
    changes = {"evaluation.every": 4, "evaluation.num_images": 12, "evaluation.metrics": ("fid", "pr", "sfid", "swd")}
    config = tiny_config(**changes, **{"training.log_every": 4})
    train_run(config, tmp_path / "run")
    scored = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "fid[tiny]" in r]
    assert [r["step"] for r in scored] == [4, 8]
    assert set(scored[0]) == {"step", "fid[tiny]", "precision[tiny]", "recall[tiny]", "sfid[tiny]", "swd_8", "swd"}
    assert (tmp_path / "run" / "reference-tiny.npz").is_file()
    train_run(
        dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=12)), tmp_path / "run"
    )
    scored = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "fid[tiny]" in r]
    assert scored == [4, 8, 12]


def test_training_without_weights_says_so_before_it_starts(tmp_path):
    config = tiny_config(**{"evaluation.every": 4, "evaluation.weights": str(tmp_path / "nothing.pth")})
    with pytest.raises(ConfigError, match=r"config.evaluation: .*nothing.pth"):
        train_run(config, tmp_path / "run")


# Images -------------------------------------------------------------------------------------------------------------


def folder_of(path, shapes):
    rng = np.random.default_rng(0)
    for i, (h, w) in enumerate(shapes):
        save_png(path / f"{i}.png", rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
    return path


def test_folder_of_images(tmp_path):
    images = open_images(str(folder_of(tmp_path / "a", [(6, 8)] * 5)))
    assert len(images) == 5
    assert sorted(np.concatenate([part for part, _ in images.batches(2)]).sum((1, 2, 3))) == sorted(
        images.source[i]["image"].sum() for i in range(5)
    )
    assert open_images(str(tmp_path / "a"), size=4).image(0).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.mkdir(), "has no images"),
        (
            lambda p: folder_of(p, [(4, 4), (4, 6)]),
            r"images differ in size \(.* is .*x4.*--image_size 64, say, cuts all",
        ),
        (lambda p: (folder_of(p, [(4, 4)] * 3) / "1.png").write_bytes(b"no image"), "1.png cannot be read as an image"),
        (lambda p: np.savez(p.with_suffix(".npz"), images=np.zeros((3, 4, 4, 3))), "uint8 images .* not float64"),
        (lambda p: np.savez(p.with_suffix(".npz"), other=np.zeros(3)), "it has no array of images"),
        (lambda p: p.with_suffix(".npz").write_bytes(b"PK"), "cannot be read as an .npz file of images"),
        (lambda p: None, "neither a folder, nor an .npz file, nor a data source"),
    ],
)
def test_bad_images_are_named(tmp_path, make, message):
    path = tmp_path / "set"
    make(path)
    npz = path.with_suffix(".npz")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_images(str(npz if npz.exists() else path))


def test_a_truncated_image_is_named_when_it_is_decoded(tmp_path):
    path = folder_of(tmp_path / "set", [(40, 40)] * 4)
    content = (path / "2.png").read_bytes()
    (path / "2.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"2.png cannot be decoded"):
        list(open_images(str(path)).batches(2))


def test_too_many_asked_for():
    with pytest.raises(ValueError, match="5000 images were asked for, there are 1797"):
        open_images("digits", num=5000)
