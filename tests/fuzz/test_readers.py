"""Whatever is in a file of a stranger: read, or refused in one line; quickly, in bounded memory, and nothing else happens."""

import contextlib
import gzip
import io
import json
import pathlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxdiff.command_line import USAGE_ERROR, config_from_flags, one_line_errors
from jaxdiff.config import ConfigError, default_config, to_config, to_json
from jaxdiff.data.folder import open_folder
from jaxdiff.data.idx import open_idx
from jaxdiff.data.images import decode_image, is_grey
from jaxdiff.data.latents import FORMAT, LatentInfo, open_latents
from jaxdiff.files import parse_json, read_npz
from jaxdiff.weights.checkpoint import open_checkpoint
from jaxdiff.weights.lora import load_lora
from jaxdiff.weights.pth import read_pth
from jaxdiff.weights.tensors import open_tensors, read_metadata, read_tensors, write_tensors
from jaxdiff.weights.tokenizer import Tokenizer, train_tokenizer
from tests.fuzz.guarded import guarded, watching
from tests.weights import test_pth as torch_files

MEGABYTE = 2**20
FEW, MANY = 10, 300


def many_or_few(**strategies):
    """The test twice: with few examples, and with many of them under the marker slow."""

    def decorated(test):
        @pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
        def run(examples, tmp_path):
            settings(max_examples=examples)(given(**strategies)(test))(tmp_path)

        return run

    return decorated


# Damage to whole files ------------------------------------------------------------------------------------------------

cuts = st.tuples(st.just("cut"), st.floats(0, 1))
flips = st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255))
inserts = st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9))
# Lengths and offsets are what readers believe: numbers of 4 and 8 bytes are set to what hurts most.
extremes = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**6, 10**9])
numbers = st.tuples(st.just("number"), st.floats(0, 1), extremes, st.sampled_from("IQ"), st.sampled_from("<>"))
damages = st.lists(st.one_of(cuts, flips, inserts, numbers), min_size=1, max_size=4)


def damaged(content: bytes, done: list) -> bytes:
    """The content after all that was done to it."""
    changed = bytearray(content)
    for kind, place, *how in done:
        at = int(place * len(changed))
        if kind == "cut":
            del changed[at:]
        elif kind == "flip" and at < len(changed):
            changed[at] ^= how[0]
        elif kind == "insert":
            changed[at:at] = how[0]
        elif kind == "number":
            number, width, order = how
            packed = struct.pack(order + width, number % 2 ** (8 * struct.calcsize(width)))
            changed[at : at + len(packed)] = packed
    return bytes(changed)


def test_the_guard_sees(tmp_path):
    """It would be a poor guard that sees nothing."""
    import os
    import pickle

    outside = tmp_path.parent / "outside"
    outside.write_bytes(b"x")
    for deed in (
        lambda: os.system("true"),
        lambda: pickle.loads(b"cos\nsystem\n."),
        lambda: (tmp_path / "new").write_bytes(b"x"),
        lambda: (tmp_path / ".." / "outside").read_bytes(),
        lambda: outside.read_bytes(),
    ):
        with watching(tmp_path) as seen:
            deed()
        assert seen
    with watching(tmp_path) as seen:
        (tmp_path / "new").read_bytes()
    assert not seen
    with pytest.raises(AssertionError, match="bytes"):
        guarded(lambda: bytearray(MEGABYTE), tmp_path, MEGABYTE)


# Weights ----------------------------------------------------------------------------------------------------------------

# Few letters, but those that hurt; of all Unicode's hypothesis would first have to make a table.
LETTERS = 'ab0 "\\/.~:{}[]\n\0\x7f\u00e9\u2028\ud800\U0001f600'
texts = st.text(LETTERS, max_size=9)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=9,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "F99"]) | json_values,
        "shape": st.lists(extremes | st.integers(0, 4), max_size=4) | json_values,
        "data_offsets": st.lists(extremes | st.integers(0, 48), max_size=3) | json_values,
    }
)
headers = st.dictionaries(texts | st.just("__metadata__"), entries | json_values, max_size=4)


@many_or_few(header=headers, done=damages, by_hand=st.booleans())
def test_safetensors(tmp_path, header, done, by_hand):
    path = tmp_path / "a.safetensors"
    if by_hand:
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(48))
    else:
        write_tensors(path, {"a.weight": np.ones((3, 4), np.float32), "b": np.ones(4, np.float16)}, {"c": "d"})
        path.write_bytes(damaged(path.read_bytes(), done))
    read = guarded(lambda: read_tensors(path), tmp_path, MEGABYTE)
    if isinstance(read, dict):
        assert sum(array.nbytes for array in read.values()) <= path.stat().st_size
        guarded(lambda: read_metadata(path), tmp_path, MEGABYTE)
    guarded(lambda: load_lora(path, {"unet": []}, {"unet": {}}), tmp_path, MEGABYTE)


@pytest.mark.slow
def test_the_longest_header_of_safetensors(tmp_path):
    """Eight megabytes of what takes most memory when it is read."""
    path = tmp_path / "a.safetensors"
    text = b'{"a":[' + b"{}," * 2_790_000 + b"{}]}"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert isinstance(guarded(lambda: open_tensors(path), tmp_path, 256 * MEGABYTE), ValueError)
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**34)
    assert "its header should have" in str(guarded(lambda: open_tensors(path), tmp_path, MEGABYTE))


# Programs of pickle's opcodes: the parts of a sound one, names that attackers use, and noise, in any order.
PARTS = [
    *(
        b"(",
        b")",
        b"}",
        b"]",
        b"N",
        b"t",
        b"R",
        b"b",
        b"u",
        b"s",
        b"e",
        b"a",
        b"\x85",
        b"\x86",
        b"\x94",
        b"h\x00",
        b"q\x00",
        b"Q",
    ),
    *(torch_files.name(name) for name in ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "os.system")),
    *(b"cbuiltins\neval\n", b"\x8c\x02os\x8c\x06system\x93", b"ios\nsystem\n", b"\x81", b"\x82\x01", b"P1\n", b"."),
    *(torch_files.text("touch flag"), torch_files.integer(2**62), torch_files.integer(-1), torch_files.text("w")),
    torch_files.tensor(torch_files.storage("0", np.float32, 12, torch_files.ZIP), (3, 4), (4, 1)),
]
programs = st.lists(st.sampled_from(PARTS) | st.binary(max_size=3), max_size=30).map(b"".join)


@many_or_few(layout=st.sampled_from([torch_files.ZIP, torch_files.LEGACY]), body=programs)
def test_pickles(tmp_path, layout, body):
    path = torch_files.save(tmp_path / "a.pth", layout, torch_files.program(body), {"0": np.zeros(12, np.float32)})
    guarded(lambda: read_pth(path), tmp_path, 16 * MEGABYTE)


@many_or_few(
    layout=st.sampled_from([torch_files.ZIP, torch_files.LEGACY]), done=damages, shape=st.lists(extremes, max_size=3)
)
def test_pth(tmp_path, layout, done, shape):
    path = tmp_path / "a.pth"
    torch_files.save_one(path, layout, tuple(shape) or (4, 3), (1,) * len(shape) or (1, 4))
    path.write_bytes(damaged(path.read_bytes(), done))
    read = guarded(lambda: read_pth(path), tmp_path, 16 * MEGABYTE)
    if isinstance(read, dict):
        assert all(array.nbytes <= path.stat().st_size for array in read.values())


names = st.lists(
    st.sampled_from(["..", "/", "\\", "a", "unet", ".safetensors", "\0", "~", "C:", "%2e"]), max_size=6
).map("".join)


@many_or_few(weight_map=st.dictionaries(names, names | json_values, max_size=3) | json_values, config=json_values)
def test_index_of_shards(tmp_path, weight_map, config):
    """Nothing outside the folder is opened, whatever an index says."""
    unet = tmp_path / "sd" / "unet"
    unet.mkdir(parents=True, exist_ok=True)
    write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(3)})
    (tmp_path / "sd" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (unet / "config.json").write_text(json.dumps(config))
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert isinstance(guarded(lambda: open_checkpoint(tmp_path / "sd"), tmp_path / "sd", MEGABYTE), ValueError)


TOKENIZER = train_tokenizer(["a red circle"], 520, 8)
SETTINGS = ("model_max_length", "pad_token", "added_tokens_decoder")
models = st.dictionaries(st.sampled_from(["vocab", "merges"]), json_values)


@many_or_few(
    vocabulary=st.dictionaries(
        st.sampled_from(["a", "!", "<|startoftext|>", "zz"]), extremes | json_values, max_size=3
    ),
    merges=st.none() | st.text(LETTERS, max_size=30) | st.binary(max_size=30),
    told=st.dictionaries(st.sampled_from(SETTINGS), extremes | json_values) | json_values,
    done=st.none() | damages,
    whole=st.none() | json_values | st.fixed_dictionaries({"model": models}),
)
def test_tokenizers(tmp_path, vocabulary, merges, told, done, whole):
    TOKENIZER.save(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(TOKENIZER.vocabulary | vocabulary))
    if merges is not None:
        (tmp_path / "merges.txt").write_bytes(merges if isinstance(merges, bytes) else merges.encode(errors="ignore"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    if done is not None:
        (tmp_path / "vocab.json").write_bytes(damaged((tmp_path / "vocab.json").read_bytes(), done))
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    if whole is not None:
        (tmp_path / "vocab.json").unlink()
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    loaded = guarded(lambda: Tokenizer.load(tmp_path), tmp_path, 16 * MEGABYTE)
    if isinstance(loaded, Tokenizer):
        ids = guarded(lambda: loaded.encode(["a red", ""]), tmp_path, 16 * MEGABYTE)
        assert ids.min() >= 0 and ids.max() < loaded.vocabulary_size


# Data --------------------------------------------------------------------------------------------------------------------

keys = st.sampled_from(["file_name", "text", "label", "more"])
values = (
    st.sampled_from(["0.png", "../0.png", "/etc/passwd", "\\\\host\\x", "none.png", "0.png\0", "~root"]) | json_values
)
written = st.dictionaries(keys, values, max_size=4) | json_values


@many_or_few(lines=st.lists(written.map(json.dumps).map(str.encode) | st.binary(max_size=30), max_size=4))
def test_metadata(tmp_path, lines):
    Image.new("RGB", (2, 2)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    source = guarded(lambda: open_folder(tmp_path), tmp_path, 32 * MEGABYTE)
    if not isinstance(source, Exception):
        example = source[0]
        assert example["image"].shape == (2, 2, 3) and 0 <= example["label"] < max(1, source.num_classes)
        example.get("text", "").encode()


@many_or_few(
    shape=st.tuples(*[extremes | st.integers(0, 4)] * 3),
    data=st.binary(max_size=64),
    packed=st.booleans(),
    done=damages | st.just([]),
)
def test_idx(tmp_path, shape, data, packed, done):
    content = struct.pack(">4I", 0x803, *(side % 2**32 for side in shape)) + data
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' * packed}"
    for old in tmp_path.iterdir():
        old.unlink()
    path.write_bytes(damaged(gzip.compress(content) if packed else content, done))
    guarded(lambda: open_idx(tmp_path), tmp_path, 4 * MEGABYTE)


def test_idx_that_unpacks_without_end(tmp_path, monkeypatch):
    """A hundred kilobytes that unpack to a hundred megabytes, where 16 are allowed."""
    from jaxdiff.data import idx

    monkeypatch.setattr(idx, "LARGEST", 16 * MEGABYTE)
    content = struct.pack(">4I", 0x803, 100, 1024, 1024) + bytes(100 * MEGABYTE)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content, 1))
    error = guarded(lambda: open_idx(tmp_path), tmp_path, 40 * MEGABYTE)
    assert "holds more than the 16,777,216 bytes" in str(error)


def picture(format: str) -> bytes:
    """A picture with all that decoders look at."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    buffer = io.BytesIO()
    options = {} if format == "BMP" else {"exif": exif}
    Image.fromarray(pixels).quantize(9).convert("P" if format == "PNG" else "RGB").save(buffer, format, **options)
    return buffer.getvalue()


PICTURES = {format: picture(format) for format in ("PNG", "JPEG", "WEBP", "BMP")}


@many_or_few(format=st.sampled_from(sorted(PICTURES)), done=damages)
def test_pictures(tmp_path, format, done):
    content = damaged(PICTURES[format], done)
    pixels = guarded(lambda: decode_image(content, "a.png"), tmp_path, 300 * MEGABYTE)
    assert isinstance(pixels, ValueError) or (pixels.dtype == np.uint8 and pixels.shape[-1] in (1, 3))
    assert guarded(lambda: is_grey(content), tmp_path, 8 * MEGABYTE) in (True, False)


INFO = LatentInfo(FORMAT, "ab", (2, 2, 6), 1, 8, 3, 1, ("cat",), True, "pictures", ("a.array_record",))


@many_or_few(told=st.dictionaries(st.sampled_from(sorted(vars(INFO))), names | extremes | json_values, max_size=3))
def test_latents(tmp_path, told):
    (tmp_path / "a.array_record").write_bytes(b"")
    (tmp_path / "latents.json").write_text(json.dumps(vars(INFO) | told))
    assert isinstance(guarded(lambda: open_latents(tmp_path), tmp_path, MEGABYTE), ValueError)


@many_or_few(done=damages, compressed=st.booleans())
def test_npz(tmp_path, done, compressed):
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, mu=np.ones(4), sigma=np.eye(4), provenance=np.array("{}"))
    (tmp_path / "a.npz").write_bytes(damaged(buffer.getvalue(), done))
    wanted = ("mu", "sigma", "provenance")
    read = guarded(lambda: read_npz(tmp_path / "a.npz", wanted), tmp_path, 65 * MEGABYTE)
    assert isinstance(read, Exception) or not any(array.dtype.hasobject for array in read.values())


@many_or_few(text=st.binary(max_size=40) | json_values.map(json.dumps).map(str.encode))
def test_json(tmp_path, text):
    guarded(lambda: parse_json(text), tmp_path, MEGABYTE)


# Configs -----------------------------------------------------------------------------------------------------------------

SECTIONS = default_config().to_dict()
KEYS = sorted(f"{section}.{key}" for section, keys in SECTIONS.items() if isinstance(keys, dict) for key in keys)


@many_or_few(changes=st.dictionaries(st.sampled_from(KEYS) | texts, extremes | json_values, max_size=3))
def test_configs(tmp_path, changes):
    """A config is refused or it is one: nothing in between."""
    values = default_config().to_dict()
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if key and section in SECTIONS:
            values[section][key] = value
        else:
            values[section] = value
    config = guarded(lambda: to_config(values), tmp_path, MEGABYTE, (ConfigError,))
    if not isinstance(config, Exception):
        assert to_config(json.loads(to_json(config))) == config


DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "digits.py"
nested = ["(" * 9000 + ")" * 9000, "[" * 50_000, "(" + "-" * 50_000 + "1,)"]
hard = [*nested, "9" * 5000, "x" * 90_000, "1e400", "nan", "0x10", "(1,"]
typed = LETTERS.replace("\0", "=").replace(
    "\ud800", "\udcff"
)  # what a shell can hand over: a byte that is no UTF-8, but no 0
words = st.sampled_from(hard) | st.text(typed, max_size=9)
said = words | extremes.map(str) | json_values.map(repr)
named = st.sampled_from([f"--config.{key}" for key in KEYS])
odd = ["seed", "training", "seed.x", "__class__", "a." * 3000, "lock", "model.channel_multipliers[9]"]
others = [f"--config.{key}" for key in odd] + ["--workdir", "--config", "--undefok", "--flagfile"]
bare = ["--", "---", "--=1", "-", "=", "", "--config", "--workdir", "--config.seed", "--noconfig", "--help"]
flags = st.one_of(
    st.tuples(named | st.sampled_from(others) | words.map("--config.{}".format), said).map("=".join),
    st.sampled_from(bare) | words,
)


@many_or_few(argv=st.lists(flags, max_size=4), doubled=st.booleans())
def test_flags(tmp_path, argv, doubled):
    """What a user types is a config, or one line and exit status 2; --help ends well."""
    argv, told = ["train.py", f"--config={DIGITS}", *argv * (1 + doubled)], io.StringIO()

    def read():
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()), one_line_errors():
            return config_from_flags(argv, "usage")

    result, line = guarded(read, tmp_path, 16 * MEGABYTE, (SystemExit,)), told.getvalue().removesuffix("\n")
    if isinstance(result, SystemExit) and result.code == 0:
        assert not line and "--help" in argv
    elif isinstance(result, SystemExit):
        assert result.code == USAGE_ERROR and line.startswith("error: "), (result.code, line)
        assert "\n" not in line and len(line) < 1500, line
    else:
        assert to_config(json.loads(to_json(result[0]))) == result[0] and not line
