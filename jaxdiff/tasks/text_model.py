"""A pretrained text encoder, used as it is: CLIP's, with its tokenizer, in the layout of transformers and Stable Diffusion."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.files import read_json
from jaxdiff.models.text_encoder import ACTIVATIONS, CLIPTextEncoder
from jaxdiff.training.state import Params
from jaxdiff.weights.names import text_encoder_rules, to_ours
from jaxdiff.weights.single_file import MOST_LAYERS
from jaxdiff.weights.tensors import read_tensors
from jaxdiff.weights.tokenizer import FILES, WHOLE, Tokenizer

ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # folders, of a workdir as of a Stable Diffusion checkpoint
CONFIG, TENSORS = "config.json", "model.safetensors"
MOST = 2**20  # of any size: kept below this, a damaged file cannot make anybody count for hours


@dataclasses.dataclass(frozen=True, eq=False)
class TextModel:
    """A text encoder, its parameters and the tokenizer that it was trained with."""

    model: CLIPTextEncoder
    params: Params
    tokenizer: Tokenizer
    sha256: str

    def describe(self) -> str:
        """What it is, in words."""
        known = f", SHA-256 {self.sha256[:12]}..." * bool(self.sha256)
        return f"CLIP text encoder, {self.model.num_layers} layers of {self.model.width}{known}"


def load_text_model(path: str | pathlib.Path) -> TextModel:
    """Open a text encoder's folder that holds its tokenizer too, or a folder with `text_encoder` and `tokenizer` in it.

    Raises ConfigError with one line that names what is missing, damaged or not CLIP's.
    """
    encoder, tokenizer_folder = find_folders(pathlib.Path(path).expanduser())
    try:
        config = read_json(encoder / CONFIG)
        if not isinstance(config, dict):
            raise ValueError("it must hold a JSON object")
        model = text_encoder_from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{encoder / CONFIG}: {error}") from error
    try:
        tensors = read_tensors(encoder / TENSORS)
        params = to_ours(tensors, text_encoder_rules(model.num_layers), _shapes(model))
    except (OSError, ValueError) as error:
        message = str(error)
        raise ConfigError(message if str(encoder) in message else f"{encoder / TENSORS}: {message}") from error
    try:
        tokenizer = Tokenizer.load(tokenizer_folder).with_context_length(model.context_length)
        if tokenizer.vocabulary_size > model.vocabulary_size:
            raise ValueError(
                f"{tokenizer.vocabulary_size:,} tokens, but the text encoder knows {model.vocabulary_size:,}"
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{tokenizer_folder}: {error}") from error
    digest = hashlib.sha256(repr(model).encode())
    digest.update(json.dumps([tokenizer.vocabulary, tokenizer.merges, tokenizer.pad_token], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return TextModel(model, params, tokenizer, digest.hexdigest())


def find_folders(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Where the encoder and the tokenizer lie. Raises ConfigError."""
    if not path.is_dir():
        raise ConfigError(f"there is no text encoder at {path}: no such folder")
    for encoder in (path / ENCODER, path):
        if (encoder / TENSORS).is_file() and (encoder / CONFIG).is_file():
            for tokenizer in (path / TOKENIZER, encoder, encoder.parent / TOKENIZER):
                if any((tokenizer / name).is_file() for name in (FILES[0], WHOLE)):
                    return encoder, tokenizer
            raise ConfigError(
                f"{encoder} has no tokenizer: {FILES[0]} and {FILES[1]}, or {WHOLE}, beside it or in {path / TOKENIZER}"
            )
    raise ConfigError(f"{path} holds no text encoder: {CONFIG} with {TENSORS}, or {ENCODER}/ with both")


def keep_text_model(path: str, workdir: pathlib.Path, write: bool = True) -> TextModel:
    """The text encoder of a run, copied into its workdir at the start: as `first_stage.keep_first_stage`."""
    if not (workdir / ENCODER / TENSORS).is_file():
        encoder, _ = find_folders(pathlib.Path(path).expanduser())
        model = load_text_model(path)
        if write:
            model.tokenizer.save(workdir / TOKENIZER)  # what was read, from whichever files it came
            for name in (CONFIG, TENSORS):  # the tensors last: they say that all is there
                target = workdir / ENCODER / name
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.part")
                shutil.copyfile(encoder / name, temporary)
                temporary.replace(target)
        return model
    model = load_text_model(workdir)
    if pathlib.Path(path).expanduser().is_dir() and load_text_model(path).sha256 != model.sha256:
        raise ConfigError(
            f"config.text.pretrained = {path!r} is another text encoder than the one this run was begun with, of which "
            f"{workdir / ENCODER} is the copy: give the old one, or another --workdir for a new run"
        )
    return model


def _shapes(model: CLIPTextEncoder) -> Any:
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(functools.partial(model.init, jax.random.key(0)), tokens)["params"]


def text_encoder_from_config(config: dict[str, Any]) -> CLIPTextEncoder:
    """The network that transformers' config describes. Raises ValueError for what ours cannot be."""
    if config.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
        raise ValueError(f"a model of type {config['model_type']!r}, not CLIP's text encoder")
    defaults = {
        "vocab_size": 49_408,
        "max_position_embeddings": 77,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    }
    values = {name: config.get(name, default) for name, default in defaults.items()}
    for name, value in values.items():
        most = MOST_LAYERS if name == "num_hidden_layers" else MOST
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} = {str(value)[:80]} must be a positive integer, at most {most:,}")
    width, activation = values["hidden_size"], config.get("hidden_act", "quick_gelu")
    if values["intermediate_size"] != 4 * width:
        raise ValueError(f"intermediate_size = {values['intermediate_size']} must be 4 times hidden_size = {width}")
    if width % values["num_attention_heads"]:
        raise ValueError(f"num_attention_heads = {values['num_attention_heads']} must divide hidden_size = {width}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act = {activation!r} must be one of {', '.join(ACTIVATIONS)}")
    return CLIPTextEncoder(
        vocabulary_size=values["vocab_size"],
        context_length=values["max_position_embeddings"],
        width=width,
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        activation=activation,
    )
