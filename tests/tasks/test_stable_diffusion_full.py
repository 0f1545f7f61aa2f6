"""The whole Stable Diffusion 1.5, with random numbers in each of its 1,066 million parameters, against its peers.

Writes a checkpoint of 4 GB and takes 8 GB of memory; one network of the peers is there at a time.
"""

import gc
import json

import jax
import numpy as np
import pytest

from jaxdiff.tasks.stable_diffusion import load_stable_diffusion
from tests.any_torchvision import import_torchvision
from tests.golden.make_latent_diffusion import channels_first, channels_last, randomise
from tests.tasks import small_checkpoint as small
from tests.weights.small_networks import normal, relative_error

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 5e-5
SIDE, TOKENS, WIDTH = 64, 77, 768
UNET = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT = {
    "vocab_size": 49_408,
    "hidden_size": WIDTH,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
}
LATENTS, CONTEXT, TIME = normal(1, 1, SIDE, SIDE, 4), normal(2, 1, TOKENS, WIDTH), np.array([501.0], np.float32)
IDS = np.random.default_rng(3).integers(0, 49_408, (1, TOKENS), dtype=np.int32)


def write_with_peers(folder):
    """The checkpoint, saved by the peers, and what each of their networks answers."""
    import_torchvision()
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    makers = {
        "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    }
    runs = {
        "unet": lambda n: channels_last(
            n(channels_first(LATENTS), torch.from_numpy(TIME), torch.from_numpy(CONTEXT)).sample
        ),
        "vae": lambda n: channels_last(n.decode(channels_first(LATENTS)).sample),
        "text_encoder": lambda n: n(torch.from_numpy(IDS).long()).last_hidden_state.numpy(),
    }
    outputs = {}
    for component, make in makers.items():
        network = randomise(make())
        network.save_pretrained(folder / component)
        with torch.inference_mode():
            outputs[component] = np.array(runs[component](network))
        del network
        gc.collect()
    scheduler = small.configs(small.KINDS[0])["scheduler"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    small.tokenizer(small.KINDS[0]).save(folder / "tokenizer")
    return outputs


def test_networks_of_full_size_are_those_of_the_peers(tmp_path):
    expected = write_with_peers(tmp_path)
    sd = load_stable_diffusion(tmp_path, mesh=small.one_device())
    assert sum(leaf.size for leaf in jax.tree.leaves(sd.params)) == 859_520_964 + 83_653_863 + 123_060_480
    networks = sd.networks
    runs = {
        "unet": ("unet", lambda p: networks.unet.apply({"params": p}, LATENTS, TIME, None, CONTEXT)),
        "vae": ("autoencoder", lambda p: networks.autoencoder.apply({"params": p}, LATENTS, method="decode")),
        "text_encoder": ("text_encoder", lambda p: networks.text_encoder.apply({"params": p}, IDS)),
    }
    for component, (part, run) in runs.items():
        error = relative_error(jax.jit(run)(sd.params[part]), expected[component])
        print(f"{component}: {error:.1e}")
        assert error < TOLERANCE, component
