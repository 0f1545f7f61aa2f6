"""Sources of images by name: `digits` and `mnist` (embedded in packages), `shapes`, `tfds:<name>`, `folder`, `idx`, `latents`.

A source is random access: source[i] is example i, always the same.
"""

import dataclasses
import difflib
import os
import pathlib
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, UInt8

Example = dict[str, Any]  # image: uint8 [h w c]; label: int, 0 if there are none; text: str, absent if there is none


class Source(Protocol):
    """What a loader reads: source[i] = {"image": uint8 [h w c], "label": int, "text": str}, i < len(source)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label; empty without labels."""

    @property
    def num_classes(self) -> int:
        """How many labels there are; 0 without labels."""

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB): the channels of every image."""

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width if all images have the same, else None."""

    @property
    def has_text(self) -> bool:
        """Whether examples carry a caption."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def describe(self) -> str:
        """One line: what, how many, how large, from where."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """A source held in memory."""

    name: str
    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]
    origin: str
    has_text: bool = False

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.images.shape[-1]

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of every image."""
        return self.images.shape[1], self.images.shape[2]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def describe(self) -> str:
        """One line: what, how many, how large, from where."""
        return describe_source(self.name, self, self.origin)


def describe_source(name: str, source: Source, origin: str) -> str:
    """The one line that every source's `describe` gives."""
    colour = "grey" if source.channels == 1 else "RGB"
    size = f"of {source.image_shape[0]}x{source.image_shape[1]}" if source.image_shape else "of various sizes"
    classes = f", {source.num_classes} classes" if source.num_classes else ", no labels"
    return f"{name}: {len(source):,} {colour} images {size}{classes}{', captioned' * source.has_text}, from {origin}"


def open_source(
    name: str,
    dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    require_labels: bool = False,
    require_text: bool = False,
    max_bad_fraction: float = 0.01,
) -> Source:
    """Open the source called `name`: "digits", "mnist", "shapes", "tfds:<name>", "folder", "idx" or "latents".

    `dir` is where it lies: needed by folder, idx and latents; for tfds the data_dir, by default $TFDS_DATA_DIR or
    ~/tensorflow_datasets. Corrupt images of a folder or a TFDS data set are skipped as `SkipCorrupt` says.
    Raises ValueError or FileNotFoundError with one clear line, also if labels or captions are required and absent.
    """
    # Each kind of source imports its packages only when it is asked for.
    folder = None if dir is None else pathlib.Path(dir).expanduser()
    source = _open(name, folder, split, max_bad_fraction)
    if len(source) == 0:
        raise ValueError(f"{source.describe()}: split {split!r} has no images")
    if require_labels and source.num_classes == 0:
        raise ValueError(f"{source.describe()}: a class-conditional model needs labels, and there are none")
    if require_text and not source.has_text:
        raise ValueError(f"{source.describe()}: a text-conditional model needs captions, and there are none")
    return source


def _open(name: str, folder: pathlib.Path | None, split: str, max_bad_fraction: float) -> Source:
    from jaxdiff.data import embedded, idx, latents, shapes, tfds
    from jaxdiff.data import folder as image_folder
    from jaxdiff.data.corrupt import SkipCorrupt

    kind, _, rest = name.partition(":")
    if kind == "tfds" and rest:
        return SkipCorrupt(tfds.open_tfds(rest, folder, split), max_bad_fraction)
    if name in ("digits", "mnist"):
        return embedded.open_part(embedded.open_digits() if name == "digits" else embedded.open_mnist(), split)
    if name == "shapes":
        return shapes.open_shapes(split)
    if name in ("folder", "idx", "latents"):
        if folder is None:
            raise ValueError(f"data source {name!r} needs the folder it lies in (data.dir)")
        if not folder.is_dir():
            raise FileNotFoundError(f"data source {name!r}: there is no folder {folder}")
        if name == "idx":
            return idx.open_idx(folder, split)
        if name == "latents":
            return latents.open_latents(folder)
        return SkipCorrupt(image_folder.open_folder(folder, split), max_bad_fraction)
    near = difflib.get_close_matches(kind, [known.partition(":")[0] for known in SOURCES], n=1)
    hint = f"; did you mean {next(known for known in SOURCES if known.startswith(near[0]))}?" if near else ""
    raise ValueError(f"unknown data source {name!r}: there are {', '.join(SOURCES)}{hint}")


SOURCES = ("digits", "mnist", "shapes", "tfds:<name>", "folder", "idx", "latents")
