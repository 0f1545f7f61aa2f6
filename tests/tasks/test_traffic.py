"""What devices send each other in a step of every family: gradients once, split parameters once, a few scalars, nothing else.

Of the pixels' U-Net see tests/training/test_collectives.py, of the progressive GAN test_progressive_gan.py.
"""

import collections
import contextlib
import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxdiff.models import lora
from jaxdiff.tasks import preflight
from jaxdiff.training import sharding, step
from jaxdiff.training.collectives import collectives, instructions
from tests.tasks.families import family

WIDE = {"autoencoder_kl.channels": 16, "autoencoder_kl.discriminator_channels": 16}  # for some arrays to be split
FAMILIES = {  # with what is averaged besides gradients
    "vae": ({"vae.hidden": 64}, ("loss", "elbo", "kl", "reconstruction")),
    "latent text": ({}, ("loss",)),
    "fine-tuning": ({}, ("loss",)),  # by LoRA, of the text encoder too
    "whole fine-tuning": ({"lora.rank": 0, "text.trained": True}, ("loss",)),
    "autoencoder": (WIDE, ("reconstruction", "psnr", "kl", "adversarial", "discriminator_loss", "real", "fake")),
}
QUICK = (("vae", 1), ("vae", 4), ("fine-tuning", 1), ("latent text", 4))  # the rest compiles longer
DOUBLED = ("decoder_conv", "upsample")  # in the paths of convolutions after a doubling


def compiled(name, fsdp, folder):
    """A run of eight devices, abstract, and the text of its step's program."""
    changes = FAMILIES[name][0] | {"sharding.fsdp": fsdp}
    run = preflight._open(family(name.removeprefix("whole "), folder, **changes), folder / "run", None)
    return run, preflight._compile(run).compiled.as_text()


def is_split(run, tree):
    """Path, number of numbers, and whether it is split, of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    where = jax.tree.leaves(sharding.fsdp_shardings(tree, run.mesh))
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, w.spec != P())
        for (path, leaf), w in zip(leaves, where, strict=True)
    ]


def expected(run, scalars):
    """How many arrays of how many numbers are gathered, and are reduced, as it follows from the parameters."""
    fsdp, gathered, reduced = run.mesh.shape["fsdp"], collections.Counter(), collections.Counter()
    state = run.state
    for path, shape, split in is_split(run, [state.params, getattr(state, "discriminator_params", {})]):
        size, table = math.prod(shape), path.endswith("embedding")
        # A kernel after a doubling works as four of 2x2.
        pieces = [size // 9 * 4] * 4 if any(n in path for n in DOUBLED) and shape[:2] == (3, 3) else [size]
        reduced.update(pieces)
        if split:
            gathered[size] += 1
            if not table:  # first over `fsdp`, then of each part over `data`; the norm and clipping by it add up parts
                reduced.update(piece // fsdp for piece in pieces)
                reduced[1] += 2
        if path.endswith("decoder/conv_out/kernel"):
            reduced[size] += 2  # the weight of the adversarial loss compares two gradients there
    for (frozen,) in [run.frozen] * bool(run.frozen):
        gathered.update(math.prod(s) for path, s, split in is_split(run, frozen) if split)
    reduced[1] += len(scalars)
    return gathered, reduced


def families(fsdp):
    """Every family, those slow that compile long."""
    return [pytest.param(name, marks=[pytest.mark.slow] * ((name, fsdp) not in QUICK)) for name in FAMILIES]


def found(text):
    """The same of a program, and how many devices take part in each kind."""
    sizes, groups = collections.defaultdict(collections.Counter), collections.defaultdict(set)
    for one in instructions(text):
        sizes[one.kind].update(math.prod(shape) for shape in one.shapes for _ in range(one.times))
        groups[one.kind].add(one.group)
    return sizes, groups


@pytest.mark.parametrize("name", families(1))
def test_data_parallel_averages_each_gradient_once(name, tmp_path):
    run, text = compiled(name, 1, tmp_path)
    sizes, groups = found(text)
    _, reduced = expected(run, FAMILIES[name][1])
    assert dict(sizes) == {"all-reduce": reduced} and groups["all-reduce"] == {8}
    traffic = collectives(text)["all-reduce"]
    assert traffic.bytes == 4 * sum(size * times for size, times in reduced.items())
    assert traffic.count == 1 + (name == "autoencoder")  # whose adversarial weight must be known first


@pytest.mark.parametrize("name", families(4))
def test_fsdp_gathers_each_split_parameter_once_and_nothing_else(name, tmp_path):
    run, text = compiled(name, 4, tmp_path)
    sizes, groups = found(text)
    gathered, reduced = expected(run, FAMILIES[name][1])
    assert dict(sizes) == {"all-gather": gathered, "all-reduce": reduced} and groups["all-gather"] == {4}
    assert sum(gathered.values()) > 1
    reckoned = preflight.expected_traffic(run)
    assert reckoned["all-gather"] == 3 * sum(gathered.elements())  # 4 bytes each, three quarters of them from others
    # A gradient is scattered by averaging it and keeping a part here; of doubled kernels and single numbers there is more.
    averaged = sum(one.sent(8) for one in instructions(text) if one.kind == "all-reduce")
    assert 0 <= averaged - reckoned["all-reduce"] - 2 * reckoned.get("reduce-scatter", 0) < 0.5 * averaged


@pytest.mark.slow
def test_the_checks_notice_gradients_of_what_lora_leaves_as_it_is(tmp_path, monkeypatch):
    """Merged first, W would have a gradient, and that is what would be averaged."""

    def merged(params, factors, scale):
        return contextlib.nullcontext({"params": lora.merge(params, factors, scale)})

    monkeypatch.setattr("jaxdiff.tasks.diffusion.adapted", merged)
    run, text = compiled("fine-tuning", 1, tmp_path)
    sizes, _ = found(text)
    assert sum(sizes["all-reduce"].elements()) > 3 * sum(expected(run, ("loss",))[1].elements())


@pytest.mark.slow
def test_the_checks_notice_activations_sent_for_a_tables_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "whole_tables", lambda gradient: gradient)
    run, text = compiled("latent text", 4, tmp_path)
    sizes, _ = found(text)
    more = sizes["all-gather"] - expected(run, ("loss",))[0]
    tokens, width = run.config.text.context_length, run.config.text.width
    assert more[8 * tokens * width] == 1  # what eight of the 16 captions' words got
