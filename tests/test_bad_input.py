"""What users get wrong, by the command they type: one line that names the thing, exit status 2, and nothing written.

The table is run in this process, by the commands' own `main`; a few rows of it again as processes of their own.
"""

import contextlib
import dataclasses
import gzip
import importlib
import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import to_json
from jaxdiff.data import latents
from jaxdiff.tasks import asked
from jaxdiff.tasks.make import Parts, make_task
from jaxdiff.training import loop
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.weights import clip_vocabulary
from jaxdiff.weights.tensors import read_tensors, write_tensors
from jaxdiff.weights.tokenizer import train_tokenizer
from tests.tasks import tiny_checkpoint
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = {"train": "train.py", "sample": "sample.py", "evaluate": "evaluate.py"}
SHIPPED = {"DIGITS": "digits.py", "FOLDER": "folder.py", "FINETUNE": "stable_diffusion_finetune.py"}
MODULES = {"encode": "jaxdiff.encode", "export": "jaxdiff.export", "weights": "jaxdiff.weights.__main__"}


class Row(NamedTuple):
    """A command line (DIGITS ...: the shipped configs), what must be said of it, and what was done to the files before."""

    line: str
    message: str
    damage: Callable[[pathlib.Path], Any] | None = None


# Config keys and flags of train.py ----------------------------------------------------------------------------------

KEYS = [
    ("seed=-1", "config.seed = -1 must not be negative"),
    ("seed=4294967296", "config.seed must not be larger than 4,294,967,295"),
    ("seed=1.5", "config.seed=1.5: "),
    ("task=diffuson", "config.task = 'diffuson' must be one of 'diffusion'"),
    ("trainin.batch_size=8", "unknown config key config.trainin.batch_size; did you mean training"),
    ("training.batchsize=8", "unknown config key config.training.batchsize; did you mean batch_size"),
    ("training.batch_size=many", "config.training.batch_size=many: invalid literal"),
    ("training.batch_size=0", "config.training.batch_size = 0 must be at least 1"),
    ("training.num_steps=0", "config.training.num_steps = 0 must be at least 1"),
    ("training.num_steps=99999999999999999999", "config.training.num_steps must not be larger than 4,294,967,295"),
    ("training.accumulation_steps=3", "must be divisible by accumulation_steps = 3"),
    ("training.log_every=0", "config.training.log_every = 0 must be at least 1"),
    ("training.checkpoint_every=-5", "config.training.checkpoint_every = -5 must be at least 1"),
    ("training.sample_every=-1", "config.training.sample_every = -1 must not be negative"),
    ("training.keep_checkpoints=0", "config.training.keep_checkpoints = 0 must be at least 1"),
    ("data.dir=photos/\udcff", r"config.data.dir = 'photos/.udcff' must be text .UTF-8."),
    ("data.source=digist", "unknown data source 'digist': there are .*did you mean digits"),
    ("data.source=folder", "config.data: data source 'folder' needs the folder it lies in .data.dir."),
    ("data.split=tset", "config.data: digits has the splits train, nine_tenths, tenth, and no 'tset'"),
    ("data.image_size=0", "config.data.image_size = 0 must be at least 1"),
    ("data.image_size=9", "config.data.image_size = 9 must be divisible by"),
    ("data.channels=4", "config.data.channels = 4 must be 1 .grey. or 3 .RGB."),
    ("data.crop=left", "config.data.crop = 'left' must be one of 'centre', 'random'"),
    ("data.flip=maybe", "config.data.flip=maybe"),
    ("data.max_bad_fraction=1", "config.data.max_bad_fraction = 1.0 must be at least 0 and below 1"),
    ("data.max_bad_fraction=nan", "config.data.max_bad_fraction = nan must be finite"),
    ("data.num_threads=0", "config.data.num_threads = 0 must be at least 1"),
    ("model.channels=0", "config.model.channels = 0 must be at least 1"),
    ("model.channel_multipliers=1,0", "config.model.channel_multipliers = .1, 0. must hold positive integers"),
    ("model.channel_multipliers=1,a", "config.model.channel_multipliers = '1,a' must be of type int"),
    ("model.attention_resolutions=3,", "3 is not a side of this U-Net, which has"),
    ("model.num_heads=3", "config.model.num_heads = 3 must divide"),
    ("model.dropout=1.0", "config.model.dropout = 1.0 must be at least 0 and below 1"),
    ("model.num_classes=-2", "config.model.num_classes = -2 must be -1"),
    ("model.num_classes=3", "config.model.num_classes = 3, but there are 10 classes in digits"),
    ("model.dtype=float16", "config.model.dtype = 'float16' must be one of 'float32', 'bfloat16'"),
    ("model.attention_implementation=cudnn", "needs config.model.dtype = 'bfloat16'"),
    ("model.pretrained=nowhere --config.sampling.clip=none", "config.model.pretrained: nowhere: there is no such file"),
    ("model.pretrained_prediction=v", "model.pretrained_prediction is set, but config.model.pretrained is not"),
    ("text.pooled=True", "config.text.pooled is set, but config.text.enabled is False"),
    ("text.trained=True", "text.trained = True is for config.model.pretrained"),
    ("text.vocabulary_size=100", "config.text.vocabulary_size = 100 must be at least 514"),
    ("text.num_heads=3", "config.text.num_heads = 3 must divide config.text.width"),
    ("text.context_length=2", "config.text.context_length = 2 must be at least 3"),
    ("lora.rank=4", "config.lora.rank = 4 needs a model to adapt: config.model.pretrained"),
    ("lora.rank=-1", "config.lora.rank = -1 must not be negative"),
    ("autoencoder=nowhere --config.sampling.clip=none", "there is no autoencoder at nowhere: no such folder"),
    ("autoencoder=nowhere", "config.sampling.clip = 'clip' is for pixels"),
    ("diffusion.schedule=cosin", "config.diffusion.schedule = 'cosin' must be one of 'linear'"),
    ("diffusion.prediction=velocity", "needs config.diffusion.schedule = 'flow'"),
    (
        "diffusion.schedule=linear --config.diffusion.beta_start=0.5",
        "config.diffusion needs 0 < beta_start < beta_end < 1",
    ),
    ("diffusion.beta_end=inf", "config.diffusion.beta_end = inf must be finite"),
    ("diffusion.zero_terminal_snr=True", "cannot start from pure noise"),
    ("diffusion.loss=hybrid", "needs config.diffusion.learned_variance = True"),
    ("diffusion.label_dropout=1.5", "config.diffusion.label_dropout = 1.5 must lie between 0 and 1"),
    ("diffusion.num_timesteps=10", "must not exceed config.diffusion.num_timesteps = 10"),
    ("diffusion.sigma_max=0.5", "config.diffusion.sigma_max = 0.5 must be at least 1"),
    ("diffusion.p_mean=nan", "config.diffusion.p_mean = nan must be finite"),
    ("optimizer.learning_rate=0", "config.optimizer.learning_rate = 0.0 must be positive"),
    ("optimizer.learning_rate=inf", "config.optimizer.learning_rate = inf must be finite"),
    ("optimizer.name=sgd", "config.optimizer.name = 'sgd' must be one of 'adam', 'adamw', 'muon'"),
    ("optimizer.ema_decay=1", "config.optimizer.ema_decay = 1.0 must be at least 0 and below 1"),
    ("sharding.fsdp=3", "config.sharding.fsdp = 3 must divide the number of devices, 8"),
    ("sharding.mode=pjit", "config.sharding.mode = 'pjit' must be one of 'jit', 'pmap'"),
    ("sampling.sampler=dmp", "config.sampling.sampler = 'dmp' must be one of 'ddpm'"),
    ("sampling.steps=0", "config.sampling.steps = 0 must be at least 1"),
    ("sampling.variance=learned", "needs config.diffusion.learned_variance = True"),
    ("sampling.truncation=0.7", "config.sampling.truncation = 0.7 is for task 'progressive_gan'"),
    ("evaluation.metrics=bpd,", "config.evaluation.metrics: 'bpd.*' must be one of"),
    ("evaluation.num_images=3", "config.evaluation.num_images = 3 must be at least 10"),
    ("task=vae", "config.model.num_classes = -1 must be 0: a VAE has no condition"),
    ("task=vae --config.model.num_classes=0 --config.vae.channels=4,4,4,4", "config.data.image_size = 8 must be divis"),
    ("task=autoencoder", "config.data.image_size = 8 must be"),
    ("task=progressive_gan --config.data.image_size=12", "config.data.image_size = 12 must be one of 4, 8, 16"),
    (
        "task=progressive_gan --config.training.batch_size=36 --config.optimizer.schedule=constant "
        "--config.optimizer.warmup_steps=0",
        "config.training.batch_size = 36 must be divisible by 8 devices, for a progressive GAN judges a batch's images together",
    ),
]


def raising(statement: str) -> Callable[[pathlib.Path], Any]:
    """A config file whose function does this."""
    return lambda p: (p / "bad.py").write_text(f"def get_config(text=''):\n    {statement}\n")


MISSPELT = "from jaxdiff.config import default_config as new; config = new(); config.modl = 3"
TRAIN = [
    Row("train", "--config is missing: give a config file, such as"),
    Row("train --config", "--config"),
    Row("train --config=nothing.py", "--config nothing.py: no such file"),
    Row("train --config=.", "--config .: no such file"),
    Row("train --config=DIGITS --config FOLDER", "--config is given more than once"),
    Row(
        "train --config=nothing.py --config=DIGITS",
        "--config is given more than once .nothing.py and .*digits.py.: give one",
    ),
    Row("train --config=DIGITS --flagfile=image.png", "--flagfile is not read here: give the flags themselves"),
    Row("train --flagfile nowhere", "--flagfile is not read here: give the flags themselves"),
    Row("encode --config=DIGITS --out=x -flagfile=nowhere", "--flagfile is not read here: give the flags themselves"),
    Row("train --config=DIGITS config.seed=1", "'config.seed=1' is not understood: flags begin with two dashes"),
    Row("train --config=DIGITS --wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    Row("train --config=DIGITS --workdir=image.png", "--workdir image.png: it is a file, and a folder is needed"),
    Row("train --config=DIGITS --workdir=image.png/run", "image.png is a file, and a folder is needed"),
    Row("train --config=DIGITS --workdir=gs://bucket/run", "--workdir gs://bucket/run: it must be a folder"),
    Row("train --config=bad.py", "bad.py: .*line 1", lambda p: (p / "bad.py").write_text("def get_config(:\n")),
    Row("train --config=bad.py", "bad.py: .*imaginary", lambda p: (p / "bad.py").write_text("import imaginary\n")),
    Row("train --config=bad.py", "bad.py: .*get_config", lambda p: (p / "bad.py").write_text("x = 1\n")),
    Row(
        "train --config=bad.py",
        "bad.py: get_config.. must return default_config",
        lambda p: (p / "bad.py").write_text("def get_config():\n    return 3\n"),
    ),
    Row("train --config=image.png", "image.png"),
    Row("train --config=bad.py", "bad.py: line 2: ValueError: too small$", raising("raise ValueError('too small')")),
    Row("train --config=bad.py:3", "bad.py: line 2: ValueError: too small$", raising("raise ValueError('too small')")),
    Row(
        "train --config=bad.py:x",
        "bad.py: line 2: JSONDecodeError: Expecting",
        raising("__import__('json').loads(text)"),
    ),
    Row("train --config=bad.py", 'line 2: .*locked. Did you mean "model" instead of "modl".$', raising(MISSPELT)),
    Row("train --config=bad.py:x", "bad.py: line 2: KeyError: x$", raising("return {}[text]")),
    Row(
        f"train --config={ROOT}/configs/digits.py:x",
        "digits.py: get_config.. takes 0 positional arguments but 1 was given$",
    ),
    Row("train --config=nothing.py:x", "--config nothing.py: no such file"),
    Row("encode --config=DIGITS", "--out is missing"),
    Row("encode --config=DIGITS --out=x", "config.autoencoder is empty"),
    Row("encode --config=DIGITS --out", "--out is missing"),
]

# Data ----------------------------------------------------------------------------------------------------------------


def lines(*entries: Any) -> Callable[[pathlib.Path], Any]:
    """Other lines for photos/metadata.jsonl: text as it stands, or objects."""
    text = "\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries)
    return lambda p: (p / "photos" / "metadata.jsonl").write_text(text)


def without_metadata(damage: Callable[[pathlib.Path], Any]) -> Callable[[pathlib.Path], Any]:
    """A flat folder of photographs, with some of them damaged."""

    def prepare(p: pathlib.Path) -> None:
        (p / "photos" / "metadata.jsonl").unlink()
        damage(p / "photos")

    return prepare


def each(folder: pathlib.Path, content: bytes) -> None:
    """Every image of a folder becomes this."""
    for path in folder.glob("*.png"):
        path.write_bytes(content)


def bomb_png() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        import zlib

        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"x\x9c") + chunk(b"IEND", b"")


def sparse(path: pathlib.Path, size: int) -> None:
    """A file that is all hole."""
    with path.open("r+b") as file:
        file.truncate(size)


PHOTOS = "train --config=DIGITS --config.data.source=folder --config.data.dir=photos --config.data.channels=3"
PHOTOS += " --config.model.num_classes=0"
CAPTIONS = PHOTOS + " --config.text.enabled=True"
ENTRY = {"file_name": "0.png", "text": "cat"}
DATA = [
    Row(
        "train --config=FOLDER --config.data.dir=nowhere",
        "config.data: data source 'folder': there is no folder nowhere",
    ),
    Row("train --config=FOLDER --config.data.dir=image.png", "there is no folder image.png"),
    Row(PHOTOS, "folder photos has no images", lambda p: shutil.rmtree(p / "photos") or (p / "photos").mkdir()),
    Row(
        PHOTOS + " --config.data.split=test", "folder photos has no splits, so all of it is 'train'; there is no 'test'"
    ),
    Row(
        PHOTOS,
        "folder photos has images both beside .0.png. and inside subfolders .more.",
        without_metadata(lambda f: shutil.copytree(f, f / "more")),
    ),
    Row(PHOTOS + " --config.model.num_classes=-1", "a class-conditional model needs labels, and there are none"),
    Row(CAPTIONS, "a text-conditional model needs captions", without_metadata(lambda f: None)),
    Row(CAPTIONS, "metadata.jsonl is empty", lines("")),
    Row(CAPTIONS, "metadata.jsonl line 2 is not JSON", lines(ENTRY, '{"file_name": ')),
    Row(
        CAPTIONS,
        "line 1 is not JSON: it is not text .UTF-8.",
        lambda p: (p / "photos/metadata.jsonl").write_bytes(b"\xff\n"),
    ),
    Row(CAPTIONS, "line 1 is not JSON: it is nested too deeply", lines("[" * 200_000)),
    Row(CAPTIONS, "line 1 is longer than 1,048,576 bytes", lines(" " * 5 + '{"text": "' + "a" * 2**20)),
    Row(CAPTIONS, "line 1 is not JSON: it is not text", lines('{"file_name": "0.png", "text": "\\ud800"}')),
    Row(CAPTIONS, 'line 1 is not an object with a string "file_name"', lines([1])),
    Row(CAPTIONS, "line 2: its text is absent", lines(ENTRY, {"file_name": "1.png"})),
    Row(CAPTIONS, "line 1: text must be a string, not 3", lines(ENTRY | {"text": 3})),
    Row(CAPTIONS, "line 1: label must be from 0 to 65535", lines(ENTRY | {"label": 10**9})),
    Row(CAPTIONS, "line 1: label must be a number or a name", lines(ENTRY | {"label": [1]})),
    Row(CAPTIONS, "line 1: there is no file 'none.png' in photos", lines(ENTRY | {"file_name": "none.png"})),
    Row(CAPTIONS, "leads out of the folder", lines(ENTRY | {"file_name": "../image.png"})),
    Row(CAPTIONS, "leads out of the folder", lines(ENTRY | {"file_name": "/etc/hostname"})),
    Row(CAPTIONS, "leads out of the folder", lines(ENTRY | {"file_name": "C:\\x.png"})),
    Row(CAPTIONS + " --config.text.tokenizer=nowhere", "config.text: nowhere is no tokenizer: it has no vocab.json"),
    Row(
        PHOTOS, "too many corrupt images: .*0.png is empty|is empty .0 bytes.", without_metadata(lambda f: each(f, b""))
    ),
    Row(PHOTOS, "too many corrupt images", without_metadata(lambda f: each(f, b"\x89PNG\r\n\x1a\nnonsense"))),
    Row(PHOTOS, "too many corrupt images", without_metadata(lambda f: each(f, b"GIF89a"))),
    Row(PHOTOS, "png .*3600000000 pixels|60000x60000 pixels", without_metadata(lambda f: each(f, bomb_png()))),
    Row(
        PHOTOS,
        "is longer than 536,870,912 bytes, so it is no image",
        without_metadata(lambda f: [sparse(path, 2**40) for path in f.glob("*.png")]),
    ),
    Row(
        "train --config=DIGITS --config.data.source=idx --config.data.dir=photos",
        "folder photos has no train-images-idx3-ubyte",
    ),
    Row(
        "train --config=DIGITS --config.data.source=tfds:nothing --config.data.dir=.", "tfds:nothing is not prepared in"
    ),
    Row("train --config=DIGITS --config.data.source=tfds:../photos", "tfds:../photos is no name of a data set"),
    Row("train --config=DIGITS --config.data.source=tfds:/etc", "tfds:/etc is no name of a data set"),
]


def evil_data_set(p: pathlib.Path) -> None:
    """A TFDS data set whose features are a class of somebody's module, which TFDS would import."""
    put("evil/1.0.0/dataset_info.json", "{}")(p)
    put("evil/1.0.0/features.json", '{"pythonClassName": "evil.module.Feature"}')(p)
    put("evil/module.py", "raise SystemExit(3)")(p)


EVIL = "train --config=DIGITS --config.data.source=tfds:evil --config.data.dir=."
DATA += [
    Row(
        EVIL,
        "features.json: it asks for the Python class 'evil.module.Feature', which is none of TFDS's",
        evil_data_set,
    )
]


def idx(header: bytes, data: bytes = b"", compressed: bool = False) -> Callable[[pathlib.Path], Any]:
    """A folder `idx` with a file of images."""

    def prepare(p: pathlib.Path) -> None:
        (p / "idx").mkdir()
        name = f"train-images-idx3-ubyte{'.gz' * compressed}"
        (p / "idx" / name).write_bytes(gzip.compress(header + data) if compressed else header + data)

    return prepare


IDX = "train --config=DIGITS --config.data.source=idx --config.data.dir=idx"
DATA += [
    Row(IDX, "begins with 47494638, not 00000803", idx(b"GIF89a")),
    Row(IDX, "is cut off within its header", idx(struct.pack(">2I", 0x803, 2))),
    Row(
        IDX,
        "its header promises 128 bytes of data, and there are only 5",
        idx(struct.pack(">4I", 0x803, 2, 8, 8), b"12345"),
    ),
    Row(IDX, "and there are only 5", idx(struct.pack(">4I", 0x803, *[2**32 - 1] * 3), b"12345")),
    Row(IDX, "and there are more", idx(struct.pack(">4I", 0x803, 1, 2, 2), bytes(5), compressed=True)),
    Row(IDX, "has no pixels", idx(struct.pack(">4I", 0x803, 0, 8, 8))),
]

# Runs ------------------------------------------------------------------------------------------------------------------


def put(name: str, content: str | bytes) -> Callable[[pathlib.Path], Any]:
    """Another content for a file; the folders above it are made."""

    def prepare(p: pathlib.Path) -> None:
        (p / name).parent.mkdir(parents=True, exist_ok=True)
        (p / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def change(name: str, **values: Any) -> Callable[[pathlib.Path], Any]:
    """Other values in a JSON file."""
    return lambda p: put(name, json.dumps(json.loads((p / name).read_text()) | values))(p)


def lose(*names: str) -> Callable[[pathlib.Path], Any]:
    """Files or folders that are gone."""

    def prepare(p: pathlib.Path) -> None:
        for name in names:
            (shutil.rmtree if (p / name).is_dir() else pathlib.Path.unlink)(p / name)

    return prepare


def damage_checkpoint(p: pathlib.Path) -> None:
    """Every file of the only checkpoint is cut to nothing."""
    for path in (p / "run" / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


GO_ON = "train --config=DIGITS --workdir run"
SAMPLE = "sample --workdir run"
RUNS = [
    Row("sample", "give either --workdir .a run. or --model"),
    Row("sample --workdir run --model sd", "give either --workdir .a run. or --model"),
    Row("sample --wrkdir run", "unrecognized arguments: --wrkdir run"),
    Row(SAMPLE + " --num many", "argument --num: invalid int value: 'many'"),
    Row(SAMPLE + " --dtype float8", "argument --dtype: invalid choice: 'float8'"),
    Row(SAMPLE + " --num 0", "--num 0: must be at least 1"),
    Row(SAMPLE + " --seed -1", "--seed -1: the seeds of 16 images must lie from 0 to 2..32 - 1"),
    Row(SAMPLE + " --seed 4294967295 --num 2", "--seed 4294967295: the seeds of 2 images"),
    Row(SAMPLE + " --sampler dmp", "--sampler dmp: must be one of ddpm, ddim"),
    Row(SAMPLE + " --steps 0", "--steps = 0 must be at least 1"),
    Row(SAMPLE + " --steps 1000", "--steps = 1000 must not exceed config.diffusion.num_timesteps = 100"),
    Row(SAMPLE + " --guidance nan", "--guidance = nan must be finite"),
    Row(SAMPLE + " --guidance -1", "--guidance = -1.0 must not be negative"),
    Row(SAMPLE + " --eta 2", "--eta = 2.0 must lie between 0 and 1"),
    Row(SAMPLE + " --guidance_start 1", "--guidance_start must be below guidance_end"),
    Row(SAMPLE + " --variance learned", "--variance = 'learned' needs config.diffusion.learned_variance"),
    Row(SAMPLE + " --truncation 0.7", "--truncation belongs to progressive GANs"),
    Row(SAMPLE + " --batch_per_device 0", "--batch_per_device = 0 must be at least 1"),
    Row(SAMPLE + " --label 10", "label '10' is not a class of this model, which has 0, 1"),
    Row(SAMPLE + " --label cat", "label 'cat' is not a class of this model"),
    Row(SAMPLE + " --prompt cat", "this model was trained without captions: leave out --prompt"),
    Row(SAMPLE + " --negative_prompt cat", "this model was trained without captions: leave out --negative_prompt"),
    Row(SAMPLE + " --height 8", "--height goes with --model"),
    Row(SAMPLE + " --strength 0.5", "--strength says how far to go from an image: give that with --init_image"),
    Row(SAMPLE + " --init_image image.png --strength 1.5", "--strength = 1.5|--strength 1.5"),
    Row(SAMPLE + " --init_image none.png", "--init_image none.png: no such file"),
    Row(SAMPLE + " --init_image photos", "--init_image photos: is a directory"),
    Row(
        SAMPLE + " --init_image run/config.json", "--init_image: run/config.json is not a PNG, JPEG, WEBP or BMP image"
    ),
    Row(SAMPLE + " --init_image x.png", "--init_image: x.png is empty", put("x.png", b"")),
    Row(SAMPLE + " --init_image x.png", "x.png .*3600000000 pixels|60000x60000 pixels", put("x.png", bomb_png())),
    Row(SAMPLE + " --mask_image mask.png", "--mask_image says what of an image to make anew"),
    Row(
        SAMPLE + " --init_image image.png --mask_image small.png",
        "--mask_image: the mask has 8x8 pixels, the image 16x18",
    ),
    Row(SAMPLE + " --init_image image.png --mask_image black.png", "--mask_image: the mask is black all over"),
    Row(SAMPLE + " --interpolate 1", "--interpolate 1: must be at least 2"),
    Row(SAMPLE + " --interpolate 3 --label 0,1", "--interpolate shows one --label"),
    Row(SAMPLE + " --out image.png", "--out image.png: it is a file, and a folder is needed"),
    Row(SAMPLE + " --out image.png/samples", "--out image.png/samples: .*image.png is a file, and a folder is needed"),
    Row(SAMPLE + " --npz photos", "--npz photos: it is a folder, and a file is to be written"),
    Row(SAMPLE + " --npz image.png/a.npz", "--npz image.png/a.npz: image.png: it is a file, and a folder is needed"),
    Row("sample --workdir nowhere", "nowhere/config.json not found: nowhere is not the workdir of a run"),
    Row("sample --workdir image.png", "image.png/config.json not found: image.png is not the workdir of a run"),
    Row(SAMPLE, "run/config.json: Expecting", put("run/config.json", "{")),
    Row(SAMPLE, "run/config.json: it is not text .UTF-8.", put("run/config.json", b"\xff\xfe\xff")),
    Row(SAMPLE, "run/config.json: it is nested too deeply", put("run/config.json", "[" * 200_000)),
    Row(SAMPLE, "run/config.json: config. must be a section with keys", put("run/config.json", "[]")),
    Row(SAMPLE, "run/config.json: unknown config key config.models", change("run/config.json", models={})),
    Row(SAMPLE, "run/config.json: config.seed = '0' must be of type int, not str", change("run/config.json", seed="0")),
    Row(SAMPLE, "run/config.json: config.data must be a section with keys", change("run/config.json", data=3)),
    Row(SAMPLE, "run/classes.json: Expecting value", put("run/classes.json", "")),
    Row(SAMPLE, "run/classes.json: it must hold a list of names", put("run/classes.json", '{"0": 1}')),
    Row(SAMPLE, "checkpoints holds no checkpoint|checkpoints", lose("run/checkpoints")),
    Row(SAMPLE, "holds no checkpoint: train first", lose("run/checkpoints/8")),
    Row(SAMPLE, "none of the checkpoints in .* can be read", damage_checkpoint),
    Row("train --config=DIGITS --workdir run", "run holds a run with config.*give another --workdir for a new run"),
    Row("train --config=DIGITS --workdir run", "run/config.json: Expecting", put("run/config.json", "{")),
    Row(
        GO_ON,
        "run/metrics.jsonl line 2 is damaged: Unterminated",
        put("run/metrics.jsonl", b'{"step": 1}\n{"st\n{"step": 3}\n'),
    ),
    Row(GO_ON, "run/metrics.jsonl line 1 is damaged: it is not text", put("run/metrics.jsonl", b'\xff\n{"step": 3}\n')),
    Row(
        GO_ON,
        "run/metrics.jsonl line 1 is damaged: it is nested too deeply",
        put("run/metrics.jsonl", b"[" * 200_000 + b"\n"),
    ),
    Row(
        GO_ON,
        "run/metrics.jsonl line 2 is damaged: it is no object with a step",
        put("run/metrics.jsonl", b'{"step": 1}\n3\n'),
    ),
    Row(
        GO_ON,
        "run/metrics.jsonl line 1 is damaged: 'loss' is no number",
        put("run/metrics.jsonl", b'{"step": 1, "loss": []}\n'),
    ),
    Row("sample --workdir text_run --label 3", "this model reads text: ask by --prompt, not by --label"),
    Row("sample --workdir text_run --prompt \udcff", "the prompt .* is not text"),
    Row("sample --workdir text_run", "text_run/captions.json: .*No such file", lose("text_run/captions.json")),
    Row(
        "sample --workdir text_run",
        "captions.json: it must hold a list of captions",
        put("text_run/captions.json", "[1]"),
    ),
    Row("sample --workdir text_run", "captions.json: it is not text", put("text_run/captions.json", '["\\udc00"]')),
    Row("sample --workdir text_run", "tokenizer: .*it has no merges.txt", lose("text_run/tokenizer/merges.txt")),
    Row("sample --workdir text_run", "merges.txt is not text", put("text_run/tokenizer/merges.txt", b"\xff")),
    Row(
        "sample --workdir text_run",
        "merges.txt: every merge must be two pieces",
        put("text_run/tokenizer/merges.txt", "a b c"),
    ),
    Row("sample --workdir text_run", "text_run/tokenizer: .*vocabulary", put("text_run/tokenizer/merges.txt", "zz yy")),
    Row("sample --workdir text_run", "the number of 'a' is", change("text_run/tokenizer/vocab.json", a="0")),
    Row("sample --workdir text_run", "the number of 'a' is", change("text_run/tokenizer/vocab.json", a=-1)),
    Row("sample --workdir text_run", "the number of 'a' is", change("text_run/tokenizer/vocab.json", a=2**40)),
    Row("sample --workdir text_run", "has no <|startoftext|>", put("text_run/tokenizer/vocab.json", "{}")),
    Row("sample --workdir text_run", "vocab.json must hold a JSON object", put("text_run/tokenizer/vocab.json", "[]")),
    Row(
        "sample --workdir text_run",
        "model_max_length = '77' must be a number",
        change("text_run/tokenizer/tokenizer_config.json", model_max_length="77"),
    ),
    Row("sample --workdir text_run", "pad_token", change("text_run/tokenizer/tokenizer_config.json", pad_token=[1])),
    Row(
        "sample --workdir text_run",
        "tokenizer_config.json: added_tokens_decoder: 0 = 3 must be text",
        change("text_run/tokenizer/tokenizer_config.json", added_tokens_decoder={"0": 3}),
    ),
    Row(
        "sample --workdir text_run",
        "special_tokens_map.json is not JSON",
        put("text_run/tokenizer/special_tokens_map.json", "{"),
    ),
    Row(
        "sample --workdir text_run",
        "special_tokens_map.json: pad_token = \\[1\\] must be text",
        put("text_run/tokenizer/special_tokens_map.json", '{"pad_token": [1]}'),
    ),
    Row("export --workdir run", "the following arguments are required: --out"),
    Row("export --workdir run --out photos", "photos exists already"),
    Row("export --workdir run --out x --platforms abacus", "abacus"),
    Row("export --workdir run --out x --kind collage", "argument --kind: invalid choice: 'collage'"),
    Row("export --workdir run --out x --batch_per_device 3", "--batch_per_device"),
    Row("weights export --workdir run --out x", "run did not begin from a Stable Diffusion checkpoint"),
    Row("weights import --workdir run --out x", "invalid choice: 'import'"),
]

# Scores --------------------------------------------------------------------------------------------------------------

OFFLINE = " --extractor efficientnet-lite0"
IMAGES = "evaluate --images images.npz"
FID = IMAGES + " --metrics fid --num 4 --reference statistics.npz" + OFFLINE


def npz(name: str, **arrays: Any) -> Callable[[pathlib.Path], Any]:
    """An .npz file, compressed."""
    return lambda p: np.savez_compressed(p / name, **arrays)


def promising_npz(p: pathlib.Path) -> None:
    """A header that promises 8 exabytes."""
    with contextlib.closing(__import__("zipfile").ZipFile(p / "images.npz", "w")) as archive:
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 8, 8, 1), }\n" % 2**57
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


SCORES = [
    Row("evaluate", "one of the arguments --workdir --images --make_reference is required"),
    Row("evaluate --images a --workdir b", "not allowed with argument"),
    Row(IMAGES + " --metrics foo", "--metrics: unknown metric 'foo': there are fid"),
    Row(IMAGES + " --metrics ,", "--metrics: no metric was asked for"),
    Row(IMAGES + " --metrics bpd", "--metrics bpd is the likelihood of a model: it needs --workdir"),
    Row(IMAGES + " --metrics psnr", "--metrics psnr: how an autoencoder reconstructs needs its --workdir"),
    Row(IMAGES + " --metrics fid,kid", "fid, kid of --images needs --reference"),
    Row(IMAGES + " --num 0", "--num 0: must be at least 1"),
    Row(IMAGES + " --seed -1", "--seed -1: must be at least 0"),
    Row(IMAGES + " --splits 0", "--splits 0: must be at least 1"),
    Row(IMAGES + " --bootstrap 1", "--bootstrap 1: must be 0 .none. or at least 2"),
    Row(IMAGES + " --extract_batch x", "argument --extract_batch: invalid int value: 'x'"),
    Row(IMAGES + " --data digits", "--data goes with --make_reference"),
    Row(IMAGES + " --metrics ms_ssim", "8x8 are not multiples of 16"),
    Row("evaluate --make_reference --data digits --out x.txt", "--make_reference needs --data .* and --out NAME.npz"),
    Row(
        "evaluate --images nowhere --metrics ms_ssim", "nowhere: neither a folder, nor an .npz file, nor a data source"
    ),
    Row("evaluate --images none.npz --metrics ms_ssim", "none.npz: no such file"),
    Row(IMAGES + " --metrics ms_ssim", "images.npz: cannot be read as an .npz file", put("images.npz", b"PK\x03\x04")),
    Row(
        IMAGES + " --metrics ms_ssim",
        "more than a hundred times its size",
        npz("images.npz", images=np.zeros((9000, 99, 99, 1), np.uint8)),
    ),
    Row(IMAGES + " --metrics ms_ssim", "an array of shape .144115188075855872", promising_npz),
    Row(
        IMAGES + " --metrics ms_ssim",
        "Python objects, which are not read",
        npz("images.npz", images=np.array([{}], object)),
    ),
    Row(
        IMAGES + " --metrics ms_ssim",
        "uint8 images .n h w 1 or 3. were expected",
        npz("images.npz", images=np.zeros((4, 8, 8, 1))),
    ),
    Row(IMAGES + " --metrics ms_ssim", "it has no array of images", npz("images.npz", pictures=np.zeros(3))),
    Row(
        "evaluate --images photos --metrics ms_ssim",
        "images differ in size",
        lambda p: shutil.copy(p / "small.png", p / "photos/0.png"),
    ),
    Row("evaluate --images photos --metrics ms_ssim", "0.png cannot be read as an image", put("photos/0.png", b"x")),
    Row("evaluate --images digits --metrics is --num 5000" + OFFLINE, "5000 images were asked for, there are 1797"),
    Row("evaluate --images digits --metrics is --weights none.pth", "there is no file none.pth"),
    Row(
        "evaluate --images digits --metrics is --weights x.pth",
        "x.pth cannot be read as PyTorch weights: it is a web page",
        put("x.pth", "<html>"),
    ),
    Row(
        "evaluate --images digits --metrics is --weights x.pth",
        "pickle asks for 'posix.system'",
        put("x.pth", b"\x80\x02cposix\nsystem\nq\x00."),
    ),
    Row("evaluate --images digits --metrics is --weights image.png", "begins with 89504e47"),
    Row(
        FID,
        "statistics.npz: 'mu' must hold finite numbers only",
        npz("statistics.npz", mu=np.full(8, np.nan), sigma=np.eye(8)),
    ),
    Row(FID, "a covariance of shape .d, d. were expected", npz("statistics.npz", mu=np.zeros(8), sigma=np.eye(9))),
    Row(
        FID,
        "features have 8 dimensions, those of the images 1280",
        npz("statistics.npz", mu=np.zeros(8), sigma=np.eye(8)),
    ),
    Row(
        FID, "mean and covariance must come together|cannot be read as|no array", npz("statistics.npz", mu=np.zeros(8))
    ),
    Row(
        FID,
        "its provenance is damaged",
        npz("statistics.npz", mu=np.zeros(8), sigma=np.eye(8), provenance=np.array("{")),
    ),
    Row(FID, "'mu' must hold finite numbers only", npz("statistics.npz", mu=np.array(["a"] * 8), sigma=np.eye(8))),
    Row(
        IMAGES + " --metrics ms_ssim", "images_results.json: not a results file", put("images_results.json", "precious")
    ),
    Row(
        IMAGES + " --metrics ms_ssim",
        "images_results.json: not a results file, which holds a list",
        put("images_results.json", "{}"),
    ),
    Row("evaluate --workdir run --metrics psnr", "psnr: only an autoencoder reconstructs"),
]

# Stable Diffusion ------------------------------------------------------------------------------------------------------

SD = "sample --model sd --prompt cat"
FILE = "sample --model model.safetensors --tokenizer words --prompt cat"


def other_tensors(name: str, alter: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[pathlib.Path], Any]:
    """A safetensors file with other tensors."""

    def prepare(p: pathlib.Path) -> None:
        tensors = read_tensors(p / name)
        alter(tensors)
        write_tensors(p / name, tensors)

    return prepare


def raw(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file by hand."""
    return struct.pack("<Q", len(header)) + header + data


WITH_VAE = "train --config=DIGITS --config.autoencoder=vae --config.sampling.clip=none --config.data.channels=3"
WITH_VAE += " --config.data.image_size=16"
UNET = "sd/unet/diffusion_pytorch_model.safetensors"
INDEX = "sd/unet/diffusion_pytorch_model.safetensors.index.json"
EMBEDDING = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
LORA_NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
MODELS = [
    Row("sample --model nowhere --prompt cat", "nowhere: there is no such file or folder"),
    Row("sample --model sd", "--prompt is missing: say what to show"),
    Row(
        "sample --model photos --prompt cat",
        "photos: it is not a model: a Stable Diffusion folder has model_index.json",
    ),
    Row("sample --model image.png --prompt cat", "image.png: not a sound safetensors file"),
    Row(
        "sample --model x.ckpt --prompt cat",
        "x.ckpt: a pickle can run any program when it is opened",
        put("x.ckpt", b"\x80\x02."),
    ),
    Row(
        "sample --model model.safetensors --prompt cat",
        "model.safetensors: it has no tokenizer: give --tokenizer FOLDER",
    ),
    Row(
        "sample --model model.safetensors --prompt cat",
        "no tokenizer, and CLIP's vocabulary is needed: http://127.0.0.1:9/ could not be downloaded .*put the file at .*"
        "or give --tokenizer FOLDER",
        other_tensors(
            "model.safetensors", lambda tensors: tensors.update({EMBEDDING: np.zeros((49_408, 16), np.float32)})
        ),
    ),
    Row(
        "sample --model model.safetensors --prompt cat",
        "tokenizer: .*vocab.json must hold a JSON object",
        lambda p: [put(f"tokenizer/{name}", "[]")(p) for name in ("vocab.json", "merges.txt")],
    ),
    Row(
        "sample --model model.safetensors --tokenizer photos --prompt cat",
        "photos is no tokenizer: it has no vocab.json",
    ),
    Row(SD + " --label 3", "this model reads text: ask by --prompt, not by --label"),
    Row(SD + " --attention cudnn --dtype bfloat16", "attention cudnn: it needs an NVIDIA GPU .*, not cpu: use auto"),
    Row(SD + " --attention flash", "--attention: invalid choice: 'flash'"),
    Row("sample --workdir run --attention xla", "--attention goes with --model, and a run has its own"),
    Row(SD + " --prediction w", "prediction 'w': must be one of noise, v, x0"),
    Row(SD + " --variant fp8", "there is no .*fp8.safetensors"),
    Row(SD + " --height 17", "--height 17: this model makes images of multiples of 2 pixels"),
    Row(SD + " --width 99999999998", "--width 99999999998: this model makes images of multiples of 2 pixels, as 16384"),
    Row(SD + " --steps 0", "--steps = 0 must be at least 1"),
    Row(SD + " --guidance inf", "--guidance = inf must be finite"),
    Row(SD + " --lora none.safetensors", "--lora none.safetensors: there is no such file"),
    Row(SD + " --lora_scale 0.5", "--lora_scale says how much of a LoRA to take: give that with --lora"),
    Row(SD + " --lora image.png", "--lora image.png: not a sound safetensors file"),
    Row(SD + " --lora model.safetensors", "--lora model.safetensors: it is no LoRA of Stable Diffusion"),
    Row(
        SD + " --lora x.safetensors",
        "--lora x.safetensors: .* has no factor 'up'",
        lambda p: write_tensors(p / "x.safetensors", {f"{LORA_NAME}.lora_down.weight": np.zeros((2, 16), np.float32)}),
    ),
    Row(
        SD + " --lora x.safetensors",
        "for some rank: it was made for another model",
        lambda p: write_tensors(
            p / "x.safetensors",
            {f"{LORA_NAME}.lora_{way}.weight": np.zeros((2, 99), np.float32) for way in ("down", "up")},
        ),
    ),
    Row(SD, "sd: model_index.json says|no folder unet/", lose("sd/unet")),
    Row(SD, "model_index.json: it cannot be read", put("sd/model_index.json", "{")),
    Row(SD, "it is Stable Diffusion XL", put("sd/model_index.json", '{"_class_name": "StableDiffusionXLPipeline"}')),
    Row(
        SD,
        "it holds a.bin and no diffusion_pytorch_model.safetensors; a pickle",
        lambda p: (p / UNET).rename(p / "sd/unet/a.bin"),
    ),
    Row(SD, "its header should have", lambda p: (p / UNET).write_bytes((p / UNET).read_bytes()[:100])),
    Row(SD, "ends at byte .* the file is cut short", lambda p: (p / UNET).write_bytes((p / UNET).read_bytes()[:-100])),
    Row(SD, "it is a Git LFS pointer", put(UNET, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
    Row(
        SD,
        "at most 8388608 are possible",
        lambda p: put(UNET, struct.pack("<Q", 2**40) + b"{")(p) or sparse(p / UNET, 2**41),
    ),
    Row(SD, "its header is nested too deeply", put(UNET, raw(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"))),
    Row(SD, "unet: .*missing|unet: .*lack", other_tensors(UNET, lambda t: t.pop("conv_in.weight"))),
    Row(
        SD,
        "unet: .*conv_in.weight",
        other_tensors(UNET, lambda t: t.update({"conv_in.weight": np.zeros(3, np.float32)})),
    ),
    Row(SD, "unet: .*strange", other_tensors(UNET, lambda t: t.update(strange=np.zeros(3, np.float32)))),
    Row(
        SD,
        "is not the name of a .safetensors file beside it",
        lambda p: lose(UNET)(p) or put(INDEX, '{"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}')(p),
    ),
    Row(SD, "it has no weight_map", lambda p: lose(UNET)(p) or put(INDEX, "{}")(p)),
    Row(
        SD,
        "the download is not complete",
        lambda p: lose(UNET)(p) or put(INDEX, '{"weight_map": {"a": "b.safetensors"}}')(p),
    ),
    Row(SD, "layers_per_block = 1000000000 must be", change("sd/unet/config.json", layers_per_block=10**9)),
    Row(SD, "block_out_channels", change("sd/unet/config.json", block_out_channels="wide")),
    Row(SD, "describe no possible network|norm_num_groups", change("sd/unet/config.json", norm_num_groups=7)),
    Row(SD, "unet: norm_eps = .* must be a number", change("sd/unet/config.json", norm_eps=[])),
    Row(SD, "up_block_types None are not supported", change("sd/unet/config.json", up_block_types=None)),
    Row(SD, "unet: act_fn = gelu is not supported", change("sd/unet/config.json", act_fn="gelu")),
    Row(SD, "scaling_factor = nan must be a number", change("sd/vae/config.json", scaling_factor=float("nan"))),
    Row(SD, "latent_channels = -1 must be a positive integer", change("sd/vae/config.json", latent_channels=-1)),
    Row(SD, "hidden_act = 'relu'|hidden_act", change("sd/text_encoder/config.json", hidden_act="relu")),
    Row(SD, "num_hidden_layers = 1000000 must be", change("sd/text_encoder/config.json", num_hidden_layers=10**6)),
    Row(
        SD,
        "beta_schedule = 'sinus' is not supported",
        change("sd/scheduler/scheduler_config.json", beta_schedule="sinus"),
    ),
    Row(
        SD,
        "trained_betas must be a list of numbers",
        change("sd/scheduler/scheduler_config.json", trained_betas=[{}] * 1000),
    ),
    Row(SD, "beta_start = inf must be finite", change("sd/scheduler/scheduler_config.json", beta_start=float("inf"))),
    Row(
        SD,
        "num_train_timesteps = 1000000000 must lie",
        change("sd/scheduler/scheduler_config.json", num_train_timesteps=10**9),
    ),
    Row(SD, "sd/tokenizer: .*vocab.json is not JSON|vocab.json", put("sd/tokenizer/vocab.json", "{")),
    Row(
        FILE,
        "it has tensors that no Stable Diffusion has: strange",
        other_tensors("model.safetensors", lambda t: t.update(strange=np.zeros(1))),
    ),
    Row(
        FILE,
        "Stable Diffusion without text encoder",
        other_tensors("model.safetensors", lambda t: [t.pop(n) for n in list(t) if n.startswith("cond_stage")]),
    ),
    Row(
        "train --config=FINETUNE --config.model.pretrained=sd --config.data.dir=photos --config.data.image_size=17",
        "config.data.image_size = 17 must be divisible by",
    ),
    Row(
        WITH_VAE,
        "vae.*config.json: block_out_channels must hold 1 to 16 numbers, not 40",
        change("vae/config.json", block_out_channels=[1] * 40),
    ),
    Row(
        WITH_VAE,
        "latents_mean = .* must be a list of numbers",
        change("vae/config.json", latents_mean=["a"]),
    ),
]

# Latents ---------------------------------------------------------------------------------------------------------------

STAGE = " --config.autoencoder=vae --config.sampling.clip=none"
LATENT = "train --config=DIGITS --config.data.source=latents --config.data.dir=latents" + STAGE
LATENTS = [
    Row(
        LATENT.replace("=latents --config.auto", "=photos --config.auto"),
        "photos holds no latents: there is no latents.json",
    ),
    Row(LATENT, "latents.json: damaged", put("latents/latents.json", "{")),
    Row(LATENT, "latents.json: damaged .it must hold", put("latents/latents.json", "{}")),
    Row(
        LATENT,
        "shape, flips, image_size and channels must be positive",
        change("latents/latents.json", shape=[2, "a", 3]),
    ),
    Row(LATENT, "shape, flips, image_size and channels must be positive", change("latents/latents.json", flips=-1)),
    Row(LATENT, "is not the name of a file beside it", change("latents/latents.json", files=["../vae/config.json"])),
    Row(LATENT, "records, but latents.json says 7", change("latents/latents.json", num_examples=7)),
    Row(
        LATENT,
        "the records cannot be read",
        lambda p: [f.write_bytes(b"x" * 99) for f in (p / "latents").glob("*.array_record")],
    ),
    Row(LATENT, "format 9, this version reads 1", change("latents/latents.json", format=9)),
    Row(LATENT.replace("train", "encode") + " --out x", "these are encoded already"),
]

TABLE = [Row(f"train --config=DIGITS --config.{key}", message) for key, message in KEYS]
TABLE += [*TRAIN, *DATA, *RUNS, *SCORES, *MODELS, *LATENTS]


def test_there_are_many():
    assert len(TABLE) >= 150 and len({row.line for row in TABLE}) >= 150


# The files that the table's lines name -----------------------------------------------------------------------------------


def save_untrained(task: Any, workdir: pathlib.Path) -> None:
    """A workdir with a checkpoint of zeros at step 8: nothing is compiled."""
    shapes = jax.eval_shape(task.init, jax.random.key(0))

    @dataclasses.dataclass
    class State:
        ema_params: Any

    put("config.json", to_json(task.config))(workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save(8, State(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)))
    checkpoints.close()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> pathlib.Path:
    """A folder with all of them, before any damage."""
    folder = tmp_path_factory.mktemp("healthy")
    run = tiny_config(**{"diffusion.num_timesteps": 100})
    save_untrained(make_task(run), folder / "run")
    put("run/classes.json", json.dumps([str(digit) for digit in range(10)]))(folder)
    text = {"enabled": True, "width": 16, "num_layers": 1, "context_length": 8, "vocabulary_size": 514}
    text_run = tiny_config(**{f"text.{name}": value for name, value in text.items()}, **{"model.num_classes": 0})
    tokenizer = train_tokenizer([], 514, 8)
    save_untrained(make_task(text_run, Parts(tokenizer)), folder / "text_run")
    put("text_run/captions.json", '["a cat"]')(folder)
    tokenizer.save(folder / "text_run" / "tokenizer")
    tiny_checkpoint.write(folder / "sd")
    tiny_checkpoint.write(folder, single_file=True)
    shutil.copytree(folder / "sd" / "vae", folder / "vae")
    tiny_checkpoint.write_photos(folder / "photos")
    shutil.copy(folder / "photos" / "0.png", folder / "image.png")
    Image.new("L", (8, 8), 255).save(folder / "small.png")
    Image.new("L", (16, 18)).save(folder / "black.png")
    Image.new("L", (16, 18), 255).save(folder / "mask.png")
    np.savez(folder / "images.npz", images=np.zeros((4, 8, 8, 1), np.uint8))
    info = latents.LatentInfo(latents.FORMAT, "ab", (4, 4, 8), 1, 8, 1, 0, (), False, "digits", ())
    example = {"label": 0, "moments": np.zeros((1, 4, 4, 8), np.float32)}
    latents.write_latents(folder / "latents", info, iter([example] * 3))
    return folder


@pytest.fixture(scope="module")
def opened():
    """Healthy runs are opened once for all rows."""
    runs: dict[str, Any] = {}
    real = asked.load_run

    def load_run(workdir: str, *size: int | None) -> Any:
        if size:
            return real(workdir, *size)
        if workdir not in runs:
            runs[workdir] = real(workdir)
        return runs[workdir]

    return load_run


def words(row: Row) -> tuple[str, list[str]]:
    """The command and its arguments."""
    command, *argv = shlex.split(row.line, posix=True)
    short = {f"--config={name}": f"--config={ROOT / 'configs' / file}" for name, file in SHIPPED.items()}
    return command, [short.get(word, word) for word in argv]


def prepare(row: Row, healthy: pathlib.Path, folder: pathlib.Path) -> dict[str, bytes]:
    """The files that a row names, damaged as it says. Returns what lies in the folder."""
    for path in sorted(healthy.iterdir()):
        if re.search(rf"(^|[ =/]){re.escape(path.name)}($|[ =/])", row.line) or path.name == "small.png":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    if row.damage is not None:
        row.damage(folder)
    return contents(folder)


def contents(folder: pathlib.Path) -> dict[str, Any]:
    """Every file with its bytes (of large holes their size), every folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size if path.stat().st_size > 2**24 else path.read_bytes())
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def main_of(command: str) -> Callable[[], None]:
    """The `main` of a command."""
    if command in MODULES:
        return importlib.import_module(MODULES[command]).main
    spec = importlib.util.spec_from_file_location(f"{command}_command", ROOT / COMMANDS[command])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def check(row: Row, status: Any, error: str) -> None:
    """Status 2 and one line; of checkpoints and of checkpoints' conversions a note may come before it."""
    told = [line for line in error.splitlines() if not line.startswith(("note: ", "checkpoint ", "skipping a corrupt"))]
    assert status == 2, error
    assert len(told) == 1 and told[0].startswith("error: "), error
    assert re.search(row.message, told[0]), error
    assert len(told[0]) < 1000 and told[0].isprintable(), error


def went_on(*_: Any, **__: Any) -> None:
    """In the place of what takes long."""
    pytest.fail("nobody noticed")


# Every fifth row by default, all of them in the second stage.
ROWS = [row if i % 5 == 0 else pytest.param(row, marks=pytest.mark.slow) for i, row in enumerate(TABLE)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ascii(row.line.replace("--config.", ""))[1:-1][:90])
def test_one_line_and_nothing_written(row, healthy, opened, tmp_path, monkeypatch, capsys):
    before = prepare(row, healthy, tmp_path)
    monkeypatch.chdir(tmp_path)
    command, argv = words(row)
    monkeypatch.setattr(sys, "argv", [command, *argv])
    for name in [name for name, module in sys.modules.items() if getattr(module, "get_config", None)]:
        monkeypatch.delitem(sys.modules, name)  # config files are loaded into one module, again and again
    monkeypatch.setattr(clip_vocabulary, "VOCABULARY_URL", "http://127.0.0.1:9/")  # a machine without network
    monkeypatch.setattr(clip_vocabulary, "cache_folder", lambda: tmp_path.parent / "no cache")
    monkeypatch.setattr(loop, "train", went_on)
    monkeypatch.setattr(asked.Run, "make", went_on)
    if row.damage is None:
        monkeypatch.setattr(asked, "load_run", opened)
    with pytest.raises(SystemExit) as caught:
        main_of(command)()
    check(row, caught.value.code, capsys.readouterr().err)
    assert contents(tmp_path) == before


REAL = [TRAIN[0], DATA[0], RUNS[1], RUNS[39], SCORES[2], MODELS[3]]


@pytest.mark.slow
@pytest.mark.parametrize("row", REAL, ids=lambda row: row.line[:90])
def test_the_same_as_a_process(row, healthy, tmp_path):
    before = prepare(row, healthy, tmp_path)
    command, argv = words(row)
    start = [str(ROOT / COMMANDS[command])] if command in COMMANDS else ["-m", MODULES[command]]
    result = subprocess.run([sys.executable, *start, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    check(row, result.returncode, result.stderr)
    assert contents(tmp_path) == before
