"""Attention against its closed form in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxdiff.models import attention
from jaxdiff.models.attention import (
    Attention,
    AttentionBlock,
    FeedForward,
    SpatialTransformer,
    TransformerBlock,
    choose_implementation,
)
from tests.models.tiny_networks import jit, random_parameters


def as_float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def attend(x, context, p, num_heads):
    """softmax(q k^T / sqrt(d)) v, head by head."""
    q, k, v = dense(x, p["query"]), dense(context, p["key"]), dense(context, p["value"])
    d = x.shape[-1] // num_heads
    out = np.zeros_like(x)
    for head in range(num_heads):
        part = slice(head * d, (head + 1) * d)
        logits = q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(d)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[..., part] = weights / weights.sum(-1, keepdims=True) @ v[..., part]
    return dense(out, p["out"])


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_matches_numpy(num_heads, cross):
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    context = jax.random.normal(jax.random.key(1), (2, 3, 6)) if cross else None
    layer = Attention(num_heads, use_bias=not cross)
    variables = random_parameters(layer, x, context)
    source = x if context is None else context
    expected = attend(*as_float64((x, source, variables["params"])), num_heads)
    np.testing.assert_allclose(jit(layer.apply)(variables, x, context), expected, atol=1e-5)


def test_transformer_matches_numpy():
    """Self-attention, then the context, then GEGLU with the exact gelu; all after a GroupNorm with a residual."""
    x = jax.random.normal(jax.random.key(0), (2, 2, 3, 8))
    context = jax.random.normal(jax.random.key(1), (2, 4, 6))
    layer = SpatialTransformer(num_heads=2)
    variables = random_parameters(layer, x, context)
    image, text, p = as_float64((x, context, variables["params"]))

    groups = image.reshape(2, 6, 2, 4)
    centred = groups - groups.mean(axis=(1, 3), keepdims=True)
    h = (centred / np.sqrt(groups.var(axis=(1, 3), keepdims=True) + 1e-6)).reshape(2, 6, 8)
    h = dense(h * p["norm"]["scale"] + p["norm"]["bias"], p["project_in"])
    block = p["block_0"]
    normed = layer_norm(h, block["norm1"])
    h = h + attend(normed, normed, block["self_attention"], 2)
    h = h + attend(layer_norm(h, block["norm2"]), text, block["cross_attention"], 2)
    a, b = np.split(dense(layer_norm(h, block["norm3"]), block["feed_forward"]["dense_in"]), 2, axis=-1)
    h = h + dense(a * b * (1 + erf(b / np.sqrt(2))) / 2, block["feed_forward"]["dense_out"])
    expected = image + dense(h, p["project_out"]).reshape(image.shape)
    np.testing.assert_allclose(jit(layer.apply)(variables, x, context), expected, atol=5e-5)


def test_without_context_the_second_attention_is_self_attention():
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    block = TransformerBlock(num_heads=2)
    variables = random_parameters(block, x)
    p = as_float64(variables["params"])
    h = np.asarray(x, np.float64)
    normed = layer_norm(h, p["norm1"])
    h = h + attend(normed, normed, p["self_attention"], 2)
    normed = layer_norm(h, p["norm2"])
    h = h + attend(normed, normed, p["cross_attention"], 2)
    feed_forward = FeedForward().apply({"params": variables["params"]["feed_forward"]}, layer_norm(h, p["norm3"]))
    np.testing.assert_allclose(jit(block.apply)(variables, x), h + feed_forward, atol=2e-5)


def test_attention_does_not_know_where_a_pixel_is():
    """Moving the pixels around moves the result likewise: attention over pixels has no notion of place."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    block = AttentionBlock(num_heads=2)
    variables = random_parameters(block, x)
    rolled = jnp.roll(x, (1, 2), axis=(1, 2))
    np.testing.assert_allclose(
        jit(block.apply)(variables, rolled), jnp.roll(jit(block.apply)(variables, x), (1, 2), axis=(1, 2)), atol=1e-5
    )
    assert not np.allclose(jit(block.apply)(variables, x), x)


def test_attention_blocks_start_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    for block in (AttentionBlock(), SpatialTransformer(num_heads=2)):
        np.testing.assert_array_equal(block.init_with_output(jax.random.key(1), x)[0], x)


def test_softmax_is_float32_in_bfloat16():
    """No exponential of 16 bits anywhere in the program."""
    x = jnp.ones((1, 4, 8), jnp.bfloat16)
    layer = Attention(dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    text = str(jax.make_jaxpr(layer.apply)(variables, x))
    exponentials = [line.split("=")[0] for line in text.splitlines() if "= exp " in line]
    assert exponentials and all(":f32[" in line for line in exponentials), exponentials


def test_cudnn_only_when_asked_for_and_possible():
    assert choose_implementation(None, 64, jnp.bfloat16) is None
    assert choose_implementation("xla", 64, jnp.bfloat16) == "xla"
    assert choose_implementation("cudnn", 64, jnp.bfloat16) == "cudnn"
    assert choose_implementation("cudnn", 160, jnp.float16) == "xla"  # too wide a head
    assert choose_implementation("cudnn", 12, jnp.float16) == "xla"  # not a multiple of 8
    with pytest.raises(ValueError, match="needs dtype bfloat16"):
        choose_implementation("cudnn", 64, jnp.float32)
    with pytest.raises(ValueError, match="flash"):
        choose_implementation("flash", 64, jnp.float32)


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="10 channels cannot be split into 4 heads"):
        Attention(num_heads=4).init(jax.random.key(0), jnp.ones((1, 3, 10)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_tokens_are_attended_to_head_by_head_and_the_result_is_the_same(monkeypatch, dtype):
    """Output and gradients; float64's closed form decides."""
    monkeypatch.setattr(attention, "MANY_WEIGHTS", 1)
    monkeypatch.setattr(attention, "LARGEST_CHUNK", 4)
    rng = np.random.default_rng(0)
    q, k, v, target = (jnp.asarray(rng.standard_normal((2, n, 3, 5)), dtype) for n in (6, 7, 7, 6))

    def loss(function):
        return lambda q, k, v: (function(q, k, v).astype(jnp.float32) * target.astype(jnp.float32)).sum()

    program = jit(jax.value_and_grad(loss(attention.attend), (0, 1, 2)))
    assert "while" in program.lower(q, k, v).as_text(), "all at once after all"
    ours = program(q, k, v)
    plain = jit(jax.value_and_grad(loss(jax.nn.dot_product_attention), (0, 1, 2)))(q, k, v)
    tolerance = 1e-5 if dtype == "float32" else 0.1
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), atol=tolerance, rtol=tolerance)
    logits = np.einsum("bqhd,bkhd->bhqk", *(np.asarray(x, np.float64) for x in (q, k))) / np.sqrt(5)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (np.einsum("bhqk,bkhd->bqhd", weights, np.asarray(v, np.float64)) * np.asarray(target, np.float64)).sum()
    assert float(ours[0]) == pytest.approx(expected, abs=1e-4 if dtype == "float32" else 0.3)


@pytest.mark.parametrize("change", [{"causal": True}, {"implementation": "xla"}, {}])
def test_what_cannot_be_split_is_attended_to_at_once(monkeypatch, change):
    """A causal mask, an implementation that was asked for, a prime number of queries."""
    monkeypatch.setattr(attention, "MANY_WEIGHTS", 1)
    monkeypatch.setattr(attention, "LARGEST_CHUNK", 8)
    q = jax.random.normal(jax.random.key(0), (1, 6 if change else 11, 1, 4))
    run = jit(lambda q: attention.attend(q, q, q, **change))
    assert "while" not in run.lower(q).as_text()
    expected = jax.nn.dot_product_attention(q, q, q, is_causal="causal" in change)
    np.testing.assert_allclose(run(q), expected, atol=1e-6)
