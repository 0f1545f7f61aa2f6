"""Batch n of a run as a pure function of (seed, n, source), by random access; the same for any number of processes.

    example p of batch n  =  source[order[n B + p]], cropped and flipped by the uniform numbers u[p] of batch n

where B is the global batch size and `order` is Grain's shuffle of every epoch's indices, computed index by index:
starting at batch 1,000,000 costs nothing, and a resumed run needs the step alone. Where the size of the batches changes in the
course of a run, a loader for each size goes on in the same order. A batch that devices could not share out evenly is padded with
its own first examples, which have weight 0.
"""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Generator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxdiff.data.sources import Example, Source
from jaxdiff.data.transforms import (
    centre_crop,
    convert_channels,
    horizontal_flip,
    random_crop,
    resize_shorter_side,
    resized_shape,
    shrink,
)

CROPS = ("centre", "random")
# image: uint8 [b s s c]; label: int32 [b]; index: int32 [b]; text: object [b], if known; weight: float32 [b], if padded
Batch = dict[str, Any]


class Loader:
    """`loader[n]` is this process's share of global batch n; `loader.iterate(n)` goes on from there in the background.

    `batch_size` is the global one; process k of K has the k-th of K equal parts, and the batch's `index` tells the positions.
    Images are resized to `image_size` (shorter side), cropped to a square ("centre", or "random" along the longer side) and,
    with `flip`, mirrored with probability 1/2. Resized images of one size are kept in memory after their first decoding as long
    as the whole source then fits into `memory_limit` bytes. `shrink_by`: each block of so many by so many pixels of what was
    cut becomes its mean, one pixel. `begin` = (n, i): batch n begins with number i of the endless order, instead of batch 0 with
    number 0. `padded_size`: what batches are filled up to (None: not at all); then "weight" is 0 for what is repeated, equal for
    the rest, and 1 on average, so that the mean of weight x loss over all rows, or of means over shares, is the examples' mean.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        *,
        image_size: int,
        channels: int,
        crop: str = "centre",
        flip: bool = False,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int | None = None,
        memory_limit: int = 2**30,
        shrink_by: int = 1,
        begin: tuple[int, int] = (0, 0),
        padded_size: int | None = None,
    ):
        size = padded_size or batch_size
        _check(len(source) > 0, f"{source.describe()}: there is no image to load")
        _check(batch_size > 0, f"batch_size must be at least 1, not {batch_size}")
        _check(image_size > 0, f"image_size must be at least 1, not {image_size}")
        _check(channels in (1, 3), f"channels must be 1 (grey) or 3 (RGB), not {channels}")
        _check(crop in CROPS, f"crop must be one of {', '.join(CROPS)}, not {crop!r}")
        _check(0 <= seed < 2**32, f"seed must be from 0 to 2^32 - 1, not {seed}")
        _check(0 <= process_index < process_count, f"process_index {process_index} is not below {process_count}")
        _check(size >= batch_size, f"padded_size {size} is below batch_size {batch_size}")
        name = "batch_size" if size == batch_size else "padded_size"
        _check(size % process_count == 0, f"{name} {size} is not divisible by the {process_count} processes")
        fits = shrink_by > 0 and image_size % shrink_by == 0
        _check(fits, f"shrink_by {shrink_by} does not divide image_size {image_size}")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.image_size, self.channels, self.crop, self.flip = image_size, channels, crop, flip
        self.num_threads = num_threads or min(4, os.cpu_count() or 1)
        self.shrink_by, self.begin = shrink_by, begin
        share = size // process_count
        rows = np.arange(process_index * share, (process_index + 1) * share, dtype=np.int32)
        self._positions = rows % batch_size
        self._weight = (
            np.where(rows < batch_size, size / batch_size, 0).astype(np.float32) if size > batch_size else None
        )
        self._order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        self._memory = _Memory.for_source(source, self._canvas_shape(), memory_limit)

    def __getitem__(self, n: int) -> Batch:
        """Share of this process in global batch n >= 0."""
        if n < self.begin[0]:
            raise IndexError(f"batch {n}: batches are numbered from {self.begin[0]}")
        places = (self.begin[1] + (n - self.begin[0]) * self.batch_size + self._positions).tolist()
        rows = [self._row(self._order[i], u) for i, u in zip(places, self._uniforms(n), strict=True)]
        label = np.array([row["label"] for row in rows], np.int32)
        batch = self._gather(rows) | {"label": label, "index": self._positions.copy()}
        if self._weight is not None:
            batch["weight"] = self._weight.copy()
        if self.source.has_text:
            batch["text"] = np.array([row["text"] for row in rows], object)
        return batch

    def iterate(self, start: int = 0) -> Generator[Batch, None, None]:
        """Batches start, start + 1, ... without end, prepared by threads while the caller works on earlier ones.

        Equal to loader[start], loader[start + 1], ...; an error of a thread is raised at the batch it belongs to;
        closing (or dropping) the iterator ends the threads.
        """
        pool = concurrent.futures.ThreadPoolExecutor(self.num_threads, thread_name_prefix="jaxdiff-loader")
        waiting: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
        try:
            for n in itertools.count(start):
                waiting.append(pool.submit(self.__getitem__, n))
                if len(waiting) > self.num_threads + 1:  # enough to keep the threads busy while the caller works
                    yield waiting.popleft().result()
        finally:
            for future in waiting:  # not shutdown(cancel_futures=True), which fails while the interpreter is ending
                future.cancel()
            pool.shutdown(wait=True)

    def forget(self) -> None:
        """Give the kept images' memory back; from now on they are read anew."""
        self._memory = None

    def _uniforms(self, n: int) -> Float[np.ndarray, "b 3"]:
        """The random numbers of batch n, drawn for the whole batch so that the number of processes does not matter."""
        return np.random.default_rng([self.seed, n]).random((self.batch_size, 3))[self._positions]

    def _row(self, index: int, u: Float[np.ndarray, " 3"]) -> Example:
        """Example `index`, cropped and flipped by the uniform numbers u."""
        canvas, label, text = self.canvas(index)
        return {"image": self._augment(canvas, u), "label": label, "text": text}

    def _gather(self, rows: list[Example]) -> Batch:
        """What examples show, as arrays."""
        return {"image": np.stack([row["image"] for row in rows])}

    def canvas(self, index: int) -> tuple[UInt8[np.ndarray, "h w c"], int, str | None]:
        """Image `index` of the source before any random choice, with its label and caption."""
        if self._memory is not None and self._memory.known[index]:
            return self._memory.recall(index)
        example = self.source[index]
        canvas = convert_channels(resize_shorter_side(example["image"], self.image_size), self.channels)
        if self.crop == "centre":
            canvas = shrink(centre_crop(canvas, self.image_size), self.shrink_by)
        if self._memory is not None:
            self._memory.remember(index, canvas, example["label"], example.get("text"))
        return canvas, example["label"], example.get("text")

    def _augment(self, canvas: UInt8[np.ndarray, "h w c"], u: Float[np.ndarray, " 3"]) -> UInt8[np.ndarray, "s s c"]:
        if self.crop == "random":
            canvas = shrink(random_crop(canvas, self.image_size, u[0], u[1]), self.shrink_by)
        return horizontal_flip(canvas) if self.flip and u[2] < 0.5 else canvas

    def _canvas_shape(self) -> tuple[int, int, int] | None:
        """Shape of every canvas, or None if they differ."""
        if self.crop == "centre":
            side = self.image_size // self.shrink_by
            return side, side, self.channels
        if self.source.image_shape is None:
            return None
        return *resized_shape(self.source.image_shape, self.image_size), self.channels


def iterate_in_turn(loaders: Sequence[Loader], start: int = 0) -> Generator[Batch, None, None]:
    """Batches start, start + 1, ... without end: number n of the last loader that begins with n or before.

    A loader that has had its turn forgets the images that it kept; one whose batches are only looked at and closed does not.
    """
    for loader, following in itertools.zip_longest(loaders, loaders[1:]):
        end = None if following is None else following.begin[0]
        if end is not None and start >= end:
            continue
        batches = loader.iterate(start)
        try:
            yield from itertools.islice(batches, None if end is None else end - start)
        finally:
            batches.close()
        loader.forget()
        start = end or start


class _Memory:
    """Canvases seen so far. Threads may write one row twice, with the same bytes."""

    def __init__(self, length: int, shape: tuple[int, int, int]):
        self.canvas = np.empty((length, *shape), np.uint8)  # the system gives memory to the rows that are written
        self.label: Int[np.ndarray, " n"] = np.empty(length, np.int32)
        self.text: list[str | None] = [None] * length
        self.known = bytearray(length)  # unlike a bool array, fast to ask for one element

    @classmethod
    def for_source(cls, source: Source, shape: tuple[int, int, int] | None, limit: int) -> "_Memory | None":
        fits = shape is not None and len(source) * int(np.prod(shape)) <= limit
        return cls(len(source), shape) if shape is not None and fits else None

    def recall(self, index: int) -> tuple[np.ndarray, int, str | None]:
        return self.canvas[index], int(self.label[index]), self.text[index]

    def remember(self, index: int, canvas: np.ndarray, label: int, text: str | None) -> None:
        self.canvas[index], self.label[index], self.text[index] = canvas, label, text
        self.known[index] = True  # last, so that another thread never sees a row half written


def _check(right: bool, message: str) -> None:
    if not right:
        raise ValueError(message)
