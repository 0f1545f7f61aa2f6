"""The text encoder of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020): a causal transformer over tokens.

Its defaults are CLIP ViT-L/14's, which Stable Diffusion 1 uses. Stable Diffusion 2 has OpenCLIP's: width 1024, 16 heads,
23 layers (of 24: it reads the last but one), gelu.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdiff.models.attention import Attention, AttentionImplementation
from jaxdiff.models.layers import default_init


def quick_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The gelu as x sigmoid(1.702 x), with which OpenAI's CLIP was trained; up to 0.02 off the gelu."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The gelu by the error function, not by its tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": exact_gelu}


class TextBlock(nn.Module):
    """Causal self-attention, then a perceptron four times as wide; each after a LayerNorm and with a residual."""

    num_heads: int
    activation: Literal["quick_gelu", "gelu"]
    attention_implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Token by token; each sees itself and those before it."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense: dict[str, Any] = {"kernel_init": default_init, **dtypes}
        width = x.shape[-1]
        attention = Attention(
            self.num_heads, causal=True, implementation=self.attention_implementation, name="attention", **dtypes
        )
        x += attention(nn.LayerNorm(epsilon=1e-5, name="norm1", **dtypes)(x))
        h = nn.Dense(4 * width, name="dense_in", **dense)(nn.LayerNorm(epsilon=1e-5, name="norm2", **dtypes)(x))
        return x + nn.Dense(width, name="dense_out", **dense)(ACTIVATIONS[self.activation](h))


class CLIPTextEncoder(nn.Module):
    """Token ids to one vector a token, the context of a conditional U-Net."""

    vocabulary_size: int = 49_408
    context_length: int = 77
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    attention_implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"], *, skip_layers: int = 0) -> Float[Array, "b n c"]:
        """Hidden states after the final LayerNorm, in float32; n may be less than the context length.

        skip_layers: how many layers at the end are left out; 1 gives the penultimate one's states, normed.
        """
        self._check(tokens, skip_layers)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # CLIP begins at 0.02 and 0.01, where what the first block adds drowns which token it was; here that is plain at once.
        x = nn.Embed(
            self.vocabulary_size,
            self.width,
            embedding_init=nn.initializers.normal(1.0),
            name="token_embedding",
            **dtypes,
        )(tokens)
        positions = nn.Embed(
            self.context_length,
            self.width,
            embedding_init=nn.initializers.normal(0.1),
            name="position_embedding",
            **dtypes,
        )
        x += positions(jnp.arange(tokens.shape[1]))[None]
        for i in range(self.num_layers - skip_layers):
            block = TextBlock(
                self.num_heads, self.activation, self.attention_implementation, name=f"block_{i}", **dtypes
            )
            x = block(x)
        return nn.LayerNorm(epsilon=1e-5, name="norm_out", **dtypes)(x).astype(jnp.float32)

    def _check(self, tokens: Int[Array, "b n"], skip_layers: int) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"text encoder: activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}"
            )
        if tokens.shape[1] > self.context_length:
            raise ValueError(
                f"text encoder: {tokens.shape[1]} tokens a prompt, but the context length is {self.context_length}"
            )
        if not 0 <= skip_layers < self.num_layers:
            raise ValueError(
                f"text encoder: skip_layers must be 0 .. {self.num_layers - 1}, as there are {self.num_layers} layers; "
                f"got {skip_layers}"
            )


def pooled_text(hidden: Float[Array, "b n c"], tokens: Int[Array, "b n"], end_token: int) -> Float[Array, "b c"]:
    """The state at each prompt's first end token: the one vector that CLIP compares with an image."""
    position = jnp.argmax(tokens == end_token, axis=1)
    return jnp.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]
