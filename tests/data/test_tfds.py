"""TFDS data sets: read without TensorFlow, slices, captions, and clear words where something is missing."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import open_source


def test_a_prepared_data_set(prepared_cifar):
    source = open_source("tfds:cifar10", prepared_cifar[0], require_labels=True)
    assert (len(source), source.num_classes, source.channels, source.image_shape) == (40, 10, 3, (32, 32))
    assert source.class_names[3] == "cat" and not source.has_text
    assert source.describe().startswith("tfds:cifar10 (train): 40 RGB images of 32x32, 10 classes, from ")
    batch = Loader(source, 8, 0, image_size=16, channels=1)[0]
    assert batch["image"].shape == (8, 16, 16, 1)


def test_slices_are_parts_of_the_whole(prepared_cifar):
    def images(split):
        source = open_source("tfds:cifar10", prepared_cifar[0], split)
        return [source[i]["image"].tobytes() for i in range(len(source))]

    whole = images("train")
    assert images("train[:25%]") == whole[:10] and images("train[10:]") == whole[10:]
    assert images("train[:3]+test") == whole[:3] + images("test")


def test_the_data_dir_may_come_from_the_environment_and_versions_may_be_chosen(prepared_cifar, tmp_path, monkeypatch):
    shutil.copytree(prepared_cifar[0] / "cifar10", tmp_path / "cifar10")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert str(tmp_path) in open_source("tfds:cifar10").describe()
    assert "3.0.2" in open_source("tfds:cifar10:3.0.2").describe()
    with pytest.raises(FileNotFoundError, match="tfds:cifar10:1.0.0 is not prepared"):
        open_source("tfds:cifar10:1.0.0")
    for version in ("3.0.10", "3.0.9"):
        shutil.copytree(tmp_path / "cifar10" / "3.0.2", tmp_path / "cifar10" / version)
    (tmp_path / "cifar10" / "incomplete.ABC_9.0.0").mkdir()
    (tmp_path / "cifar10" / "incomplete.ABC_9.0.0" / "dataset_info.json").write_text("{}")
    assert open_source("tfds:cifar10").describe().endswith("3.0.10")  # the newest, and finished


def test_several_configurations_are_listed(prepared_cifar, tmp_path):
    for config in ("large", "small"):
        shutil.copytree(prepared_cifar[0] / "cifar10" / "3.0.2", tmp_path / "birds" / config / "1.0.0")
    with pytest.raises(ValueError, match="choose one of tfds:birds/large, tfds:birds/small"):
        open_source("tfds:birds", tmp_path)
    assert len(open_source("tfds:birds/small", tmp_path)) == 40


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar10", r"run `python -m jaxdiff.data.cifar10 --dir .*`"),
        ("mnist", r"pip install 'jaxdiff\[prepare\]'.*tfds.builder\('mnist', data_dir='.*download_and_prepare"),
    ],
)
def test_an_unprepared_data_set_says_how_to_prepare_it(tmp_path, name, hint):
    with pytest.raises(FileNotFoundError, match=f"tfds:{name} is not prepared in .*: .*{hint}") as caught:
        open_source(f"tfds:{name}", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["trian", "train[:1%", "train[5:5]"])
def test_a_wrong_split_is_one_clear_line(prepared_cifar, split):
    with pytest.raises(ValueError, match="tfds:cifar10 has no split") as caught:
        open_source("tfds:cifar10", prepared_cifar[0], split)
    assert "\n" not in str(caught.value)


def test_a_format_without_random_access_is_refused(prepared_cifar, tmp_path):
    shutil.copytree(prepared_cifar[0] / "cifar10", tmp_path / "cifar10")
    info = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="tfrecord, which has no random access.*file_format='array_record'"):
        open_source("tfds:cifar10", tmp_path)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A TFDS data set of grey images of various sizes with captions; example 3 is no image."""
    import tensorflow_datasets as tfds

    class Captioned(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Captions."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"picture": tfds.features.Image(shape=(None, None, 1)), "caption": tfds.features.Text()}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(10):
                picture = io.BytesIO()
                Image.new("L", (5 + i, 6), 10 * i).save(picture, "PNG")
                picture = io.BytesIO(b"no image" if i == 3 else picture.getvalue())
                yield i, {"picture": picture, "caption": f"größe {i}"}

    root = tmp_path_factory.mktemp("captioned")
    Captioned(data_dir=root).download_and_prepare(file_format="array_record")
    return root


def test_captions_and_a_corrupt_image(captioned):
    source = open_source("tfds:captioned", captioned, require_text=True)
    assert (source.num_classes, source.channels, source.image_shape) == (0, 1, None)
    assert source[2]["text"] == "größe 2" and source[2]["label"] == 0
    np.testing.assert_array_equal(source[2]["image"], np.full((6, 7, 1), 20))
    assert source[3]["text"] == "größe 4"  # its picture goes with it
    assert "tfds:captioned split train example 3 is not a PNG" in source.bad[3]
    batch = Loader(source, 10, 0, image_size=4, channels=3)[0]
    assert batch["image"].shape == (10, 4, 4, 3) and sorted(batch["text"])[0] == "größe 0"


@pytest.mark.parametrize("inner", ["text", "entries"])
def test_the_first_of_several_captions_is_taken(tmp_path, inner):
    """Of a list of texts, or of entries as COCO has them; example 1 has none, and is passed over."""
    import tensorflow_datasets as tfds

    text, entries = tfds.features.Text(), inner == "entries"
    kind = {"id": tfds.features.Scalar(np.int64), "text": text} if entries else text

    class Listed(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Several captions an image."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(4, 4, 3)), "captions": tfds.features.Sequence(kind)}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, captions in enumerate([["größe", "size"], [], ["one only"], ["a", "b", "c"]]):
                told = [{"id": 7, "text": caption} for caption in captions] if entries else captions
                image = io.BytesIO()
                Image.new("RGB", (4, 4)).save(image, "PNG")
                yield i, {"image": io.BytesIO(image.getvalue()), "captions": told}

    Listed(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    source = open_source("tfds:listed", tmp_path, require_text=True)
    assert [source[i]["text"] for i in (0, 2, 3)] == ["größe", "one only", "a"]
    assert source[1]["text"] == "one only" and "example 1 has no caption" in source.bad[1]


SCRIPT = """
import sys
from jaxdiff.data import cifar10
from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import open_source
import pathlib
archive, data_dir, md5 = sys.argv[1:]
cifar10.prepare(pathlib.Path(archive), pathlib.Path(data_dir), {"md5": md5})
Loader(open_source("tfds:cifar10", data_dir), 8, 0, image_size=32, channels=3)[0]
assert "tensorflow" not in sys.modules
"""


def test_tensorflow_is_never_imported_even_where_it_is_installed(tiny_cifar, tmp_path):
    package, mark = tmp_path / "packages" / "tensorflow", tmp_path / "was_imported"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise ImportError('not to be imported')\n")
    paths = [str(package.parent), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    arguments = [str(tiny_cifar.path), str(tmp_path / "out"), tiny_cifar.checksums["md5"]]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert result.returncode == 0, result.stderr
    assert not mark.exists()
