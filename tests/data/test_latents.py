"""Latents on disk: what is written is read, batches follow the same order as images, and damage is told in one line."""

import dataclasses
import json

import numpy as np
import pytest

from jaxdiff.data import latents
from jaxdiff.data.latents import LatentInfo, LatentLoader, open_latents, write_latents
from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import ArraySource, open_source

INFO = LatentInfo(latents.FORMAT, "ab12", (2, 2, 6), 2, 8, 3, 0, ("cat", "dog"), True, "little pictures", ())
OPTIONS = {"image_size": 8, "channels": 3, "crop": "centre", "flip": True, "num_threads": 2}


def example(i, flips=2):
    moments = np.random.default_rng(i).standard_normal((flips, 2, 2, 6)).astype(np.float32)
    return {"moments": moments, "label": i % 2, "text": f"näme {i}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "latents"
    write_latents(path, INFO, (example(i) for i in range(21)))
    return path


def test_what_is_written_is_read(folder):
    source = open_source("latents", folder, require_labels=True, require_text=True)
    assert len(source) == 21 and source.class_names == ("cat", "dog") and source.num_classes == 2
    assert source.image_shape == (8, 8) and source.channels == 3
    for i in (0, 7, 20):
        found, wanted = source[i], example(i)
        assert found["label"] == wanted["label"] and found["text"] == wanted["text"]
        np.testing.assert_array_equal(found["moments"], wanted["moments"])
    assert "2x2x3" in source.describe() and "mirror" in source.describe()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["latents"]  # nothing half-written beside it


def test_several_files_are_one_source(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "RECORDS_PER_FILE", 4)
    write_latents(tmp_path / "l", INFO, (example(i) for i in range(9)))
    source = open_latents(tmp_path / "l")
    assert len(source.info.files) == 3 and len(source) == 9
    np.testing.assert_array_equal(source[8]["moments"], example(8)["moments"])


def test_batches_have_the_order_and_the_flips_of_the_images(folder):
    """Latents and images of the same seed go together: image i shows i, and so does its label, and a flip is a flip."""
    images = np.zeros((21, 8, 8, 3), np.uint8)
    images[:, :, :4] = np.arange(21)[:, None, None, None] + 1  # the left half; mirrored it is the right
    pictures = Loader(ArraySource("p", images, np.arange(21) % 2, ("cat", "dog"), "here"), 6, 3, **OPTIONS)
    stored = LatentLoader(open_latents(folder), 6, 3, **OPTIONS)
    flips = 0
    for n in (0, 1, 5, 2, 3):
        seen, batch = pictures[n], stored[n]
        assert batch["moments"].shape == (6, 2, 2, 6) and batch["moments"].dtype == np.float32
        np.testing.assert_array_equal(batch["label"], seen["label"])
        for row in range(6):
            i, mirrored = int(seen["image"][row].max()) - 1, int(seen["image"][row, 0, 0, 0] == 0)
            np.testing.assert_array_equal(batch["moments"][row], example(i)["moments"][mirrored])
            assert batch["text"][row] == f"näme {i}"
            flips += mirrored
    assert 5 < flips < 25
    for n, batch in zip(range(2, 5), stored.iterate(2), strict=False):
        np.testing.assert_array_equal(batch["moments"], stored[n]["moments"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 16}, "8x8 images of 3 channels, not of image_size 16"),
        ({"channels": 1}, "not of image_size 8 and channels 1"),
        ({"crop": "random"}, "centre crops"),
    ],
)
def test_a_loader_that_wants_other_images_is_refused(folder, change, message):
    with pytest.raises(ValueError, match=message):
        LatentLoader(open_latents(folder), 6, 3, **OPTIONS | change)


def test_flips_need_mirrored_latents(tmp_path):
    write_latents(tmp_path / "l", dataclasses.replace(INFO, flips=1), (example(i, 1) for i in range(3)))
    with pytest.raises(ValueError, match="without mirror images"):
        LatentLoader(open_latents(tmp_path / "l"), 3, 0, **OPTIONS)
    assert LatentLoader(open_latents(tmp_path / "l"), 3, 0, **OPTIONS | {"flip": False})[0]["moments"].shape == (
        3,
        2,
        2,
        6,
    )


def test_a_folder_is_never_overwritten(folder):
    with pytest.raises(ValueError, match="exists already"):
        write_latents(folder, INFO, iter(()))
    assert len(open_latents(folder)) == 21


def test_a_failed_writing_leaves_nothing(tmp_path):
    def examples():
        yield example(0)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        write_latents(tmp_path / "l", INFO, examples())
    assert not list(tmp_path.iterdir())


def test_damage_is_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"holds no latents: there is no latents.json"):
        open_latents(tmp_path)
    folder = tmp_path / "l"
    write_latents(folder, INFO, (example(i) for i in range(5)))
    index, record = folder / "latents.json", folder / "latents-00000.array_record"
    sound = index.read_text()
    for content, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps(json.loads(sound) | {"strange": 1}), "damaged"),
        (json.dumps(json.loads(sound) | {"format": 7}), "format 7"),
        (json.dumps(json.loads(sound) | {"num_examples": 6}), "5 records, but latents.json says 6"),
        (json.dumps(json.loads(sound) | {"files": ["a", "b"]}), "a is missing"),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            open_latents(folder)
        assert "\n" not in str(caught.value)
    index.write_text(sound)
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        open_latents(folder)
