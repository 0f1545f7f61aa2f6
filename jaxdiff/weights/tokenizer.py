"""Text to token ids: CLIP's byte-level BPE (Radford et al. 2021), read from its files or trained on captions.

One format for both, the one of a Stable Diffusion checkpoint's `tokenizer/` folder: vocab.json, merges.txt and
tokenizer_config.json. So a tokenizer trained here opens in transformers as a CLIPTokenizer.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from jaxdiff.files import read_at_most, write_text
from jaxdiff.weights.added_tokens import END as END
from jaxdiff.weights.added_tokens import START as START
from jaxdiff.weights.added_tokens import WHOLE as WHOLE
from jaxdiff.weights.added_tokens import read_added, read_object, read_settings, state_of

END_OF_WORD = "</w>"
CONTEXT_LENGTH = 77
MOST_TOKENS = 2**16  # of a prompt; files without a limit say 10^30
LONGEST_MERGES = 2**24  # bytes of merges.txt: CLIP's has half a million
MOST_IDS = 2**20  # of a vocabulary: CLIP's has 49,408
# A word is a run of letters, one digit, an English ending, or a run of anything else but spaces; they go without spaces.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")

HALF_CHARACTERS = re.compile("[\ud800-\udfff]")

Merges = list[tuple[str, str]]


class Tokenizer(NamedTuple):
    """Lower-cases and splits prompts into pieces of words, known by number; `encode` gives what a text encoder takes."""

    vocabulary: dict[str, int]
    merges: Merges
    context_length: int
    pad_token: str
    added: tuple[AddedToken, ...]  # found whole in a prompt
    backend: tokenizers.Tokenizer

    @classmethod
    def create(
        cls,
        vocabulary: dict[str, int],
        merges: Merges,
        context_length: int = CONTEXT_LENGTH,
        pad_token: str = END,
        added: Sequence[AddedToken] = (),
    ) -> Tokenizer:
        """Tokenizer of a vocabulary and its merges, the most frequent first. Raises ValueError for what cannot be one.

        added: tokens that are found whole in a prompt, besides start, end and padding, or in the place of these.
        """
        _check_vocabulary(vocabulary, merges)
        lacking = [token for token in (START, END, pad_token) if token not in vocabulary]
        if lacking:
            raise ValueError(f"tokenizer: the vocabulary has no {' nor '.join(lacking)}")
        try:
            model = models.BPE(
                vocab=vocabulary,
                merges=merges,
                continuing_subword_prefix="",
                end_of_word_suffix=END_OF_WORD,
                fuse_unk=False,
                unk_token=END,
            )
        except Exception as error:  # the library knows no other kind: of a merge whose pieces are not in the vocabulary
            raise ValueError(f"tokenizer: {error}") from error
        backend = tokenizers.Tokenizer(model)
        backend.normalizer, backend.pre_tokenizer = _normalizer(), _pre_tokenizer()
        backend.decoder = decoders.ByteLevel()
        # As transformers does: these are found whole in a prompt, the padding too ("!" in Stable Diffusion 2).
        whole = _plain(pad_token) | {token.content: token for token in added}
        backend.add_tokens(list(whole.values()))
        tokenizer = cls(vocabulary, merges, CONTEXT_LENGTH, pad_token, tuple(whole.values()), backend)
        return tokenizer.with_context_length(context_length)

    def with_context_length(self, context_length: int) -> Tokenizer:
        """The same for so many tokens."""
        if context_length < 2:
            raise ValueError(f"tokenizer: a context of {context_length} tokens has no room for start and end")
        return self._replace(context_length=context_length)

    @property
    def vocabulary_size(self) -> int:
        """Rows that an embedding table needs."""
        return max(self.vocabulary.values()) + 1

    @property
    def start_token(self) -> int:
        """Id of the token that begins every prompt."""
        return self.vocabulary[START]

    @property
    def end_token(self) -> int:
        """Id of the token that ends every prompt."""
        return self.vocabulary[END]

    def encode(self, prompts: Sequence[str]) -> Int[np.ndarray, "b n"]:
        """Ids of prompts, each [start, its tokens, end, padding] of the context length; int32.

        A longer prompt is cut, with a warning that names what was lost.
        """
        if isinstance(prompts, str):
            raise ValueError("tokenizer: prompts must be a list of strings, not one string")
        for prompt in prompts:
            if HALF_CHARACTERS.search(prompt):  # bytes of a command line that were no text
                raise ValueError(f"tokenizer: the prompt {ascii(prompt)[:80]} is not text (UTF-8)")
        ids = np.full((len(prompts), self.context_length), self.vocabulary[self.pad_token], np.int32)
        room = self.context_length - 2
        for row, encoding in zip(ids, self.backend.encode_batch(list(prompts)), strict=True):
            if len(encoding.ids) > room:
                lost = self.decode_ids(encoding.ids[room:])
                warnings.warn(
                    f"a prompt of {len(encoding.ids)} tokens was cut to {room}; the model does not see {lost!r}",
                    stacklevel=2,
                )
            tokens = [self.start_token, *encoding.ids[:room], self.end_token]
            row[: len(tokens)] = tokens
        return ids

    def decode(self, ids: Int[np.ndarray, "b n"]) -> list[str]:
        """Text up to each row's end token: lower case, one space after a word, punctuation apart."""
        texts = []
        for row in np.asarray(ids).tolist():
            inner = row[1:] if row[:1] == [self.start_token] else row
            texts.append(self.decode_ids(inner[: inner.index(self.end_token)] if self.end_token in inner else inner))
        return texts

    def decode_ids(self, ids: Sequence[int]) -> str:
        """Text of tokens without start, end and padding."""
        return self.backend.decode(list(ids)).replace(END_OF_WORD, " ").strip()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the three files, which `load` and transformers.CLIPTokenizer read."""
        folder = pathlib.Path(folder)
        settings: dict[str, Any] = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.context_length,
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": self.pad_token,
        }
        if self.added != tuple(_plain(self.pad_token).values()):
            listed = {str(self.vocabulary[token.content]): state_of(token) for token in self.added}
            settings["added_tokens_decoder"] = listed
        write_text(folder / FILES[0], json.dumps(self.vocabulary, ensure_ascii=False))
        write_text(folder / FILES[1], "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in self.merges)]) + "\n")
        write_text(folder / FILES[2], json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read a folder of `save` or the `tokenizer/` folder of a checkpoint. Raises ValueError naming the file."""
        folder = pathlib.Path(folder)
        vocabulary, merges = _read_vocabulary(folder)
        settings = read_settings(folder)
        added = read_added(folder, settings)
        for token in added:
            if token.content not in (START, END):
                vocabulary.setdefault(token.content, len(vocabulary))
        pad = settings.get("pad_token") or END
        length = settings.get("model_max_length", CONTEXT_LENGTH)
        if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 2:
            raise ValueError(
                f"{folder / FILES[2]}: model_max_length = {str(length)[:80]!r} must be a number, at least 2"
            )
        return cls.create(
            vocabulary,
            merges,
            CONTEXT_LENGTH if length > MOST_TOKENS else int(length),
            pad["content"] if isinstance(pad, dict) else pad,
            added,
        )


def train_tokenizer(captions: Iterable[str], vocabulary_size: int, context_length: int = CONTEXT_LENGTH) -> Tokenizer:
    """BPE (Sennrich et al. 2016) on captions: the 256 bytes inside and at the end of a word, the merges, start and end.

    It knows every text, whatever the captions were. Fewer captions than vocabulary_size asks for give fewer merges.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [letter + END_OF_WORD for letter in alphabet]
    num_merges = vocabulary_size - 2 * len(alphabet) - 2
    if num_merges < 0:
        raise ValueError(f"tokenizer: vocabulary_size is {vocabulary_size}, but bytes, start and end alone are 514")
    backend = tokenizers.Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD))
    backend.normalizer, backend.pre_tokenizer = _normalizer(), _pre_tokenizer()
    # The endings are entered beforehand: else the trainer numbers them in the order of a hash table, which is another
    # in every process, and breaks ties between merges by these numbers.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2,
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=endings,
        end_of_word_suffix=END_OF_WORD,
    )
    backend.train_from_iterator(captions, trainer)
    merges: Merges = [(a, b) for a, b in json.loads(backend.to_str())["model"]["merges"]][:num_merges]
    return of_merges(merges, context_length)


def of_merges(merges: Merges, context_length: int = CONTEXT_LENGTH, pad_token: str = END) -> Tokenizer:
    """CLIP's numbers: the 256 bytes, the same at the end of a word, what the merges make, start and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [letter + END_OF_WORD for letter in alphabet]
    tokens = dict.fromkeys([*alphabet, *endings, *(a + b for a, b in merges), START, END])
    return Tokenizer.create({token: i for i, token in enumerate(tokens)}, merges, context_length, pad_token)


def _plain(pad_token: str) -> dict[str, AddedToken]:
    """The tokens that every tokenizer finds whole."""
    return {token: AddedToken(token, special=True) for token in (START, END, pad_token)}


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _read_vocabulary(folder: pathlib.Path) -> tuple[dict[str, int], Merges]:
    """From vocab.json and merges.txt, or from the one tokenizer.json that transformers 5 writes."""
    whole = folder / WHOLE
    if not (folder / FILES[0]).is_file() and whole.is_file():
        content = read_object(whole)
        try:
            added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"]]
            vocabulary = content["model"]["vocab"] | added
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{whole} is not a tokenizer of byte-level BPE, with vocab and merges") from error
        return vocabulary, _checked_merges(pairs, whole)
    for name in FILES[:2]:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no tokenizer: it has no {name}")
    try:
        text = read_at_most(folder / FILES[1], LONGEST_MERGES)
    except ValueError as error:
        raise ValueError(f"{folder / FILES[1]}: {error}") from error
    try:
        lines = text.decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / FILES[1]} is not text (UTF-8)") from error
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return read_object(folder / FILES[0]), _checked_merges(pairs, folder / FILES[1])


def _check_vocabulary(vocabulary: Any, merges: Merges) -> None:
    """Raise ValueError for numbers that are none, or that would need a table without end."""
    if not isinstance(vocabulary, dict) or len(vocabulary) > MOST_IDS or len(merges) > MOST_IDS:
        raise ValueError(
            f"tokenizer: the vocabulary must be an object of at most {MOST_IDS:,} tokens, and as many merges"
        )
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < MOST_IDS:
            shown = ascii(token)[:80], str(number)[:40]
            raise ValueError("tokenizer: the number of {} is {}, not from 0 to {:,}".format(*shown, MOST_IDS - 1))


def _checked_merges(pairs: list[list[str]], path: pathlib.Path) -> Merges:
    if any(
        not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(piece, str) for piece in pair)
        for pair in pairs
    ):
        raise ValueError(f"{path}: every merge must be two pieces with a space between")
    return [(a, b) for a, b in pairs]
