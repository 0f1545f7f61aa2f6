"""Prepared TensorFlow Datasets, read as random-access array_record files without importing TensorFlow."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdiff.data.images import decode_image
from jaxdiff.data.sources import Example, describe_source
from jaxdiff.data.transforms import convert_channels

TEXT_FEATURES = ("text", "caption")


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
        record = self._records[index]
        where = f"tfds:{self.name} split {self.split} example {index}"
        image = convert_channels(decode_image(record[self._image], where), self.channels)
        example: Example = {"image": image, "label": int(record[self._label]) if self._label else 0}
        if example["label"] < 0:
            raise ValueError(f"{where} has no label (it says {example['label']}): train on a split that has them")
        return example | {"text": record[self._text].decode()} if self._text else example

    def describe(self) -> str:
        """One line: what, how many, how large, from where."""
        return describe_source(f"tfds:{self.name} ({self.split})", self, self.origin)


def open_tfds(name: str, data_dir: pathlib.Path | None = None, split: str = "train") -> TFDSSource:
    """One split, or a slice of it ("train[:10%]"), of the data set `name`, `name/config` or `name:1.0.0`."""
    data_dir = data_dir or pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = _prepared_folder(name, data_dir)
    import tensorflow_datasets as tfds  # half a second

    builder = tfds.builder_from_directory(folder)
    features = dict(sorted(builder.info.features.items()))  # their order in the file is arbitrary
    image, _, _ = _roles(name, features)
    try:
        records = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"tfds:{name} in {folder} is stored as {builder.info.file_format.value}, which has no random "
            f"access: prepare it again with file_format='array_record'"
        ) from error
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"tfds:{name} has no split {split!r} (or it is empty): {reason}") from error
    return TFDSSource(name, split, records, features, str(folder))


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


def _roles(name: str, features: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """Names of the image, the label and the caption among a data set's features."""
    import tensorflow_datasets as tfds

    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    texts = [key for key in TEXT_FEATURES if isinstance(features.get(key), tfds.features.Text)]
    if not images:
        raise ValueError(f"tfds:{name} has no image among its features: {', '.join(features)}")
    image = "image" if "image" in images else images[0]
    dtype = np.dtype(features[image].np_dtype)
    if dtype != np.uint8:
        raise ValueError(f"tfds:{name} has images of {dtype}, not of 8 bits")
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    return image, label, texts[0] if texts else None
