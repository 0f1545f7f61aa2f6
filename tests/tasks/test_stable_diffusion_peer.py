"""Whole pipelines of Stable Diffusion against those of diffusers, from the same folder and the same noise."""

import numpy as np
import pytest

from jaxdiff.tasks.stable_diffusion import load_stable_diffusion
from tests.golden import make_stable_diffusion as peers
from tests.tasks import parity_of_networks
from tests.tasks import small_checkpoint as small
from tests.tasks.small_checkpoint import images_of, one_device

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Folder and loaded model of a kind."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = small.write(tmp_path_factory.mktemp("model"), kind)
            made[kind] = folder, load_stable_diffusion(folder, mesh=one_device())
        return made[kind]

    return of


@pytest.mark.parametrize("name", peers.CASES)
def test_images_are_those_of_diffusers(opened, name):
    """Float images of about [-1, 1]; 1e-3 is asked for."""
    case = peers.CASES[name]
    folder, sd = opened(case.kind)
    ours, theirs = images_of(sd, peers, case), peers.theirs(folder, case)
    assert ours.shape == theirs.shape == (2, *case.size, 3)
    error = np.abs(ours - theirs).max()
    print(f"{name}: largest difference {error:.1e}, largest number {np.abs(theirs).max():.2f}")
    assert theirs.std() > 0.1 and error < 1e-4 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("kind", small.KINDS)
def test_networks_are_those_of_the_peers(opened, kind):
    """Latents of odd sizes too; 5e-5 is asked for."""
    differences = parity_of_networks.whole_networks(*opened(kind))
    print(kind, {name: f"{difference:.1e}" for name, difference in differences.items()})
    assert len(differences) == 5 and max(differences.values()) < 5e-5


@pytest.mark.parametrize("kind", small.KINDS)
def test_blocks_are_those_of_the_peers(opened, kind):
    """Each with what reached it there; 2e-5 is asked for."""
    differences = parity_of_networks.blocks(*opened(kind))
    print(kind, {name: f"{difference:.1e}, {number}" for name, (difference, number) in differences.items()})
    assert sum(number for _, number in differences.values()) == 59, "a block is not compared"
    assert max(difference for difference, _ in differences.values()) < 2e-5


def test_golden_numbers_are_those_of_the_peer_here(opened, golden_dir):
    golden = np.load(golden_dir / "stable_diffusion.npz")
    assert set(golden.files) == set(peers.KEPT)
    for name in peers.KEPT:
        folder, _ = opened(peers.CASES[name].kind)
        np.testing.assert_allclose(peers.theirs(folder, peers.CASES[name]), golden[name], atol=1e-4)


@pytest.mark.parametrize("kind", small.KINDS)
def test_tokens_are_those_of_transformers(opened, kind):
    from transformers import CLIPTokenizer

    folder, sd = opened(kind)
    prompts = ["", "a cat", "Don't!", "a ! mark", "a prompt that is much longer than the encoder's context"]
    there = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = there(prompts, padding="max_length", max_length=small.TOKENS, truncation=True).input_ids
    with pytest.warns(UserWarning, match="was cut"):
        np.testing.assert_array_equal(sd.tokenizer.encode(prompts), ids)
