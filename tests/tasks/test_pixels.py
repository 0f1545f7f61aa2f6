"""swd and ms_ssim of a run and of any images: the numbers of the files that its samples would be, however they are made."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import ShardingConfig
from jaxdiff.evaluation.images import open_images
from jaxdiff.evaluation.ms_ssim import mean_pair_similarity
from jaxdiff.evaluation.scores import Options
from jaxdiff.evaluation.sliced_wasserstein import collect_patches, sliced_wasserstein_distances
from jaxdiff.files import save_png
from jaxdiff.tasks import evaluate as evaluate_module
from jaxdiff.tasks import pixels, score
from jaxdiff.tasks.evaluate import Reference, default_num, evaluate_images, evaluate_samples
from jaxdiff.tasks.pixels import Onlooker
from jaxdiff.tasks.run import Run
from jaxdiff.tasks.score import Scorer
from jaxdiff.training.sharding import make_mesh
from tests.evaluation.tiny_extractor import tiny_extractor
from tests.test_evaluate_command import main
from tests.tiny import tiny_config

BOTH = ["swd", "ms_ssim"]


class Stripes:
    """A task without a network: noise in the key's own colours, on stripes as many as the label says."""

    config = tiny_config(**{"data.image_size": 16, "sampling.batch_per_device": 3})
    num_classes, tokenizer = 10, None

    def make_sample(self, settings, guided):
        return self.sample

    def is_guided(self, settings):
        return False

    def make_knobs(self, settings):
        return None

    @staticmethod
    def sample(params, keys, labels, knobs):
        noise = jax.vmap(lambda key: jax.random.normal(key, (16, 16, 1)))(keys)
        rows = jnp.arange(16, dtype=jnp.float32)[None] * labels[:, None] / 3
        return jnp.sin(rows)[:, :, None, None] + params * noise


@pytest.fixture(scope="module")
def run():
    return Run(Stripes(), jnp.float32(0.3), 7, tuple(map(str, range(10))))


def on(monkeypatch, devices):
    """Samples are made on so many devices."""
    mesh = make_mesh(ShardingConfig(), jax.devices()[:devices])
    for module in (evaluate_module, score):
        monkeypatch.setattr(module, "local_mesh", lambda config: mesh)
    return mesh


def values(results):
    return {s.name: s.value for s in results.scores}


def noise(count, size=16, seed=0, channels=1):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def test_a_runs_samples_on_any_devices_and_with_features_beside(run, tmp_path, monkeypatch):
    """By hand from the images that sample.py would write: bit for bit."""
    found = []
    for devices in (1, 4):
        on(monkeypatch, devices)
        found.append(evaluate_samples(BOTH, run, tmp_path, Reference(), None, Options(), num=25, seed=5))
    assert found[0].scores == found[1].scores
    images = run.make(np.arange(5, 30), run.labels([], 30)[5:])
    real = np.stack([open_images("digits", size=16).image(i) for i in range(25)])
    # ms_ssim takes the samples in a random order, and so does swd.
    shuffled = images[np.random.default_rng(5).permutation(25)]
    expected = sliced_wasserstein_distances(collect_patches([shuffled], 0), collect_patches([real], 1))
    similarity = mean_pair_similarity([shuffled])
    assert values(found[0]) == {"swd_16": expected[16], "swd": expected[16], "ms_ssim": similarity}
    assert found[0].images.num_images == 25 and found[0].images.data == "25 samples of step 7"
    assert found[0].reference.num_images == 1797
    assert "25 images a side, fewer than the paper's 16,384" in found[0].warnings[0]
    scorer, options = Scorer(tiny_extractor(), on(monkeypatch, 2), 8), Options(splits=2)
    mixed = evaluate_samples(["is", *BOTH], run, tmp_path, Reference("digits"), lambda: scorer, options, num=25, seed=5)
    assert list(values(mixed)) == ["is[tiny]", "swd_16", "swd", "ms_ssim"]
    assert {name: value for name, value in values(mixed).items() if "is[" not in name} == values(found[0])


def test_swd_alone_makes_no_more_samples_than_it_compares(run, tmp_path):
    np.savez(tmp_path / "real.npz", images=noise(9))
    found = evaluate_samples(["swd"], run, tmp_path, Reference(str(tmp_path / "real.npz")), None, Options())
    assert found.images.num_images == 9 and "9 images a side" in found.scores[0].note
    assert (default_num(["swd"]), default_num(["fid", "ms_ssim"]), default_num(["fid"])) == (16_384, 10_000, 5_000)


def test_two_halves_of_a_set_are_near_and_something_else_is_far(tmp_path):
    digits = np.stack([open_images("digits", size=16).image(i) for i in range(120)])
    np.savez(tmp_path / "a.npz", images=digits[:60])
    np.savez(tmp_path / "b.npz", images=digits[60:])
    np.savez(tmp_path / "noise.npz", images=noise(60))
    near, far = (
        values(evaluate_images(BOTH, open_images(str(tmp_path / name)), reference, None, Options()))
        for name, reference in (("b.npz", Reference(str(tmp_path / "a.npz"))), ("noise.npz", Reference("digits", image_size=16)))
    )  # fmt: skip
    assert 5 * near["swd"] < far["swd"]
    assert near["ms_ssim"] > far["ms_ssim"] + 0.05  # digits are alike, noise is not


def test_the_two_sets_patches_are_of_different_places(tmp_path, monkeypatch):
    """Of the very same images the distance is not 0, as it would be if both sides looked at the same places."""
    np.savez(tmp_path / "a.npz", images=noise(40, 32))
    same = Reference(str(tmp_path / "a.npz"))
    images = open_images(same.name)
    assert values(evaluate_images(["swd"], images, same, None, Options()))["swd"] > 1
    monkeypatch.setitem(pixels.STREAMS, "reference", pixels.STREAMS["images"])
    assert values(evaluate_images(["swd"], images, same, None, Options()))["swd"] == 0


@pytest.mark.parametrize("count", [2, 7, 12, 13])
def test_several_processes_see_what_one_sees(count, monkeypatch):
    """Three processes in threads, each with its share, in batches of 2: the same pairs, and no one waits for ever."""
    import threading

    from jaxdiff.evaluation import moments

    images, processes, size = noise(count, 16, seed=3), 3, 2
    barrier, told, local = threading.Barrier(processes, timeout=60), {}, threading.local()

    def gather(array):
        told[local.index] = array
        barrier.wait()
        together = np.stack([told[i] for i in range(processes)])
        barrier.wait()
        return together

    alone = Onlooker(BOTH, count, images.shape[1:])
    alone.compared = count
    list(alone.watch(((images[i : i + 5], len(images[i : i + 5])) for i in range(0, count, 5)), 5))
    expected = (alone._pairs.result(), alone._patches.result())
    monkeypatch.setattr(moments, "gather_processes", gather)
    monkeypatch.setattr("jaxdiff.evaluation.sliced_wasserstein.gather_processes", gather)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "process_index", lambda: local.index)
    found = {}

    def process(index):
        local.index = index
        mine = images[index::processes]
        onlooker = Onlooker(BOTH, count, images.shape[1:])
        onlooker.compared = count
        list(onlooker.watch(((mine[i : i + size], len(mine[i : i + size])) for i in range(0, len(mine), size)), size))
        found[index] = (onlooker._pairs.result(), onlooker._patches.result())

    threads = [threading.Thread(target=process, args=(i,)) for i in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2]
    for pairs, patches in found.values():
        np.testing.assert_array_equal(pairs, expected[0])
        for level in patches:
            np.testing.assert_array_equal(patches[level], expected[1][level])


@pytest.mark.parametrize(
    ("metrics", "images", "reference", "message"),
    [
        (["ms_ssim"], noise(4, 24), None, "ms_ssim halves images 4 times: 24x24 are not multiples of 16"),
        (["ms_ssim"], noise(1), None, "ms_ssim compares pairs: it needs at least 2 images, not 1"),
        (["swd"], noise(4, 4), noise(4, 4), "swd compares patches of 7x7 pixels: images of 4x4 are too small"),
        (["swd"], noise(4, 33), noise(4, 33), "33x33 cannot be halved so often"),
        (["swd"], noise(4, 16), noise(4, 32), "images of one size: .* are 16x16x1, those of .* 32x32x1"),
        (["swd"], noise(4), noise(4, channels=3), "are 16x16x1, those of .* 16x16x3"),
        (["swd"], noise(4), None, "swd: a reference is needed"),
        (["fid"], noise(4), None, "fid: an extractor is needed"),
        (["nothing"], noise(4), None, "unknown metric 'nothing'"),
    ],
)
def test_refusals(metrics, images, reference, message, tmp_path):
    np.savez(tmp_path / "images.npz", images=images)
    if reference is not None:
        np.savez(tmp_path / "real.npz", images=reference)
        reference = Reference(str(tmp_path / "real.npz"))
    with pytest.raises(ValueError, match=message):
        evaluate_images(metrics, open_images(str(tmp_path / "images.npz")), reference, None, Options())


def test_what_the_images_size_forbids_is_left_out_while_something_is_left(tmp_path):
    """Of 8x8 images ms_ssim cannot be told: a warning says so, and the others are as they are without it."""
    np.savez(tmp_path / "images.npz", images=noise(12, 8))
    images, same = open_images(str(tmp_path / "images.npz")), Reference(str(tmp_path / "images.npz"))
    scorer, options = Scorer(tiny_extractor(), make_mesh(ShardingConfig(), jax.devices()[:1]), 8), Options(splits=2)
    found = evaluate_images(["swd", "ms_ssim", "is"], images, same, lambda: scorer, options)
    assert found.scores == evaluate_images(["swd", "is"], images, same, lambda: scorer, options).scores
    alone = evaluate_images(["ms_ssim", "is"], images, None, lambda: scorer, options)
    for warnings in (found.warnings, alone.warnings):
        assert warnings[0] == "ms_ssim is left out: ms_ssim halves images 4 times: 8x8 are not multiples of 16"
    np.savez(tmp_path / "images.npz", images=noise(12, 4))
    with pytest.raises(ValueError, match="4x4 are too small; ms_ssim halves images 4 times: 4x4 are not multiples"):
        evaluate_images(BOTH, open_images(str(tmp_path / "images.npz")), same, None, Options())


def test_what_pixels_refuse_is_refused_before_an_extractor_is_loaded(run, tmp_path):
    def download():
        raise AssertionError("an extractor was loaded")

    np.savez(tmp_path / "real.npz", images=noise(4, 32))
    reference = Reference(str(tmp_path / "real.npz"))
    with pytest.raises(ValueError, match="swd compares patches of images of one size"):
        evaluate_images(["fid", "swd"], open_images("digits", size=16), reference, download, Options())
    with pytest.raises(ValueError, match="ms_ssim compares pairs"):
        evaluate_samples(["ms_ssim", "fid"], run, tmp_path, Reference(), download, Options(), num=1)


def test_a_statistics_file_holds_no_images(run, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(ValueError, match="swd compares images, and this file holds statistics only"):
        evaluate_samples(["swd"], run, tmp_path, Reference(str(tmp_path / "statistics.npz")), None, Options(), num=4)


def test_the_command_needs_no_network_for_them(tmp_path, monkeypatch, capsys):
    """Folders of images; neither is an extractor loaded, nor a weight downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxdiff.evaluation.extractors.load_extractor", None)
    for folder, seed in (("ours", 0), ("theirs", 1)):
        for i, image in enumerate(noise(6, 32, seed, channels=3)):
            save_png(tmp_path / folder / f"{i}.png", image)
    main(["--images", "ours", "--reference", "theirs", "--metrics", "ms_ssim,swd", "--num", "5"], monkeypatch)
    printed = capsys.readouterr()
    assert "swd      " in printed.out and "wrote ours_results.json and ours_evaluation.png" in printed.out
    (entry,) = json.loads((tmp_path / "ours_results.json").read_text())
    assert [s["name"] for s in entry["scores"]] == ["ms_ssim", "swd_32", "swd_16", "swd"]
    by_name = {s["name"]: s for s in entry["scores"]}
    assert by_name["swd"]["value"] == pytest.approx((by_name["swd_32"]["value"] + by_name["swd_16"]["value"]) / 2)
    assert by_name["ms_ssim"]["note"] == "2 pairs" and (tmp_path / "ours_evaluation.png").is_file()
    with pytest.raises(SystemExit) as caught:
        main(["--images", "ours", "--reference", "theirs", "--metrics", "swd", "--image_size", "6"], monkeypatch)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "6x6 are too small" in error


def test_pairs_are_drawn_at_random_not_of_classes_in_turn(run, tmp_path, monkeypatch):
    """Only where pairs are asked for: the samples' order decides on the parts of an inception score."""
    labels = []
    whole = type(run).requests
    monkeypatch.setattr(
        Run, "requests", lambda self, num, start=0: labels.append(whole(self, num, start)) or labels[-1]
    )
    found = evaluate_samples(["ms_ssim"], run, tmp_path, Reference(), None, Options(), num=8, seed=1)
    images = run.make(np.arange(1, 9), run.labels([], 9)[1:])
    np.testing.assert_array_equal(found.preview, images[np.random.default_rng(1).permutation(8)])
    plain = evaluate_samples(["swd"], run, tmp_path, Reference(), None, Options(), num=8, seed=1)
    np.testing.assert_array_equal(plain.preview, images)
    assert dataclasses.asdict(found)["reference"] is None
