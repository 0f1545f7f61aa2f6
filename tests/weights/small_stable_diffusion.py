"""Small whole models of Stable Diffusion's kinds: networks, configs under diffusers' names, random parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxdiff.models.text_encoder import CLIPTextEncoder
from jaxdiff.models.unet import UNet
from jaxdiff.models.vae import AutoencoderKL

KINDS = ("Stable Diffusion 1", "Stable Diffusion 1 inpainting", "Stable Diffusion 2", "Stable Diffusion 2 inpainting")
LEVELS, BLOCKS, LAYERS, CONTEXT = 3, 2, 2, 64


def networks(kind):
    """Our three networks and the inputs that they are initialised with."""
    second, inputs = "2" in kind, 9 if "inpainting" in kind else 4
    unet = UNet(
        4,
        channels=32,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=BLOCKS,
        attention_levels=(0, 1),
        num_heads=1 if second else 8,
        context_dim=CONTEXT,
        norm_epsilon=1e-5,
        frequency_shift=0.0,
        cosine_first=True,
    )
    vae = AutoencoderKL(channels=32, channel_multipliers=(1, 2, 2), num_res_blocks=BLOCKS, norm_groups=32)
    text = CLIPTextEncoder(99, 11, CONTEXT, LAYERS, 1, "gelu" if second else "quick_gelu")
    return {
        "unet": (unet, (jnp.zeros((1, 8, 8, inputs)), jnp.zeros(1), None, jnp.zeros((1, 3, CONTEXT)))),
        "vae": (vae, (jnp.zeros((1, 16, 16, 3)),)),
        "text_encoder": (text, (jnp.zeros((1, 3), jnp.int32),)),
    }


@functools.cache
def shapes(kind, component):
    network, inputs = networks(kind)[component]
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]


def params(kind, component, dtype=np.float32):
    """Random numbers in every parameter, of which no two tensors have the same."""
    rng = np.random.default_rng(len(component))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), shapes(kind, component))


def all_params(kind, dtype=np.float32):
    return {component: params(kind, component, dtype) for component in ("unet", "vae", "text_encoder")}


def configs(kind):
    second, inputs = "2" in kind, 9 if "inpainting" in kind else 4
    v = second and inputs == 4
    scheduler = {
        "_class_name": "DDIMScheduler" if v else "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if v else "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "in_channels": inputs,
            "out_channels": 4,
            "block_out_channels": [32, 64, 64],
            "layers_per_block": BLOCKS,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": CONTEXT,
            "attention_head_dim": [1, 1, 1] if second else 8,
            "use_linear_projection": second,
            "norm_num_groups": 32,
            "sample_size": 8,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": [32, 64, 64],
            "layers_per_block": BLOCKS,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "norm_num_groups": 32,
            "scaling_factor": 0.18215,
            "sample_size": 32,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": 99,
            "hidden_size": CONTEXT,
            "intermediate_size": 4 * CONTEXT,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 1,
            "max_position_embeddings": 11,
            "hidden_act": "gelu" if second else "quick_gelu",
            "bos_token_id": 97,
            "eos_token_id": 98,
            "pad_token_id": 98,
        },
        "scheduler": scheduler,
    }


def assert_same(ours, theirs):
    """Two trees of parameters with the same bits."""
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        array, other = np.asarray(array), np.asarray(theirs[path])
        assert array.dtype == other.dtype and array.shape == other.shape and array.tobytes() == other.tobytes(), path
