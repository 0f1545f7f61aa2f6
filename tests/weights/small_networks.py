"""Small networks of Stable Diffusion's kinds with the inputs and tensors on which they are compared with their peers.

Channels are 128 or more, where every GroupNorm has 32 groups in all libraries.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models.text_encoder import CLIPTextEncoder
from jaxdiff.models.unet import UNet
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.weights.names import autoencoder_rules, text_encoder_rules, to_ours, to_theirs, unet_rules
from tests.models.tiny_networks import jit

START, END = 97, 98


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


IMAGES, LATENTS = normal(1, 2, 16, 12, 3), normal(2, 2, 8, 6, 4)
ODD = LATENTS[:, :7, :5]  # halved to 4 by 3, and back
CONTEXT, TIME = normal(3, 2, 5, 24), np.array([3.0, 981.0], np.float32)
TOKENS = np.array([[START, 4, 17, *[END] * 8], [START, *range(1, 10), END]], np.int32)


def autoencoder(quant_conv=True):
    network = AutoencoderKL(channels=128, channel_multipliers=(1, 2), num_res_blocks=1, quant_conv=quant_conv)
    return network, autoencoder_rules(2, 1), (IMAGES,)


def text_encoder(activation):
    network = CLIPTextEncoder(
        vocabulary_size=99, context_length=11, width=48, num_layers=3, num_heads=4, activation=activation
    )
    return network, text_encoder_rules(3), (TOKENS,)


def unet(version):
    """Stable Diffusion 1 has a number of heads and convolutions as projections; 2 a head size and linear projections."""
    network = UNet(
        4,
        channels=128,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_levels=(0,),
        num_heads=8,
        head_dim=None if version == 1 else 64,
        context_dim=24,
        norm_epsilon=1e-5,
        frequency_shift=0.0,
        cosine_first=True,
    )
    return network, unet_rules(2, 1, linear_projection=version == 2), (LATENTS, TIME, None, CONTEXT)


def shapes_of(network, inputs):
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]


def random_tensor(name, shape):
    """Norm scales about 1, biases about 0, kernels that keep the size of what goes through: a function of the name."""
    name = name.removeprefix("text_model.")
    values = normal(zlib.crc32(name.encode()), *shape)
    if len(shape) > 1:
        return values / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
    return 1 + np.float32(0.2) * values if name.endswith("weight") else np.float32(0.2) * values


def load(network, rules, inputs):
    """Our network's parameters from a checkpoint of random tensors."""
    shapes = shapes_of(network, inputs)
    empty = to_theirs(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), rules)
    return {"params": to_ours({name: random_tensor(name, t.shape) for name, t in empty.items()}, rules, shapes)}


def our_outputs():
    """Everything that is compared, by name."""
    network, rules, inputs = autoencoder()
    params = load(network, rules, inputs)
    posterior = jit(lambda v, x: network.apply(v, x, method="encode"))(params, IMAGES)
    image = jit(lambda v, z: network.apply(v, z, method="decode"))(params, LATENTS)
    outputs = {"mean": posterior.mean, "log_variance": posterior.log_variance, "image": image}
    for activation in ("quick_gelu", "gelu"):
        network, rules, inputs = text_encoder(activation)
        params = load(network, rules, inputs)
        apply = jit(network.apply, static_argnames="skip_layers")
        outputs[activation] = apply(params, TOKENS)
        outputs[f"{activation} penultimate"] = apply(params, TOKENS, skip_layers=1)
    for version in (1, 2):
        network, rules, inputs = unet(version)
        params, run = load(network, rules, inputs), jit(network.apply)
        outputs[f"unet {version}"] = run(params, *(i if i is None else jnp.asarray(i) for i in inputs))
        if version == 1:
            outputs["unet 1 odd"] = run(
                params, jnp.asarray(ODD), *(i if i is None else jnp.asarray(i) for i in inputs[1:])
            )
    return {name: np.asarray(output) for name, output in outputs.items()}


def relative_error(ours, theirs):
    """Largest difference by the largest number."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()
