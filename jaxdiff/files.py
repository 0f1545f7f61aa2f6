"""Files that are never half-written: everything is written to a temporary name beside its place, then renamed.

And the folder for what may be made again.
"""

import contextlib
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image


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


def cache_folder() -> pathlib.Path:
    """$XDG_CACHE_HOME/jaxdiff, or ~/.cache/jaxdiff."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jaxdiff"
