"""Checksums of the files of a checkpoint: Orbax notices a file that is cut short, but not a bit that has changed in an array.

`checksums.json` in a checkpoint's folder holds the SHA-256 of every file of its items. It is there before the folder is renamed.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence

from jaxdiff.files import read_json

NAME = "checksums.json"


def write_checksums(folder: pathlib.Path) -> None:
    """Write the checksums of all items (sub-folders) of a checkpoint."""
    items = [path.name for path in folder.iterdir() if path.is_dir()]
    sums = {name: _sha256(folder / name) for name in _files(folder, items)}
    (folder / NAME).write_text(json.dumps({"sha256": sums}, indent=1) + "\n")


def find_damage(folder: pathlib.Path, items: Sequence[str]) -> str | None:
    """What is wrong with the files of some items; None where they are what was written, or where nobody wrote checksums.

    Raises OSError or MemoryError where that cannot be told now: files that cannot be opened or read may be good.
    """
    try:
        written = read_json(folder / NAME)["sha256"]
        wanted = {name: digest for name, digest in written.items() if name.split("/")[0] in items}
    except FileNotFoundError:
        return None if folder.is_dir() else "it is gone"
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError) as error:
        return f"{NAME} is damaged: {error}"
    try:
        for name in sorted(wanted.keys() | set(_files(folder, items))):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != wanted.get(name):
                return f"{name} is damaged: its SHA-256 is not that which was written"
    except (FileNotFoundError, NotADirectoryError) as error:  # somebody is deleting it
        return str(error)
    return None


def _files(folder: pathlib.Path, items: Sequence[str]) -> list[str]:
    paths = (path for item in items for path in (folder / item).rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
