"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022), from a checkpoint on disk to a `Pipeline` that makes images.

The networks are those of this library; what a checkpoint's config asks of them and they are not is refused by name.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from jaxdiff.config import ConfigError, SamplingConfig, ShardingConfig
from jaxdiff.generation.foreign_schedule import CLASSES, PREDICTION_TYPES, own_sampler, training_schedule
from jaxdiff.generation.image_model import ImageModel, Known, Request
from jaxdiff.generation.pipelines import make_images
from jaxdiff.generation.sampling import AS_FILED, OTHER_SAMPLER, filed_sampler, make_recipe, sampler_of
from jaxdiff.models.lora import merge
from jaxdiff.models.text_encoder import CLIPTextEncoder
from jaxdiff.models.unet import UNet
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.tasks.attending import Attention, attention_of
from jaxdiff.tasks.first_stage import FirstStage, autoencoder_from_config, scale_and_shift
from jaxdiff.tasks.memory import check_room, least_activations
from jaxdiff.tasks.text_model import text_encoder_from_config
from jaxdiff.training.sharding import fsdp_shardings, make_mesh, replicated
from jaxdiff.training.state import Params
from jaxdiff.weights.checkpoint import (
    TOKENIZER,
    Checkpoint,
    ComponentName,
    Config,
    component_rules,
    load_params,
    open_checkpoint,
)
from jaxdiff.weights.clip_vocabulary import NUM_TOKENS, clip_tokenizer
from jaxdiff.weights.lora import Adapters, load_lora
from jaxdiff.weights.names import match
from jaxdiff.weights.tokenizer import END, Tokenizer

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
# Our name of a component's parameters -> the checkpoint's.
PARTS: dict[str, ComponentName] = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}
STEPS, GUIDANCE = 50, 7.5
LARGEST = 2**14  # pixels a side

# Options of diffusers' UNet2DConditionModel at the only values that Stable Diffusion 1 and 2 have.
ONLY: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
DEFAULT_TYPES = {
    "down": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
READ = {  # what `unet_from_config` makes use of, and what changes nothing
    *("block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "cross_attention_dim"),
    *("attention_head_dim", "norm_num_groups", "norm_eps", "freq_shift", "flip_sin_to_cos", "in_channels"),
    *("use_linear_projection", "sample_size", "upcast_attention", "addition_embed_type_num_heads"),
}


class SizeError(ConfigError):
    """Images of a size that a model cannot make; it begins with `height` or `width`."""


@dataclasses.dataclass(frozen=True)
class Networks:
    """The three networks with what lies between them; equal ones share their compiled programs."""

    unet: UNet
    autoencoder: AutoencoderKL
    text_encoder: CLIPTextEncoder
    scaling_factor: float
    shift_factor: float
    scheduler: str  # JSON
    mask_channels: bool

    @functools.cached_property
    def first_stage(self) -> FirstStage:
        """The autoencoder with its scale, without parameters."""
        return FirstStage(self.autoencoder, {}, self.scaling_factor, self.shift_factor)

    @property
    def multiple(self) -> int:
        """What the height and width of images must be multiples of: the U-Net takes latents of any size."""
        return self.autoencoder.downsampling

    def image_model(self, height: int, width: int) -> ImageModel:
        """The pure functions that make images of this size."""
        schedule, prediction = training_schedule(_trained_with(json.loads(self.scheduler)))
        stage = self.first_stage
        return ImageModel(
            schedule=schedule,
            prediction=prediction,
            learned_variance=False,
            image_shape=(height, width, self.autoencoder.image_channels),
            latent_shape=stage.latent_shape((height, width, self.autoencoder.image_channels)),
            network=self._predict,
            conditions=self._conditions,
            encode=lambda params, x, keys: stage.encode(params["autoencoder"], x, keys),
            decode=lambda params, latents: stage.decode(params["autoencoder"], latents),
            mask_channels=self.mask_channels,
            scheduler=json.loads(self.scheduler),
        )

    def shapes(self) -> Params:
        """Shapes and dtypes of all parameters, by part."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        pixels, side = self.autoencoder.downsampling, 2 ** (len(self.unet.channel_multipliers) - 1)
        channels = self.unet.out_channels * 2 + 1 if self.mask_channels else self.unet.out_channels
        context = jnp.zeros((*tokens.shape, self.text_encoder.width))
        inputs: dict[str, tuple[Any, ...]] = {
            "unet": (self.unet, jnp.zeros((1, side, side, channels)), jnp.zeros(1), None, context),
            "autoencoder": (self.autoencoder, jnp.zeros((1, pixels, pixels, self.autoencoder.image_channels))),
            "text_encoder": (self.text_encoder, tokens),
        }
        key = jax.random.key(0)
        return {
            part: jax.eval_shape(functools.partial(network.init, key), *given)["params"]
            for part, (network, *given) in inputs.items()
        }

    def _predict(self, params: Params, x: Array, time: Array, condition: Any) -> Array:
        if isinstance(condition, Known):
            condition, channels = condition
            x = jnp.concatenate([x, channels.astype(x.dtype)], axis=-1)
        return cast(Array, self.unet.apply({"params": params["unet"]}, x, time, context=condition))

    def _conditions(self, params: Params, request: Any, guided: bool) -> tuple[Any, Any]:
        def read(tokens: Array) -> Array:
            return cast(Array, self.text_encoder.apply({"params": params["text_encoder"]}, tokens))

        return read(request["tokens"]), read(request["negative"]) if guided else None


@functools.lru_cache(maxsize=16)
def _image_model(networks: Networks, height: int, width: int) -> ImageModel:
    return networks.image_model(height, width)


@functools.lru_cache(maxsize=16)
def _shapes(networks: Networks) -> Params:
    return networks.shapes()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StableDiffusion:
    """A Stable Diffusion checkpoint: a `jaxdiff.generation.pipelines.Pipeline`.

    params: of "unet", "autoencoder" and "text_encoder"; only their shapes before `load`.
    """

    checkpoint: Checkpoint
    networks: Networks
    tokenizer: Tokenizer
    height: int
    width: int
    settings: SamplingConfig
    params: Params
    lora: Adapters = dataclasses.field(default_factory=dict)  # to be merged by `load`
    lora_scale: float = 1.0

    @property
    def model(self) -> ImageModel:
        """What it takes to make images of this height and width."""
        return _image_model(self.networks, self.height, self.width)

    def with_size(self, height: int | None = None, width: int | None = None) -> "StableDiffusion":
        """The same model for images of another size. Raises SizeError for one that the autoencoder cannot halve."""
        height, width = self.height if height is None else height, self.width if width is None else width
        multiple = self.networks.multiple
        for name, value in (("height", height), ("width", width)):
            if value < multiple or value % multiple or value > LARGEST:
                near = min(max(1, round(value / multiple)) * multiple, LARGEST // multiple * multiple)
                raise SizeError(f"{name} {value}: this model makes images of multiples of {multiple} pixels, as {near}")
        return dataclasses.replace(self, height=height, width=width)

    def with_lora(self, path: str | pathlib.Path, scale: float = 1.0) -> "StableDiffusion":
        """The same model with a LoRA file that `load` will merge. Raises ConfigError for what is none, or not of this model."""
        configs = self.checkpoint.configs
        parts = ("unet", "text_encoder")
        rules = {part: component_rules(PARTS[part], configs[PARTS[part]]) for part in parts}
        try:
            lora = load_lora(path, rules, {part: self.params[part] for part in parts})
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error
        return dataclasses.replace(self, lora=lora, lora_scale=scale)

    def check(self, settings: SamplingConfig) -> None:
        """Raise ConfigError for settings that this model cannot sample with."""
        try:
            make_recipe(self.model, settings)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def load(self, mesh: Mesh | None = None) -> "StableDiffusion":
        """Read the parameters, one tensor at a time, straight to the devices of a mesh: copied, or split over `fsdp`.

        Raises ConfigError before it reads any where a device has no room for them and for making one image of this size.
        """
        mesh = mesh or make_mesh(ShardingConfig())
        placed, params = self.check_room(mesh), {}
        for part, component in PARTS.items():
            try:
                loaded = load_params(self.checkpoint, component, placed[part])
            except (OSError, ValueError) as error:  # the file is not what it was when it was opened
                raise ConfigError(str(error)) from error
            params[part] = self._adapted(part, loaded)
        return dataclasses.replace(self, params=params)

    def check_room(self, mesh: Mesh) -> dict[str, Any]:
        """Shapes of the parameters as they will lie on the devices.

        Raises ConfigError where one has no room for them and for making one image of this size.
        """
        placed = {}
        for part in PARTS:
            shapes = self.params[part]
            copies = jax.tree.map(lambda _: replicated(mesh), shapes)
            placed[part] = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                shapes,
                fsdp_shardings(shapes, mesh) if "fsdp" in mesh.shape else copies,
            )
        # Of the three networks the decoder has the largest activations that are sure to be.
        latents = jax.ShapeDtypeStruct((1, *self.model.latent_shape), jnp.float32)
        activations = least_activations(self.model.decode, self.params, latents)
        check_room(placed, mesh.local_devices[0], len(mesh.local_devices), activations)
        return placed

    def _adapted(self, part: str, params: Params) -> Params:
        """The parameters of a part with its LoRA merged: as many, of the same dtypes and in the same places."""
        for kernel, (a, b, alpha) in self.lora.get(part, {}).items():
            *above, name = kernel.split("/")
            layer = functools.reduce(lambda tree, step: tree[step], above, params)
            leaf = layer[name]
            merged = merge(leaf, {"a": a, "b": b}, self.lora_scale * alpha / b.shape[0])
            layer[name] = jax.device_put(merged.astype(leaf.dtype), leaf.sharding)
        return params

    def make(
        self,
        seeds: Sequence[int] | np.ndarray,
        request: Any,
        settings: SamplingConfig | None = None,
        mesh: Mesh | None = None,
        strength: float = 1.0,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """An image for each seed; `request`: of `condition_of`, or a `Request` with more than that."""
        request = request if isinstance(request, Request) else Request(request)
        return make_images(self, request, np.asarray(seeds, np.uint32), settings or self.settings, strength, mesh=mesh)

    def describe_sampling(self, settings: SamplingConfig) -> str:
        """How images are made, in words."""
        sampler = sampler_of(self.model.scheduler, settings)
        return f"{sampler}, {settings.steps} steps, guidance {settings.guidance:g}"

    def __repr__(self) -> str:
        return f"StableDiffusion({str(self.checkpoint.path)!r}: {self.describe()})"

    def describe(self) -> str:
        """What it is, in words."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        dtype = jnp.dtype(self.networks.unet.dtype)
        return f"{self.checkpoint.family}, {count / 1e6:,.1f} million parameters, {dtype}, {self.width}x{self.height} pixels"


def load_stable_diffusion(
    path: str | pathlib.Path,
    *,
    variant: str | None = None,
    dtype: DType = "float32",
    mesh: Mesh | None = None,
    tokenizer: str | pathlib.Path | Tokenizer | None = None,
    prediction: str | None = None,
    lora: str | pathlib.Path | None = None,
    lora_scale: float = 1.0,
    attention_implementation: Attention = "auto",
) -> StableDiffusion:
    """Open Stable Diffusion 1.x or 2.x, inpainting variants too: a folder in diffusers' layout, or a .safetensors file.

    variant: of a folder's files, as "fp16". dtype: of parameters and computation. mesh: the parameters are split over its axis
    `fsdp` and copied over the others (default: copied to all devices). tokenizer: the folder of one; a single file takes one that
    lies beside it, or else CLIP's own, whose vocabulary is downloaded once.
    prediction: "noise", "v" or "x0", where the checkpoint does not say, or says it wrongly.
    lora: a LoRA file, in kohya's naming or that of diffusers, merged into the parameters times lora_scale.
    attention_implementation: "xla", "cudnn" (NVIDIA GPUs, 16 bits) or "auto": cuDNN's where it can be. "xla" to export a sampler.
    Raises ConfigError with one line that names what is missing, damaged or not supported.
    """
    opened = open_stable_diffusion(
        path,
        variant=variant,
        dtype=dtype,
        tokenizer=tokenizer,
        prediction=prediction,
        attention_implementation=attention_implementation,
    )
    return (opened if lora is None else opened.with_lora(lora, lora_scale)).load(mesh)


def open_stable_diffusion(
    path: str | pathlib.Path,
    *,
    variant: str | None = None,
    dtype: DType = "float32",
    tokenizer: str | pathlib.Path | Tokenizer | None = None,
    prediction: str | None = None,
    attention_implementation: Attention = "auto",
) -> StableDiffusion:
    """As `load_stable_diffusion`, but no tensor is read yet: `params` are shapes, and `load` fills them."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    attention = attention_of(attention_implementation, dtype)
    try:
        checkpoint = open_checkpoint(path, variant)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    configs, scheduler = checkpoint.configs, dict(checkpoint.configs["scheduler"])
    if prediction is not None:
        scheduler["prediction_type"] = _prediction_type(prediction)
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    dtypes["attention_implementation"] = attention
    try:
        networks = Networks(
            unet_from_config(configs["unet"]).clone(**dtypes),
            autoencoder_from_config(configs["vae"]).clone(**dtypes),
            text_encoder_from_config(configs["text_encoder"]).clone(**dtypes),
            *scale_and_shift(configs["vae"]),
            json.dumps(scheduler),
            mask_channels=configs["unet"].get("in_channels") == 9,
        )
        _check_together(networks)
        training_schedule(_trained_with(scheduler))
        height, width = _size(configs["unet"], networks.autoencoder.downsampling)
    except ValueError as error:
        raise ConfigError(f"{checkpoint.path}: {error}") from error
    reader = _tokenizer(checkpoint, tokenizer, networks.text_encoder)
    for note in _notes(checkpoint, scheduler, tokenizer, prediction):
        print(f"note: {checkpoint.path}: {note}", file=sys.stderr)
    settings = SamplingConfig(
        sampler=cast(Any, filed_sampler(scheduler)),
        steps=STEPS,
        spacing=AS_FILED,
        guidance=GUIDANCE,
        clip="none",
        batch_per_device=1,
    )
    try:
        shapes = _shapes(networks)
    except Exception as error:  # Flax and JAX raise every kind for sizes that do not go together
        what = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ConfigError(f"{checkpoint.path}: its configs describe no possible network ({what})") from error
    for part, component in PARTS.items():
        try:
            match(checkpoint.tensors[component], checkpoint.rules[component], shapes[part])
        except ValueError as error:
            raise ConfigError(f"{checkpoint.path}: {component}: {error}") from error
    return StableDiffusion(checkpoint, networks, reader, height, width, settings, shapes).with_size()


def unet_from_config(config: Config) -> UNet:
    """The network that diffusers' UNet2DConditionModel config describes. Raises ValueError naming what ours cannot be."""
    name = config.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        raise ValueError(f"unet: a {name}, not a UNet2DConditionModel")
    for key, value in config.items():
        only = ONLY.get(key)
        same = value == only or (key == "transformer_layers_per_block" and value == [1] * len(_widths(config)))
        if key.startswith("_") or key in READ or same or (key not in ONLY and not value):
            continue
        raise ValueError(f"unet: {key} = {str(value)[:60]} is not supported" + f", only {only}" * (key in ONLY))
    widths = _widths(config)
    types = [config.get(f"{way}_block_types", default) for way, default in DEFAULT_TYPES.items()]
    attends = [kind == "CrossAttnDownBlock2D" for kind in types[0]]
    expected = [["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends]]
    expected.append([kind.replace("Down", "Up") for kind in reversed(expected[0])])
    if types != expected or len(attends) != len(widths):
        raise ValueError(f"unet: down_block_types {types[0]} and up_block_types {types[1]} are not supported")
    counts = {"layers_per_block": 2, "cross_attention_dim": 1280, "norm_num_groups": 32}
    numbers = {key: _positive(config, key, default) for key, default in counts.items()}
    num_heads, head_dim = _heads(config, widths)
    return UNet(
        out_channels=4,
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=numbers["layers_per_block"],
        attention_levels=tuple(level for level, has in enumerate(attends) if has),
        num_heads=num_heads,
        head_dim=head_dim,
        context_dim=numbers["cross_attention_dim"],
        norm_groups=numbers["norm_num_groups"],
        norm_epsilon=_number(config, "norm_eps", 1e-5),
        frequency_shift=_number(config, "freq_shift", 0),
        cosine_first=bool(config.get("flip_sin_to_cos", True)),
    )


def _widths(config: Config) -> list[int]:
    widths = config.get("block_out_channels", [320, 640, 1280, 1280])
    if not isinstance(widths, list) or not widths or not all(type(width) is int and width > 0 for width in widths):
        raise ValueError(f"unet: block_out_channels = {str(widths)[:60]} must hold positive integers")
    if any(width % widths[0] for width in widths):
        raise ValueError(f"unet: block_out_channels = {widths} must be multiples of the first")
    return widths


def _heads(config: Config, widths: list[int]) -> tuple[int, int | None]:
    """The number of heads, or their width where every level has another number; diffusers calls it attention_head_dim."""
    heads = config.get("attention_head_dim", 8)
    heads = heads if isinstance(heads, list) else [heads] * len(widths)
    if len(heads) != len(widths) or not all(type(count) is int and count > 0 for count in heads):
        raise ValueError(f"unet: attention_head_dim = {str(heads)[:60]} must be a positive integer for every level")
    if len(set(heads)) == 1:
        return heads[0], None
    sizes = {width / count for width, count in zip(widths, heads, strict=True)}
    if len(sizes) > 1 or not min(sizes).is_integer():
        raise ValueError(f"unet: attention_head_dim = {heads} must give every level heads of one width")
    return 1, int(min(sizes))


def _positive(config: Config, key: str, default: int) -> int:
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"unet: {key} = {str(value)[:60]} must be a positive integer")
    return value


def _number(config: Config, key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise ValueError(f"unet: {key} = {str(value)[:60]} must be a number")
    return float(value)


def _size(config: Config, downsampling: int) -> tuple[int, int]:
    """Height and width in pixels that the model was trained for."""
    side = config.get("sample_size") or 64
    sides = side if isinstance(side, list) else [side, side]
    if len(sides) != 2 or not all(type(value) is int and value > 0 for value in sides):
        raise ValueError(f"unet: sample_size = {str(side)[:60]} must be a positive integer")
    return sides[0] * downsampling, sides[1] * downsampling


def _check_together(networks: Networks) -> None:
    unet, autoencoder, text_encoder = networks.unet, networks.autoencoder, networks.text_encoder
    if unet.context_dim != text_encoder.width:
        raise ValueError(
            f"the U-Net reads {unet.context_dim} channels of text, the text encoder has {text_encoder.width}"
        )
    if autoencoder.latent_channels != unet.out_channels:
        raise ValueError(f"the U-Net makes {unet.out_channels} channels, the autoencoder {autoencoder.latent_channels}")


def _prediction_type(prediction: str) -> str:
    """Diffusers' word for what a network predicts."""
    theirs = {ours: their for their, ours in PREDICTION_TYPES.items()}
    if prediction not in theirs:
        raise ConfigError(f"prediction {prediction!r}: must be one of {', '.join(theirs)}")
    return theirs[prediction]


def _trained_with(scheduler: Config) -> Config:
    """The file with a class that knows all its options of training, whatever class it names."""
    return scheduler | {"_class_name": CLASSES["ddim"]}


def _notes(checkpoint: Checkpoint, scheduler: Config, tokenizer: Any, prediction: str | None) -> list[str]:
    """What had to be supposed, less what the user has said."""
    said = ["has no tokenizer"] * (tokenizer is not None) + ["what the U-Net predicts"] * (prediction is not None)
    notes = [note for note in checkpoint.notes if not any(words in note for words in said)]
    if own_sampler(scheduler) is None:
        notes.append(
            f"its {scheduler.get('_class_name')} is not among the samplers here: {OTHER_SAMPLER} takes its place"
        )
    return notes


def _tokenizer(
    checkpoint: Checkpoint, given: str | pathlib.Path | Tokenizer | None, text_encoder: CLIPTextEncoder
) -> Tokenizer:
    """The tokenizer given, the checkpoint's own or CLIP's, for at most as many tokens as the text encoder takes."""
    if isinstance(given, Tokenizer):
        tokenizer, where = given, "tokenizer"
    else:
        folder = pathlib.Path(given).expanduser() if given is not None else checkpoint.tokenizer
        if folder is None:
            return _clips_own(checkpoint, text_encoder)
        folder, where = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder, str(folder)
        try:
            tokenizer = Tokenizer.load(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder}: {error}") from error
    if tokenizer.vocabulary_size > text_encoder.vocabulary_size:
        known = f"{text_encoder.vocabulary_size:,}"
        raise ConfigError(f"{where}: {tokenizer.vocabulary_size:,} tokens, but the text encoder knows {known}")
    return tokenizer.with_context_length(min(tokenizer.context_length, text_encoder.context_length))


def _clips_own(checkpoint: Checkpoint, text_encoder: CLIPTextEncoder) -> Tokenizer:
    """The tokenizer of every Stable Diffusion 1 and 2 as published; the latter pads with "!", as OpenCLIP does (id 0)."""
    other = "give --tokenizer FOLDER (tokenizer=...), such as the tokenizer/ of any Stable Diffusion folder of the same family"
    if checkpoint.kind != "single file" or text_encoder.vocabulary_size != NUM_TOKENS:
        raise ConfigError(f"{checkpoint.path}: it has no tokenizer: {other}")
    try:
        tokenizer = clip_tokenizer("!" if checkpoint.family.startswith("Stable Diffusion 2") else END)
    except ValueError as error:
        raise ConfigError(f"{checkpoint.path}: it has no tokenizer, and {error}, or {other}") from error
    return tokenizer.with_context_length(min(tokenizer.context_length, text_encoder.context_length))
