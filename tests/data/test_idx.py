"""MNIST-format files: read exactly, or refused."""

import gzip
import struct

import numpy as np
import pytest

from jaxdiff.data.sources import open_source

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 5, 7), np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 6


def idx_bytes(array, magic=None):
    return struct.pack(f">I{array.ndim}I", magic or 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write(root, prefix="train", joint="-", images=None, labels=None, compress=False):
    pack = gzip.compress if compress else bytes
    end = ".gz" if compress else ""
    (root / f"{prefix}-images{joint}idx3-ubyte{end}").write_bytes(pack(images or idx_bytes(IMAGES)))
    (root / f"{prefix}-labels{joint}idx1-ubyte{end}").write_bytes(pack(labels or idx_bytes(LABELS)))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("joint", ["-", "."])
def test_round_trip(tmp_path, compress, joint):
    write(tmp_path, joint=joint, compress=compress)
    source = open_source("idx", tmp_path)
    np.testing.assert_array_equal(source.images[..., 0], IMAGES)
    assert [source[i]["label"] for i in range(20)] == LABELS.tolist()
    assert (source.num_classes, source.channels, source.image_shape) == (6, 1, (5, 7))
    assert source.describe().startswith("idx: 20 grey images of 5x7, 6 classes, from ")


def test_the_test_split_has_its_own_files(tmp_path):
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match="no t10k-images-idx3-ubyte"):
        open_source("idx", tmp_path, "test")
    write(tmp_path, "t10k", images=idx_bytes(IMAGES[:3]), labels=idx_bytes(LABELS[:3]))
    assert len(open_source("idx", tmp_path, "test")) == 3
    with pytest.raises(ValueError, match="splits train, test, and no 'validation'"):
        open_source("idx", tmp_path, "validation")


def test_labels_may_be_missing(tmp_path):
    write(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert open_source("idx", tmp_path).num_classes == 0
    with pytest.raises(ValueError, match="needs labels"):
        open_source("idx", tmp_path, require_labels=True)


HEADER = struct.pack(">4I", 0x0803, 20, 5, 7)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images": idx_bytes(IMAGES, magic=0x0801)}, "begins with 00000801, not 00000803"),
        ({"images": b"GIF89a"}, "begins with 47494638, not 00000803"),
        ({"images": HEADER[:10]}, "cut off within its header"),
        ({"images": b"\0\0"}, "not an IDX file"),
        ({"images": idx_bytes(IMAGES)[:-1]}, "promises 700 bytes of data, and there are only 699"),
        ({"images": idx_bytes(IMAGES) + b"\0"}, "promises 700 bytes of data, and there are more"),
        ({"images": struct.pack(">4I", 0x0803, *[2**32 - 1] * 3) + bytes(99)}, "and there are only 99"),
        ({"images": idx_bytes(IMAGES[:0])}, "has no pixels: its header says 0 x 5 x 7"),
        ({"labels": idx_bytes(LABELS[:-1])}, "19 labels for the 20 images"),
        ({"labels": idx_bytes(IMAGES)}, "begins with 00000803, not 00000801"),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_any_disagreement_with_the_header_is_an_error(tmp_path, files, message, compress):
    write(tmp_path, **files, compress=compress)
    with pytest.raises(ValueError, match=message):
        open_source("idx", tmp_path)


def test_damaged_gzip_is_an_error(tmp_path):
    write(tmp_path, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-12], whole[:100], b"no gzip at all", whole[:60] + b"\xff" * 20 + whole[80:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is damaged or cut off"):
            open_source("idx", tmp_path)
