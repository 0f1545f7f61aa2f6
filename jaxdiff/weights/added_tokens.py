"""Tokens that are looked for whole before a prompt is split: which they are, as transformers reads a tokenizer's folder."""

from __future__ import annotations

import pathlib
from typing import Any

from tokenizers import AddedToken

from jaxdiff.files import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
SETTINGS, OVERRULING, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
WHOLE = "tokenizer.json"  # vocabulary, merges and added tokens in one
# Parts that a token can play, and CLIP's token for each where no file names one.
NAMED = {"bos_token": START, "eos_token": END, "unk_token": END, "sep_token": None, "pad_token": END}
NAMED |= {"cls_token": None, "mask_token": None}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_settings(folder: pathlib.Path) -> dict[str, Any]:
    """What tokenizer_config.json says; special_tokens_map.json overrules it, unless the former lists its added tokens.

    Published folders of Stable Diffusion 2 pad with the end in the one file and with "!" in the other, which counts.
    """
    settings = read_object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if "added_tokens_decoder" in settings or not (folder / OVERRULING).is_file():
        return settings
    for name, value in read_object(folder / OVERRULING).items():
        if name in NAMED:
            if value:
                _token(value, f"{folder / OVERRULING}: {name}")  # a mistake is told with the name of its own file
            settings[name] = value | {"special": True} if isinstance(value, dict) else value
    return settings


def read_added(folder: pathlib.Path, settings: dict[str, Any]) -> list[AddedToken]:
    """The tokens that are listed, then those with a part to play; `settings` of `read_settings`."""
    played = {name: settings.get(name) or token for name, token in NAMED.items()}
    named = [_token(token, f"{folder / SETTINGS}: {name}") for name, token in played.items() if token is not None]
    parts = {token.content for token in named}
    added = {token.content: token for token in _listed(folder, settings, parts)}
    listed = set(added)
    for token in added.values():
        token.special = token.special or token.content in parts
    for token in named:
        if token.content not in listed:
            token.special = True
            added[token.content] = token
    return list(added.values())


def state_of(token: AddedToken) -> dict[str, Any]:
    """A token as the files have it."""
    return {"content": token.content} | {flag: getattr(token, flag) for flag in FLAGS}


def _listed(folder: pathlib.Path, settings: dict[str, Any], parts: set[str]) -> list[AddedToken]:
    """Tokens of the settings' own list, or else of the two files that older and newer programs have for them."""
    if "added_tokens_decoder" in settings:
        return _by_number(settings["added_tokens_decoder"], f"{folder / SETTINGS}: added_tokens_decoder")
    found: dict[Any, Any] = {}
    if (folder / ADDED).is_file():
        for content, number in read_object(folder / ADDED).items():
            special = content in parts
            found[number] = {"content": content, "normalized": not special, "special": special}
    if (folder / WHOLE).is_file():
        tokens = read_object(folder / WHOLE).get("added_tokens") or []
        if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
            raise ValueError(f"{folder / WHOLE}: added_tokens must be a list of objects")
        found |= {str(token.get("id")): token for token in tokens}
    return _by_number({str(number): token for number, token in found.items()}, f"{folder}: added tokens")


def _by_number(tokens: Any, where: str) -> list[AddedToken]:
    if not isinstance(tokens, dict) or not all(number.isdecimal() and len(number) < 10 for number in tokens):
        raise ValueError(f"{where} must be an object of tokens by their numbers")
    return [_token(tokens[number], f"{where}: {number}") for number in sorted(tokens, key=int)]


def _token(token: Any, where: str) -> AddedToken:
    if isinstance(token, str) and token:
        return AddedToken(token, special=True)
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(content, str) or not content:
        raise ValueError(f"{where} = {repr(token)[:80]} must be text, or an object with it as content")
    flags = {flag: token[flag] for flag in FLAGS if flag in token}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{where}: {', '.join(flags)} must be true or false")
    return AddedToken(content, **flags)


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError naming the file."""
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
