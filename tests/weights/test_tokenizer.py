"""CLIP's tokenizer: what it makes of a prompt, round trips, and the ids of transformers' own."""

import json
import random

import numpy as np
import pytest

from jaxdiff.weights.tokenizer import END, START, Tokenizer, train_tokenizer
from tests.any_torchvision import import_torchvision

CAPTIONS = [
    "a small red circle at the top left", "a large blue square", "a red triangle and a green circle, side by side",
    "it's the cat's smiling face", "10 yellow stars", "cafés in crème brûlée", "colour colours coloured",
]  # fmt: skip
PROMPTS = [
    "", " ", "a small red circle", "A Small RED Circle!", "  runs \t of\n\n white   space ", "it's they'll we've I'm",
    "in 1984, 3.14 or 10,000", "hello!!! ... ?? (a+b)*c", "crème brûlée", "cre\u0300me", "日本語 テキスト", "смех",
    "🙂🙂 a smile 🏳️‍🌈", "_under_score-and-hyphen", "a\u00a0b\u2003c", "İstanbul ſtraße ﬁ", "x" * 40, "\x00\x7f",
    f"{END} not the end", f"a {START}b", "’quotes’ “and” `ticks`", "１２ ½ ²",
]  # fmt: skip
LONG = "a red circle and " * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 600)


def test_prompts_are_framed_and_padded(tokenizer):
    ids = tokenizer.encode(["", "a red circle"])
    assert ids.dtype == np.int32 and ids.shape == (2, 77)
    start, end = tokenizer.start_token, tokenizer.end_token
    assert tokenizer.vocabulary_size == 600 and (start, end) == (598, 599)
    assert ids[0].tolist() == [start] + [end] * 76
    length = ids[1].tolist().index(end)
    assert ids[1, 0] == start and (ids[1, length:] == end).all() and 4 <= length < 20
    assert tokenizer.encode([]).shape == (0, 77)
    with pytest.raises(ValueError, match="list of strings"):
        tokenizer.encode("a red circle")


def test_what_it_was_trained_on_is_short_and_all_else_is_known_too(tokenizer):
    def length(prompt):
        return tokenizer.encode([prompt])[0].tolist().index(tokenizer.end_token) - 1

    assert length("circle") == 1 < length("elcric") <= 6
    assert length("日") == 3  # bytes
    assert length("İ") == 3  # "i" and a combining dot of two bytes


def test_text_comes_back(tokenizer):
    for prompt in ["a small red circle at the top left", "crème brûlée", "日本語", "🙂 smile"]:
        assert tokenizer.decode(tokenizer.encode([prompt])) == [prompt]
    assert tokenizer.decode(tokenizer.encode(["  A  Red\nCircle!", ""])) == ["a red circle !", ""]


def test_a_long_prompt_is_cut_with_a_warning(tokenizer):
    words = ["red"] * 76
    with pytest.warns(UserWarning, match=r"76 tokens was cut to 75; the model does not see 'red'"):
        ids = tokenizer.encode([" ".join(words)])
    assert ids[0, -1] == tokenizer.end_token and (ids[0, 1:-1] == ids[0, 1]).all()
    np.testing.assert_array_equal(tokenizer.encode([" ".join(words[:75])]), ids)  # fits: no warning


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    short = train_tokenizer(CAPTIONS, 600, context_length=12)
    short.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert loaded[:5] == short[:5] and loaded.context_length == 12
    prompts = ["a red circle", "日", "it's"]
    np.testing.assert_array_equal(loaded.encode(prompts), short.encode(prompts))
    np.testing.assert_array_equal(loaded.encode(prompts)[:2], tokenizer.encode(prompts)[:2, :12])


def test_training_is_deterministic():
    """Ties between merges are broken by numbers that a hash table would give in another order each time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(300)]
    first = train_tokenizer(words, 800)
    assert len(first.merges) == 800 - 514
    assert all(train_tokenizer(words, 800).merges == first.merges for _ in range(4))


def test_padding_of_a_checkpoint_is_followed(tokenizer, tmp_path):
    """Stable Diffusion 2 pads with "!", in one of two files, in one of two forms."""
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    bang = tokenizer.vocabulary["!"]
    for name, content in [
        ("tokenizer_config.json", settings | {"pad_token": "!"}),
        ("tokenizer_config.json", settings | {"pad_token": {"content": "!"}, "model_max_length": 10**30}),
        ("special_tokens_map.json", {"pad_token": "!"}),
    ]:
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
        ids = Tokenizer.load(tmp_path).encode([""])
        assert ids[0].tolist() == [tokenizer.start_token, tokenizer.end_token] + [bang] * 75


def flags(content, **changed):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    return {"content": content} | plain | changed


# As in published folders: SD 1's and 2's of 2022, and those that transformers wrote from 2023 on. None: as `save` writes it.
OLD = {name: {"__type": "AddedToken"} | flags(token) for name, token in (("bos_token", START), ("eos_token", END))}
MAP = {"bos_token": flags(START), "eos_token": flags(END), "unk_token": flags(END)}
LISTED = {"598": flags(START, special=True), "599": flags(END, special=True)}
LISTED_BANG = LISTED | {"0": flags("!", normalized=False, special=True)}
FOLDERS = {  # what tokenizer_config.json and special_tokens_map.json say, the padding, and whether "!" is found whole
    "the config alone": ({"pad_token": "!"}, None, "!", True),
    "nothing": ({"pad_token": None}, None, END, False),
    "the map alone": ({"pad_token": None}, MAP | {"pad_token": "!"}, "!", True),
    "SD 1": (OLD, MAP | {"pad_token": END}, END, False),
    "SD 2": (OLD | {"pad_token": END}, MAP | {"pad_token": "!"}, "!", True),
    "the other way round": ({"pad_token": "!"}, MAP | {"pad_token": END}, END, False),
    "listed": ({"pad_token": "!", "added_tokens_decoder": LISTED_BANG}, MAP | {"pad_token": END}, "!", True),
    "listed, but another pad": ({"added_tokens_decoder": LISTED_BANG}, MAP | {"pad_token": "!"}, END, True),
    "listed without it": ({"added_tokens_decoder": LISTED}, MAP | {"pad_token": "!"}, END, False),
    "a new word": ({"added_tokens_decoder": LISTED | {"600": flags("<frog>", rstrip=True)}}, None, END, False),
}  # fmt: skip


def write_folder(tokenizer, folder, config, special):
    tokenizer.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | config
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if special is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))


@pytest.mark.parametrize("name", FOLDERS)
def test_of_two_files_that_disagree_the_right_one_is_followed(tokenizer, tmp_path, name):
    config, special, pad, whole = FOLDERS[name]
    write_folder(tokenizer, tmp_path, config, special)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.pad_token == pad and ("!" in {token.content for token in loaded.added}) == whole
    end = tokenizer.vocabulary["!</w>"]
    assert loaded.encode(["!"])[0, 1] == (tokenizer.vocabulary["!"] if whole else end)
    loaded.save(tmp_path / "copy")  # which finds the same tokens, the same way
    copy, prompts = Tokenizer.load(tmp_path / "copy"), ["a !! <FROG> <frog>  x", ""]
    assert copy.with_context_length(9).added == copy.added and set(map(repr, copy.added)) == set(
        map(repr, loaded.added)
    )
    np.testing.assert_array_equal(copy.encode(prompts), loaded.encode(prompts))


def test_refusals(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vocabulary_size is 513, but bytes, start and end alone are 514"):
        train_tokenizer(CAPTIONS, 513)
    assert train_tokenizer([], 514).vocabulary_size == 514
    with pytest.raises(ValueError, match="it has no vocab.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"has no <\|startoftext\|> nor <\|endoftext\|>"):
        Tokenizer.create({"a": 0}, [])
    with pytest.raises(ValueError, match="context of 1 tokens"):
        Tokenizer.create(tokenizer.vocabulary, tokenizer.merges, 1)
    tokenizer.save(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match="two pieces"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for listed, message in [
        ([], "added_tokens_decoder must be an object of tokens by their numbers"),
        ({"-1": "a"}, "added_tokens_decoder must be an object of tokens by their numbers"),
        ({"0": {"special": True}}, "added_tokens_decoder: 0 = .* must be text, or an object with it as content"),
        ({"0": {"content": "!", "lstrip": 1}}, "added_tokens_decoder: 0: lstrip must be true or false"),
    ]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": listed}))
        with pytest.raises(ValueError, match=f"tokenizer_config.json: {message}"):
            Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Tokenizer.load(tmp_path)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pad_token", [END, "!"])
def test_ids_are_those_of_transformers(tokenizer, tmp_path, pad_token):
    import_torchvision()
    from transformers import CLIPTokenizer

    ours = Tokenizer.create(tokenizer.vocabulary, tokenizer.merges, pad_token=pad_token)
    ours.save(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 77
    for prompt in [*PROMPTS, *CAPTIONS, LONG]:
        expected = theirs([prompt], padding="max_length", truncation=True, max_length=77)["input_ids"]
        np.testing.assert_array_equal(ours.encode([prompt]), expected, err_msg=repr(prompt))
        inner = theirs(prompt, add_special_tokens=False)["input_ids"]
        if not any(token in prompt for token in (START, END, pad_token)):  # ours leaves these out
            assert theirs.decode(inner) == ours.decode_ids(inner)
    # What transformers writes, we read: transformers 5 has one file where there were two.
    theirs.save_pretrained(tmp_path / "theirs")
    assert Tokenizer.load(tmp_path / "theirs")[:5] == ours[:5]


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_as_transformers_reads_it(tokenizer, tmp_path, name):
    import_torchvision()
    from transformers import CLIPTokenizer

    write_folder(tokenizer, tmp_path, *FOLDERS[name][:2])
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    Tokenizer.load(tmp_path).save(tmp_path / "copy")
    theirs.save_pretrained(tmp_path / "theirs")
    for ours in (Tokenizer.load(folder) for folder in (tmp_path, tmp_path / "copy", tmp_path / "theirs")):
        assert ours.vocabulary_size == len(theirs)
        for prompt in [
            *PROMPTS,
            "a cat!!",
            "!",
            f"a {END.upper()} {START.upper()}",
            "wow!  <frog>   <FROG>!x",
            LONG + "!",
        ]:
            expected = theirs([prompt], padding="max_length", truncation=True, max_length=77)["input_ids"]
            np.testing.assert_array_equal(ours.encode([prompt]), expected, err_msg=repr(prompt))
