"""CIFAR-10 (Krizhevsky 2009) as a TFDS data set, prepared without TensorFlow from its published binary archive.

    python -m jaxdiff.data.cifar10                                         # downloads 170 MB
    python -m jaxdiff.data.cifar10 --archive cifar-10-binary.tar.gz        # or takes the file you have

The result, `tfds:cifar10`, has the features, names and version of TFDS's own, as lossless PNG in array_record files.
"""

import argparse
import hashlib
import http.client
import io
import pathlib
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.files import replacing

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CHECKSUMS = {
    "md5": "c32a1d4ab5d03f1284b67883e8d87530",
    "sha256": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
}
VERSION = "3.0.2"
FOLDER = "cifar-10-batches-bin/"
SPLITS = {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)}
CLASS_NAMES = "batches.meta.txt"
RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes row by row
MAX_MEMBER = 64 * 2**20  # a real batch has 30,730,000 bytes


def prepare(
    archive: pathlib.Path | None, data_dir: pathlib.Path, checksums: Mapping[str, str] = CHECKSUMS
) -> pathlib.Path:
    """Write the data set under `data_dir` and return its folder; without an archive, download it first.

    Raises ValueError or OSError with one clear line, and then leaves no half-written data set behind.
    """
    if archive is None:
        archive = data_dir / "downloads" / URL.rpartition("/")[2]
        if not archive.is_file():
            download(URL, archive, checksums)
    check_archive(archive, checksums)
    builder = _builder(_read_archive(archive), data_dir)
    builder.download_and_prepare(file_format="array_record")
    return pathlib.Path(builder.data_dir)


def check_archive(archive: pathlib.Path, checksums: Mapping[str, str]) -> None:
    """Raise ValueError unless the file has all `checksums` (name of the hash -> hexadecimal digest)."""
    if not archive.is_file():
        raise FileNotFoundError(f"there is no archive {archive}")
    for kind, wanted in checksums.items():
        with open(archive, "rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
        if found != wanted:
            raise ValueError(
                f"{archive} ({archive.stat().st_size:,} bytes) is damaged or another file: its {kind.upper()} is "
                f"{found}, and should be {wanted}; delete it and get {URL}"
            )


def download(url: str, path: pathlib.Path, checksums: Mapping[str, str]) -> None:
    """Fetch `url` with a progress bar; `path` appears only when complete and of the right checksums."""
    from tqdm import tqdm

    try:
        with replacing(path) as temporary:
            with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                    while piece := response.read(2**18):
                        file.write(piece)
                        bar.update(len(piece))
            check_archive(temporary, checksums)
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise OSError(f"cannot download {url}: {error}; get it another way and give it with --archive") from error


def _read_archive(archive: pathlib.Path) -> dict[str, bytes]:
    """The files needed, by name, read in memory: nothing of the archive is ever written under a name it chose."""
    wanted = {CLASS_NAMES, *(name for names in SPLITS.values() for name in names)}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.removeprefix("./").removeprefix(FOLDER)
                if name in wanted and member.isfile() and member.size <= MAX_MEMBER:
                    file = tar.extractfile(member)
                    assert file is not None  # since it is a regular file
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{archive} is cut off or no .tar.gz: {error}") from error
    if missing := wanted - set(found):
        raise ValueError(f"{archive} lacks {', '.join(FOLDER + name for name in sorted(missing))}")
    for name in wanted - {CLASS_NAMES}:
        if not found[name] or len(found[name]) % RECORD:
            raise ValueError(f"{archive}: {name} has {len(found[name]):,} bytes, not a multiple of {RECORD:,}")
    return found


def _examples(split: str, batches: Sequence[bytes], num_classes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, example) of one split; keys and ids are those of TFDS's own builder."""
    number = 0
    for batch in batches:
        for record in np.frombuffer(batch, np.uint8).reshape(-1, RECORD):
            label = int(record[0])
            if label >= num_classes:
                raise ValueError(f"image {number} of {split} has label {label}, and there are {num_classes} classes")
            png = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))).save(png, "PNG")
            png.seek(0)
            key = f"{split}_{number:05d}"
            yield key, {"id": key, "image": png, "label": label}
            number += 1


def _builder(files: Mapping[str, bytes], data_dir: pathlib.Path) -> Any:
    """The TFDS builder of the archive's files; defined here because importing tensorflow_datasets takes a while."""
    import tensorflow_datasets as tfds

    names = files[CLASS_NAMES].decode().split()

    class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """The 60,000 images of 32x32 in 10 classes of CIFAR-10, as PNG."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> Any:
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=names),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            return _examples(split, [files[name] for name in SPLITS[split]], len(names))

    return Cifar10(data_dir=data_dir)


def main(arguments: Sequence[str] | None = None, checksums: Mapping[str, str] = CHECKSUMS) -> int:
    """Command line; returns the exit status (2: something is wrong, said in one line)."""
    parser = argparse.ArgumentParser(prog="python -m jaxdiff.data.cifar10", description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=pathlib.Path, help="cifar-10-binary.tar.gz, if you have it already")
    parser.add_argument(
        "--dir",
        type=pathlib.Path,
        default=pathlib.Path("~/tensorflow_datasets"),
        help="where TFDS data sets lie (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    data_dir = options.dir.expanduser()
    target = data_dir / "cifar10" / VERSION
    if target.exists():
        print(f"cifar10 is already prepared in {target}")
        return 0
    try:
        archive = options.archive.expanduser() if options.archive else None
        target = prepare(archive, data_dir, checksums)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"cifar10 is prepared in {target}: train on it with the source tfds:cifar10 and the dir {data_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
