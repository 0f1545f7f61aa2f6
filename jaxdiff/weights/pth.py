"""PyTorch's .pth files without PyTorch: a reader that builds tensors and nothing else.

Formats: the zip archive (torch >= 1.6) and the older one, a row of pickles and then the storages.

A .pth file may come from anyone. Its pickle runs on `pickle_machine`, which calls nothing but its own descriptions of tensors, in
bounded time and memory. Bytes are read only after the checks: every storage lies within the file, storages together are no larger
than the file, every tensor lies within its storage. Zip members must be stored, not compressed. So the arrays take no more memory
than the file has bytes, and nothing is written. Damage is noticed where the format has a checksum (zip); a legacy file whose
numbers were altered reads as those numbers, so whoever must know what a file is compares its SHA-256.

The arrays are read-only views of the storages, with whatever strides the file gives them; tied tensors share memory.
"""

import io
import math
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from jaxdiff.weights.pickle_machine import MAX_PICKLE, Machine, Storage, Tensor, kind, shown

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def read_pth(path: str | os.PathLike[str], key: str | None = None) -> dict[str, np.ndarray]:
    """Return the tensors of a .pth file by name; with `key`, those of the dict under that key of a checkpoint.

    Whatever is wrong with the file is a ValueError of one line that names it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file" if path.exists() else f"there is no file {path}")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            read = _format(file, size)
            return read(file, size, key)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as PyTorch weights: {error}") from error


def _format(file: BinaryIO, size: int) -> Callable[[BinaryIO, int, str | None], dict[str, np.ndarray]]:
    """Which of the two readers, by the first bytes of the file."""
    start = file.read(512)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip
    if start.startswith(b"\x80"):
        return _read_legacy
    if not start:
        raise ValueError("it is empty")
    if start.lstrip().startswith(b"<"):
        raise ValueError("it is a web page (HTML or XML): the download went wrong")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS, not the file itself")
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < size:
        raise ValueError("it is a safetensors file")
    raise ValueError(f"it begins with {start[:8].hex()}, as no file of torch.save does")


def _read_zip(file: BinaryIO, size: int, key: str | None) -> dict[str, np.ndarray]:
    """The zip archive: <root>/data.pkl, <root>/data/<storage key>, <root>/byteorder."""
    members = _members(file, size)
    roots = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it is a zip archive, but not one of torch.save: it has no data.pkl")
    root = roots[0]
    if members[f"{root}data.pkl"].file_size > MAX_PICKLE:
        raise ValueError(f"its pickle is longer than {MAX_PICKLE:,} bytes")
    order = _member_bytes(file, size, members[f"{root}byteorder"]) if f"{root}byteorder" in members else b"little"
    if order not in (b"little", b"big"):
        raise ValueError(f"its byte order is {order[:10]!r}, not little or big")
    machine = Machine(io.BytesIO(_member_bytes(file, size, members[f"{root}data.pkl"])))
    tensors = _tensors(machine.run(), key)

    def content(storage: Storage) -> bytes:
        member = members.get(f"{root}data/{storage.key}")
        if member is None or member.file_size != storage.num_bytes:
            found = "is missing" if member is None else f"has {member.file_size:,} bytes, not {storage.num_bytes:,}"
            raise ValueError(f"its storage {shown(storage.key)} {found}")
        return _member_bytes(file, size, member)

    storages = {tensor.storage: content(tensor.storage) for tensor in tensors.values()}
    return _arrays(tensors, storages, swap=order == b"big")


class _BoundedFile:
    """A file that reads at most MAX_PICKLE bytes at once: zipfile reads the whole table of contents in one go."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1, /) -> bytes:
        """As of a file."""
        if size > MAX_PICKLE:
            raise ValueError(f"its table of contents is longer than {MAX_PICKLE:,} bytes")
        return self.file.read(size)


def _members(file: BinaryIO, size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by name, none of which promises more than there is."""
    try:
        with zipfile.ZipFile(_BoundedFile(file)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, OverflowError, IndexError) as error:
        raise ValueError(f"it is a zip archive that is damaged or cut off ({shown(str(error))})") from error
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise ValueError("its archive has two members of the same name")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
        raise ValueError("its archive is compressed or encrypted, which torch.save never does")
    if sum(info.file_size for info in infos) > size:
        raise ValueError("its members together are larger than the file")
    return members


def _member_bytes(file: BinaryIO, size: int, member: zipfile.ZipInfo) -> bytes:
    """The content of a stored member, whose checksum must agree."""
    start = max(0, member.header_offset)
    header = _bytes_at(file, size, start, 30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"its member {shown(member.filename)} is not where the table of contents says")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    content = _bytes_at(file, size, start + 30 + name_length + extra_length, member.file_size)
    if zlib.crc32(content) != member.CRC:
        raise ValueError(f"its member {shown(member.filename)} is damaged: the checksum does not agree")
    return content


def _read_legacy(file: BinaryIO, size: int, key: str | None) -> dict[str, np.ndarray]:
    """The older format: pickles of magic number, protocol, system, object, storage keys; then the storages in that order."""
    stream = io.BytesIO(_bytes_at(file, size, 0, min(size, MAX_PICKLE)))
    if Machine(stream).run() != MAGIC:
        raise ValueError("it is a pickle, but not one of torch.save: the magic number is missing")
    if Machine(stream).run() != PROTOCOL:
        raise ValueError(f"its protocol is not {PROTOCOL}")
    Machine(stream).run()  # sizes of C's types: the storages do not depend on them
    machine = Machine(stream)
    tensors = _tensors(machine.run(), key)
    order = Machine(stream).run()
    if type(order) is not list or {type(item) for item in order} - {str} or sorted(order) != sorted(machine.storages):
        raise ValueError("its list of storages is not that of its tensors")

    wanted = {tensor.storage for tensor in tensors.values()}
    storages = {}
    position = stream.tell()
    for storage in (machine.storages[item] for item in order):
        header = _bytes_at(file, size, position, 8)
        if struct.unpack("<q", header)[0] != storage.size:
            raise ValueError(f"its storage {shown(storage.key)} has not the {storage.size:,} elements promised")
        if storage in wanted:
            storages[storage] = _bytes_at(file, size, position + 8, storage.num_bytes)
        position += 8 + storage.num_bytes
    if position > size:
        raise ValueError("it is cut off")
    if position < size:
        raise ValueError(f"it goes on for {size - position:,} bytes after its last tensor")
    return _arrays(tensors, storages, swap=False)


def _bytes_at(file: BinaryIO, size: int, start: int, length: int) -> bytes:
    """Exactly `length` bytes, and no allocation before it is known that the file has them."""
    if start + length > size:
        raise ValueError("it is cut off")
    file.seek(start)
    content = file.read(length)
    if len(content) != length:
        raise ValueError("it is cut off")
    return content


def _tensors(loaded: object, key: str | None) -> dict[str, Tensor]:
    """The dict of tensors that the pickle describes, or that under `key`."""
    if key is not None:
        if type(loaded) is not dict or type(loaded.get(key)) is not dict:
            raise ValueError(f"it has no dict under the key {key!r}")
        loaded = loaded[key]
    if type(loaded) is not dict:
        raise ValueError(f"it holds a {kind(loaded)}, not a dict of tensors")
    for name, value in loaded.items():
        if type(name) is not str:
            raise ValueError("it is not a dict of tensors by name: it has numbers for names")
        if type(value) is dict and key is None:
            raise ValueError(f"its entry {shown(name)} is a dict, not a tensor: key={shown(name)} would read that dict")
        if type(value) is not Tensor:
            raise ValueError(f"its entry {shown(name)} is a {kind(value)}, not a tensor")
    return loaded


def _arrays(tensors: dict[str, Tensor], storages: dict[Storage, bytes], swap: bool) -> dict[str, np.ndarray]:
    """Views of the storages; `swap` turns the bytes of each number round."""
    rows = {}
    for storage, content in storages.items():
        row = np.frombuffer(content, f"u{storage.dtype.itemsize}")
        row = row.byteswap() if swap else row
        # A Boolean whose byte is neither 0 nor 1 would be a third truth value to NumPy.
        row = row != 0 if storage.dtype == np.bool_ else row.view(storage.dtype)
        row.flags.writeable = False
        rows[storage] = row
    arrays = {}
    for name, (storage, offset, shape, strides) in tensors.items():
        itemsize = storage.dtype.itemsize
        if math.prod(shape) == 0:
            arrays[name] = np.empty(shape, storage.dtype)
            continue
        arrays[name] = np.ndarray(
            shape, storage.dtype, rows[storage], offset * itemsize, tuple(stride * itemsize for stride in strides)
        )
    return arrays
