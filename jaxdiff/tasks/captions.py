"""Captions of a run's data: the tokenizer that reads them, and some of them kept to ask the model for."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from jaxdiff.config import Config, ConfigError, TextConfig
from jaxdiff.data.sources import Source
from jaxdiff.files import read_json, write_text
from jaxdiff.generation.prompts import request as request
from jaxdiff.generation.prompts import tokens_of
from jaxdiff.weights.tokenizer import Tokenizer, train_tokenizer

MAX_READ = 10_000  # captions that a tokenizer is trained on
MAX_KEPT = 1000  # captions kept in the workdir
KEPT = "captions.json"


def some_captions(source: Source, num: int) -> list[str]:
    """Captions of examples spread evenly over the source."""
    indices = np.unique(np.linspace(0, len(source) - 1, num).astype(int))
    return [source[int(i)]["text"] for i in indices]


def make_tokenizer(config: TextConfig, captions: Sequence[str]) -> Tokenizer:
    """The tokenizer that the config names, or one trained on captions. Raises ConfigError."""
    try:
        if config.tokenizer:
            tokenizer = Tokenizer.load(pathlib.Path(config.tokenizer).expanduser())
            return tokenizer.with_context_length(config.context_length)
        return train_tokenizer(captions, config.vocabulary_size, config.context_length)
    except ValueError as error:
        raise ConfigError(f"config.text: {error}") from error


def prepare(
    config: Config, source: Source, workdir: pathlib.Path, write: bool, given: Tokenizer | None = None
) -> tuple[Tokenizer, list[str]]:
    """The run's tokenizer and captions: those in its workdir, else new ones, which are written there (if `write`).

    given: the tokenizer of a pretrained text encoder.
    """
    if (workdir / KEPT).is_file():
        tokenizer, kept = read(workdir)
        return given or tokenizer, kept  # whose context is as long as its encoder's, whatever a file says
    captions = some_captions(source, MAX_KEPT if config.text.tokenizer or given else MAX_READ)
    tokenizer = given or make_tokenizer(config.text, captions)
    kept = [captions[int(i)] for i in np.random.default_rng(config.seed).permutation(len(captions))[:MAX_KEPT]]
    cut = tokens_of(tokenizer, captions)[1]
    if cut and write:
        print(
            f"note: {len(cut)} of {len(captions)} captions are longer than config.text.context_length: {cut[0]}",
            file=sys.stderr,
        )
    if write:
        if given is None:
            tokenizer.save(workdir / "tokenizer")
        write_text(workdir / KEPT, json.dumps(kept, ensure_ascii=False, indent=0) + "\n")
    return tokenizer, kept


def read(workdir: pathlib.Path) -> tuple[Tokenizer, list[str]]:
    """Tokenizer and captions of a run. Raises ConfigError naming the file that is missing or damaged."""
    try:
        captions = read_json(workdir / KEPT)
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions) or not captions:
            raise ValueError("it must hold a list of captions")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{workdir / KEPT}: {error}") from error
    try:
        return Tokenizer.load(workdir / "tokenizer"), captions
    except (OSError, ValueError) as error:
        raise ConfigError(f"{workdir / 'tokenizer'}: {error}") from error
