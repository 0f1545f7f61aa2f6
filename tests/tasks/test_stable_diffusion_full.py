"""The whole Stable Diffusion 1.5, with random numbers in each of its 1,066 million parameters, against its peers.

Writes a checkpoint of 4 GB and takes 11 GB of memory. The peers have answered all before it is opened here.
"""

import gc
import shutil

import jax
import numpy as np
import pytest

from jaxdiff.tasks.stable_diffusion import load_stable_diffusion
from tests.any_torchvision import import_torchvision
from tests.golden import make_stable_diffusion as peers
from tests.golden.make_latent_diffusion import channels_first, channels_last, randomise
from tests.tasks import small_checkpoint as small
from tests.weights.small_networks import normal, relative_error

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOLERANCE, OF_IMAGES = 5e-5, 1e-3
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
IMAGE = np.clip(normal(4, 1, 8 * SIDE, 8 * SIDE, 3), -1, 1)
IDS = np.random.default_rng(3).integers(0, 49_408, (1, TOKENS), dtype=np.int32)
CASES = {
    "text to image": peers.Case(peers.SD1, size=(128, 128), steps=3),
    "image to image": peers.Case(peers.SD1, "dpm++2m", 0.7, size=(128, 128), steps=3),
    "inpainting": peers.Case(peers.SD1, "ddim", 0.7, True, size=(128, 128), steps=3),
}


def write_with_peers(folder):
    """The checkpoint, saved by the peers, and what each of their networks answers; one network is there at a time."""
    import_torchvision()
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def of_autoencoder(network):
        posterior = network.encode(channels_first(IMAGE)).latent_dist
        moments = channels_last(torch.cat([posterior.mean, posterior.logvar], 1))
        return {"encoder": moments, "decoder": channels_last(network.decode(channels_first(LATENTS)).sample)}

    def of_unet(network):
        answer = network(channels_first(LATENTS), torch.from_numpy(TIME), torch.from_numpy(CONTEXT))
        return {"U-Net": channels_last(answer.sample)}

    def of_text_encoder(network):
        return {"text encoder": network(torch.from_numpy(IDS).long()).last_hidden_state.numpy()}

    small.write(folder, peers.SD1)  # index, scheduler; the small networks are written over
    small.tokenizer(peers.SD1, TOKENS).save(folder / "tokenizer")
    networks = {
        "unet": (lambda: UNet2DConditionModel(**UNET), of_unet),
        "vae": (lambda: AutoencoderKL(**VAE), of_autoencoder),
        "text_encoder": (lambda: CLIPTextModel(CLIPTextConfig(**TEXT)), of_text_encoder),
    }
    outputs = {}
    for component, (make, run) in networks.items():
        network = randomise(make())
        network.save_pretrained(folder / component)
        with torch.inference_mode():
            outputs |= {name: np.array(output) for name, output in run(network).items()}
        del network
        gc.collect()
    return outputs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The checkpoint opened here, and what the peers answered."""
    folder = tmp_path_factory.mktemp("model")
    expected = write_with_peers(folder)
    for name, case in CASES.items():
        expected[name] = peers.theirs(folder, case)
        gc.collect()
    sd = load_stable_diffusion(folder, mesh=small.one_device())
    shutil.rmtree(folder)
    return sd, expected


def test_networks_of_full_size_are_those_of_the_peers(model):
    sd, expected = model
    assert sum(leaf.size for leaf in jax.tree.leaves(sd.params)) == 859_520_964 + 83_653_863 + 123_060_480
    networks = sd.networks

    def encode(params):
        posterior = networks.autoencoder.apply({"params": params}, IMAGE, method="encode")
        return jax.numpy.concatenate([posterior.mean, posterior.log_variance], -1)

    runs = {
        "U-Net": ("unet", lambda p: networks.unet.apply({"params": p}, LATENTS, TIME, None, CONTEXT)),
        "encoder": ("autoencoder", encode),
        "decoder": ("autoencoder", lambda p: networks.autoencoder.apply({"params": p}, LATENTS, method="decode")),
        "text encoder": ("text_encoder", lambda p: networks.text_encoder.apply({"params": p}, IDS)),
    }
    for name, (part, run) in runs.items():
        error = relative_error(jax.jit(run)(sd.params[part]), expected[name])
        print(f"{name}: {error:.1e}")
        assert error < TOLERANCE, name


@pytest.mark.parametrize("name", CASES)
def test_images_of_full_size_are_those_of_diffusers(model, name):
    """Float images that are not clipped."""
    sd, expected = model
    images = small.images_of(sd, peers, CASES[name])
    error, largest = np.abs(images - expected[name]).max(), np.abs(expected[name]).max()
    print(f"{name}: largest difference {error:.1e}, largest number {largest:.2f}")
    assert expected[name].std() > 0.1 and error < OF_IMAGES
