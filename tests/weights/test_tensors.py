"""Files of tensors: what is read is what was written, and nothing that a damaged or hostile file holds gets past the header."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.weights.tensors import DTYPES, open_tensors, read_tensors, write_tensors


def tensors():
    rng = np.random.default_rng(0)
    made = {name: rng.integers(0, 2 if name == "BOOL" else 256, (2, 3, 8)) for name in DTYPES}
    arrays = {}
    for name, numbers in made.items():
        raw = numbers.astype(np.uint8)
        arrays[f"of.{name}"] = raw.astype(bool) if name == "BOOL" else raw.view(DTYPES[name])
    return arrays | {"a number": np.full((), 3, np.float32), "nothing": np.zeros((4, 0), np.float16)}


def raw_file(path, header, data=b"", length=None):
    """A file made by hand; `header` is an object or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def complaint(path):
    """What is said of a file that must be refused: one line with its name."""
    with pytest.raises(ValueError) as error:
        read_tensors(path)
    message = str(error.value)
    assert message.startswith(f"{path}: not a sound safetensors file (") and message.endswith(")"), message
    assert message.isprintable() and len(message) < len(str(path)) + 400, message
    return message


def test_every_dtype_there_and_back(tmp_path):
    written = tensors()
    write_tensors(tmp_path / "a.safetensors", written)
    for tensor in open_tensors(tmp_path / "a.safetensors").values():
        assert (tensor.dtype, tensor.shape) == (written[tensor.name].dtype, written[tensor.name].shape)
        assert tensor.nbytes == written[tensor.name].nbytes
    read = read_tensors(tmp_path / "a.safetensors")
    assert read.keys() == written.keys()
    for name, array in read.items():
        assert array.dtype == written[name].dtype and array.shape == written[name].shape, name
        assert array.tobytes() == written[name].tobytes(), name
        assert array.flags.writeable  # memory of its own, not the file's
    assert read["of.BF16"].dtype == ml_dtypes.bfloat16
    common = {name: array for name, array in written.items() if "F8" not in name}  # the library's own reader lacks them
    write_tensors(tmp_path / "a.safetensors", common)
    for name, array in load_file(tmp_path / "a.safetensors").items():
        assert array.tobytes() == read[name].tobytes(), name


def test_arrays_in_any_order_of_memory_are_written_rightly(tmp_path):
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    write_tensors(
        tmp_path / "a.safetensors",
        {"turned": a.transpose(2, 0, 1), "sparse": a[:, ::2], "scalar": a[1, 1, 1:2].reshape(())},
    )
    read = read_tensors(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read["turned"], a.transpose(2, 0, 1))
    np.testing.assert_array_equal(read["sparse"], a[:, ::2])
    assert read["scalar"].shape == () and read["scalar"] == 17


def test_opening_reads_no_tensor(tmp_path):
    """A file whose numbers are a hole of eight gigabytes is opened at once."""
    path = raw_file(tmp_path / "a.safetensors", {"a": entry(0, 2**33)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**33)
    assert open_tensors(path)["a"].nbytes == 2**33


def test_what_is_wrong_is_said(tmp_path):
    path, eight = tmp_path / "a.safetensors", bytes(8)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_tensors(path)
    for header, data, said in (
        (
            {"a": entry(0, 8), "b": entry(4, 12)},
            bytes(12),
            "b overlaps the tensor before it: it begins at byte 4, not 8",
        ),
        ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "b leaves a gap before it"),
        ({"a": entry(4, 8)}, eight, "a leaves a gap before it: it begins at byte 4, not 0"),
        ({"a": entry(0, 16)}, eight, "a ends at byte 16 of 8: the file is cut short or damaged"),
        ({"a": entry(0, 4)}, eight, "its tensors end at byte 4 of 8"),
        ({}, eight, "its tensors end at byte 0 of 8"),
        ({"a": entry(0, 8, shape=[3])}, eight, "a has 8 bytes, but its shape needs 12"),
        ({"a": entry(0, 8, shape=[2**62, 2**62])}, eight, "a has 8 bytes, but its shape needs"),
        ({"a": entry(0, 8, shape=[-2])}, eight, "a has no possible shape"),
        ({"a": entry(0, 8, shape=[True, 2])}, eight, "a has no possible shape"),
        ({"a": entry(0, 8, shape=[1] * 40)}, eight, "a has no possible shape"),
        ({"a": entry(0, 8, shape=[2.0])}, eight, "a has no possible shape"),
        ({"a": entry(0, 8, shape="2")}, eight, "a has no possible shape"),
        ({"a": entry(0, 8, "F33")}, eight, "a holds 'F33', which is none of BOOL, U8"),
        ({"a": entry(0, 8, ["F32"])}, eight, "a holds ['F32'], which is none of"),
        ({"a": entry(0, 8) | {"data_offsets": [8, 0]}}, eight, "a has no possible data_offsets"),
        ({"a": entry(0, 8) | {"data_offsets": [0, 8, 8]}}, eight, "a has no possible data_offsets"),
        ({"a": entry(0, 8) | {"more": 1}}, eight, "a must have dtype, shape and data_offsets"),
        ({"a": 3}, eight, "a must have dtype"),
        ({"a\nb": entry(0, 8)}, eight, r"'a\nb'... is not the name of a tensor"),
        ({"a" * 9999: entry(0, 8)}, eight, "is not the name of a tensor"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must hold strings"),
        (b"[1]", b"", "its header does not begin with a brace"),
        (b'{"a": ', b"", "its header is not JSON"),
        (b'{"a": NaN}', b"", "NaN is not JSON"),
        (b'{"a": ' + b"9" * 9999 + b"}", b"", "Exceeds the limit"),
        (b'{"\xff": 1}', b"", "its header is not text"),
        (b'{"a": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", b"", "its header is nested too deeply"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "'dtype' is there twice"),
    ):
        assert said in complaint(raw_file(path, header, data)), said
    for length, said in ((2**63, "its header should have 9223372036854775808 bytes, but at most 2"), (3, "at most 2")):
        assert said in complaint(raw_file(path, b"{}", length=length))
    for content, said in (
        (b"", "it has only 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "it is a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(99), "it is a zip archive, as torch.save writes"),
        (b"\x80\x02}q\x00.", "it has only 6 bytes"),
        (b"\x80\x02}q\x00(X\x01\x00\x00", "it is a pickle"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
    ):
        path.write_bytes(content)
        assert said in complaint(path)


@pytest.mark.filterwarnings("error")
def test_no_damage_gets_through(tmp_path):
    """Cut anywhere, any bit turned over in the header: refused in one line, or the same tensors under another name."""
    path, good = tmp_path / "a.safetensors", tmp_path / "good.safetensors"
    written = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16)}
    save_file(written, good)
    content = good.read_bytes()
    header = int.from_bytes(content[:8], "little")
    for length in range(len(content)):
        path.write_bytes(content[:length])
        complaint(path)
    rng, refused = np.random.default_rng(0), 0
    bits = [(at, bit) for at in range(8 + header) for bit in range(8)]
    many = [tuple((int(rng.integers(8 + header)), int(rng.integers(8))) for _ in range(3)) for _ in range(1000)]
    for flips in [(flip,) for flip in bits] + many:
        damaged = bytearray(content)
        for at, bit in flips:
            damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            read = read_tensors(path)
        except ValueError:
            refused += 1
            complaint(path)
            continue
        assert sum(array.nbytes for array in read.values()) == len(content) - 8 - header
    assert refused > 0.7 * (len(bits) + len(many))


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": np.zeros(9, np.float32)})
    tensor = open_tensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="a.safetensors: the file has become shorter; a is no longer in it"):
        tensor.read()
    path.unlink()
    with pytest.raises(ValueError, match="a cannot be read .No such file"):
        tensor.read()
