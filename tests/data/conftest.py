"""Small data sets made on the spot."""

import hashlib
import io
import pathlib
import tarfile

import numpy as np
import pytest

from jaxdiff.data import cifar10

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class TinyCifar:
    """A synthetic archive laid out as CIFAR-10's, with the truth about its content."""

    def __init__(self, path: pathlib.Path, per_batch: int = 8):
        self.path = path
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (6, per_batch, 32, 32, 3), np.uint8)
        self.labels = rng.integers(0, 10, (6, per_batch), np.uint8)
        self.members = {cifar10.CLASS_NAMES: ("\n".join(CLASSES) + "\n\n").encode()}
        names = [*cifar10.SPLITS["train"], *cifar10.SPLITS["test"]]
        for name, images, labels in zip(names, self.images, self.labels, strict=True):
            planes = images.transpose(0, 3, 1, 2).reshape(per_batch, -1)
            self.members[name] = np.concatenate([labels[:, None], planes], axis=1).tobytes()
        self.write()

    def write(self, extra: list[tarfile.TarInfo] | None = None) -> None:
        with tarfile.open(self.path, "w:gz", compresslevel=1) as tar:
            for info in extra or []:
                tar.addfile(info, io.BytesIO(bytes(info.size)))
            for name, data in self.members.items():
                info = tarfile.TarInfo(cifar10.FOLDER + name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    @property
    def checksums(self) -> dict[str, str]:
        data = self.path.read_bytes()
        return {"md5": hashlib.md5(data).hexdigest(), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.fixture
def tiny_cifar(tmp_path: pathlib.Path) -> TinyCifar:
    return TinyCifar(tmp_path / "cifar-10-binary.tar.gz")


@pytest.fixture(scope="session")
def prepared_cifar(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, TinyCifar]:
    """A TFDS data_dir with `cifar10` in it, and what was put in."""
    archive = TinyCifar(tmp_path_factory.mktemp("archive") / "cifar-10-binary.tar.gz")
    data_dir = tmp_path_factory.mktemp("tfds")
    cifar10.prepare(archive.path, data_dir, archive.checksums)
    return data_dir, archive
