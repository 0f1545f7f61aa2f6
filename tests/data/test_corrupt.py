"""Corrupt images: named, counted, replaced in one way, and refused when they are many."""

import itertools
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.corrupt import SkipCorrupt
from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import open_source

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    for i in range(300):
        (root / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (6, 6, 3), np.uint8)).save(root / str(i % 2) / f"{i:03d}.png")
    return root


@pytest.fixture
def folder(good_folder, tmp_path):
    """300 images, three of them bad in three ways: 1% of all, just allowed."""
    root = shutil.copytree(good_folder, tmp_path / "images")
    whole = (root / "0" / "010.png").read_bytes()
    (root / "0" / "010.png").write_bytes(whole[: len(whole) // 2])
    (root / "1" / "021.png").write_text("this is a text")
    (root / "1" / "299.png").write_bytes(b"")  # the last of all: the next good one is the first
    return root


BAD = {5: "010.png cannot be decoded", 160: "021.png is not a PNG", 299: "299.png is empty"}


def test_bad_images_are_named_counted_and_replaced_by_the_next_good_one(folder, caplog):
    source = open_source("folder", folder)
    with caplog.at_level(logging.WARNING, logger="jaxdiff.data"):
        for _ in range(2):
            for bad, successor in ((5, 6), (160, 161), (299, 0)):
                np.testing.assert_array_equal(source[bad]["image"], source[successor]["image"])
                assert source[bad]["label"] == source[successor]["label"]
    assert len(caplog.messages) == 3  # each is said once
    for count, (message, reason) in enumerate(zip(caplog.messages, BAD.values(), strict=True), start=1):
        assert reason in message and f"skipped so far: {count} of 300" in message
    assert set(source.bad) == set(BAD)


def test_batches_stay_a_function_of_seed_and_number(folder):
    options = {"image_size": 6, "channels": 3, "flip": True}
    forwards, backwards = (Loader(open_source("folder", folder), 50, 1, **options) for _ in range(2))
    there = [forwards[n] for n in range(6)]
    back = [backwards[n] for n in reversed(range(6))][::-1]
    iterator = Loader(open_source("folder", folder), 50, 1, **options).iterate()
    threads = list(itertools.islice(iterator, 6))
    for a, b, c in zip(there, back, threads, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            np.testing.assert_array_equal(a[name], c[name])


def test_too_many_bad_images_end_the_run(folder):
    (folder / "0" / "100.png").write_bytes(b"")  # the fourth of 300
    loader = Loader(open_source("folder", folder), 50, 1, image_size=6, channels=3)
    with pytest.raises(ValueError, match="too many corrupt images: 4 already, at most 3 of 300 may be; .*png"):
        for _, n in zip(loader.iterate(), range(20), strict=False):
            assert n < 6, "a whole epoch went by"
    more = open_source("folder", folder, max_bad_fraction=0.02)
    assert all(more[i]["image"].shape == (6, 6, 3) for i in range(300))


def test_fraction_zero_forgives_none_and_a_small_folder_one(folder):
    with pytest.raises(ValueError, match="at most 0 of 300"):
        open_source("folder", folder, max_bad_fraction=0)[5]
    for path in sorted(folder.rglob("*.png"))[10:]:
        path.unlink()
    source = open_source("folder", folder)
    assert len(source) == 10
    np.testing.assert_array_equal(source[5]["image"], source[6]["image"])
    (folder / "0" / "000.png").write_bytes(b"")
    with pytest.raises(ValueError, match="at most 1 of 10"):
        source[0]
    with pytest.raises(ValueError, match="max_bad_fraction must be"):
        open_source("folder", folder, max_bad_fraction=1.5)


def test_a_source_without_one_good_image_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="every image is corrupt"):
        open_source("folder", tmp_path)[0]


def test_other_errors_are_not_taken_for_corrupt_images():
    class Broken:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            raise PermissionError("photo.png")

    with pytest.raises(PermissionError, match="photo.png"):
        SkipCorrupt(Broken())[0]
