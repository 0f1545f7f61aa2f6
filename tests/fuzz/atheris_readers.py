"""Readers before files that libFuzzer invents, led by the code that they reach (pip install -e '.[fuzz]').

    python tests/fuzz/atheris_readers.py safetensors -max_total_time=60
    python tests/fuzz/atheris_readers.py pth found/crash-1234        # a file once more

Readers: safetensors | pth | metadata | idx | flags. What is neither read nor refused in a line ends it and is kept.
"""

import contextlib
import gzip
import io
import json
import pathlib
import struct
import sys
import tempfile

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
with atheris.instrument_imports(include=["jaxdiff", "ml_collections", "zipfile", "gzip"]):
    from jaxdiff.command_line import USAGE_ERROR, config_from_flags, one_line_errors
    from jaxdiff.data.folder import open_folder
    from jaxdiff.data.idx import open_idx
    from jaxdiff.weights.pth import read_pth
    from jaxdiff.weights.tensors import read_tensors

import numpy as np  # after what is instrumented
from PIL import Image

from tests.fuzz.guarded import guarded
from tests.weights import test_pth as torch_files

MEBIBYTE = 2**20
DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "digits.py"


def safetensors(folder: pathlib.Path, data: bytes) -> None:
    """The whole file, or with the right length of its header in front, which no fuzzer would guess."""
    length = struct.pack("<Q", data.rfind(b"}")) if data[:1] < b"\x80" and b"}" in data else b""
    (folder / "a.safetensors").write_bytes(length + data[1:])
    guarded(lambda: read_tensors(folder / "a.safetensors"), folder, 16 * MEBIBYTE)


def pth(folder: pathlib.Path, data: bytes) -> None:
    """A pickle within a sound archive, or the whole file."""
    path = folder / "a.pth"
    path.write_bytes(data[1:])
    if data[:1] < b"\x80":
        torch_files.save(path, torch_files.ZIP, data[1:], {"0": np.zeros(12, np.float32)})
    guarded(lambda: read_pth(path), folder, 32 * MEBIBYTE)


def metadata(folder: pathlib.Path, data: bytes) -> None:
    """Lines about one picture."""
    Image.new("RGB", (2, 2)).save(folder / "0.png")
    (folder / "metadata.jsonl").write_bytes(data)
    guarded(lambda: open_folder(folder), folder, 32 * MEBIBYTE)


def idx(folder: pathlib.Path, data: bytes) -> None:
    """Packed or not."""
    for old in folder.iterdir():
        old.unlink()
    packed = data[:1] < b"\x80"
    content = gzip.compress(data[1:], 1) if data[:1] < b"\x40" else data[1:]
    (folder / f"train-images-idx3-ubyte{'.gz' * packed}").write_bytes(content)
    guarded(lambda: open_idx(folder), folder, 16 * MEBIBYTE)


def flags(folder: pathlib.Path, data: bytes) -> None:
    """A flag a line."""
    typed = data.replace(b"\0", b"").decode(errors="surrogateescape").split("\n")  # as a shell hands them over
    told = io.StringIO()

    def read() -> object:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()), one_line_errors():
            return config_from_flags(["train.py", f"--config={DIGITS}", *typed], "usage")

    end = guarded(read, folder, 32 * MEBIBYTE, (SystemExit,))
    if isinstance(end, SystemExit) and end.code != 0:
        assert end.code == USAGE_ERROR and told.getvalue().count("\n") == 1, told.getvalue()


READERS = {reader.__name__: reader for reader in (safetensors, pth, metadata, idx, flags)}
SEEDS = {  # something sound to begin from
    "safetensors": [
        b"\0" + json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode() + bytes(4)
    ],
    "pth": [
        b"\0"
        + torch_files.program(
            torch_files.dictionary(
                w=torch_files.tensor(torch_files.storage("0", np.float32, 12, "zip"), (3, 4), (4, 1))
            )
        )
    ],
    "metadata": [b'{"file_name": "0.png", "text": "a cat"}\n{"file_name": "0.png", "label": "b"}'],
    "idx": [
        b"\xff" + struct.pack(">4I", 0x803, 1, 2, 2) + bytes(4),
        b"\0" + struct.pack(">4I", 0x803, 1, 2, 2) + bytes(4),
    ],
    "flags": [
        b"--config.seed=1\n--workdir=a",
        b"--config.model.channel_multipliers=(1,2)\n--config.optimizer.learning_rate=1e-3",
    ],
}


def main() -> None:
    """Fuzz the reader that is named; what follows is for libFuzzer."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in READERS:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as place:
        corpus, folder = pathlib.Path(place, "corpus"), pathlib.Path(place, "files")
        corpus.mkdir(), folder.mkdir()
        for number, seed in enumerate(SEEDS[name]):
            (corpus / str(number)).write_bytes(seed)
        given = [argument for argument in sys.argv[2:] if not argument.startswith("-")]
        atheris.Setup(
            [sys.argv[0], *sys.argv[2:], *([] if given else [str(corpus)])], lambda data: READERS[name](folder, data)
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
