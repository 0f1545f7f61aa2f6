"""Folders of images: classes from subfolders, flat, and metadata.jsonl."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.folder import open_folder
from jaxdiff.data.sources import open_source


def save(path, level=0, mode="RGB", size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level if mode == "L" else (level,) * 3).save(path)


def write_metadata(root, *entries):
    lines = (entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    for level, name in enumerate(["dog/b.png", "dog/deeper/a.PNG", "cat/x.bmp", "cat/y.webp", "bird/z.png"]):
        save(tmp_path / name, 10 * level)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    save(tmp_path / ".hidden" / "a.png")
    source = open_source("folder", tmp_path)
    assert source.class_names == ("bird", "cat", "dog")
    assert [(source[i]["label"], source[i]["image"][0, 0, 0]) for i in range(5)] == [
        (0, 40),
        (1, 20),
        (1, 30),
        (2, 0),
        (2, 10),
    ]
    assert source[0]["image"].shape == (4, 5, 3) and "text" not in source[0]
    assert re.fullmatch(r"folder: 5 RGB images of various sizes, 3 classes, from .*", source.describe())


def test_a_flat_folder_has_no_labels(tmp_path):
    for name in ("b.png", "a.jpg", "c.txt"):
        (tmp_path / name).write_text("") if name == "c.txt" else save(tmp_path / name)
    source = open_source("folder", tmp_path)
    assert len(source) == 2 and open_folder(tmp_path).files == ("a.jpg", "b.png")
    assert (source.num_classes, source[0]["label"], source.has_text) == (0, 0, False)
    with pytest.raises(ValueError, match="needs labels, and there are none"):
        open_source("folder", tmp_path, require_labels=True)


def test_channels_are_those_of_the_files(tmp_path):
    for i in range(40):
        save(tmp_path / "grey" / f"{i:02d}.png", i, "L")
    source = open_folder(tmp_path / "grey")
    assert source.channels == 1 and source[3]["image"].shape == (4, 5, 1)
    save(tmp_path / "grey" / "00.png", 9)  # one RGB file among the sampled ones: everything is RGB
    source = open_folder(tmp_path / "grey")
    assert source.channels == 3
    np.testing.assert_array_equal(source[3]["image"], np.full((4, 5, 3), 3))


def test_splits_are_subfolders_named_so(tmp_path):
    save(tmp_path / "train" / "a" / "1.png")
    save(tmp_path / "train" / "b" / "2.png")
    save(tmp_path / "test" / "a" / "3.png")
    assert open_folder(tmp_path, "train").class_names == ("a", "b")
    assert open_folder(tmp_path, "test").files == ("a/3.png",)
    with pytest.raises(ValueError, match="no split 'validation', only test, train"):
        open_folder(tmp_path, "validation")
    with pytest.raises(ValueError, match="no splits"):
        open_folder(tmp_path / "test", "validation")
    save(tmp_path / "plane" / "4.png")  # now "train" is a vehicle
    assert open_folder(tmp_path).class_names == ("plane", "test", "train")


def test_metadata_gives_captions_in_the_order_of_its_lines(tmp_path):
    for level, name in enumerate(["images/b.png", "images/a.png", "c.png"]):
        save(tmp_path / name, level)
    write_metadata(
        tmp_path,
        {"file_name": "images/b.png", "text": "ein Bär"},
        "",
        {"file_name": "c.png", "text": "c"},
        {"file_name": "images/a.png", "text": "c", "extra": [1, 2]},
    )
    source = open_source("folder", tmp_path, require_text=True)
    assert [(source[i]["image"][0, 0, 0], source[i]["text"]) for i in range(3)] == [(0, "ein Bär"), (2, "c"), (1, "c")]
    assert source.has_text and source.num_classes == 0 and "captioned" in source.describe()


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [([2, 0, 2], [2, 0, 2], ("0", "1", "2")), (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog"))],
)
def test_metadata_labels_are_numbers_or_names(tmp_path, labels, numbers, names):
    save(tmp_path / "a.png")
    write_metadata(tmp_path, *({"file_name": "a.png", "label": label} for label in labels))
    source = open_source("folder", tmp_path, require_labels=True)
    assert [source[i]["label"] for i in range(3)] == numbers and source.class_names == names and not source.has_text


GOOD = {"file_name": "a.png", "text": "a", "label": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is not an object"),
        ({"text": "a"}, 'line 2 is not an object with a string "file_name"'),
        ({"file_name": "a.png", "label": 0}, "line 2: its text is absent, the first line's is a string"),
        (GOOD | {"text": None}, "line 2: its text is absent"),
        (GOOD | {"text": 3}, "line 2: text must be a string, not 3"),
        (GOOD | {"label": "cat"}, "line 2: its label is a string, the first line's is a number"),
        (GOOD | {"label": -1}, "line 2: label must be from 0"),
        (GOOD | {"label": 10**12}, "line 2: label must be from 0"),
        (GOOD | {"label": True}, "line 2: label must be a number or a name, not True"),
        (GOOD | {"label": 1.5}, "line 2: label must be a number or a name"),
        (GOOD | {"file_name": "b.png"}, "line 2: there is no file 'b.png'"),
        (GOOD | {"file_name": "../data/a.png"}, "line 2: file_name .* leads out of the folder"),
        (GOOD | {"file_name": "x/../../data/a.png"}, "leads out of the folder"),
        (GOOD | {"file_name": "..\\a.png"}, "leads out of the folder"),
        (GOOD | {"file_name": "C:a.png"}, "leads out of the folder"),
        (GOOD | {"file_name": "/etc/passwd"}, "leads out of the folder"),
        (GOOD | {"file_name": "a.png\0"}, "leads out of the folder"),
        (GOOD | {"file_name": ""}, "there is no file"),
    ],
)
def test_a_wrong_line_of_metadata_is_named(tmp_path, line, message):
    root = tmp_path / "data"
    save(root / "a.png")
    write_metadata(root, GOOD, line)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_source("folder", root)
    assert "\n" not in str(caught.value)


def test_empty_and_ambiguous_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no images"):
        open_source("folder", tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="metadata.jsonl is empty"):
        open_source("folder", tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    save(tmp_path / "a.png")
    save(tmp_path / "cats" / "b.png")
    with pytest.raises(ValueError, match=r"beside \(a.png\) and inside subfolders \(cats\)"):
        open_source("folder", tmp_path)
