"""Latents kept on disk: a data set encoded once, to train a latent diffusion model without its autoencoder at every step.

A folder of ArrayRecord files and `latents.json`. A record holds the posterior's moments (mean and log variance, not a sample
of them: every step draws anew), of the image and, if wanted, of its mirror image; its label and its caption. `latents.json`
names the autoencoder by its SHA-256: latents mean nothing to another one.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float

from jaxdiff.data.loader import Batch, Loader
from jaxdiff.data.sources import Example
from jaxdiff.files import parse_json, read_json, write_text

INDEX = "latents.json"
FORMAT = 1
RECORDS_PER_FILE = 16_384
MOST_CELLS = 2**16  # in each direction


@dataclasses.dataclass(frozen=True)
class LatentInfo:
    """What `latents.json` says."""

    format: int
    sha256: str  # of the autoencoder
    shape: tuple[int, int, int]  # [h w 2d] of the moments
    flips: int  # versions of each image: 1, or 2 with the mirrored one
    image_size: int
    channels: int
    num_examples: int
    class_names: tuple[str, ...]
    has_text: bool
    origin: str  # of what images, in words
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSource:
    """A source whose examples are {"moments": float32 [flips h w 2d], "label", "text"}."""

    info: LatentInfo
    records: Any
    folder: pathlib.Path

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.info.class_names

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.info.class_names)

    @property
    def channels(self) -> int:
        """Of the images that were encoded."""
        return self.info.channels

    @property
    def image_shape(self) -> tuple[int, int]:
        """Of the images that were encoded."""
        return self.info.image_size, self.info.image_size

    @property
    def has_text(self) -> bool:
        """Whether there are captions."""
        return self.info.has_text

    def __len__(self) -> int:
        return self.info.num_examples

    def __getitem__(self, index: int) -> Example:
        try:
            return _unpack(self.records[index], self.info)
        except Exception as error:  # the reader raises RuntimeError and its relatives for what is damaged
            raise ValueError(
                f"{self.folder}: record {index} is damaged ({str(error).splitlines()[0][:200]})"
            ) from error

    def describe(self) -> str:
        """One line: what, how many, of what."""
        h, w, moments = self.info.shape
        mirrored = " and their mirror images" * (self.info.flips == 2)
        return f"latents of {h}x{w}x{moments // 2} in {self.folder}, of {self.info.origin}{mirrored}"


class LatentLoader(Loader):
    """As `Loader`, but a batch has "moments" (float32 [b h w 2d]) in place of "image"."""

    source: LatentSource

    def __init__(self, source: LatentSource, batch_size: int, seed: int, **options: Any):
        info = source.info
        if options["image_size"] != info.image_size or options["channels"] != info.channels:
            raise ValueError(
                f"{source.folder} holds latents of {info.image_size}x{info.image_size} images of {info.channels} channels, "
                f"not of image_size {options['image_size']} and channels {options['channels']}"
            )
        if options["flip"] and info.flips == 1:
            raise ValueError(f"{source.folder} was encoded without mirror images: set flip = False, or encode anew")
        if options["crop"] != "centre":
            raise ValueError(
                f"{source.folder} holds latents of centre crops: crop = {options['crop']!r} is not possible"
            )
        super().__init__(source, batch_size, seed, memory_limit=0, **options)

    def _row(self, index: int, u: Float[np.ndarray, " 3"]) -> Example:
        example = self.source[index]
        mirrored = self.flip and u[2] < 0.5
        return example | {"moments": example["moments"][int(mirrored)]}

    def _gather(self, rows: list[Example]) -> Batch:
        return {"moments": np.stack([row["moments"] for row in rows])}


def open_latents(folder: pathlib.Path) -> LatentSource:
    """The latents in a folder. Raises ValueError with one line if they are not there, not whole or of another format."""
    path = folder / INDEX
    try:
        info = _parse(read_json(path))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no latents: there is no {INDEX}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    if info.format != FORMAT:
        raise ValueError(f"{path}: format {info.format}, this version reads {FORMAT}: encode anew")
    files = [folder / name for name in info.files]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{path}: {file.name} is missing")
    try:
        records = grain.sources.ArrayRecordDataSource([str(file) for file in files])
        found = len(records)
    except Exception as error:  # the reader raises RuntimeError and its relatives for whatever is not its format
        raise ValueError(f"{folder}: the records cannot be read ({str(error).splitlines()[0]})") from error
    if found != info.num_examples:
        raise ValueError(f"{folder}: {found} records, but {INDEX} says {info.num_examples}")
    return LatentSource(info, records, folder)


def _parse(values: Any) -> LatentInfo:
    """What `latents.json` holds. Raises ValueError or TypeError where it is not that."""
    fields = {field.name: getattr(field.type, "__name__", str(field.type)) for field in dataclasses.fields(LatentInfo)}
    if not isinstance(values, dict) or set(values) != set(fields):
        raise ValueError(f"it must hold {', '.join(fields)}")
    for name, kind in fields.items():
        wanted = list if kind.startswith("tuple") else {"int": int, "str": str, "bool": bool}[kind]
        if type(values[name]) is not wanted:
            raise ValueError(f"{name} is {values[name]!r}")
    held: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    info = LatentInfo(**held)
    sides = (*info.shape, info.flips, info.image_size, info.channels)
    if len(info.shape) != 3 or any(type(side) is not int or not 1 <= side <= MOST_CELLS for side in sides):
        raise ValueError("shape, flips, image_size and channels must be positive integers")
    if any(not isinstance(name, str) for name in (*info.class_names, *info.files)):
        raise ValueError("class_names and files must hold names")
    # A plain name: nothing outside the folder is opened, whatever the file says.
    if strange := [name for name in info.files if not name or any(character in name for character in "/\\\0")]:
        raise ValueError(f"{strange[0][:80]!r} is not the name of a file beside it")
    return info


def write_latents(folder: pathlib.Path, info: LatentInfo, examples: Iterator[Example]) -> None:
    """Write a folder of latents at once or not at all; `info`'s number of examples and files are filled in.

    Raises ValueError if the folder is there already.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another place, or remove it first")
    partial = folder.with_name(f".{folder.name}.part{os.getpid()}")
    partial.mkdir(parents=True)
    names: list[str] = []
    count, writer = 0, None
    try:
        for count, example in enumerate(examples, start=1):
            if (count - 1) % RECORDS_PER_FILE == 0:
                if writer is not None:
                    writer.close()
                names.append(f"latents-{len(names):05d}.array_record")
                # Groups of one record: a shuffled epoch reads them one by one.
                writer = ArrayRecordWriter(str(partial / names[-1]), "group_size:1,uncompressed")
            assert writer is not None
            writer.write(_pack(example))
        if writer is not None:
            writer.close()
            writer = None
        whole = dataclasses.replace(info, num_examples=count, files=tuple(names))
        write_text(partial / INDEX, json.dumps(dataclasses.asdict(whole), indent=2) + "\n")
        partial.rename(folder)
    finally:
        if writer is not None:
            writer.close()
        shutil.rmtree(partial, ignore_errors=True)


def _pack(example: Example) -> bytes:
    """A record: length of the JSON, the JSON (label, text), the moments as little-endian float32."""
    told = json.dumps({key: example[key] for key in ("label", "text") if key in example}).encode()
    moments = np.ascontiguousarray(example["moments"], "<f4").tobytes()
    return struct.pack("<I", len(told)) + told + moments


def _unpack(record: bytes, info: LatentInfo) -> Example:
    """What `_pack` packed. Raises ValueError or struct.error for anything else."""
    (length,) = struct.unpack_from("<I", record)
    told = parse_json(record[4 : 4 + length])
    kinds = {"label": int, "text": str} if info.has_text else {"label": int}
    if not isinstance(told, dict) or {name: type(value) for name, value in told.items()} != kinds:
        raise ValueError(f"it must say {', '.join(kinds)}")
    moments = np.frombuffer(record, "<f4", offset=4 + length).reshape(info.flips, *info.shape)
    return told | {"moments": moments}
