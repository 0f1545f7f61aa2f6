"""CLIP's own vocabulary: made of its merges as OpenAI makes it, downloaded once, checked, and what a single file takes."""

import gzip
import hashlib
import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest

from jaxdiff.config import ConfigError
from jaxdiff.tasks import stable_diffusion
from jaxdiff.tasks.stable_diffusion import open_stable_diffusion
from jaxdiff.weights import clip_vocabulary
from jaxdiff.weights.clip_vocabulary import clip_tokenizer
from jaxdiff.weights.tokenizer import END, START, Tokenizer, train_tokenizer
from tests.any_torchvision import import_torchvision
from tests.tasks import small_checkpoint as small
from tests.weights.test_tokenizer import CAPTIONS, PROMPTS

BYTES = 514  # tokens of a vocabulary without merges
FIRST, _, SECOND, _ = small.KINDS


def publish(monkeypatch, folder, merges, num_tokens):
    """A file such as OpenAI's, with more merges than are used, where the download goes; the cache is empty."""
    lines = ['"name"#version: 0.2', *(f"{a} {b}" for a, b in merges), "z z", ""]
    file = folder / "published.txt.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.setattr(clip_vocabulary, "VOCABULARY_URL", file.as_uri())
    monkeypatch.setattr(clip_vocabulary, "VOCABULARY_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(clip_vocabulary, "NUM_TOKENS", num_tokens)
    monkeypatch.setattr(stable_diffusion, "NUM_TOKENS", num_tokens)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return file, folder / "cache" / "jaxdiff" / clip_vocabulary.VOCABULARY_FILE


def test_it_is_made_of_the_merges_and_downloaded_once(tmp_path, monkeypatch):
    trained = train_tokenizer(CAPTIONS, 600)
    file, cached = publish(monkeypatch, tmp_path, trained.merges, 600)
    assert clip_tokenizer()[:5] == trained[:5]
    file.unlink()
    assert clip_tokenizer("!").pad_token == "!" and clip_tokenizer().merges == trained.merges
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{cached}: its SHA-256 is .*delete it, .* downloaded again from file://"):
        clip_tokenizer()
    cached.unlink()
    with pytest.raises(
        ValueError, match=f"^CLIP's vocabulary is needed: file://.*could not be .*put the file at {cached}$"
    ):
        clip_tokenizer()


@pytest.mark.parametrize("kind", [FIRST, SECOND])
def test_a_single_file_takes_it(kind, tmp_path, monkeypatch, capsys):
    """Padded as its family is: Stable Diffusion 2 with "!"."""
    file = small.write(tmp_path, kind, single_file=True)
    with pytest.raises(ConfigError, match=f"^{file}: it has no tokenizer: give --tokenizer FOLDER"):
        open_stable_diffusion(file)  # a vocabulary of another size than CLIP's
    publish(monkeypatch, tmp_path, [], BYTES)
    found = open_stable_diffusion(file).tokenizer
    assert found[:5] == small.tokenizer(kind)[:5] and found.pad_token == ("!" if kind == SECOND else END)
    assert "a single file has no tokenizer: CLIP's own is taken" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(clip_vocabulary, "VOCABULARY_URL", "http://127.0.0.1:9/vocabulary")
    with pytest.raises(ConfigError) as error:
        open_stable_diffusion(file)
    for part in (str(file), "http://127.0.0.1:9/vocabulary", str(tmp_path / "other"), "or give --tokenizer FOLDER"):
        assert part in str(error.value)


@pytest.mark.parametrize("place", ["tokenizer", "."])
def test_one_that_lies_beside_the_file_comes_first(place, tmp_path, monkeypatch, capsys):
    file = small.write(tmp_path, FIRST, single_file=True)
    shutil.rmtree(tmp_path / "words")
    publish(monkeypatch, tmp_path, [], BYTES)
    other = Tokenizer.create(small.tokenizer(FIRST).vocabulary, [], 9, "?")
    other.save(tmp_path / place)
    found = open_stable_diffusion(file).tokenizer
    assert (found.pad_token, found.context_length) == ("?", 9) and not (tmp_path / "cache").exists()
    assert f"a single file has no tokenizer: that in {tmp_path / place} beside it is taken" in capsys.readouterr().err


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_it_is_that_of_openai_and_of_transformers(tmp_path, monkeypatch):
    """The file that OpenAI's own package carries; nothing is downloaded."""
    (folder,) = importlib.util.find_spec("clip").submodule_search_locations  # not imported: that would want torchvision
    file = pathlib.Path(folder) / clip_vocabulary.VOCABULARY_FILE
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "jaxdiff").mkdir()
    shutil.copyfile(file, tmp_path / "jaxdiff" / file.name)
    ours = clip_tokenizer()
    spec = importlib.util.spec_from_file_location("simple_tokenizer", file.with_name("simple_tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    openai = module.SimpleTokenizer()
    assert ours.vocabulary == openai.encoder and ours.merges == list(openai.bpe_ranks)
    assert (ours.vocabulary["!"], ours.start_token, ours.end_token, ours.vocabulary_size) == (0, 49_406, 49_407, 49_408)
    import_torchvision()
    from transformers import CLIPTokenizer

    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocabulary.write_text(json.dumps(openai.encoder), encoding="utf-8")
    merges.write_text("#version: 0.2\n" + "\n".join(map(" ".join, openai.bpe_ranks)), encoding="utf-8")
    theirs = CLIPTokenizer(str(vocabulary), str(merges))
    for prompt in [*PROMPTS, *CAPTIONS, "an astronaut riding a horse on mars, 4k"]:
        expected = theirs([prompt], padding="max_length", truncation=True, max_length=77)["input_ids"]
        np.testing.assert_array_equal(ours.encode([prompt]), expected, err_msg=repr(prompt))
    for prompt in ["a photo of a cat", "it's 10 yellow stars!", f"a {START}b", "crème brûlée", "日本語"]:
        assert ours.encode([prompt])[0, 1:].tolist()[: len(ids := openai.encode(prompt))] == ids
    assert ours.encode(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
