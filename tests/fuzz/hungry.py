"""Readers before files that promise or unpack to gigabytes, in a process that gets no more address space than is stated.

python -m tests.fuzz.hungry FOLDER prints a line of JSON for each: what the reader said, or how it failed.
"""

import ctypes
import gzip
import json
import pathlib
import resource
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.data import idx
from jaxdiff.data.folder import open_folder
from jaxdiff.data.idx import open_idx
from jaxdiff.data.images import decode_image
from jaxdiff.files import read_json, read_npz
from jaxdiff.weights.pth import read_pth
from jaxdiff.weights.tensors import open_tensors, read_tensors
from jaxdiff.weights.tokenizer import Tokenizer
from tests.weights import test_pth as torch_files

MEBIBYTE, ZEROS = 2**20, 512 * 2**20


class Meal(NamedTuple):
    """How to write a file into an empty folder, how it is read, and the MiB that reading may take."""

    write: Callable[[pathlib.Path], Any]
    read: Callable[[pathlib.Path], Any]
    most: int


def _sparse(path: pathlib.Path, start: bytes, size: int = 2**34) -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def _zeros(path: pathlib.Path, member: str, start: bytes = b"") -> None:
    """A zip archive of half a megabyte whose one member unpacks to half a gigabyte."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(member, "w") as file,
    ):
        file.write(start)
        for _ in range(ZEROS // MEBIBYTE):
            file.write(bytes(MEBIBYTE))


def _npz(folder: pathlib.Path) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({ZEROS // 8},), }}".ljust(117) + "\n"
    _zeros(folder / "a.npz", "mu.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())


def _idx(folder: pathlib.Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(struct.pack(">4I", 0x803, ZEROS // MEBIBYTE, 1024, 1024))
        for _ in range(ZEROS // MEBIBYTE):
            file.write(bytes(MEBIBYTE))


def _small_idx(folder: pathlib.Path) -> Any:
    idx.LARGEST = 16 * MEBIBYTE  # of 4 GiB, which no test should write
    return open_idx(folder)


def _png(folder: pathlib.Path, side: int = 30_000) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x" * 9))


def _pth(layout: str, promised: int) -> Callable[[pathlib.Path], Any]:
    return lambda folder: torch_files.save_one(folder / "a.pth", layout, (promised,), (1,), promised=promised)


def _wide_header(folder: pathlib.Path) -> None:
    text = b'{"a":[' + b"{}," * 2_790_000 + b"{}]}"
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


MEALS = {  # docs/untrusted_files.md has the same table
    "safetensors, header of 8 GiB": Meal(
        lambda folder: _sparse(folder / "a.safetensors", struct.pack("<Q", 2**33)),
        lambda folder: open_tensors(folder / "a.safetensors"),
        8,
    ),
    ".pth, a storage of 2^40 numbers": Meal(
        _pth(torch_files.ZIP, 2**40), lambda folder: read_pth(folder / "a.pth"), 16
    ),
    ".pth of old, a storage of 2^40 numbers": Meal(
        _pth(torch_files.LEGACY, 2**40), lambda folder: read_pth(folder / "a.pth"), 16
    ),
    ".pth, a packed member": Meal(
        lambda folder: _zeros(folder / "a.pth", "archive/data.pkl"), lambda folder: read_pth(folder / "a.pth"), 16
    ),
    ".npz, a packed array": Meal(_npz, lambda folder: read_npz(folder / "a.npz", ("mu",)), 96),
    "JSON": Meal(lambda folder: _sparse(folder / "a.json", b"["), lambda folder: read_json(folder / "a.json"), 8),
    "metadata.jsonl, a line without end": Meal(
        lambda folder: _sparse(folder / "metadata.jsonl", b'{"file_name": "'), open_folder, 48
    ),
    "IDX, packed": Meal(_idx, _small_idx, 64),
    "IDX, 2^96 pixels": Meal(
        lambda folder: (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *[2**32 - 1] * 3)),
        open_idx,
        8,
    ),
    "a picture of 900 million pixels": Meal(
        _png, lambda folder: decode_image((folder / "a.png").read_bytes(), "a.png"), 16
    ),
    "a tokenizer's merges": Meal(
        lambda folder: [_sparse(folder / "merges.txt", b"a b"), (folder / "vocab.json").write_text("{}")],
        Tokenizer.load,
        8,
    ),
    "a tokenizer's vocabulary": Meal(
        lambda folder: [_sparse(folder / "vocab.json", b"{"), (folder / "merges.txt").write_text("")],
        Tokenizer.load,
        8,
    ),
    "an honest glutton": Meal(lambda folder: None, lambda folder: np.ones(16 * MEBIBYTE, np.uint8), 8),
    "safetensors, the longest header": Meal(_wide_header, lambda folder: read_tensors(folder / "a.safetensors"), 320),
}


def _size() -> int:
    """Bytes of address space that this process has."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def serve(meal: Meal, folder: pathlib.Path) -> str:
    """What the reader says when it gets no more than is stated."""
    folder.mkdir()
    meal.write(folder)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier ones left would be given to this one without being asked for
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_size() + meal.most * MEBIBYTE, hard))
    try:
        meal.read(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return "read"


if __name__ == "__main__":
    for number, (name, meal) in enumerate(MEALS.items()):
        print(json.dumps([name, serve(meal, pathlib.Path(sys.argv[1]) / str(number))]), flush=True)
