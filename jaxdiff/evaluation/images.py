"""Sets of images to be scored, by a word or a path: a folder, an .npz of images, or a data source's name.

Unlike for training, no corrupt image is skipped: a score over a damaged set would be a score of something else. The order is
shuffled by a seed, so that the first images, and the splits of the inception score, are a fair sample of a folder that is sorted
by class.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from jaxdiff.data.folder import FolderSource, open_folder
from jaxdiff.data.images import FORMATS
from jaxdiff.data.latents import LatentSource
from jaxdiff.data.sources import SOURCES, ArraySource, Source, open_source
from jaxdiff.data.transforms import centre_crop, convert_channels, resize_shorter_side
from jaxdiff.files import read_npz

IMAGE_KEYS = ("images", "arr_0")  # ours and ADM's
ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height are exchanged


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of a source, by their indices in it.

    With a `size` they are cut to size x size, with `channels` made grey or RGB, as for training.
    """

    source: Source
    description: str
    indices: Int[np.ndarray, " n"]
    size: int | None = None
    channels: int | None = None
    seed: int | None = None  # that drew them, where they are not all

    @classmethod
    def of(
        cls, source: Source, split: str, size: int | None, channels: int | None, num: int | None = None, seed: int = 0
    ) -> ImageSet:
        """All images of a source, or `num` of them, in an order drawn by `seed`. Raises ValueError where there are too few."""
        if isinstance(source, LatentSource):
            raise ValueError(f"{source.describe()}: these are latents, and images are needed")
        if num is not None and not 1 <= num <= len(source):
            raise ValueError(f"{source.describe()}: {num} images were asked for, there are {len(source)}")
        indices = np.random.default_rng(seed).permutation(len(source))[:num]
        cut = "" if size is None or source.image_shape == (size, size) else f", cut to {size}x{size}"
        description = f"{source.describe()} ({split}){cut}"
        images = cls(source, description, indices, size, channels, None if num is None else seed)
        images.check_sizes()
        return images

    def share(self, process_index: int, process_count: int) -> ImageSet:
        """The part of one of several processes."""
        return dataclasses.replace(self, indices=self.indices[process_index::process_count])

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, position: int) -> UInt8[np.ndarray, "h w c"]:
        """Image number `position` of the set."""
        image = self.source[int(self.indices[position])]["image"]
        if self.size is not None:
            image = centre_crop(resize_shorter_side(image, self.size), self.size)
        return image if self.channels is None else convert_channels(image, self.channels)

    def batches(self, size: int) -> Iterator[tuple[UInt8[np.ndarray, "b h w c"], int]]:
        """All images in order, `size` at a time, with their number. Raises ValueError naming the first that differs in size."""
        first = self.image(0).shape
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(self), size):
                images = list(pool.map(self.image, range(start, min(start + size, len(self)))))
                for position, image in enumerate(images, start):
                    if image.shape != first:
                        raise ValueError(self._differ(self._name(0), first[:2], self._name(position), image.shape[:2]))
                yield np.stack(images), len(images)

    def check_sizes(self) -> None:
        """Raise ValueError, before any work is done, where the images of a folder differ in size. Reads headers only."""
        if self.size is not None or not isinstance(self.source, FolderSource):
            return
        first = None
        for position in range(len(self)):
            name = self._name(position)
            try:
                with Image.open(self.source.root / name, formats=FORMATS) as image:
                    # Asked only where there is some: Pillow would decode a whole PNG to look for it.
                    sideways = "exif" in image.info and image.getexif().get(ORIENTATION, 1) >= 5
                    shape = (image.width, image.height) if sideways else (image.height, image.width)
            except Exception as error:  # Pillow's decoders raise every kind on damaged bytes
                raise ValueError(f"{self.source.root / name} cannot be read as an image") from error
            first = first or shape
            if shape != first:
                raise ValueError(self._differ(self._name(0), first, name, shape))

    def _name(self, position: int) -> str:
        index = int(self.indices[position])
        return self.source.files[index] if isinstance(self.source, FolderSource) else f"image {index}"

    def _differ(self, name1: str, shape1: tuple[int, ...], name2: str, shape2: tuple[int, ...]) -> str:
        sizes = f"{name1} is {shape1[1]}x{shape1[0]}, {name2} is {shape2[1]}x{shape2[0]}"
        return f"{self.description}: images differ in size ({sizes}): --image_size 64, say, cuts all to 64x64"


def open_images(
    name: str,
    dir: str | None = None,
    split: str = "train",
    *,
    size: int | None = None,
    channels: int | None = None,
    num: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """The images that `name` stands for: a folder, an .npz with uint8 `images` (or `arr_0`) [n h w c], or a data source.

    `dir` and `split` belong to data sources (see `open_source`); with `num`, that many are drawn at random by `seed`.
    Raises ValueError or FileNotFoundError with one clear line.
    """
    path = pathlib.Path(name).expanduser()
    source: Source
    if path.suffix == ".npz":
        source = _open_npz(path)
    elif path.is_dir():
        source = open_folder(path, split)
    elif name.partition(":")[0] in {known.partition(":")[0] for known in SOURCES}:
        folder = pathlib.Path(dir).expanduser() if name == "folder" and dir else None
        source = open_folder(folder, split) if folder else open_source(name, dir or None, split, max_bad_fraction=0.0)
    else:
        raise ValueError(f"{name}: neither a folder, nor an .npz file, nor a data source ({', '.join(SOURCES)})")
    return ImageSet.of(source, split, size, channels, num, seed)


def _open_npz(path: pathlib.Path) -> ArraySource:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        images = next(iter(read_npz(path, IMAGE_KEYS).values()), None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as an .npz file of images: {error}") from error
    if images is None:
        raise ValueError(f"{path}: it has no array of images ({' or '.join(map(repr, IMAGE_KEYS))})")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise ValueError(f"{path}: uint8 images [n h w 1 or 3] were expected, not {images.dtype} {list(images.shape)}")
    return ArraySource("npz", images, np.zeros(len(images), np.int32), (), str(path))
