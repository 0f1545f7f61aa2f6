"""A reader under guard: what it may raise, how long it may take, how much memory, and that it does nothing but read."""

import contextlib
import pathlib
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 5  # of the processor
REFUSED = (  # what Python tells its audit hooks of before it happens; whatever begins so
    *(
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "os.spawn",
        "subprocess.",
        "pty.",
        "ctypes.dlopen",
        "pickle.",
    ),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "shutil."),
    *("socket.connect", "socket.bind", "urllib.", "webbrowser.", "code.__new__", "marshal.loads.reader"),
)
CODE = (".py", ".pyc", ".so", ".pyd")

_watch: dict[str, Any] = {"folder": None, "seen": []}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what a reader must not do; there is no way to take a hook off again, so it sleeps between two readings."""
    if _watch["folder"] is None:
        return
    if event.startswith(REFUSED):
        _watch["seen"].append(event)
    if event == "open" and not isinstance(arguments[0], int):
        path, mode, flags = arguments
        place = pathlib.Path(path.decode() if isinstance(path, bytes) else str(path))
        inside = place.absolute().is_relative_to(_watch["folder"]) and ".." not in place.parts
        writes = bool(flags & 0b11) or any(letter in str(mode or "r") for letter in "wax+")
        if writes or not (inside or place.suffix in CODE or place.is_relative_to(sys.prefix)):
            _watch["seen"].append(f"open {place} {mode}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def watching(folder: pathlib.Path) -> Iterator[list[str]]:
    """What is done meanwhile besides reading files of the folder."""
    _watch.update(folder=folder, seen=[])
    try:
        yield _watch["seen"]
    finally:
        _watch["folder"] = None


def guarded(
    read: Callable[[], Any],
    folder: pathlib.Path,
    most: int,
    refusals: tuple[type[BaseException], ...] = (ValueError, OSError),
) -> Any:
    """What `read` returns, or the error with which it refused.

    Anything but one of `refusals` with one printable line goes through, as do more than `most` bytes of memory.
    """
    tracemalloc.start()
    begin = time.process_time()
    try:
        with watching(folder) as seen:
            try:
                result = read()
            except refusals as error:
                result = error
        peak, seconds = tracemalloc.get_traced_memory()[1], time.process_time() - begin
    finally:
        tracemalloc.stop()
    assert not seen, seen
    assert peak < most, f"{peak:,} bytes"
    assert seconds < SECONDS, seconds
    if isinstance(result, Exception):
        line = str(result)
        assert line and "\n" not in line.strip() and len(line) < 1500, line
    return result
