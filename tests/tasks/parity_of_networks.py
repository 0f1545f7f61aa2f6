"""A small checkpoint's networks, and all their blocks one by one, against those of diffusers and transformers.

Each block here is given what reached the peer's in a whole evaluation. A difference is the largest one by the largest number.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models.attention import AttentionBlock, SpatialTransformer
from jaxdiff.models.layers import BOTTOM_RIGHT, Downsample, ResidualBlock, Upsample
from jaxdiff.models.text_encoder import TextBlock
from tests.any_torchvision import import_torchvision
from tests.golden.make_latent_diffusion import channels_first, channels_last
from tests.tasks.small_checkpoint import jit
from tests.weights.small_networks import normal, relative_error

PROMPTS = ["a cat", "my dog!"]
SIZES = {"": (8, 8), ", 9x7 latents": (9, 7)}  # of an odd side: halved to the larger half, and back
TIME = np.array([3.0, 981.0], np.float32)


def peers(folder):
    """The three networks of a folder."""
    import_torchvision()
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    return unet.eval(), vae.eval(), transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()


def whole_networks(folder, sd):
    """Name of an evaluation -> difference."""
    import torch

    unet, vae, text = peers(folder)
    networks, params, found = sd.networks, sd.params, {}
    tokens = sd.tokenizer.encode(PROMPTS)
    with torch.no_grad():
        theirs = text(torch.from_numpy(tokens).long()).last_hidden_state
        ours = jit(networks.text_encoder.apply)({"params": params["text_encoder"]}, tokens)
        found["text encoder"] = relative_error(ours, theirs)
        context = np.array(ours)
        for note, size in SIZES.items():
            x = normal(5, 2, *size, unet.config.in_channels)
            theirs = unet(channels_first(x), torch.from_numpy(TIME), torch.from_numpy(context)).sample
            ours = jit(networks.unet.apply)({"params": params["unet"]}, x, TIME, None, context)
            found[f"U-Net{note}"] = relative_error(ours, channels_last(theirs))
        image = np.clip(normal(6, 2, 32, 24, 3), -1, 1)
        posterior = vae.encode(channels_first(image)).latent_dist
        theirs = torch.cat([posterior.mean, posterior.logvar], 1)
        ours = jit(lambda p, x: networks.first_stage.posterior(p, x))(params["autoencoder"], image)
        both = np.concatenate([ours.mean, ours.log_variance], -1)
        found["autoencoder, encode"] = relative_error(both, channels_last(theirs))
        latents = normal(7, 2, 8, 6, 4)
        theirs = vae.decode(channels_first(latents / networks.scaling_factor)).sample
        ours = jit(networks.first_stage.decode)(params["autoencoder"], latents)
        found["autoencoder, decode"] = relative_error(ours, channels_last(theirs))
    return found


def recorded(module, pattern, *inputs):
    """Name of a block -> (its arguments, its named arguments, what it answered), in one evaluation of the module."""
    import torch

    found, handles = {}, []
    for name, block in module.named_modules():
        if re.search(pattern, name):
            handles.append(
                block.register_forward_hook(
                    lambda _, args, kwargs, output, name=name: found.update({name: (args, kwargs, output)}),
                    with_kwargs=True,
                )
            )
    with torch.no_grad():
        module(*inputs)
    for handle in handles:
        handle.remove()
    return found


def blocks(folder, sd):
    """Kind of block -> the largest difference of all such blocks, and how many there are."""
    import torch

    unet, vae, text = peers(folder)
    x, context = normal(5, 2, 8, 8, unet.config.in_channels), normal(8, 2, 5, sd.networks.text_encoder.width)
    pattern = r"(resnets|attentions|downsamplers|upsamplers)\.\d+$"
    calls = {
        "unet": recorded(unet, pattern, channels_first(x), torch.from_numpy(TIME), torch.from_numpy(context)),
        "autoencoder": recorded(vae, pattern, channels_first(np.clip(normal(6, 2, 16, 16, 3), -1, 1))),
        "text_encoder": recorded(text, r"layers\.\d+$", torch.from_numpy(sd.tokenizer.encode(PROMPTS)).long()),
    }
    found: dict[str, list[float]] = {}
    for part, of_part in calls.items():
        for name, (args, kwargs, output) in of_part.items():
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            kind, ours = our_block(sd, part, name, args, kwargs, output)
            theirs = channels_last(output) if output.ndim == 4 else output.numpy()
            found.setdefault(kind, []).append(relative_error(ours, theirs))
    return {kind: (max(errors), len(errors)) for kind, errors in found.items()}


def our_block(sd, part, name, args, kwargs, output):
    """Kind and answer of our block with the peer's name, given the same."""
    given = args[0] if args else kwargs["hidden_states"]
    x = channels_last(given) if given.ndim == 4 else given.numpy()
    network = getattr(sd.networks, part)
    params = place(sd.params[part], part, name, len(getattr(network, "channel_multipliers", ())))
    more = ()
    if part == "text_encoder":
        kind, block = "text block", TextBlock(network.num_heads, network.activation)
    elif "resnets" in name:
        epsilon = network.norm_epsilon if part == "unet" else 1e-6
        block = ResidualBlock(output.shape[1], epsilon=epsilon, norm_groups=network.norm_groups)
        more = (args[1].numpy(),) if part == "unet" else ()
        kind = f"residual block, {part}"
    elif "attentions" in name and part == "unet":
        heads = network.num_heads if network.head_dim is None else output.shape[1] // network.head_dim
        kind, block = "transformer block", SpatialTransformer(heads, norm_groups=network.norm_groups)
        more = (kwargs["encoder_hidden_states"].numpy(),)
    elif "attentions" in name:
        kind, block = "attention block, autoencoder", AttentionBlock(norm_groups=network.norm_groups)
    elif "downsamplers" in name:
        kind = f"halving, {part}"
        block = Downsample(padding=BOTTOM_RIGHT) if part == "autoencoder" else Downsample()
    else:
        kind, block = f"doubling, {part}", Upsample()
    return kind.replace("unet", "U-Net"), jit(block.apply)({"params": params}, jnp.asarray(x), *map(jnp.asarray, more))


def place(params, part, name, levels):
    """Our parameters of the block that the peer calls so."""
    words, numbers = re.sub(r"\.\d+", "", name), [int(number) for number in re.findall(r"\.(\d+)", name)]
    side = name.split(".")[0] if part == "autoencoder" else ""
    if part == "text_encoder":
        path = [f"block_{numbers[-1]}"]
    elif "mid_block" in words:
        residual = f"residual_{numbers[-1]}"
        of_unet = [f"middle_{numbers[-1]}", "residual" if "resnets" in words else "transformer"]
        path = of_unet if part == "unet" else [side, "middle", residual if "resnets" in words else "attention"]
    else:
        way = "down" if "down_blocks" in words else "up"
        level = numbers[0] if way == "down" else levels - 1 - numbers[0]
        if "samplers" in words:
            path = [f"{way}_{level}_{way}sample"]
        else:
            path = [f"{way}_{level}_{numbers[1]}"]
            path += ["residual" if "resnets" in words else "transformer"] * (part == "unet")
        path = [side] * bool(side) + path
    for step in path:
        params = params[step]
    return jax.tree.map(jnp.asarray, params)
