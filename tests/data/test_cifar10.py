"""CIFAR-10 from its published archive: exact, checked, one line for whatever is wrong, nothing left half-written."""

import tarfile

import pytest

from jaxdiff.data import cifar10
from jaxdiff.data.sources import open_source


def test_the_data_set_has_exactly_the_archives_images(prepared_cifar):
    data_dir, truth = prepared_cifar
    for split, batches in (("train", slice(0, 5)), ("test", slice(5, 6))):
        source = open_source("tfds:cifar10", data_dir, split)
        found = {source[i]["image"].tobytes(): source[i]["label"] for i in range(len(source))}
        images = truth.images[batches].reshape(-1, 32, 32, 3)
        labels = truth.labels[batches].ravel()
        assert len(source) == len(images) == len(found)
        assert found == {image.tobytes(): label for image, label in zip(images, labels, strict=True)}


def test_it_has_the_features_of_the_well_known_data_set(prepared_cifar):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared_cifar[0] / "cifar10" / "3.0.2")
    assert builder.info.full_name == "cifar10/3.0.2" and sorted(builder.info.features) == ["id", "image", "label"]
    assert builder.info.features["label"].int2str(3) == "cat"
    example = builder.as_data_source("test", decoders={"image": tfds.decode.SkipDecoding()})[0]
    assert example["id"].startswith(b"test_0000") and example["image"].startswith(b"\x89PNG")


def run(capsys, archive, data_dir, checksums):
    """Exit status and the one line of the error."""
    status = cifar10.main(["--archive", str(archive), "--dir", str(data_dir)], checksums)
    *_, line = capsys.readouterr().err.strip().splitlines()
    return status, line


def assert_nothing_prepared(data_dir):
    assert not [path for path in data_dir.rglob("*") if path.is_file()]


def test_the_command_says_what_to_do_next_and_does_not_repeat_itself(tiny_cifar, tmp_path, capsys):
    arguments = ["--archive", str(tiny_cifar.path), "--dir", str(tmp_path / "out")]
    assert cifar10.main(arguments, tiny_cifar.checksums) == 0
    assert "train on it with the source tfds:cifar10" in capsys.readouterr().out
    tiny_cifar.path.unlink()
    assert cifar10.main(arguments) == 0
    assert "already prepared" in capsys.readouterr().out


def test_another_file_than_the_published_one_is_refused(tiny_cifar, tmp_path, capsys):
    status, line = run(capsys, tiny_cifar.path, tmp_path / "out", cifar10.CHECKSUMS)
    assert status == 2 and "is damaged or another file: its MD5 is" in line and cifar10.CHECKSUMS["md5"] in line
    status, line = run(capsys, tiny_cifar.path, tmp_path / "out", tiny_cifar.checksums | {"sha256": "0" * 64})
    assert status == 2 and "its SHA256 is" in line
    status, line = run(capsys, tmp_path / "missing.tar.gz", tmp_path / "out", tiny_cifar.checksums)
    assert status == 2 and "there is no archive" in line
    assert_nothing_prepared(tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 30, 0.5, 0.99])
def test_a_cut_off_archive_is_refused(tiny_cifar, tmp_path, capsys, keep):
    whole = tiny_cifar.path.read_bytes()
    tiny_cifar.path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    status, line = run(capsys, tiny_cifar.path, tmp_path / "out", tiny_cifar.checksums)
    assert status == 2 and ("cut off" in line or "lacks" in line)
    assert_nothing_prepared(tmp_path / "out")


def test_a_missing_or_misshapen_member_is_named(tiny_cifar, tmp_path, capsys):
    batch = tiny_cifar.members.pop("data_batch_3.bin")
    tiny_cifar.write()
    status, line = run(capsys, tiny_cifar.path, tmp_path / "out", tiny_cifar.checksums)
    assert status == 2 and "lacks cifar-10-batches-bin/data_batch_3.bin" in line
    for wrong, message in (
        (batch[:-1], "not a multiple of 3,073"),
        (b"", "has 0 bytes"),
        (b"\x0a" + batch[1:], "has label 10, and there are 10 classes"),
    ):
        tiny_cifar.members["data_batch_3.bin"] = wrong
        tiny_cifar.write()
        status, line = run(capsys, tiny_cifar.path, tmp_path / "out", tiny_cifar.checksums)
        assert status == 2 and message in line
        assert_nothing_prepared(tmp_path / "out")


def test_no_member_is_written_under_a_name_of_its_own_choice(tiny_cifar, tmp_path):
    evil = tarfile.TarInfo("../../evil.bin")
    evil.size = 3073
    link = tarfile.TarInfo(cifar10.FOLDER + "data_batch_1.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tiny_cifar.write(extra=[evil, link])
    cifar10.prepare(tiny_cifar.path, tmp_path / "a" / "b", tiny_cifar.checksums)
    assert not list(tmp_path.rglob("evil*"))
    assert len(open_source("tfds:cifar10", tmp_path / "a" / "b")) == 40


def test_download_is_checked_and_appears_only_when_right(tiny_cifar, tmp_path, capsys):
    url, target = tiny_cifar.path.as_uri(), tmp_path / "downloads" / "file.tar.gz"
    cifar10.download(url, target, tiny_cifar.checksums)
    assert target.read_bytes() == tiny_cifar.path.read_bytes()
    target.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        cifar10.download(url, target, cifar10.CHECKSUMS)
    with pytest.raises(OSError, match="cannot download file://.*get it another way and give it with --archive"):
        cifar10.download(url + "x", target, tiny_cifar.checksums)
    assert not list(target.parent.iterdir())


def test_without_an_archive_it_is_downloaded_once(tiny_cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "URL", tiny_cifar.path.as_uri())
    folder = cifar10.prepare(None, tmp_path / "out", tiny_cifar.checksums)
    assert folder == tmp_path / "out" / "cifar10" / "3.0.2"
    assert len(open_source("tfds:cifar10", tmp_path / "out")) == 40
    assert (tmp_path / "out" / "downloads" / tiny_cifar.path.name).is_file()
