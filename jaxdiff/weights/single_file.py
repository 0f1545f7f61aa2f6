"""Single-file checkpoints of Stable Diffusion (the CompVis layout): what a file is, told by its names and shapes.

Such a file has no configuration: how deep and wide its networks are is read off the tensors; what is written nowhere (norm
groups, epsilons, heads, the noise schedule) is the same in all of Stable Diffusion 1 and in all of 2.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

UNET, VAE, CLIP, OPENCLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)

# What a training run leaves in its checkpoint besides, and what other programs note there.
KNOWN = re.compile(
    r"(model_ema\..*|first_stage_model\.(loss|model_ema)\..*"
    r"|(log_one_minus_|sqrt_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?|betas|logvar|scale_factor"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|lvlb_weights|global_step|denoiser\.sigmas"
    r"|cond_stage_model\.(logit_scale|text_projection)|v_pred|ztsnr)"
)

# What else may be in a file that is no whole Stable Diffusion: a pattern of one of its names, and what it then is.
OTHERS: tuple[tuple[str, str], ...] = (
    (
        r"(^|[._])(lora_(up|down|[AB]|unet|te\d*)|lora\.(up|down)|hada_w\d|lokr_w\d)([._]|$)",
        "a LoRA, not a whole model",
    ),
    (r"^(string_to_param|emb_params|clip_[lg]$)", "a textual inversion, not a whole model"),
    (r"^(control_model|controlnet_cond_embedding|controlnet_blocks|input_hint_block)\.", "a ControlNet"),
    (r"(^|\.)joint_blocks\.\d", "Stable Diffusion 3"),
    (r"(^|\.)distilled_guidance_layer\.", "Chroma"),
    (r"(^|\.)(double_blocks|single_transformer_blocks)\.\d", "Flux"),
    (r"(^|\.)clip_txt_mapper\.|(^|\.)down_blocks\.\d+\.\d+\.channelwise\.", "Stable Cascade"),
    (r"motion_modules\.\d", "AnimateDiff"),
    (r"^conditioner\.embedders\.1\.", "Stable Diffusion XL"),
    (r"^conditioner\.embedders\.0\.model\.", "the refiner of Stable Diffusion XL"),
    (r"^embedder\.|^noise_augmentor\.", "Stable Diffusion unCLIP"),
    (r"^low_scale_model\.", "the upscaler of Stable Diffusion"),
    (r"^(model\.diffusion_model\.)?label_emb\.0\.|^add_embedding\.", "the U-Net of Stable Diffusion XL"),
)
LONE: tuple[tuple[str, str], ...] = (
    (r"^(input_blocks\.0\.0|conv_in)\.weight$", "a U-Net alone"),
    (r"^((first_stage_model|vae)\.)?decoder\.conv_in\.weight$", "an autoencoder alone"),
    (r"(^|\.)(embeddings\.token_embedding\.weight|token_embedding\.weight)$", "a text encoder alone"),
)
# U-Nets of Stable Diffusion by their input channels: 4 latents, and for inpainting a mask and 4 latents of what is masked.
INPUTS = {4: "", 9: " inpainting"}
OTHER_INPUTS = {
    5: "Stable Diffusion with depth",
    7: "the upscaler of Stable Diffusion",
    8: "InstructPix2Pix",
    12: "a U-Net with 12 input channels",
}
# Kept below this, a damaged file cannot make anybody count for hours.
MOST_LEVELS, MOST_BLOCKS, MOST_LAYERS = 16, 64, 256


def identify(shapes: Shapes) -> str:
    """Name a file: "Stable Diffusion 1" or "2", with " inpainting" where it is. Raises ValueError with what else it is."""
    other = next((what for pattern, what in OTHERS if any(re.search(pattern, name) for name in shapes)), None)
    if other:
        raise ValueError(f"it is {other}; supported are whole Stable Diffusion 1.x and 2.x models")
    parts = {prefix: any(name.startswith(prefix) for name in shapes) for prefix in (UNET, VAE, CLIP, OPENCLIP)}
    if not any(parts.values()) or sum(parts.values()) == 1 and not parts[UNET]:
        lone = next((what for pattern, what in LONE if any(re.search(pattern, name) for name in shapes)), None)
        first = ascii(min(shapes, default=""))[:80]
        what = f"it is {lone}" if lone else f"no model that is known here: {len(shapes)} tensors, the first is {first}"
        raise ValueError(f"{what}; a single file of Stable Diffusion has U-Net, autoencoder and text encoder")
    lacking = [
        name
        for name, there in (
            ("U-Net", parts[UNET]),
            ("autoencoder", parts[VAE]),
            ("text encoder", parts[CLIP] or parts[OPENCLIP]),
        )
        if not there
    ]
    if lacking:
        raise ValueError(f"it is Stable Diffusion without {' and '.join(lacking)}: a file with all parts is needed")
    channels = _shape(shapes, f"{UNET}input_blocks.0.0.weight", 4)[1]
    return f"Stable Diffusion {2 if parts[OPENCLIP] else 1}{input_kind(channels)}"


def input_kind(channels: int) -> str:
    """Tell by the U-Net's input channels: " inpainting" or nothing. Raises ValueError for what takes anything else."""
    if channels not in INPUTS:
        what = OTHER_INPUTS.get(channels, f"a U-Net with {channels} input channels")
        raise ValueError(f"it is {what}; supported are 4 input channels, and 9 for inpainting")
    return INPUTS[channels]


def unknown(shapes: Shapes) -> list[str]:
    """Names that belong to no component and that no checkpoint is known to have."""
    prefixes = (UNET, VAE, CLIP, OPENCLIP)
    return sorted(name for name in shapes if not name.startswith(prefixes) and not KNOWN.fullmatch(name))


def component_of(name: str) -> str | None:
    """The component that a tensor belongs to, or None where it is none of theirs."""
    if KNOWN.fullmatch(name):
        return None
    prefixes = {"unet": (UNET,), "vae": (VAE,), "text_encoder": (CLIP, OPENCLIP)}
    return next((component for component, starts in prefixes.items() if name.startswith(starts)), None)


def configs(shapes: Shapes, global_step: int | None = None) -> dict[str, dict[str, Any]]:
    """The components and the scheduler as diffusers' JSON files would describe them.

    Whether Stable Diffusion 2 predicts noise or v is not in its file. As diffusers has it: noise where the file says that it
    was trained for 875,000 steps (2.0-base) and v elsewhere; so 2.1-base needs to be told. A tensor named `v_pred`, which
    some programs write, settles it.
    """
    second = any(name.startswith(OPENCLIP) for name in shapes)
    unet = _unet(_stripped(shapes, UNET))
    v = "v_pred" in shapes or (second and unet["in_channels"] == 4 and global_step != 875_000)
    size = 96 if v and second else 64
    text = _openclip(_stripped(shapes, OPENCLIP)) if second else _clip(_stripped(shapes, CLIP))
    return {
        "unet": unet | {"sample_size": size},
        "vae": _vae(_stripped(shapes, VAE)) | {"sample_size": 8 * size},
        "text_encoder": text,
        "scheduler": {
            "_class_name": "DDIMScheduler" if v else "PNDMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction" if v else "epsilon",
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "trained_betas": None,
            **({"clip_sample": False, "rescale_betas_zero_snr": "ztsnr" in shapes} if v else {"skip_prk_steps": True}),
        },
    }


def _unet(shapes: Shapes) -> dict[str, Any]:
    inputs = _count(shapes, r"input_blocks\.(\d+)\.")
    samples = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in shapes]
    levels, blocks = len(samples) + 1, (samples[0] if samples else inputs) - 1
    if levels > MOST_LEVELS or not 1 <= blocks <= MOST_BLOCKS or inputs != levels * (blocks + 1):
        raise ValueError(f"its U-Net has {inputs} input blocks and {levels} levels, which do not go together")
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    widths = [_shape(shapes, f"{first}.0.out_layers.3.weight", 4)[0] for first in firsts]
    attends = [f"{first}.1.proj_in.weight" in shapes for first in firsts]
    linear = len(_shape(shapes, "middle_block.1.proj_in.weight")) == 2
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": _shape(shapes, "input_blocks.0.0.weight", 4)[1],
        "out_channels": _shape(shapes, "out.2.weight", 4)[0],
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attends)],
        "cross_attention_dim": _shape(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "attention_head_dim": [max(1, width // 64) for width in widths] if linear else 8,  # a number of heads, really
        "use_linear_projection": linear,
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    levels, blocks = _count(shapes, r"encoder\.down\.(\d+)\."), _count(shapes, r"encoder\.down\.0\.block\.(\d+)\.")
    if not 1 <= levels <= MOST_LEVELS or not 1 <= blocks <= MOST_BLOCKS:
        raise ValueError(f"its autoencoder has {levels} levels of {blocks} blocks")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(shapes, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4)[1],
        "block_out_channels": [
            _shape(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)
        ],
        "layers_per_block": blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "scaling_factor": 0.18215,
    }


def _clip(shapes: Shapes) -> dict[str, Any]:
    prefix = "text_model." if any(name.startswith("text_model.") for name in shapes) else ""
    layers = _count(shapes, re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
    embeddings = f"{prefix}embeddings"
    return _text_config(
        _shape(shapes, f"{embeddings}.token_embedding.weight", 2),
        _shape(shapes, f"{embeddings}.position_embedding.weight", 2)[0],
        layers,
        _shape(shapes, f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "quick_gelu",
    )


def _openclip(shapes: Shapes) -> dict[str, Any]:
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    # Stable Diffusion 2 reads the last but one of OpenCLIP's 24 layers; files made from diffusers' layout lack the last.
    whole = "text_projection" in shapes or layers == 24
    return _text_config(
        _shape(shapes, "token_embedding.weight", 2),
        _shape(shapes, "positional_embedding", 2)[0],
        layers - whole,
        _shape(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "gelu",
    )


def _text_config(table: tuple[int, ...], positions: int, layers: int, inside: int, activation: str) -> dict[str, Any]:
    vocabulary, width = table
    if not 1 <= layers <= MOST_LAYERS:
        raise ValueError(f"its text encoder has {layers} layers")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inside,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions,
        "hidden_act": activation,
        "layer_norm_eps": 1e-05,
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1 if activation == "quick_gelu" else 0,
    }


def _stripped(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _shape(shapes: Shapes, name: str, axes: int | None = None) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"it has no tensor {name}")
    if axes is not None and len(shapes[name]) != axes:
        raise ValueError(f"{name} has shape {list(shapes[name])}, but should have {axes} axes")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers stand in the names at the pattern's group; they must be 0, 1, 2 ..."""
    match: Callable[[str], re.Match[str] | None] = re.compile(pattern).match
    numbers = {found[1] for name in shapes if (found := match(name))}
    if numbers != {str(i) for i in range(len(numbers))}:
        raise ValueError(f"its blocks are not numbered 0, 1, 2 ...: {pattern.replace(chr(92), '')}")
    return len(numbers)
