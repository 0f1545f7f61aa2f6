"""Attention over pixels and text: DDPM's block, and the transformer of latent diffusion (Rombach et al. 2022)."""

import functools
import math
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.layers import Dropout, default_init, group_norm, zero_init

AttentionImplementation = Literal["xla", "cudnn"] | None
# Where a CPU takes heads one by one (see `attend`): from so many weights a head, and at most so many queries at a time.
MANY_WEIGHTS, LARGEST_CHUNK = 2**19, 128


def choose_implementation(
    implementation: AttentionImplementation, head_dim: int, dtype: DTypeLike
) -> AttentionImplementation:
    """Whether to follow a wish for cuDNN: it takes 16-bit inputs and heads of at most 128 channels, a multiple of 8.

    A head it cannot take goes to XLA (Stable Diffusion 1 has heads of 40, 80 and 160 channels in one network); a
    32-bit network raises, since there the wish could be met nowhere.
    """
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f'attention_implementation must be None, "xla" or "cudnn", not {implementation!r}')
    if implementation != "cudnn":
        return implementation
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise ValueError(f'attention_implementation="cudnn" needs dtype bfloat16 or float16, not {jnp.dtype(dtype)}')
    return "cudnn" if head_dim % 8 == 0 and head_dim <= 128 else "xla"


def attend(
    query: Float[Array, "b n heads d"],
    key: Float[Array, "b m heads d"],
    value: Float[Array, "b m heads d"],
    causal: bool = False,
    implementation: AttentionImplementation = None,
) -> Float[Array, "b n heads d"]:
    """softmax(q k^T / sqrt(d)) v for every head; the softmax is float32.

    With no implementation asked for, a CPU looks at many tokens head by head, some queries at a time: then what a softmax
    works on fits into its caches.
    """
    n, m = query.shape[1], key.shape[1]
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    chunk = next((size for size in range(min(n, LARGEST_CHUNK), LARGEST_CHUNK // 4 - 1, -1) if n % size == 0), None)
    if causal or implementation is not None or n * m < MANY_WEIGHTS or chunk is None:
        return cast(Array, plain(query, key, value))
    by_head = functools.partial(attend_by_head, chunk=chunk)
    return cast(Array, jax.lax.platform_dependent(query, key, value, cpu=by_head, default=plain))


def attend_by_head(
    query: Float[Array, "b n heads d"], key: Float[Array, "b m heads d"], value: Float[Array, "b m heads d"], chunk: int
) -> Float[Array, "b n heads d"]:
    """The same, one head after the other and `chunk` of the n queries at a time; gradients compute the weights again.

    All images side by side, so that they can be spread over devices.
    """
    b, n, _, d = query.shape

    def head(tensors: tuple[Array, Array, Array]) -> Float[Array, "b n d"]:
        query, key, value = tensors

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def some(query: Float[Array, "b chunk d"]) -> Float[Array, "b chunk d"]:
            logits = jnp.einsum("bqd,bkd->bqk", query, key, preferred_element_type=jnp.float32)
            weights = jnp.exp((logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))) / math.sqrt(d))
            summed = jnp.einsum("bqk,bkd->bqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
            return (summed / weights.sum(-1, keepdims=True)).astype(value.dtype)

        chunks = jnp.moveaxis(query.reshape(b, n // chunk, chunk, d), 1, 0)
        return jnp.moveaxis(jax.lax.map(some, chunks), 0, 1).reshape(b, n, d)

    heads = jax.lax.map(head, tuple(jnp.moveaxis(tensor, 2, 0) for tensor in (query, key, value)))
    return jnp.moveaxis(heads, 0, 2)


class Attention(nn.Module):
    """Multi-head attention softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017); k and v come from x or from `context`."""

    num_heads: int = 1
    use_bias: bool = True  # of query, key and value; the output projection always has one
    causal: bool = False  # position i sees positions 0 .. i only
    out_init: Initializer = default_init
    implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b m d"] | None = None) -> Float[Array, "b n c"]:
        """Self-attention, or cross-attention when `context` is given; the softmax is float32."""
        channels = x.shape[-1]
        if channels % self.num_heads:
            raise ValueError(f"attention: {channels} channels cannot be split into {self.num_heads} heads")
        head_dim = channels // self.num_heads
        source = x if context is None else context

        def heads(name: str, inputs: Float[Array, "b n c"]) -> Float[Array, "b n heads head_dim"]:
            projected = nn.Dense(
                channels,
                use_bias=self.use_bias,
                kernel_init=default_init,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )(inputs)
            return projected.reshape(*projected.shape[:-1], self.num_heads, head_dim)

        h = attend(
            heads("query", x),
            heads("key", source),
            heads("value", source),
            self.causal,
            choose_implementation(self.implementation, head_dim, self.dtype),
        )
        return nn.Dense(
            channels, kernel_init=self.out_init, dtype=self.dtype, param_dtype=self.param_dtype, name="out"
        )(h.reshape(x.shape))


class AttentionBlock(nn.Module):
    """x + attention(norm(x)) over all pixels (DDPM, app. B); the output projection starts at zero."""

    num_heads: int = 1
    epsilon: float = 1e-6
    norm_groups: int | None = None
    implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Every pixel attends to every pixel of its image."""
        b, height, width, c = x.shape
        h = group_norm(c, self.epsilon, self.dtype, self.param_dtype, name="norm", groups=self.norm_groups)(x)
        h = Attention(
            self.num_heads,
            out_init=zero_init,
            implementation=self.implementation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="attention",
        )(h.reshape(b, height * width, c))
        return x + h.reshape(x.shape)


class FeedForward(nn.Module):
    """dense(a * gelu(b)) with (a, b) = dense(x), four times as wide inside (GEGLU, Shazeer 2020); the exact gelu."""

    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], *, train: bool = False) -> Float[Array, "b n c"]:
        """Position by position."""
        dtypes: dict[str, Any] = {"kernel_init": default_init, "dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        a, b = jnp.split(nn.Dense(8 * channels, name="dense_in", **dtypes)(x), 2, axis=-1)
        h = Dropout(self.dropout)(a * jax.nn.gelu(b, approximate=False), train=train)
        return nn.Dense(channels, name="dense_out", **dtypes)(h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each after a LayerNorm and with a residual."""

    num_heads: int
    dropout: float = 0.0
    implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b m d"] | None = None, *, train: bool = False
    ) -> Float[Array, "b n c"]:
        """Without a context the second attention is a self-attention too."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention: dict[str, Any] = {
            "num_heads": self.num_heads,
            "use_bias": False,
            "implementation": self.implementation,
            **dtypes,
        }

        def norm(name: str, inputs: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
            return nn.LayerNorm(epsilon=1e-5, name=name, **dtypes)(inputs)

        x += Attention(name="self_attention", **attention)(norm("norm1", x))
        x += Attention(name="cross_attention", **attention)(norm("norm2", x), context)
        return x + FeedForward(self.dropout, name="feed_forward", **dtypes)(norm("norm3", x), train=train)


class SpatialTransformer(nn.Module):
    """x + project(transformer blocks(project(norm(x)))) over all pixels (Rombach et al. 2022, app. E.2.1)."""

    num_heads: int
    depth: int = 1
    dropout: float = 0.0
    epsilon: float = 1e-6
    norm_groups: int | None = None
    implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b m d"] | None = None, *, train: bool = False
    ) -> Float[Array, "b h w c"]:
        """Every pixel attends to every pixel of its image and to its text; the last projection starts at zero."""
        b, height, width, c = x.shape
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = group_norm(c, self.epsilon, name="norm", groups=self.norm_groups, **dtypes)(x).reshape(b, height * width, c)
        h = nn.Dense(c, kernel_init=default_init, name="project_in", **dtypes)(h)
        for i in range(self.depth):
            block = TransformerBlock(self.num_heads, self.dropout, self.implementation, name=f"block_{i}", **dtypes)
            h = block(h, context, train=train)
        h = nn.Dense(c, kernel_init=zero_init, name="project_out", **dtypes)(h)
        return x + h.reshape(x.shape)
