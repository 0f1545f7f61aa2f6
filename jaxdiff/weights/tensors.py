"""Files of tensors: safetensors, which hold numbers and names and nothing that could run.

A file is the length of its header (8 bytes), the header (JSON: of each tensor its dtype, shape and place) and the numbers. The
header is checked whole before anything in it is believed, and a tensor is read when it is asked for.
https://github.com/huggingface/safetensors#format
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, cast

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxdiff.files import replacing

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
    }.items()
}
LONGEST_HEADER = 8 * 2**20  # bytes, for some 60,000 tensors: in memory less than 256 MiB
LONGEST_NAME, MOST_AXES = 500, 32

# What is often found under the name of a model, by how it begins.
BEGINNINGS = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself: `git lfs pull` fetches that",
    b"PK\x03\x04": "it is a zip archive, as torch.save writes its pickles",
    b"\x80\x02": "it is a pickle",
    b"\x80\x04": "it is a pickle",
    b"<": "it is a web page: a download that went wrong",
    b"\x89HDF": "it is an HDF5 file",
    b"GGUF": "it is a GGUF file",
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what the header says of it, found to be possible."""

    path: pathlib.Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        """Its size in the file and in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The numbers, in memory of their own: nothing of the file stays open or mapped."""
        try:
            raw = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.offset)
        except OSError as error:
            raise ValueError(f"{self.path}: {self.name} cannot be read ({error.strerror})") from error
        if raw.size != self.nbytes:
            raise ValueError(f"{self.path}: the file has become shorter; {self.name} is no longer in it")
        return raw.view(self.dtype).reshape(self.shape)


def open_tensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """What a safetensors file holds, by name; no tensor is read.

    Raises FileNotFoundError, or ValueError with one line that names the file and what is wrong with it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        header, start, size = _read_header(path)
        return _checked(path, header, start, size)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a sound safetensors file ({_one_line(error)})") from error


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file. Raises FileNotFoundError, or ValueError naming the file if it is damaged."""
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a safetensors file says of itself. Raises as `open_tensors` does."""
    open_tensors(path)
    return dict(_read_header(pathlib.Path(path))[0].get("__metadata__", {}))


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file that PyTorch's libraries read too, written at once or not at all."""
    # The library writes the memory as it lies: of an array in another order it would make another array, and not say so.
    in_order = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    with replacing(path) as temporary:
        save_file(in_order, temporary, metadata={"format": "pt", **(metadata or {})})


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """The header, and where the numbers begin and how many bytes they are."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        beginning = file.read(32)
        if len(beginning) < 8:
            raise ValueError(f"it has only {len(beginning)} bytes")
        if (known := next((what for start, what in BEGINNINGS.items() if beginning.startswith(start)), None)) and (
            beginning[8:9] != b"{"
        ):
            raise ValueError(known)
        length = int.from_bytes(beginning[:8], "little")
        if length > LONGEST_HEADER or length > size - 8:
            limit = min(LONGEST_HEADER, size - 8)
            raise ValueError(f"its header should have {length} bytes, but at most {limit} are possible")
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("its header does not begin with a brace")
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    return header, 8 + length, size - 8 - length


def _checked(path: pathlib.Path, header: dict[str, Any], start: int, size: int) -> dict[str, StoredTensor]:
    """The header's tensors, in the order of the file: together they fill its `size` bytes of numbers exactly."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must hold strings")
    tensors = []
    for name, entry in header.items():
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise ValueError(f"{ascii(name[:40])}... is not the name of a tensor")
        dtype, shape, (begin, end) = _entry(name, entry)
        tensors.append((begin, end, StoredTensor(path, name, dtype, shape, start + begin)))
    position = 0
    for begin, end, tensor in sorted(tensors, key=lambda item: item[:2]):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise ValueError(f"{tensor.name} {what}: it begins at byte {begin}, not {position}")
        if end > size:
            raise ValueError(f"{tensor.name} ends at byte {end} of {size}: the file is cut short or damaged")
        if end - begin != tensor.nbytes:
            raise ValueError(f"{tensor.name} has {end - begin} bytes, but its shape needs {tensor.nbytes}")
        position = end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} of {size}")
    return {tensor.name: tensor for _, _, tensor in tensors}


def _entry(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], list[int]]:
    """Dtype, shape, and first and last offset of one tensor: each of the right kind."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} holds {ascii(dtype)[:40]}, which is none of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MOST_AXES:
        raise ValueError(f"{name} has no possible shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has no possible data_offsets")
    return DTYPES[dtype], tuple(cast(list[int], shape)), cast(list[int], offsets)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{ascii(name[:40])} is there twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _one_line(error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError | RecursionError):
        return "its header is not text" if isinstance(error, UnicodeDecodeError) else "its header is nested too deeply"
    message = str(error)
    return f"its header is not JSON: {message}" if isinstance(error, json.JSONDecodeError) else message
