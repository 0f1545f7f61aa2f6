"""A folder of images: one subfolder a class, or flat, or described by a `metadata.jsonl` with captions and labels."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxdiff.data.images import EXTENSIONS, decode_image, is_grey, read_image_file
from jaxdiff.data.sources import Example, describe_source
from jaxdiff.data.transforms import convert_channels
from jaxdiff.files import parse_json

METADATA = "metadata.jsonl"
SPLIT_NAMES = {"train", "test", "val", "valid", "validation"}
MAX_LABEL = 65_535
MAX_LINE = 2**20  # bytes of a line of metadata.jsonl


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files, decoded when asked for."""

    root: pathlib.Path
    files: tuple[str, ...]  # relative to root
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]
    texts: tuple[str, ...] | None
    channels: int
    image_shape: None = None

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 without labels."""
        return len(self.class_names)

    @property
    def has_text(self) -> bool:
        """Whether examples carry a caption."""
        return self.texts is not None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path = self.root / self.files[index]
        image = convert_channels(decode_image(read_image_file(path), str(path)), self.channels)
        example = {"image": image, "label": int(self.labels[index])}
        return example if self.texts is None else example | {"text": self.texts[index]}

    def describe(self) -> str:
        """One line: what, how many, how large, from where."""
        return describe_source("folder", self, str(self.root))


def open_folder(root: pathlib.Path, split: str = "train") -> FolderSource:
    """Images of `root` (PNG, JPEG, WebP, BMP).

    With subfolders for splits only (train/, test/ ...), `split` picks one. Then: a `metadata.jsonl` if there is one
    (each line an object with file_name and text and/or label); else classes from subfolders, in sorted order, with
    images at any depth in them; else the images of the flat folder, unlabelled.
    """
    root = _split_folder(root, split)
    if (root / METADATA).is_file():
        files, labels, class_names, texts = _read_metadata(root)
    else:
        files, labels, class_names = _scan(root)
        texts = None
    if not files:
        raise FileNotFoundError(f"folder {root} has no images ({', '.join(EXTENSIONS)})")
    return FolderSource(root, files, np.array(labels, np.int32), class_names, texts, _channels(root, files))


def _split_folder(root: pathlib.Path, split: str) -> pathlib.Path:
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")}
    if folders and folders <= SPLIT_NAMES:
        if split not in folders:
            raise ValueError(f"folder {root} has no split {split!r}, only {', '.join(sorted(folders))}")
        return root / split
    if split != "train":
        raise ValueError(f"folder {root} has no splits, so all of it is 'train'; there is no {split!r}")
    return root


def _scan(root: pathlib.Path) -> tuple[tuple[str, ...], list[int], tuple[str, ...]]:
    """Files, labels and class names of a folder without metadata."""
    flat = sorted(entry.name for entry in os.scandir(root) if entry.is_file() and _is_image(entry.name))
    classes = {
        entry.name: images
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name)
        if entry.is_dir() and not entry.name.startswith(".") and (images := _images_below(root, entry.name))
    }
    if flat and classes:
        raise ValueError(
            f"folder {root} has images both beside ({flat[0]}) and inside subfolders ({next(iter(classes))}): "
            "either every class has a subfolder, or there are none"
        )
    if flat:
        return tuple(flat), [0] * len(flat), ()
    files = tuple(file for images in classes.values() for file in images)
    labels = [label for label, images in enumerate(classes.values()) for _ in images]
    return files, labels, tuple(classes)


def _images_below(root: pathlib.Path, subfolder: str) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root / subfolder)
        for name in names
        if _is_image(name) and os.path.isfile(os.path.join(folder, name))  # no pipe, no link to nothing
    )


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _read_metadata(root: pathlib.Path) -> tuple[tuple[str, ...], list[int], tuple[str, ...], tuple[str, ...] | None]:
    """Files, labels, class names and captions of a folder with metadata.jsonl."""
    entries: list[dict[str, Any]] = []
    with open(root / METADATA, "rb") as lines:
        for number, line in enumerate(iter(functools.partial(lines.readline, MAX_LINE + 1), b""), start=1):
            if line.strip():
                where = f"{root / METADATA} line {number}"
                if len(line) > MAX_LINE:
                    raise ValueError(f"{where} is longer than {MAX_LINE:,} bytes")
                entries.append(_parse_line(line, where, root))
                for key in ("text", "label"):
                    if type(entries[-1].get(key)) is not type(entries[0].get(key)):
                        raise ValueError(
                            f"{where}: its {key} is {_kind(entries[-1], key)}, the first line's is "
                            f"{_kind(entries[0], key)}; all lines must agree"
                        )
    if not entries:
        raise ValueError(f"{root / METADATA} is empty")
    files = tuple(entry["file_name"] for entry in entries)
    texts = tuple(entry["text"] for entry in entries) if "text" in entries[0] else None
    if "label" not in entries[0]:
        return files, [0] * len(files), (), texts
    values = [entry["label"] for entry in entries]
    if isinstance(values[0], int):  # numbers stay as they are, names are numbered in sorted order
        return files, values, tuple(str(label) for label in range(max(values) + 1)), texts
    class_names = tuple(sorted(set(values)))
    number_of = {name: label for label, name in enumerate(class_names)}
    return files, [number_of[value] for value in values], class_names, texts


def _kind(entry: dict[str, Any], key: str) -> str:
    return {str: "a string", int: "a number"}[type(entry[key])] if key in entry else "absent"


def _parse_line(line: bytes, where: str, root: pathlib.Path) -> dict[str, Any]:
    """One checked line of metadata.jsonl, reduced to file_name, text and label (absent rather than null)."""
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise ValueError(f'{where} is not an object with a string "file_name"')
    entry = {key: entry[key] for key in ("file_name", "text", "label") if entry.get(key) is not None}
    if not isinstance(entry.get("text", ""), str):
        raise ValueError(f"{where}: text must be a string, not {repr(entry['text'])[:80]}")
    label = entry.get("label", 0)
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"{where}: label must be a number or a name, not {repr(label)[:80]}")
    if isinstance(label, int) and not 0 <= label <= MAX_LABEL:
        raise ValueError(f"{where}: label must be from 0 to {MAX_LABEL}, not {label}")
    name = entry["file_name"]
    parts = pathlib.PureWindowsPath(name)  # knows "/", "\\" and drives: refuse what any system might read as outside
    if parts.anchor or ".." in parts.parts or name.startswith("~") or "\0" in name:
        raise ValueError(f"{where}: file_name {name[:200]!r} leads out of the folder")
    if not (root / name).is_file():
        raise FileNotFoundError(f"{where}: there is no file {name[:200]!r} in {root}")
    return entry


def _channels(root: pathlib.Path, files: tuple[str, ...]) -> int:
    """1 if a sample of the files is grey throughout, else 3."""
    sample = files[:: max(1, len(files) // 16)]
    return 1 if all(is_grey(root / file) for file in sample) else 3
