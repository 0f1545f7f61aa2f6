"""The first stage of latent diffusion (Rombach et al. 2022): a trained autoencoder, kept as it is, and its latents' scale.

On disk it is a folder in the layout of diffusers' AutoencoderKL: `config.json` and `diffusion_pytorch_model.safetensors`. So a
run's own autoencoder can be used by PyTorch's libraries, and Stable Diffusion's can be used here.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxdiff.config import ConfigError
from jaxdiff.files import read_json, write_text
from jaxdiff.models.gaussian import Gaussian
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.training.state import Params
from jaxdiff.weights.names import autoencoder_rules, to_ours, to_theirs
from jaxdiff.weights.single_file import MOST_BLOCKS, MOST_LEVELS
from jaxdiff.weights.tensors import read_tensors, write_tensors

FOLDER = "autoencoder"  # of a workdir
CONFIG, TENSORS = "config.json", "diffusion_pytorch_model.safetensors"
CLASS_NAME = "AutoencoderKL"
MOST = 2**20  # channels: kept below this, a damaged file cannot make anybody count for hours


@dataclasses.dataclass(frozen=True, eq=False)
class FirstStage:
    """An autoencoder, its parameters, and what the diffusion model's latents are: (z - shift_factor) * scaling_factor."""

    model: AutoencoderKL
    params: Params
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] = ()  # of each channel before scaling, measured; empty if nobody did
    latents_std: tuple[float, ...] = ()
    sha256: str = ""  # of all that decides what a latent means

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """[h/f w/f d] of the latents of images [h w c]."""
        factor = self.model.downsampling
        return image_shape[0] // factor, image_shape[1] // factor, self.model.latent_channels

    def posterior(self, params: Params, x: Float[Array, "b h w c"]) -> Gaussian:
        """The Gaussian of images in [-1, 1], as the network gives it: not scaled."""
        return cast(Gaussian, self.model.apply({"params": params}, x, method="encode"))

    def scaled(self, z: Float[Array, "b p q d"]) -> Float[Array, "b p q d"]:
        """The network's latents as the diffusion model wants them: of about unit variance."""
        return (z - self.shift_factor) * self.scaling_factor

    def encode(self, params: Params, x: Float[Array, "b h w c"], key: Key[Array, "*b"]) -> Float[Array, "b p q d"]:
        """Scaled latents of images in [-1, 1], drawn from the posterior by one key or one for each image."""
        return self.scaled(self.posterior(params, x).sample(key))

    def decode(self, params: Params, latents: Float[Array, "b p q d"]) -> Float[Array, "b h w c"]:
        """Images of scaled latents; about [-1, 1], not clipped."""
        z = latents / self.scaling_factor + self.shift_factor
        return cast(Array, self.model.apply({"params": params}, z, method="decode"))

    def describe(self) -> str:
        """What it is, in words."""
        return (
            f"AutoencoderKL, f = {self.model.downsampling}, {self.model.latent_channels} channels, "
            f"scaling factor {self.scaling_factor:.5g}" + f", SHA-256 {self.sha256[:12]}..." * bool(self.sha256)
        )


def save_first_stage(
    folder: pathlib.Path,
    model: AutoencoderKL,
    params: Params,
    latents_mean: Sequence[float],
    latents_std: Sequence[float],
    image_size: int,
) -> FirstStage:
    """Write a trained autoencoder, with the scaling factor that follows from its latents' measured mean and deviation.

    One factor and one shift for all channels, as Stable Diffusion has them (1 and 2 a factor only, 3 both): over all latents
    the variance becomes 1 and the mean 0.
    """
    if model.norm_groups is None:
        raise ValueError("an autoencoder to be saved needs norm_groups: the file has one number for all its layers")
    mean = float(np.mean(latents_mean))
    std = math.sqrt(float(np.mean(np.square(latents_std)) + np.var(latents_mean)))
    tensors = to_theirs(params, autoencoder_rules(len(model.channel_multipliers), model.num_res_blocks))
    config = _to_config(model, image_size) | {
        "scaling_factor": 1 / std,
        "shift_factor": mean,
        "latents_mean": [float(value) for value in latents_mean],
        "latents_std": [float(value) for value in latents_std],
    }
    # The tensors last: a folder with both files is whole.
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_tensors(folder / TENSORS, tensors)
    return load_first_stage(folder)


def load_first_stage(path: str | pathlib.Path) -> FirstStage:
    """Open a folder in diffusers' layout, or the `autoencoder` of a run's workdir.

    Raises ConfigError with one line that names what is missing, damaged or not an AutoencoderKL.
    """
    folder = find_folder(pathlib.Path(path).expanduser())
    try:
        config = read_json(folder / CONFIG)
        if not isinstance(config, dict):
            raise ValueError("it must hold a JSON object")
        model = autoencoder_from_config(config)
        scale, shift = scale_and_shift(config)
        mean, std = (_numbers(config, f"latents_{name}") for name in ("mean", "std"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error
    try:
        tensors = read_tensors(folder / TENSORS)
        params = to_ours(
            tensors, autoencoder_rules(len(model.channel_multipliers), model.num_res_blocks), _shapes(model)
        )
    except (OSError, ValueError) as error:
        message = str(error)
        raise ConfigError(message if str(folder) in message else f"{folder / TENSORS}: {message}") from error
    sha256 = digest_of(model, scale, shift, tensors)
    return FirstStage(model, params, scale, shift, mean, std, sha256)


def _numbers(config: dict[str, Any], name: str) -> tuple[float, ...]:
    values = config.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{name} = {str(values)[:80]} must be a list of numbers")
    return tuple(map(float, values))


def digest_of(model: AutoencoderKL, scale: float, shift: float, tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of all that decides what a latent means; `tensors`: under diffusers' names."""
    digest = hashlib.sha256(json.dumps([scale, shift, _to_config(model, 0)], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def find_folder(path: pathlib.Path) -> pathlib.Path:
    """The folder with the two files: the path itself, or `autoencoder` in it (a run), or `vae` (a Stable Diffusion folder)."""
    if not path.is_dir():
        raise ConfigError(f"there is no autoencoder at {path}: no such folder")
    for folder in (path, path / FOLDER, path / "vae"):
        if (folder / TENSORS).is_file() and (folder / CONFIG).is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise ConfigError(f"{path} has no {FOLDER}/ yet: an autoencoder's run writes it when it ends")
    raise ConfigError(f"{path} holds no autoencoder: neither a run's workdir nor {CONFIG} with {TENSORS}")


def keep_first_stage(path: str, workdir: pathlib.Path, write: bool = True) -> FirstStage:
    """The first stage of a latent run: copied into its workdir at the start, so that the workdir is all it takes.

    `path` may be gone or moved later; if it is there it must still hold the same autoencoder. Raises ConfigError.
    """
    kept = workdir / FOLDER
    if not (kept / TENSORS).is_file():
        source = find_folder(pathlib.Path(path).expanduser())
        stage = load_first_stage(source)
        if write:
            kept.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, TENSORS):  # the tensors last, as in `save_first_stage`
                temporary = kept / f".{name}.part"
                shutil.copyfile(source / name, temporary)
                temporary.replace(kept / name)
        return stage
    stage = load_first_stage(kept)
    if pathlib.Path(path).expanduser().is_dir():
        now = load_first_stage(path)
        if now.sha256 != stage.sha256:
            raise ConfigError(
                f"config.autoencoder = {path!r} is another autoencoder than the one this run was begun with, of which {kept} is "
                "the copy: give the old one, or another --workdir for a new run"
            )
    return stage


def _shapes(model: AutoencoderKL) -> Any:
    size = model.downsampling
    image = jnp.zeros((1, size, size, model.image_channels))
    try:
        return jax.eval_shape(functools.partial(model.init, jax.random.key(0)), image)["params"]
    except Exception as error:  # Flax and JAX raise every kind for sizes that do not go together
        what = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ValueError(f"its {CONFIG} describes no possible network ({what})") from error


def _to_config(model: AutoencoderKL, image_size: int) -> dict[str, Any]:
    """What diffusers calls the parts of the network."""
    levels = len(model.channel_multipliers)
    return {
        "_class_name": CLASS_NAME,
        "in_channels": model.image_channels,
        "out_channels": model.image_channels,
        "latent_channels": model.latent_channels,
        "block_out_channels": [model.channels * multiplier for multiplier in model.channel_multipliers],
        "layers_per_block": model.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": model.norm_groups,
        "act_fn": "silu",
        "use_quant_conv": model.quant_conv,
        "use_post_quant_conv": model.quant_conv,
        "mid_block_add_attention": True,
        "sample_size": image_size,
        "force_upcast": False,
    }


def autoencoder_from_config(config: dict[str, Any]) -> AutoencoderKL:
    """The network that diffusers' config describes. Raises ValueError for what ours cannot be."""
    if config.get("_class_name", CLASS_NAME) != CLASS_NAME:
        raise ValueError(f"a {config['_class_name']}, not an {CLASS_NAME}")
    widths = config.get("block_out_channels", [64])
    if not isinstance(widths, list) or not all(type(w) is int and 0 < w <= MOST for w in widths):
        raise ValueError(f"block_out_channels = {str(widths)[:80]} must hold positive integers")
    if not 1 <= len(widths) <= MOST_LEVELS:
        raise ValueError(f"block_out_channels must hold 1 to {MOST_LEVELS} numbers, not {len(widths):,}")
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels = {widths} must be multiples of the first")
    if config.get("use_quant_conv", True) != config.get("use_post_quant_conv", True):
        raise ValueError("use_quant_conv and use_post_quant_conv must agree")
    if not config.get("mid_block_add_attention", True):
        raise ValueError("mid_block_add_attention = false is not supported")
    if config.get("act_fn", "silu") != "silu":
        raise ValueError(f"act_fn = {config['act_fn']!r} is not supported, only 'silu'")
    counts = {"layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32, "in_channels": 3}
    values = {name: config.get(name, default) for name, default in counts.items()}
    for name, value in values.items():
        most = MOST_BLOCKS if name == "layers_per_block" else MOST
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} = {str(value)[:80]} must be a positive integer, at most {most:,}")
    return AutoencoderKL(
        image_channels=values["in_channels"],
        latent_channels=values["latent_channels"],
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=values["layers_per_block"],
        norm_groups=values["norm_num_groups"],
        quant_conv=bool(config.get("use_quant_conv", True)),
    )


def scale_and_shift(config: dict[str, Any]) -> tuple[float, float]:
    """What the latents are scaled by, as diffusers' config says. Raises ValueError."""
    scale, shift = _number(config, "scaling_factor", 0.18215), _number(config, "shift_factor", 0.0)
    if not scale > 0:
        raise ValueError(f"scaling_factor = {scale} must be positive")
    return scale, shift


def _number(config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} = {value!r} must be a number")
    return float(value)
