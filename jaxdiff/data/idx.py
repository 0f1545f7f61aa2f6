"""A folder of MNIST-format files (IDX, http://yann.lecun.com/exdb/mnist): also Fashion-MNIST, KMNIST ..."""

import gzip
import io
import math
import pathlib
import struct
import zlib

import numpy as np
from jaxtyping import UInt8

from jaxdiff.data.sources import ArraySource

PREFIXES = {"train": "train", "test": "t10k"}
CHUNK = 2**20
LARGEST = 2**32  # bytes of images: all of them are held in memory


def open_idx(folder: pathlib.Path, split: str = "train") -> ArraySource:
    """Images `<prefix>-images-idx3-ubyte[.gz]` and, if present, labels `<prefix>-labels-idx1-ubyte[.gz]`.

    The prefix is "train" or, for the test split, "t10k".
    """
    if split not in PREFIXES:
        raise ValueError(f"idx has the splits {', '.join(PREFIXES)}, and no {split!r}")
    image_file = _find(folder, f"{PREFIXES[split]}-images", "idx3-ubyte")
    if image_file is None:
        raise FileNotFoundError(f"folder {folder} has no {PREFIXES[split]}-images-idx3-ubyte or .gz of it")
    images = read_idx(image_file, num_dims=3)[..., None]
    if images.size == 0:
        raise ValueError(f"{image_file} has no pixels: its header says {' x '.join(map(str, images.shape[:3]))}")
    label_file = _find(folder, f"{PREFIXES[split]}-labels", "idx1-ubyte")
    if label_file is None:
        return ArraySource("idx", images, np.zeros(len(images), np.int32), (), str(image_file))
    labels = read_idx(label_file, num_dims=1).astype(np.int32)
    if len(labels) != len(images):
        raise ValueError(f"{label_file} has {len(labels):,} labels for the {len(images):,} images of {image_file}")
    class_names = tuple(str(label) for label in range(labels.max() + 1))
    return ArraySource("idx", images, labels, class_names, str(image_file))


def _find(folder: pathlib.Path, stem: str, suffix: str) -> pathlib.Path | None:
    names = [f"{stem}{joint}{suffix}{end}" for joint in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: pathlib.Path, num_dims: int) -> UInt8[np.ndarray, "..."]:
    """The unsigned bytes of an IDX file with `num_dims` dimensions; any disagreement with its header is an error."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = _read_at_most(file, 4 + 4 * num_dims)
            magic = 0x0800 + num_dims  # 0x08: unsigned byte
            if len(header) < 4 or struct.unpack(">I", header[:4])[0] != magic:
                raise ValueError(f"{path} is not an IDX file: it begins with {header[:4].hex()}, not {magic:08x}")
            if len(header) < 4 + 4 * num_dims:
                raise ValueError(f"{path} is cut off within its header")
            shape = struct.unpack(f">{num_dims}I", header[4:])
            size = math.prod(shape)
            data = _read_at_most(file, min(size, LARGEST) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error
    if len(data) > LARGEST:
        raise ValueError(f"{path} holds more than the {LARGEST:,} bytes that are read into memory")
    if len(data) != size:
        found = f"only {len(data):,}" if len(data) < size else "more"
        raise ValueError(f"{path}: its header promises {size:,} bytes of data, and there are {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_at_most(file: gzip.GzipFile | io.BufferedReader, size: int) -> bytearray:
    """Up to `size` bytes, piece by piece: a header that promises terabytes must not allocate them."""
    pieces = bytearray()
    while len(pieces) < size and (piece := file.read(min(CHUNK, size - len(pieces)))):
        pieces += piece
    return pieces
