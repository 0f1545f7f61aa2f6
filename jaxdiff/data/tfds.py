"""Prepared TensorFlow Datasets, read as random-access array_record files without importing TensorFlow."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdiff.data.images import CorruptImage, decode_image
from jaxdiff.data.sources import Example, describe_source
from jaxdiff.data.transforms import convert_channels
from jaxdiff.files import read_json

TEXT_FEATURES = ("text", "caption")
LISTS_OF_TEXTS = ("captions", "texts", *TEXT_FEATURES)  # of texts, or of entries with a text among other things
MAX_CLASSES = 2**16
# A plain name: nothing outside the folder of data sets is opened, whatever a config says.
NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)?(:\d+\.\d+\.\d+)?")


class TFDSSource:
    """One split of a prepared data set; its encoded images are decoded here, when asked for."""

    def __init__(
        self, name: str, split: str, records: Sequence[Mapping[str, Any]], features: Mapping[str, Any], origin: str
    ):
        self.name, self.split, self.origin = name, split, origin
        self._records = records
        self._image, self._label, self._text = _roles(name, features)
        height, width, channels = features[self._image].shape
        self.image_shape: tuple[int, int] | None = (height, width) if height and width else None
        self.channels = 1 if channels == 1 else 3
        self.class_names: tuple[str, ...] = tuple(features[self._label].names) if self._label else ()

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 without labels."""
        return len(self.class_names)

    @property
    def has_text(self) -> bool:
        """Whether examples carry a caption."""
        return self._text is not None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        where = f"tfds:{self.name} split {self.split} example {index}"
        try:
            record = self._records[index]
        except Exception as error:  # the reader raises RuntimeError and its relatives for what is damaged
            raise CorruptImage(f"{where} cannot be read: {one_line(error)}") from error
        image = convert_channels(decode_image(record[self._image], where), self.channels)
        example: Example = {"image": image, "label": int(record[self._label]) if self._label else 0}
        if example["label"] < 0:
            raise ValueError(f"{where} has no label (it says {example['label']}): train on a split that has them")
        if self._label and example["label"] >= self.num_classes:
            raise ValueError(f"{where} has label {example['label']}, and there are {self.num_classes:,} classes")
        if self._text is None:
            return example
        try:
            return example | {"text": _caption(record, self._text, where).decode()}
        except UnicodeDecodeError as error:
            raise CorruptImage(f"{where} has a caption that is not text (UTF-8)") from error

    def describe(self) -> str:
        """One line: what, how many, how large, from where."""
        return describe_source(f"tfds:{self.name} ({self.split})", self, self.origin)


def _caption(record: Mapping[str, Any], path: Sequence[str], where: str) -> bytes:
    """The text behind these keys, or the first where there are several. Raises CorruptImage where there is none."""
    found: Any = record
    for key in path:
        found = found[key]
    if isinstance(found, bytes):
        return found
    if not len(found):
        raise CorruptImage(f"{where} has no caption")
    return found[0]


def open_tfds(name: str, data_dir: pathlib.Path | None = None, split: str = "train") -> TFDSSource:
    """One split, or a slice of it ("train[:10%]"), of the data set `name`, `name/config` or `name:1.0.0`."""
    data_dir = data_dir or pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if not NAME.fullmatch(name):
        raise ValueError(f"tfds:{name} is no name of a data set, as tfds:cifar10, tfds:name/config or tfds:name:1.0.0")
    folder = _prepared_folder(name, data_dir)
    _check_features(folder / "features.json")
    import tensorflow_datasets as tfds  # half a second

    try:
        builder = tfds.builder_from_directory(folder)
        features = dict(sorted(builder.info.features.items()))  # their order in the file is arbitrary
    except Exception as error:  # TFDS raises many kinds on damaged files
        raise ValueError(f"tfds:{name} in {folder} is damaged: {one_line(error)}") from error
    image, _, _ = _roles(name, features)
    try:
        records = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"tfds:{name} in {folder} is stored as {builder.info.file_format.value}, which has no random "
            f"access: prepare it again with file_format='array_record'"
        ) from error
    except ValueError as error:
        raise ValueError(f"tfds:{name} has no split {split!r} (or it is empty): {one_line(error)}") from error
    except Exception as error:  # of files that are missing, cut off or no array_record
        raise ValueError(f"tfds:{name} in {folder} is damaged: {one_line(error)}") from error
    return TFDSSource(name, split, records, features, str(folder))


def _check_features(path: pathlib.Path) -> None:
    """Raise ValueError for a features.json that names a class of anything but TFDS: TFDS would import what it names."""
    try:
        nodes = [read_json(path)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    while nodes:
        node = nodes.pop()
        for key in ("type", "pythonClassName", "python_class_name"):
            named = node.get(key) if isinstance(node, dict) else None
            if isinstance(named, str) and not named.startswith("tensorflow_datasets.core.features."):
                raise ValueError(
                    f"{path}: it asks for the Python class {ascii(named)[:80]}, which is none of TFDS's: refused"
                )
        nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []


def one_line(error: BaseException) -> str:
    """The beginning of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _prepared_folder(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The folder of the newest prepared version: data_dir / name [/ config] / version."""
    path, _, wanted = name.partition(":")
    found: dict[pathlib.Path, list[tuple[int, ...]]] = {}
    for info in [*data_dir.glob(f"{path}/*/dataset_info.json"), *data_dir.glob(f"{path}/*/*/dataset_info.json")]:
        version = info.parent.name
        if re.fullmatch(r"\d+\.\d+\.\d+", version) and wanted in ("", version):
            found.setdefault(info.parent.parent, []).append(tuple(int(number) for number in version.split(".")))
    if len(found) > 1:
        configs = ", ".join(sorted(f"tfds:{path}/{folder.name}" for folder in found))
        raise ValueError(f"tfds:{name} in {data_dir} has several configurations: choose one of {configs}")
    if not found:
        raise FileNotFoundError(f"tfds:{name} is not prepared in {data_dir}: {_how_to_prepare(name, data_dir)}")
    [(folder, versions)] = found.items()
    return folder / ".".join(map(str, max(versions)))


def _how_to_prepare(name: str, data_dir: pathlib.Path) -> str:
    if re.split("[:/]", name)[0] == "cifar10":
        return f"run `python -m jaxdiff.data.cifar10 --dir {data_dir}`"
    builder = f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
    return (
        "install the extra with `pip install 'jaxdiff[prepare]'` and run "
        f'`python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"`'
    )


def _roles(name: str, features: Mapping[str, Any]) -> tuple[str, str | None, tuple[str, ...] | None]:
    """Names of the image and the label among a data set's features, and the keys that lead to its caption, or captions."""
    import tensorflow_datasets as tfds

    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if not images:
        raise ValueError(f"tfds:{name} has no image among its features: {', '.join(features)}")
    image = "image" if "image" in images else images[0]
    dtype = np.dtype(features[image].np_dtype)
    if dtype != np.uint8:
        raise ValueError(f"tfds:{name} has images of {dtype}, not of 8 bits")
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    if label and (features[label].num_classes or 0) > MAX_CLASSES:
        raise ValueError(
            f"tfds:{name} has {features[label].num_classes:,} classes, and at most {MAX_CLASSES:,} are read"
        )
    return image, label, _text_keys(features)


def _text_keys(features: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Where the caption is: a text, the first of a list of texts, or of a list of entries with a text, as COCO's."""
    import tensorflow_datasets as tfds

    texts: list[tuple[str, ...]] = [
        (key,) for key in TEXT_FEATURES if isinstance(features.get(key), tfds.features.Text)
    ]
    lists = [key for key in LISTS_OF_TEXTS if type(features.get(key)) is tfds.features.Sequence]
    for key in lists:
        inner = features[key].feature
        if isinstance(inner, tfds.features.Text):
            texts.append((key,))
        if isinstance(inner, tfds.features.FeaturesDict):
            entry = dict(inner.items())
            texts += [(key, part) for part in TEXT_FEATURES if isinstance(entry.get(part), tfds.features.Text)]
    return texts[0] if texts else None
