"""Files that are never half-written: everything is written to a temporary name beside its place, then renamed.

Files of strangers, of which nothing is believed before it is checked: JSON and .npz. And the folder for what may be made again.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

LONGEST_JSON = 32 * 2**20  # bytes of a file, which take less than 1 GiB in memory
# What an .npz file may unpack to: pixels and features do not shrink to a hundredth, a bomb to a thousandth.
UNPACKED_AT_LEAST, UNPACKED_TIMES = 64 * 2**20, 100


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Give a temporary path in the same folder; on success it is renamed to `path`, on an error it is removed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner may read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file at once, or leave the old one untouched."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write a whole UTF-8 file at once, or leave the old one untouched."""
    write_bytes(path, content.encode())


def save_png(path: str | os.PathLike[str], image: UInt8[np.ndarray, "h w c"]) -> None:
    """One uint8 image, grey (c = 1) or RGB (c = 3), as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def save_gif(path: str | os.PathLike[str], frames: UInt8[np.ndarray, "n h w c"], frames_per_second: int = 12) -> None:
    """Frames as a GIF that goes on for ever, there and back again."""
    pictures = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    first, *rest = [*pictures, *pictures[-2:0:-1]]
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=1000 // frames_per_second, loop=0)
    write_bytes(path, buffer.getvalue())


def obstacle(place: str | os.PathLike[str]) -> str | None:
    """Why no folder can be made at a place, or written to if it is there, in words; None where that can be done."""
    folder = pathlib.Path(place).absolute()
    above = next(known for known in (folder, *folder.parents) if known.exists() or known.is_symlink())
    if not above.is_dir():
        return (
            "it is a file, and a folder is needed" if above == folder else f"{above} is a file, and a folder is needed"
        )
    return None if os.access(above, os.W_OK) else f"nothing can be written in {above}"


def read_at_most(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file. Raises ValueError, before it has read them, where there are more than `most`."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size  # 0 of a pipe
        content = file.read(size + 1) if size <= most else b""
        while size < len(content) <= most and (piece := file.read(2**20)):
            content += piece
    if max(size, len(content)) > most:
        raise ValueError(f"it is longer than {most:,} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Raises ValueError with one line, and nothing else, whatever the text is."""
    try:
        content = json.loads(text)
        if b"\\u" in text if isinstance(text, bytes) else "\\u" in text:
            json.dumps(
                content, ensure_ascii=False
            ).encode()  # half a character, as "\ud800", cannot be written anywhere
    except UnicodeError as error:
        raise ValueError("it is not text (UTF-8)") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return content


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file says. Raises OSError where it cannot be read, else as `parse_json` does."""
    return parse_json(read_at_most(path, LONGEST_JSON))


def read_npz(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those arrays of an .npz file that it has of `names`; nothing is unpickled.

    Memory: at most 100 times the size of the file, or 64 MiB. Raises ValueError with one line for what is damaged, promises more
    or holds Python objects; OSError for a file that cannot be opened.
    """
    with open(path, "rb") as file:
        most = max(UNPACKED_AT_LEAST, UNPACKED_TIMES * os.fstat(file.fileno()).st_size)
        try:
            with zipfile.ZipFile(file) as archive:
                members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                wanted = {name: members[name] for name in names if name in members}
                unpacked = sum(info.file_size for info in wanted.values())
                if unpacked > most:
                    raise ValueError(f"it would unpack to {unpacked:,} bytes, more than a hundred times its size")
                return {name: _read_npy(archive.open(info), info.file_size) for name, info in wanted.items()}
        except _DAMAGED_ARCHIVE as error:
            raise ValueError(f"it is damaged or no .npz file ({str(error)[:200]})") from error


# What zipfile and NumPy's reader of headers raise, besides ValueError, on damaged bytes, encrypted members, unknown methods.
_DAMAGED_ARCHIVE = (
    *(OSError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile),
    *(SyntaxError, TypeError, KeyError, IndexError, OverflowError, MemoryError),
)


def _read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """An array of `size` bytes, header included: what the header promises must be there before memory is taken for it."""
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise ValueError(f"an array is of the unknown version {version}")
    shape, turned, dtype = _NPY_HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    content = file.read(size)
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {str(list(shape))[:80]} has {len(content):,} bytes")
    return np.ndarray(shape, dtype, content, order="F" if turned else "C")


_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def cache_folder() -> pathlib.Path:
    """$XDG_CACHE_HOME/jaxdiff, or ~/.cache/jaxdiff."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jaxdiff"
