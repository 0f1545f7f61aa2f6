"""From prompts to tokens."""

import sys
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxdiff.config import ConfigError
from jaxdiff.weights.tokenizer import Tokenizer


def tokens_of(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Int[np.ndarray, "b n"], list[str]]:
    """Tokens of texts, and what the tokenizer has to say of those that it cut."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = tokenizer.encode(list(texts))
    return tokens, [str(warning.message) for warning in caught]


def request(tokenizer: Tokenizer, prompts: Sequence[str], negative: str = "") -> dict[str, np.ndarray]:
    """What a text model is asked for: tokens of the prompts and, for each, of what to lead away from. Raises ConfigError."""
    try:
        tokens, cut = tokens_of(tokenizer, prompts)
        away, cut_away = tokens_of(tokenizer, [negative])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    notes = list(dict.fromkeys(cut + cut_away))  # images in turn are asked for by the same prompts
    if notes:
        others = f" (and {len(notes) - 1} more prompts were cut)" * (len(notes) > 1)
        print(f"note: {notes[0]}{others}", file=sys.stderr)
    return {"tokens": tokens, "negative": np.repeat(away, len(prompts), axis=0)}
