"""CLIP's own vocabulary (Radford et al. 2021) from the file of merges that OpenAI publishes: downloaded once, and checked."""

import gzip
import hashlib

from jaxdiff.files import cache_folder, read_at_most
from jaxdiff.weights.download import fetch_file
from jaxdiff.weights.tokenizer import END, Tokenizer, of_merges

VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_URL = f"https://github.com/openai/CLIP/raw/main/clip/{VOCABULARY_FILE}"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"  # open_clip has the same file
LONGEST_FILE = 2**24
NUM_TOKENS = 49_408  # 256 bytes, the same at the end of a word, 48,894 merges, start and end


def clip_tokenizer(pad_token: str = END) -> Tokenizer:
    """The tokenizer of CLIP's text encoders. Raises ValueError with one line that says what to do where there is no network."""
    path = cache_folder() / VOCABULARY_FILE
    try:
        fetch_file(VOCABULARY_URL, VOCABULARY_SHA256, path)
        content = read_at_most(path, LONGEST_FILE)
    except (OSError, ValueError) as error:
        raise ValueError(f"CLIP's vocabulary is needed: {error}; put the file at {path}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != VOCABULARY_SHA256:
        raise ValueError(
            f"{path}: its SHA-256 is {found[:8]}..., and CLIP's vocabulary has {VOCABULARY_SHA256[:8]}...: delete it, and it is "
            f"downloaded again from {VOCABULARY_URL}"
        )
    return read_merges(content, NUM_TOKENS, pad_token)


def read_merges(content: bytes, num_tokens: int, pad_token: str = END) -> Tokenizer:
    """A tokenizer of so many tokens from the file's bytes: a line of its name, then more merges than are used."""
    lines = gzip.decompress(content).decode().split("\n")[1 : num_tokens - 2 * 256 - 2 + 1]
    pairs = [line.split() for line in lines]
    return of_merges([(a, b) for a, b in pairs], pad_token=pad_token)
