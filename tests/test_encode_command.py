"""`python -m jaxdiff.encode`: its flags; what it does is tested in tests/tasks/test_latent.py."""

import sys

import pytest

from jaxdiff import encode


def ended_with(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["encode", *flags])
    with pytest.raises(SystemExit) as ended:
        encode.main()
    return ended.value.code, capsys.readouterr().err


def test_what_is_missing_or_in_the_way_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    config = "--config=configs/emoji_text.py"
    for flags, message in (
        ((config,), "--out is missing"),
        (("--out", str(tmp_path / "new")), "--config is missing"),
        ((config, "--out", str(tmp_path)), "exists already"),
        (("--config=configs/digits.py", f"--out={tmp_path / 'new'}"), "config.autoencoder is empty"),
        ((config, f"--out={tmp_path / 'new'}", f"--config.autoencoder={tmp_path}"), "holds no autoencoder"),
        ((config, f"--out={tmp_path / 'new'}", "--config.data.crop=random"), "centre crops only"),
    ):
        status, said = ended_with(monkeypatch, capsys, *flags)
        assert status == 2 and message in said and said.count("\n") == 1, said
    assert not (tmp_path / "new").exists()


def test_flags_in_either_form():
    assert encode.take_flag(["x", "--out", "a", "--b=1"], "--out") == ("a", ["x", "--b=1"])
    assert encode.take_flag(["x", "--out=a"], "--out") == ("a", ["x"])
    assert encode.take_flag(["x"], "--out") == (None, ["x"])
