"""Name rules: both directions, strictness, and the layouts, without PyTorch."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdiff.models.text_encoder import CLIPTextEncoder
from jaxdiff.models.unet import UNet
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.weights.names import Rule, autoencoder_rules, text_encoder_rules, to_ours, to_theirs, unet_rules

X, TOKENS = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 7), jnp.int32)
CONTEXT = jnp.zeros((1, 3, 6))
SMALL = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1}
UNET = UNet(4, **SMALL, attention_levels=(0,), num_heads=2, context_dim=6)
MODELS = {
    "unet": (UNET, unet_rules(2, 1), (X, jnp.zeros(1), None, CONTEXT)),
    "unet, linear": (UNET, unet_rules(2, 1, linear_projection=True), (X, jnp.zeros(1), None, CONTEXT)),
    "autoencoder": (AutoencoderKL(4, **SMALL), autoencoder_rules(2, 1), (X,)),
    "text encoder": (CLIPTextEncoder(20, 7, 8, num_layers=2, num_heads=2), text_encoder_rules(2), (TOKENS,)),
}


def parameters(name):
    network, rules, inputs = MODELS[name]
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    return params, rules, shapes


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same_to_the_bit(name):
    params, rules, shapes = parameters(name)
    tensors = to_theirs(params, rules)
    assert len(tensors) == len(jax.tree.leaves(params))
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    back = to_ours(tensors, rules, shapes)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for here, there in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert here.tobytes() == there.tobytes()
    again = to_theirs(back, rules)
    assert all(again[key].tobytes() == tensor.tobytes() for key, tensor in tensors.items())


def test_names_are_those_of_stable_diffusion():
    """The last of four levels is the first of the decoder's; only existing layers are named."""
    network = UNet(4, channels=8, channel_multipliers=(1, 2, 4, 4), attention_levels=(0, 1, 2), context_dim=6)
    shapes = jax.eval_shape(network.init, jax.random.key(0), X, jnp.zeros(1), None, CONTEXT)["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    tensors = to_theirs(params, unet_rules(4, 2))
    block = "down_blocks.2.attentions.1.transformer_blocks.0"
    for name, shape in {
        "conv_in.weight": (8, 4, 3, 3),
        "time_embedding.linear_2.weight": (32, 32),
        "down_blocks.1.resnets.0.conv_shortcut.weight": (16, 8, 1, 1),
        "down_blocks.2.downsamplers.0.conv.bias": (32,),
        f"{block}.attn2.to_k.weight": (32, 6),
        f"{block}.attn1.to_out.0.bias": (32,),
        f"{block}.ff.net.0.proj.weight": (256, 32),
        "mid_block.attentions.0.proj_in.weight": (32, 32, 1, 1),
        "mid_block.resnets.1.time_emb_proj.weight": (32, 32),
        "up_blocks.0.resnets.2.conv1.weight": (32, 64, 3, 3),
        "up_blocks.3.attentions.2.proj_out.weight": (8, 8, 1, 1),
        "conv_norm_out.weight": (8,),
    }.items():
        assert tensors[name].shape == shape, name
    for name in ("down_blocks.3.downsamplers.0.conv.weight", "up_blocks.3.upsamplers.0.conv.weight"):
        assert name not in tensors
    assert not any(name.startswith(("down_blocks.3.attentions", "up_blocks.0.attentions")) for name in tensors)


def test_layouts():
    """A convolution is turned from [o i h w], a dense layer from [o i]: a square kernel would not show a mistake."""
    rules = [
        Rule("a", "a", "conv"), Rule("b", "b", "dense"), Rule("c", "c", "pointwise"), Rule("d", "d", "norm"),
        Rule("e", "e", "embedding"),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"a": (4, 3, 3, 3), "b": (3, 3), "c": (3, 3, 1, 1), "d": (3,), "e": (3, 3)}.items()
    }
    shapes = {"a": ("kernel", (3, 3, 3, 4)), "b": ("kernel", (3, 3)), "c": ("kernel", (3, 3)), "d": ("scale", (3,))}
    shapes["e"] = ("embedding", (3, 3))
    shapes = {name: {leaf: jax.ShapeDtypeStruct(shape, jnp.float32)} for name, (leaf, shape) in shapes.items()}
    params = to_ours(tensors, rules, shapes)
    assert params["a"]["kernel"][2, 1, 0, 3] == tensors["a.weight"][3, 0, 2, 1]
    assert params["b"]["kernel"][2, 1] == tensors["b.weight"][1, 2]
    assert params["c"]["kernel"][2, 1] == tensors["c.weight"][1, 2, 0, 0]
    np.testing.assert_array_equal(params["d"]["scale"], tensors["d.weight"])
    np.testing.assert_array_equal(params["e"]["embedding"], tensors["e.weight"])


def test_everything_wrong_is_said_in_one_line():
    params, rules, shapes = parameters("autoencoder")
    tensors = to_theirs(params, rules)
    del tensors["encoder.conv_in.weight"]
    tensors["encoder.conv_inn.weight"] = np.zeros(3, np.float32)
    tensors["decoder.conv_out.weight"] = tensors["decoder.conv_out.weight"].transpose(1, 0, 2, 3)
    tensors["decoder.conv_norm_out.bias"] = np.zeros(8, np.int64)
    with pytest.raises(ValueError) as error:
        to_ours(tensors, rules, shapes)
    assert str(error.value) == (
        "the weights are not this model's. missing: encoder.conv_in.weight; unused: encoder.conv_inn.weight; "
        "misshapen: decoder.conv_out.weight is [8, 4, 3, 3], should be [4, 8, 3, 3], "
        "decoder.conv_norm_out.bias holds int64, should hold one of float16, bfloat16, float32, float64"
    )
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
        to_ours({}, rules, shapes)
    with pytest.raises(ValueError, match="no name rule for .*: are the rules made for this model's levels"):
        to_theirs(params, autoencoder_rules(1, 1))


def test_older_names_are_read_and_newer_ones_written():
    params, rules, shapes = parameters("autoencoder")
    tensors = to_theirs(params, rules)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = tensor
    assert set(renamed) != set(tensors)
    for here, there in zip(jax.tree.leaves(to_ours(renamed, rules, shapes)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(here, there)

    params, rules, shapes = parameters("text encoder")
    tensors = to_theirs(params, rules)
    short = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    short["embeddings.position_ids"] = np.arange(7)[None]
    for here, there in zip(jax.tree.leaves(to_ours(short, rules, shapes)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(here, there)
    with pytest.raises(ValueError, match="unused: final_layer_norm.bias"):  # both names at once
        to_ours(tensors | {"final_layer_norm.bias": short["final_layer_norm.bias"]}, rules, shapes)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_the_parameters_dtype(dtype):
    params, rules, shapes = parameters("text encoder")
    tensors = {name: tensor.astype(dtype) for name, tensor in to_theirs(params, rules).items()}
    loaded = flatten_dict(to_ours(tensors, rules, shapes), sep="/")
    for path, leaf in flatten_dict(params, sep="/").items():
        assert loaded[path].dtype == np.float32
        np.testing.assert_array_equal(loaded[path], leaf.astype(dtype).astype(np.float32))
