"""Networks and name rules against diffusers and transformers with random weights in every parameter."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxdiff.models.text_encoder import pooled_text
from jaxdiff.weights.names import to_ours, to_theirs
from tests.golden import make_latent_diffusion as peers
from tests.weights import small_networks as small
from tests.weights.small_networks import relative_error

TOLERANCE = 2e-5
peer = pytest.mark.peer
quiet = pytest.mark.filterwarnings("ignore")


def test_outputs_are_the_golden_ones(golden_dir):
    """Stable Diffusion's three networks, small: kept numbers of diffusers and transformers."""
    golden = np.load(golden_dir / "latent_diffusion.npz")
    outputs = small.our_outputs()
    assert outputs.keys() == set(golden)
    for name, output in outputs.items():
        assert output.shape == golden[name].shape and relative_error(output, golden[name]) < TOLERANCE, name


def epsilons(network, inputs):
    """Epsilon of every norm, by its path."""
    found = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.GroupNorm | nn.LayerNorm):
            found["/".join(context.module.path)] = context.module.epsilon
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return found


def test_epsilons_are_those_of_stable_diffusion():
    """Too little for the numbers above to show, where variances are about 1; real weights have small ones."""
    network, _, inputs = small.unet(1)
    found = epsilons(network, inputs)
    assert {e for path, e in found.items() if path.endswith("transformer/norm")} == {1e-6}
    assert {e for path, e in found.items() if not path.endswith("transformer/norm")} == {1e-5}
    assert any("residual/norm2" in path for path in found) and any("block_0/norm3" in path for path in found)
    network, _, inputs = small.autoencoder()
    assert set(epsilons(network, inputs).values()) == {1e-6}
    network, _, inputs = small.text_encoder("gelu")
    assert set(epsilons(network, inputs).values()) == {1e-5}


@peer
@quiet
def test_golden_numbers_are_those_of_the_peers_here(golden_dir):
    golden, theirs = np.load(golden_dir / "latent_diffusion.npz"), peers.their_outputs()
    assert theirs.keys() == set(golden)
    for name, output in theirs.items():
        assert relative_error(golden[name], output) < 1e-5, name


def check_round_trip(module, network, rules, inputs):
    """Every tensor of the peer is used, every parameter filled, and all comes back bit by bit."""
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    params = to_ours(tensors, rules, small.shapes_of(network, inputs))
    back = to_theirs(params, rules)
    assert {name.removeprefix("text_model.") for name in back} == {name.removeprefix("text_model.") for name in tensors}
    for name, tensor in tensors.items():
        again = back[name if name in back else f"text_model.{name}"]
        assert again.dtype == tensor.dtype and again.tobytes() == tensor.tobytes(), name
    return params


@peer
@quiet
def test_tensors_go_there_and_back_bit_by_bit():
    for quant_conv in (True, False):
        check_round_trip(peers.autoencoder(quant_conv), *small.autoencoder(quant_conv))
    for version in (1, 2):
        check_round_trip(peers.unet(version), *small.unet(version))


@peer
@quiet
def test_the_posterior_is_that_of_diffusers():
    """Standard deviation and KL, without the quant convolutions."""
    import torch

    module, (network, rules, inputs) = peers.autoencoder(False), small.autoencoder(False)
    params = check_round_trip(module, network, rules, inputs)
    with torch.no_grad():
        theirs = module.encode(peers.channels_first(small.IMAGES)).latent_dist
    ours = jax.jit(lambda v, x: network.apply(v, x, method="encode"))({"params": params}, small.IMAGES)
    assert relative_error(ours.mean, peers.channels_last(theirs.mean)) < TOLERANCE
    assert relative_error(ours.std, peers.channels_last(theirs.std)) < TOLERANCE
    assert relative_error(ours.kl_to_standard(), theirs.kl()) < TOLERANCE


@peer
@quiet
def test_a_text_encoder_is_read_from_and_by_transformers(tmp_path):
    """What transformers saves we read; what we write has the names of published checkpoints, and transformers reads it."""
    import torch
    from safetensors.numpy import load_file, save_file

    module, (network, rules, inputs) = peers.text_encoder("gelu"), small.text_encoder("gelu")
    module.save_pretrained(tmp_path)
    shapes = small.shapes_of(network, inputs)
    params = to_ours(load_file(tmp_path / "model.safetensors"), rules, shapes)
    with torch.no_grad():
        theirs = module(torch.from_numpy(small.TOKENS).long())
    pooled = pooled_text(jax.jit(network.apply)({"params": params}, small.TOKENS), small.TOKENS, small.END)
    assert relative_error(pooled, theirs.pooler_output) < TOLERANCE

    written = to_theirs(params, rules)
    assert all(name.startswith("text_model.") for name in written)
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = type(module).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor, module.state_dict()[name])
    check_round_trip(again, network, rules, inputs)
