"""The reader of .pth files: the same tensors as torch's, and nothing but tensors from whatever bytes it is given."""

import io
import os
import pathlib
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from jaxdiff.weights.pickle_machine import MAX_PICKLE, STORAGES
from jaxdiff.weights.pth import read_pth

MAGIC, PROTOCOL, SYSTEM = 0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}
ZIP, LEGACY = "zip", "legacy"
STORAGE_NAMES = {dtype: name.encode().replace(b".", b"\n") for name, dtype in STORAGES.items()}


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value):
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def integers(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def name(dotted):
    module, last = dotted.rsplit(".", 1)
    return f"c{module}\n{last}\n".encode()


def storage(key, dtype, size, layout):
    """What torch.save writes to name a storage."""
    kind = b"c" + STORAGE_NAMES[np.dtype(dtype)] + b"\n"
    return (
        b"("
        + text("storage")
        + kind
        + text(key)
        + text("cpu")
        + integer(size)
        + (b"N" if layout == LEGACY else b"")
        + b"tQ"
    )


def tensor(stored, shape, strides, offset=0):
    hooks = name("collections.OrderedDict") + b")R"
    arguments = b"(" + stored + integer(offset) + integers(shape) + integers(strides) + b"\x89" + hooks + b"t"
    return name("torch._utils._rebuild_tensor_v2") + arguments + b"R"


def dictionary(**values):
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def program(body):
    return b"\x80\x02" + body + b"."


def save(path, layout, pickled, storages, order="little", compression=zipfile.ZIP_STORED):
    """A file around a pickle and its storages (a dict of arrays), laid out as torch.save lays it out."""
    if layout == LEGACY:
        head = [pickle.dumps(value, 2) for value in (MAGIC, PROTOCOL, SYSTEM)]
        tail = [struct.pack("<q", row.size) + row.tobytes() for row in storages.values()]
        path.write_bytes(b"".join([*head, pickled, pickle.dumps(list(storages), 2), *tail]))
        return path
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", order)
        for key, row in storages.items():
            archive.writestr(f"archive/data/{key}", row.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def save_one(path, layout, shape, strides, offset=0, row=None, promised=None):
    """One tensor named w."""
    row = np.arange(12, dtype=np.float32) if row is None else row
    stored = storage("0", row.dtype, row.size if promised is None else promised, layout)
    return save(path, layout, program(dictionary(w=tensor(stored, shape, strides, offset))), {"0": row})


both = pytest.mark.parametrize("layout", [ZIP, LEGACY])


@both
@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((3, 4), (4, 1), 0, np.arange(12).reshape(3, 4)),
        ((4, 3), (1, 4), 0, np.arange(12).reshape(3, 4).T),
        ((2, 2), (4, 2), 5, [[5, 7], [9, 11]]),
        ((), (), 7, 7),
        ((0, 3), (3, 1), 0, np.zeros((0, 3))),
        ((12,), (1,), 0, np.arange(12)),
    ],
)
def test_a_tensor_is_a_view_of_its_storage(tmp_path, layout, shape, strides, offset, expected):
    w = read_pth(save_one(tmp_path / "a.pth", layout, shape, strides, offset))["w"]
    assert w.dtype == np.float32 and w.shape == tuple(shape)
    np.testing.assert_array_equal(w, np.asarray(expected, np.float32))


@both
@pytest.mark.parametrize("dtype", STORAGES.values(), ids=str)
def test_every_dtype(tmp_path, layout, dtype):
    row = np.array([0, 1, 3, 100]).astype(dtype)
    w = read_pth(save_one(tmp_path / "a.pth", layout, (4,), (1,), row=row))["w"]
    assert w.dtype == dtype
    np.testing.assert_array_equal(w, row)


def test_a_boolean_is_true_or_false(tmp_path):
    path = save_one(tmp_path / "a.pth", ZIP, (3,), (1,), row=np.array([0, 1, 7], np.uint8).view(np.bool_))
    w = read_pth(path)["w"]
    np.testing.assert_array_equal(w.view(np.uint8), [0, 1, 1])
    assert not w.flags.writeable


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_big_endian_archives(tmp_path, dtype):
    row = np.array([1, 2, 300]).astype(dtype)
    swapped = row.view(f"u{row.itemsize}").byteswap().view(dtype)
    pickled = program(dictionary(w=tensor(storage("0", dtype, 3, ZIP), (3,), (1,))))
    np.testing.assert_array_equal(read_pth(save(tmp_path / "a.pth", ZIP, pickled, {"0": swapped}, "big"))["w"], row)


@both
def test_tensors_that_share_a_storage_share_memory(tmp_path, layout):
    stored = storage("0", np.float32, 12, layout)
    pickled = program(dictionary(a=tensor(stored, (3, 4), (4, 1)), b=tensor(stored, (4,), (1,), 8)))
    arrays = read_pth(save(tmp_path / "a.pth", layout, pickled, {"0": np.arange(12, dtype=np.float32)}))
    np.testing.assert_array_equal(arrays["a"][2], arrays["b"])
    assert np.shares_memory(arrays["a"], arrays["b"]) and not arrays["a"].flags.writeable


@both
def test_ordered_dict_with_metadata_and_parameters(tmp_path, layout):
    inner = tensor(storage("0", np.float32, 3, layout), (3,), (1,))
    parameter = (
        name("torch._utils._rebuild_parameter") + b"(" + inner + b"\x88" + name("collections.OrderedDict") + b")RtR"
    )
    metadata = b"}" + text("_metadata") + b"}" + text("version") + integer(2) + b"ssb"
    pickled = program(name("collections.OrderedDict") + b")R(" + text("w") + parameter + b"u" + metadata)
    arrays = read_pth(save(tmp_path / "a.pth", layout, pickled, {"0": np.arange(3, dtype=np.float32)}))
    assert list(arrays) == ["w"]
    np.testing.assert_array_equal(arrays["w"], [0, 1, 2])


def python2_dict(items):
    """An OrderedDict as Python 2 wrote it: called with a list of [key, value]; text without its encoding."""
    pairs = b"".join(b"](U" + bytes([len(key)]) + key.encode() + value + b"e" for key, value in items.items())
    return name("collections.OrderedDict") + b"](" + pairs + b"e\x85R"


@both
def test_files_that_python_2_wrote(tmp_path, layout):
    """LPIPS's weights are one."""
    stored = tensor(storage("0", np.float32, 3, layout).replace(text("0"), b"U\x010"), (3,), (1,))
    pickled = program(python2_dict({"lin0.model.1.weight": stored}))
    tensors = read_pth(save(tmp_path / "a.pth", layout, pickled, {"0": np.arange(3, dtype=np.float32)}))
    np.testing.assert_array_equal(tensors["lin0.model.1.weight"], [0, 1, 2])


@both
def test_a_dict_within_a_checkpoint_is_read_by_its_key(tmp_path, layout):
    inner = dictionary(w=tensor(storage("0", np.float32, 3, layout), (3,), (1,)))
    pickled = program(dictionary(epoch=integer(3), state_dict=inner))
    path = save(tmp_path / "a.pth", layout, pickled, {"0": np.arange(3, dtype=np.float32)})
    np.testing.assert_array_equal(read_pth(path, key="state_dict")["w"], [0, 1, 2])
    with pytest.raises(ValueError, match="'epoch' is a int, not a tensor"):
        read_pth(path)
    with pytest.raises(ValueError, match="no dict under the key 'params'"):
        read_pth(path, key="params")
    path = save(path, layout, program(dictionary(state_dict=inner)), {"0": np.arange(3, dtype=np.float32)})
    with pytest.raises(ValueError, match="key='state_dict' would read that dict"):
        read_pth(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_legacy_head_may_have_any_protocol(tmp_path, protocol):
    body = pickle.dumps(OrderedDict(), protocol) if protocol < 4 else pickle.dumps({}, protocol)
    head = b"".join(pickle.dumps(value, protocol) for value in (MAGIC, PROTOCOL, SYSTEM))
    path = tmp_path / "a.pth"
    path.write_bytes(head + body + pickle.dumps([], protocol))
    assert read_pth(path) == {}


@both
@pytest.mark.parametrize(
    ("shape", "strides", "offset", "promised", "message"),
    [
        ((13,), (1,), 0, None, "larger than its storage"),
        ((12,), (1,), 1, None, "larger than its storage"),
        ((2, 2), (12, 1), 0, None, "larger than its storage"),
        ((2**40,), (0,), 0, None, "larger than its storage"),
        ((2**300, 2**300), (1, 1), 2**2000, None, "larger than its storage"),
        ((4,), (-1,), 3, None, "not known"),
        ((4,), (1,), -1, None, "not known"),
        ((4, 1), (1,), 0, None, "not known"),
        ((1,) * 33, (1,) * 33, 0, None, "33 dimensions"),
        ((0, 2**60), (1, 1), 0, None, "impossible shape"),
        ((12,), (1,), 0, 2**50, "storage '0'"),
        ((12,), (1,), 0, -1, "storage in a way"),
        ((12,), (1,), 0, 11, "storage '0'"),
    ],
)
def test_nothing_reaches_beyond_its_storage(tmp_path, layout, shape, strides, offset, promised, message):
    with pytest.raises(ValueError, match=message):
        read_pth(save_one(tmp_path / "a.pth", layout, shape, strides, offset, promised=promised))


@pytest.fixture
def traced_memory():
    """The most bytes that Python held at once."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@both
def test_a_storage_is_described_in_one_way(tmp_path, layout):
    row = np.arange(12, dtype=np.float32)
    tensors = {dtype: tensor(storage("0", dtype, 12, layout), (1,), (1,)) for dtype in ("float32", "int32")}
    with pytest.raises(ValueError, match="storage '0' in two ways"):
        read_pth(save(tmp_path / "a.pth", layout, program(dictionary(**tensors)), {"0": row}))


@both
@pytest.mark.parametrize("used", [True, False])
def test_nothing_is_allocated_for_a_promise(tmp_path, layout, used, traced_memory):
    """Pickle and header agree on 4 GiB, in a file of a few hundred bytes."""
    promise = 2**30
    stored = tensor(storage("0", np.float32, promise, layout), (promise,), (1,))
    pickled = program(dictionary(a=dictionary(), b=dictionary(w=stored)))
    path = save(tmp_path / "a.pth", layout, pickled, {"0": np.zeros(3, np.float32)})
    content = path.read_bytes().replace(struct.pack("<q", 3) + bytes(12), struct.pack("<q", promise) + bytes(12))
    path.write_bytes(content)
    if used or layout == LEGACY:
        with pytest.raises(ValueError, match="cut off" if layout == LEGACY else "has 12 bytes, not 4,294,967,296"):
            read_pth(path, key="b" if used else "a")
    else:
        assert read_pth(path, key="a") == {}
    assert traced_memory() < 2**20


class Command:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def attacks(flag):
    """Pickles that make the file `flag` when Python's unpickler runs them, and what the reader says of them."""
    command = f"touch {flag}"
    return {
        "reduce": (pickle.dumps(Command(flag), 2), "posix.system"),
        "stack_global": (pickle.dumps(Command(flag), 4), "posix.system"),
        "global": (b"cos\nsystem\n(" + text(command) + b"tR.", "os.system"),
        "inst": (b"(" + text(command) + b"ios\nsystem\n.", "os.system"),
        "obj": (b"(cos\nsystem\n" + text(command) + b"o.", "os.system"),
        "newobj": (b"csubprocess\nPopen\n(" + text(command) + text("x") + b"t\x81.", "subprocess.Popen"),
        "eval": (b"c__builtin__\neval\n(" + text(f"open({str(flag)!r}, 'w')") + b"tR.", "__builtin__.eval"),
        "newobj of an allowed name": (b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        "inst of an allowed name": (b"(icollections\nOrderedDict\n.", "INST"),
        "extension": (b"\x82\x01.", "EXT1"),
        "attribute": (b"ccollections\nOrderedDict.fromkeys\n.", "OrderedDict.fromkeys"),
        "state": (name("torch._utils._rebuild_tensor_v2") + b"}" + text("__call__") + b"NsN\x86b.", "attributes"),
        "load_from_bytes": (b"ctorch.storage\n_load_from_bytes\n.", "_load_from_bytes"),
        "call of a storage type": (b"ctorch\nFloatStorage\n)R.", "torch.FloatStorage"),
        "call of a dict with arguments": (name("collections.OrderedDict") + b"}\x85R.", "OrderedDict with 1"),
        "dict of no items": (name("collections.OrderedDict") + b"](K\x01e\x85R.", "OrderedDict with 1"),
        "persistent id": (b"Pevil\n.", "PERSID"),
    }


@both
@pytest.mark.parametrize("attack", attacks("x"))
def test_pickles_that_do_anything_else_are_refused_by_name(tmp_path, layout, attack):
    flag = tmp_path / "flag"
    pickled, message = attacks(flag)[attack]
    with pytest.raises(ValueError, match=message) as caught:
        read_pth(save(tmp_path / "a.pth", layout, pickled, {}))
    assert "a.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert not flag.exists()


def test_the_attacks_are_real(tmp_path):
    """Python's own unpickler falls for them."""
    for attack in ("reduce", "stack_global", "global", "inst", "obj", "eval"):
        flag = tmp_path / f"flag_{attack}"
        result = pickle.loads(attacks(flag)[attack][0])
        if attack == "eval":
            result.close()
        assert flag.exists(), attack


BOMBS = {
    "doubling": b")q\x00" + b"h\x00h\x00\x86q\x00" * 200,
    "doubling as a key": b")q\x00" + b"h\x00h\x00\x86q\x00" * 26 + b"}h\x00Ns",
    "doubling in a list": b"]q\x00" + b"h\x00h\x00\x86q\x00" * 200 + b"a",
    "nesting": b")" + b"\x85" * 500_000,
    "marks": b"(" * 900_000,
    "a list of items many times over": (
        name("collections.OrderedDict")
        + b"q\x00](K\x01Neq\x01]("
        + b"h\x01" * 200_000
        + b"eq\x02"
        + b"h\x00h\x02\x85R" * 150_000
        + b"N"
    ),
    "memo": b"]" + b"r\xff\xff\xff\xff" * 1000,
    "steps": b"N" * 2_000_000,
    "huge text": b"X\xff\xff\xff\x7f" + b"a" * 100,
    "huge integer": b"\x8b\xff\xff\xff\x7f" + b"a" * 100,
    "decimal integer": b"I" + b"9" * 100_000 + b"\n",
    "a list within itself": b"]q\x00h\x00a",
    "a dict within itself": b"}q\x00" + text("w") + b"h\x00s",
    "frame": b"\x95" + b"\xff" * 8,
    "empty": b"",
}


@both
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_soon_and_take_little_memory(tmp_path, layout, bomb):
    path = save(tmp_path / "a.pth", layout, program(BOMBS[bomb]), {})
    with pytest.raises(ValueError, match=r"a\.pth") as caught:
        read_pth(path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_memory_is_bounded(tmp_path, traced_memory):
    path = save(tmp_path / "a.pth", ZIP, program(b"}" * 2_000_000), {})
    with pytest.raises(ValueError, match="steps"):
        read_pth(path)
    assert traced_memory() < 256 * 2**20


def test_archives_that_promise_more_than_they_hold(tmp_path):
    path = tmp_path / "a.pth"
    row = np.zeros(10**6, np.float32)
    pickled = program(dictionary(w=tensor(storage("0", np.float32, row.size, ZIP), row.shape, (1,))))
    with pytest.raises(ValueError, match="compressed"):
        read_pth(save(path, ZIP, pickled, {"0": row}, compression=zipfile.ZIP_DEFLATED))

    save(path, ZIP, pickled, {"0": row})
    content = path.read_bytes()
    entry = content.rindex(b"archive/data/0") - 46
    for sizes in (2**31, len(content) - 100):
        path.write_bytes(content[: entry + 20] + struct.pack("<II", sizes, sizes) + content[entry + 28 :])
        with pytest.raises(ValueError, match="larger than the file"):
            read_pth(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled + bytes(MAX_PICKLE))
    with pytest.raises(ValueError, match="pickle is longer"):
        read_pth(path)
    with zipfile.ZipFile(path, "w") as archive:
        for member in range(150):
            info = zipfile.ZipInfo(f"archive/{member}")
            info.comment = b"x" * 60000
            archive.writestr(info, b"")
    with pytest.raises(ValueError, match="table of contents is longer"):
        read_pth(path)


def test_a_member_has_one_content(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data.pkl", program(b"}"))
        archive.writestr("archive/data.pkl", program(b"]"))
    with pytest.raises(ValueError, match="two members of the same name"):
        read_pth(path)


def test_keys_are_text_or_numbers(tmp_path):
    """The hash of a value that holds itself many times over would take for ever."""
    path = save(tmp_path / "a.pth", ZIP, program(b"})Ns"), {})
    with pytest.raises(ValueError, match="a tuple as the key of a dict"):
        read_pth(path)


def test_a_damaged_storage_is_noticed(tmp_path):
    path = save_one(tmp_path / "a.pth", ZIP, (12,), (1,))
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(12, dtype=np.float32).tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        read_pth(path)


def test_what_is_no_pth_file(tmp_path):
    path = tmp_path / "a.pth"
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.png", b"x")
    cases = {
        "empty": b"",
        "web page": b"\n<!DOCTYPE html><html>404</html>",
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "safetensors": struct.pack("<Q", len(header)) + header + bytes(4),
        "begins with 1f8b": b"\x1f\x8b\x08" + bytes(50),
        "not one of torch.save: it has no data.pkl": (tmp_path / "photos.zip").read_bytes(),
        "magic number is missing": pickle.dumps({"w": [1.0, 2.0]}, 2),
        "holds a list": save(path, ZIP, program(b"]"), {}).read_bytes(),
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_pth(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is not a file"):
        read_pth(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        read_pth(tmp_path / "none.pth")


@both
def test_every_truncation_is_noticed(tmp_path, layout):
    path = save_one(tmp_path / "a.pth", layout, (3, 4), (4, 1))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a\.pth"):
            read_pth(path)
    path.write_bytes(content + b"\0")
    if layout == LEGACY:
        with pytest.raises(ValueError, match="1 bytes after its last tensor"):
            read_pth(path)


@both
def test_random_damage_gives_one_line_or_an_array_of_the_file(tmp_path, layout):
    path = save_one(tmp_path / "a.pth", layout, (4, 3), (1, 4))
    content = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), random.integers(1, 4)):
            damaged[position] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(1, len(content))] if random.random() < 0.1 else damaged)
        try:
            assert all(array.nbytes <= len(content) for array in read_pth(path).values())
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 500
            refused += 1
    assert refused > 250


@pytest.mark.peer
@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_same_bits_as_torch(tmp_path, new_format, protocol):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    tensors = dict(network.state_dict()) | {
        "base": base,
        "transposed": base.t(),
        "slice": base[1::2, 2:7:3],
        "parameter": torch.nn.Parameter(base[2]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    for dtype in ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"):
        tensors[dtype] = (torch.randn(3, 5) * 4).to(getattr(torch, dtype)).t()
    path = tmp_path / "a.pth"
    save_as = {"_use_new_zipfile_serialization": new_format, "pickle_protocol": protocol}
    torch.save(tensors, path, **save_as)
    arrays = read_pth(path)
    assert list(arrays) == list(tensors)
    for key, expected in tensors.items():
        bits = (
            expected.detach().contiguous().view(torch.uint8) if expected.ndim else expected.reshape(1).view(torch.uint8)
        )
        assert arrays[key].shape == tuple(expected.shape), key
        assert str(arrays[key].dtype) == str(expected.dtype).removeprefix("torch."), key
        assert arrays[key].tobytes() == bits.numpy().tobytes(), key
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, path, **save_as)
    assert list(read_pth(path, key="state_dict")) == list(network.state_dict())
    torch.save(network, path, **save_as)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.container\.Sequential"):
        read_pth(pathlib.Path(path))


@pytest.mark.peer
def test_torch_reads_the_files_of_these_tests(tmp_path):
    torch = pytest.importorskip("torch")
    for layout in (ZIP, LEGACY):
        path = save_one(tmp_path / "a.pth", layout, (4, 3), (1, 4))
        expected = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)["w"].numpy()
        np.testing.assert_array_equal(read_pth(path)["w"], expected)
