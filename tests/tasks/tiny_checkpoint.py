"""The smallest Stable Diffusion checkpoint to begin training from, with random numbers in every parameter; captioned images."""

import json

import numpy as np
from PIL import Image

from jaxdiff.weights.export import save_folder, save_single_file
from tests.tasks import small_checkpoint as small

SIDE, CONTEXT = 16, 16
SD1, INPAINT1, SD2, INPAINT2 = small.KINDS


def configs(kind):
    """As those of small_checkpoint, with one block a level, two levels, and 16 channels."""
    found = small.configs(kind)
    unet = {
        "block_out_channels": [16, 16],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": CONTEXT,
        "attention_head_dim": [2, 2] if "2" in kind else 2,
        "norm_num_groups": 8,
        "sample_size": SIDE // 2,
    }
    vae = {
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "sample_size": SIDE,
    }
    text = {"hidden_size": CONTEXT, "intermediate_size": 4 * CONTEXT, "num_hidden_layers": 1}
    return found | {n: found[n] | more for n, more in (("unet", unet), ("vae", vae), ("text_encoder", text))}


def networks(kind):
    return small.networks_of(configs(kind), kind)


def params(kind, scale=1.0):
    """By the checkpoint's names of the components."""
    return small.params_of(configs(kind), kind, scale)


def write(folder, kind=SD1, single_file=False, scale=1.0):
    """A folder, or a file; the folder `words` beside it is a tokenizer."""
    small.tokenizer(kind).save(folder / "words")
    if single_file:
        save_single_file(folder / "model.safetensors", params(kind, scale), configs(kind))
        return folder / "model.safetensors"
    save_folder(folder, params(kind, scale), configs(kind), folder / "words")
    return folder


def write_photos(folder, num=8):
    """Captioned images."""
    folder.mkdir()
    lines = []
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE + 2, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"cat {i}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder
