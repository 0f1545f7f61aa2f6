"""The typed, validated form of a config file.

A config file's `get_config()` starts from `default_config()`, a locked `ml_collections.ConfigDict` holding every key, and
changes what it wants; `to_config` turns the result into the frozen dataclasses below, which check everything before anything
compiles.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import ml_collections


class ConfigError(ValueError):
    """A config that cannot work; the message is one line naming the key, what was wrong and what would be right."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are cut."""

    source: str = "tfds:cifar10"  # digits | mnist | shapes | tfds:<name> | folder | idx | latents
    dir: str = ""  # folder of the images, IDX files or latents, or TFDS's data_dir ("" = TFDS's own default)
    split: str = "train"
    image_size: int = 32  # pixels; images are resized (shorter side) and cropped to a square
    channels: int = 3  # 1 grey, 3 RGB
    crop: Literal["centre", "random"] = "centre"
    flip: bool = False  # random horizontal flips
    max_bad_fraction: float = 0.01  # a run fails when more of the images than this cannot be read
    num_threads: int = 4


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The U-Net (`jaxdiff.models.unet.UNet`)."""

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (
        16,
    )  # sides, in cells behind the patch door, at which self-attention acts
    num_heads: int = 1
    dropout: float = 0.1
    patch_size: int = 1  # space-to-depth at the door
    scale_shift_norm: bool = (
        False  # time, label and pooled text scale and shift what is normed, instead of adding before
    )
    position_embedding: bool = False  # sines of row and column at the door: good where patches leave few positions
    num_classes: int = 0  # 0: unconditional; -1: as many as the data has (resolved when training starts)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    attention_implementation: Literal["auto", "xla", "cudnn"] = "auto"
    pretrained: str = ""  # Stable Diffusion to begin from: a folder or a .safetensors file, which says what it is
    pretrained_prediction: Literal["", "noise", "v", "x0"] = ""  # what it predicts, where the file does not say


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Captions as the condition: CLIP's architecture as text encoder, trained along with the U-Net."""

    enabled: bool = False
    tokenizer: str = ""  # folder with vocab.json and merges.txt, such as CLIP's; "" = trained on the data's captions
    vocabulary_size: int = 2000  # of a tokenizer that is trained; the least is 514
    context_length: int = 32  # tokens of a caption, start and end included
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    dropout: float = 0.1  # fraction of captions replaced by the empty one, for classifier-free guidance
    pooled: bool = False  # the mean of the text's vectors goes to every residual block, too, by the side of the time
    pretrained: str = ""  # folder of a CLIP text encoder, used as it is, with its tokenizer; "" = trained along
    trained: bool = False  # the text encoder of model.pretrained is trained, too, instead of used as it is


LORA_TARGETS = ("attention", "feed_forward", "projections", "text_encoder", "text_feed_forward")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021): model.pretrained stays as it is, W becomes W + alpha / rank * A B."""

    rank: int = 0  # columns of A and rows of B; 0 = off: everything is trained
    alpha: float = 0.0  # 0 = as rank
    targets: tuple[str, ...] = ("attention",)  # of LORA_TARGETS


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The textbook's variational autoencoder (`jaxdiff.models.vae.ConvVAE`)."""

    latent_dim: int = 20
    channels: tuple[int, ...] = (32, 64)  # of the convolutions, each of which halves the image
    hidden: int = 256  # width of the dense layer between them and the latents
    likelihood: Literal["discretized", "gaussian", "bernoulli"] = "discretized"  # p(x | z) of a pixel
    beta: float = 1.0  # weight of the KL divergence
    free_bits: float = 0.0  # nats that a latent may have for nothing


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The first stage of latent diffusion (`jaxdiff.models.vae.AutoencoderKL`), its discriminator and its loss."""

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # every level but the first halves the image: f = 8
    num_res_blocks: int = 2
    latent_channels: int = 4
    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual: Literal["none", "auto", "efficientnet-lite0", "lpips"] = "none"  # auto: lpips if its files are given
    perceptual_weight: float = 1.0
    perceptual_files: str = ""  # lpips: folder of its weights
    kl_weight: float = 1e-6  # of the sum over the latents, where reconstruction is the sum over the pixels
    adversarial: Literal["hinge", "non_saturating"] = "hinge"
    discriminator_weight: float = 0.5  # times the adaptive weight; 0 = no discriminator
    discriminator_start: int = 50_000  # step at which it begins
    discriminator_channels: int = 64
    discriminator_layers: int = 3


@dataclasses.dataclass(frozen=True)
class ProgressiveGANConfig:
    """The progressive GAN (`jaxdiff.models.progressive_gan`): networks, growth up to data.image_size, losses."""

    latent_dim: int = 512
    channel_base: int = 8192  # feature maps at a resolution: 2 channel_base / resolution, but ...
    channel_max: int = 512  # ... not above
    total_kimg: float = 12_000.0  # length of the run in thousand images; 0 = training.num_steps says it
    stable_kimg: float = 600.0  # a resolution stays for so many ...
    fade_kimg: float = 600.0  # ... before the next fades in over so many
    hold_steps: int = 4  # steps between two looks at the schedule
    batch_sizes: tuple[int, ...] = ()  # at 4, 8, 16, ... pixels, the last for all above; () = training.batch_size
    learning_rates: tuple[float, ...] = ()  # the same; () = optimizer.learning_rate
    loss: Literal["wgan_gp", "r1"] = "wgan_gp"  # r1: non-saturating, with R1
    gamma: float = 1.0  # wgan_gp: how steep the discriminator is meant to be
    penalty_weight: float = 10.0  # lambda
    drift: float = 1e-3  # wgan_gp
    class_weight: float = 1.0  # of AC-GAN's loss, where model.num_classes is not 0
    stddev_group: int = 4  # images whose standard deviation the discriminator sees; 0 = a whole part
    stddev_parts: int = 1  # of a batch, beyond which no group reaches: pmap needs a multiple of its devices
    together: bool = False  # both networks take their gradients before either moves
    folded: Literal["auto", "always", "never"] = "auto"  # few channels: 2x2 pixels as one position; auto = on a TPU


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule, prediction and loss."""

    schedule: Literal["linear", "scaled_linear", "cosine", "flow", "edm"] = "linear"
    num_timesteps: int = 1000  # T of the discrete schedules
    beta_start: float = 1e-4  # linear and scaled_linear only
    beta_end: float = 0.02
    zero_terminal_snr: bool = False
    sigma_data: float = 0.5  # edm: standard deviation of the data
    sigma_max: float = 80.0  # edm: noise that sampling begins with
    p_mean: float = -1.2  # edm: log sigma of training is normal with this mean
    p_std: float = 1.2  # and this deviation
    prediction: Literal["noise", "x0", "v", "velocity", "edm"] = "noise"
    learned_variance: bool = False
    loss: Literal["simple", "min_snr", "vlb", "hybrid"] = "simple"
    min_snr_gamma: float = 5.0
    min_snr_floor: float = 0.0  # x0's error is weighed by max(SNR, floor) where that is less than gamma
    label_dropout: float = 0.1  # fraction of labels replaced by the null label, for classifier-free guidance
    inpainting: bool = False  # the network sees a mask and what is known, too: for inpainting by mask channels


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam, AdamW or Muon with warm-up, and the moving average of the parameters."""

    name: Literal["adam", "adamw", "muon"] = "adam"
    learning_rate: float = 2e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # of adamw, and of muon's kernels
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
    ema_decay: float = 0.9999
    ema_warmup: bool = True  # decay at step n is min(ema_decay, (1 + n) / (10 + n))


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    batch_size: int = 128  # over all devices, which need not divide it
    num_steps: int = 800_000
    accumulation_steps: int = 1  # micro-batches a step
    log_every: int = 100
    checkpoint_every: int = 1000
    sample_every: int = 5000  # 0 = only at the end
    keep_checkpoints: int = 3


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """How a step is spread over devices."""

    mode: Literal["jit", "pmap"] = "jit"
    fsdp: int = 1  # devices over which parameters and optimiser state are sharded; 0 = as few as fit


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Defaults of `sample.py` and of the grids made during training."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpm++2m", "euler_ancestral", "pndm", "lcm", "file"] = "ddim"
    steps: int = 50
    # Sampler and spacing "file": as the scheduler's file of model.pretrained says.
    spacing: Literal["linspace", "leading", "trailing", "karras", "file"] = "trailing"
    eta: float = 0.0  # ddim: 0 deterministic, 1 ancestral
    variance: Literal["fixed_small", "fixed_large", "learned"] = "fixed_small"  # ddpm
    guidance: float = 1.0  # classifier-free guidance scale; 1 = none
    guidance_start: float = 0.0  # guidance acts only while the fraction of sampling done is in [start, end]
    guidance_end: float = 1.0
    guidance_rescale: float = 0.0
    clip: Literal["none", "clip", "dynamic"] = "clip"  # what is done to predicted x0 outside [-1, 1]
    truncation: float = 0.0  # progressive GAN: no number of a latent lies beyond +- this; 0 = as they come
    resolution: int = 0  # progressive GAN: pixels a side, at most those grown to; 0 = as many
    num_images: int = 64  # in a grid during training
    batch_per_device: int = 16  # images a device makes at a time


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scores during training, of the moving average of the parameters against the training data; and for `evaluate.py`."""

    every: int = 0  # steps; 0 = never
    metrics: tuple[str, ...] = ("fid", "is")  # of fid, sfid, is, kid, pr, swd, ms_ssim
    num_images: int = 5000  # samples to score
    extractor: Literal["inception", "efficientnet-lite0"] = "inception"
    weights: str = ""  # file of the inception network's weights ("" = downloaded once)
    batch_per_device: int = 16  # images that a device looks at at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    task: Literal["diffusion", "vae", "autoencoder", "progressive_gan"] = "diffusion"
    seed: int = 0
    autoencoder: str = ""  # diffusion in its latents: workdir of a trained one, or folder of one in diffusers' layout
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    lora: LoraConfig = LoraConfig()
    vae: VAEConfig = VAEConfig()
    autoencoder_kl: AutoencoderConfig = AutoencoderConfig()
    progressive_gan: ProgressiveGANConfig = ProgressiveGANConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    sharding: ShardingConfig = ShardingConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


# What may change when a run goes on in its workdir; everything else defines the run. (Folders may have moved: what was in
# those of `autoencoder` and `text.pretrained` is kept in the workdir, and compared; of `model.pretrained` the SHA-256.)
CHANGEABLE_SECTIONS = ("sampling.", "evaluation.", "sharding.")
CHANGEABLE_KEYS = {
    *(
        f"training.{name}"
        for name in ("num_steps", "log_every", "checkpoint_every", "sample_every", "keep_checkpoints")
    ),
    *("progressive_gan.total_kimg",),
    *("data.dir", "data.num_threads", "autoencoder", "text.pretrained", "model.pretrained"),
}


def may_change(name: str) -> bool:
    """Whether a run may go on with another value of the key called `name`."""
    return name in CHANGEABLE_KEYS or name.startswith(CHANGEABLE_SECTIONS)


def default_config() -> ml_collections.ConfigDict:
    """Every key with its default value, locked: config files change it and can't misspell a key."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def to_config(config: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """Check a ConfigDict (or plain dictionary) and freeze it. Raises ConfigError."""
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    result = _build(Config, values, "")
    check(result)
    return result


def to_json(config: Config) -> str:
    """The config as indented JSON, as stored in `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def flatten(config: Config) -> dict[str, Any]:
    """The config as {"model.channels": 128, ...}."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if not dataclasses.is_dataclass(node):
            return {prefix[:-1]: node}
        items: dict[str, Any] = {}
        for field in dataclasses.fields(node):
            items |= walk(getattr(node, field.name), f"{prefix}{field.name}.")
        return items

    return walk(config, "")


def _build(cls: type, values: Any, prefix: str) -> Any:
    """A dataclass from a dictionary, strictly: unknown keys and wrong types are refused."""
    if not isinstance(values, dict):
        raise ConfigError(f"config.{prefix[:-1]} must be a section with keys, not {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            shown = ascii(str(key))[1:-1][:80]
            raise ConfigError(f"unknown config key config.{prefix}{shown}{_suggest(shown, list(hints))}")
    return cls(**{key: _coerce(hints[key], value, prefix + key) for key, value in values.items()})


def _suggest(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(choices)}"


LARGEST = 2**32 - 1  # of integers: seeds have 32 bits, and nothing counts further


def _coerce(hint: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type; ints pass for floats, lists for tuples, nothing else is converted."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, name + ".")
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"config.{name} = {value!r} must be one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"config.{name} = {value!r} must be a tuple, such as ({name.split('.')[-1]}=1,2)")
        return tuple(_coerce(typing.get_args(hint)[0], item, name) for item in value)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(typing.get_args(hint)[0], value, name)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"config.{name} must not be larger than {LARGEST:,}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"config.{name} = {value!r} must be of type {hint.__name__}, not {type(value).__name__}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"config.{name} = {ascii(value)} must be text (UTF-8), or config.json could not be read back")
    return value


def check(config: Config) -> None:
    """Refuse what cannot work, whatever the data and the machine. Raises ConfigError."""
    of_task = {
        "diffusion": (
            _model_rules,
            _size_rules,
            _diffusion_rules,
            _floor_rules,
            _sampling_rules,
            _latent_rules,
            _text_rules,
            _pretrained_rules,
            _lora_rules,
        ),
        "vae": (_vae_rules,),
        "autoencoder": (_autoencoder_rules,),
        "progressive_gan": (_progressive_gan_rules,),
    }
    for rules in (_range_rules, *of_task[config.task], _evaluation_rules):
        for holds, message in rules(config):
            if not holds:
                raise ConfigError(f"config.{message}")


Rules = Iterator[tuple[bool, str]]  # what must hold, and what to say after "config." if it does not


def check_latent_size(config: Config, size: int) -> None:
    """Refuse a U-Net that latents of size x size do not fit, once the autoencoder is known. Raises ConfigError."""
    for holds, message in _fitting_rules(config, size, f"latents of {size}x{size}: {size}"):
        if not holds:
            raise ConfigError(f"config.{message}")


def _range_rules(config: Config) -> Rules:
    values = flatten(config)
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            yield not isinstance(number, float) or math.isfinite(number), f"{name} = {value} must be finite"
    for name in _AT_LEAST_ONE:
        yield values[name] >= 1, f"{name} = {values[name]} must be at least 1"
    for name in _NOT_NEGATIVE:
        yield values[name] >= 0, f"{name} = {values[name]} must not be negative"
    for name in _FRACTIONS:
        yield 0 <= values[name] <= 1, f"{name} = {values[name]} must lie between 0 and 1"
    for name in ("data.max_bad_fraction", "model.dropout", "optimizer.beta1", "optimizer.beta2", "optimizer.ema_decay"):
        yield 0 <= values[name] < 1, f"{name} = {values[name]} must be at least 0 and below 1"
    for name in (
        *("optimizer.learning_rate", "optimizer.epsilon", "diffusion.sigma_data", "diffusion.p_std"),
        "diffusion.min_snr_gamma",
    ):
        yield values[name] > 0, f"{name} = {values[name]} must be positive"
    channels, training = config.data.channels, config.training
    yield channels in (1, 3), f"data.channels = {channels} must be 1 (grey) or 3 (RGB)"
    sampling, gan = config.sampling, config.task == "progressive_gan"
    yield gan or not sampling.truncation, f"sampling.truncation = {sampling.truncation} is for task 'progressive_gan'"
    yield gan or not sampling.resolution, f"sampling.resolution = {sampling.resolution} is for task 'progressive_gan'"
    yield config.seed < 2**32, f"seed = {config.seed} must be below 2**32"
    yield (
        training.batch_size % training.accumulation_steps == 0,
        f"training.batch_size = {training.batch_size} must be divisible by accumulation_steps = {training.accumulation_steps}",
    )


_AT_LEAST_ONE = (
    *("data.image_size", "data.num_threads", "diffusion.num_timesteps"),
    *(f"model.{name}" for name in ("channels", "num_res_blocks", "num_heads", "patch_size")),
    *(
        f"training.{name}"
        for name in ("batch_size", "num_steps", "accumulation_steps", "log_every", "checkpoint_every")
    ),
    *("training.keep_checkpoints", "sampling.steps", "sampling.num_images", "sampling.batch_per_device"),
    *("evaluation.batch_per_device", "text.width", "text.num_layers", "text.num_heads"),
    *("vae.latent_dim", "vae.hidden"),
    *(
        f"progressive_gan.{name}"
        for name in ("latent_dim", "channel_base", "channel_max", "hold_steps", "stddev_parts")
    ),
    *(f"autoencoder_kl.{name}" for name in ("channels", "num_res_blocks", "latent_channels")),
    *(f"autoencoder_kl.discriminator_{name}" for name in ("channels", "layers")),
)
_NOT_NEGATIVE = (
    *("sampling.truncation", "sampling.resolution", "sharding.fsdp"),
    *(f"progressive_gan.{name}_kimg" for name in ("total", "stable", "fade")),
    *(f"progressive_gan.{name}" for name in ("penalty_weight", "drift", "class_weight", "stddev_group")),
    *("training.sample_every", "optimizer.warmup_steps", "optimizer.clip_norm", "optimizer.weight_decay"),
    *("lora.rank", "lora.alpha"),
    *("seed", "sampling.guidance", "diffusion.min_snr_floor", "evaluation.every", "vae.beta", "vae.free_bits"),
    *(
        f"autoencoder_kl.{name}"
        for name in ("perceptual_weight", "kl_weight", "discriminator_weight", "discriminator_start")
    ),
)
_FRACTIONS = (
    *("diffusion.label_dropout", "text.dropout", "sampling.eta"),
    *("sampling.guidance_start", "sampling.guidance_end", "sampling.guidance_rescale"),
)


def _vae_rules(config: Config) -> Rules:
    channels, size = config.vae.channels, config.data.image_size
    yield min(channels, default=0) >= 1, f"vae.channels = {channels} must hold positive integers"
    factor = 2 ** len(channels)
    yield size % factor == 0, f"data.image_size = {size} must be divisible by {factor} (halved {len(channels)} times)"
    yield (
        config.model.num_classes == 0,
        f"model.num_classes = {config.model.num_classes} must be 0: a VAE has no condition",
    )
    yield not config.text.enabled, "text.enabled = True: a VAE has no condition"


def _autoencoder_rules(config: Config) -> Rules:
    settings, size = config.autoencoder_kl, config.data.image_size
    multipliers = settings.channel_multipliers
    yield (
        min(multipliers, default=0) >= 1,
        f"autoencoder_kl.channel_multipliers = {multipliers} must hold positive integers",
    )
    factor = 2 ** (len(multipliers) - 1)
    yield (
        size % factor == 0,
        f"data.image_size = {size} must be divisible by {factor} (halved {len(multipliers) - 1} times)",
    )
    least = 3 * 2**settings.discriminator_layers
    yield (
        size >= least or settings.discriminator_weight == 0,
        f"data.image_size = {size} must be at least {least} for {settings.discriminator_layers} discriminator_layers",
    )
    yield (
        settings.perceptual != "lpips" or settings.perceptual_files != "",
        "autoencoder_kl.perceptual = 'lpips' needs the folder of its weights in config.autoencoder_kl.perceptual_files",
    )
    yield (
        config.training.accumulation_steps == 1,
        f"training.accumulation_steps = {config.training.accumulation_steps} must be 1: an autoencoder's step is not split",
    )
    classes = config.model.num_classes
    yield classes == 0, f"model.num_classes = {classes} must be 0: an autoencoder has no condition"
    yield not config.text.enabled, "text.enabled = True: an autoencoder has no condition"
    yield config.autoencoder == "", f"autoencoder = {config.autoencoder!r} is for task 'diffusion'; here one is trained"


def _progressive_gan_rules(config: Config) -> Rules:
    gan, size = config.progressive_gan, config.data.image_size
    yield (
        size in RESOLUTIONS,
        f"data.image_size = {size} must be one of {', '.join(map(str, RESOLUTIONS))}: growing doubles the side",
    )
    yield gan.gamma > 0, f"progressive_gan.gamma = {gan.gamma} must be positive"
    yield gan.stable_kimg + gan.fade_kimg > 0, "progressive_gan: stable_kimg and fade_kimg must not both be 0"
    levels = RESOLUTIONS.index(size) + 1
    for name, values in (("batch_sizes", gan.batch_sizes), ("learning_rates", gan.learning_rates)):
        yield min(values, default=1) > 0, f"progressive_gan.{name} = {values} must hold positive numbers"
        yield (
            len(values) <= levels,
            f"progressive_gan.{name} = {values}: {len(values)} numbers for {levels} resolutions, 4 to {size}",
        )
    for batch_size in gan.batch_sizes or (config.training.batch_size,):
        yield (
            batch_size % gan.stddev_parts == 0,
            f"progressive_gan.stddev_parts = {gan.stddev_parts} must divide every batch, and one is of {batch_size}",
        )
        part = batch_size // gan.stddev_parts
        group = min(gan.stddev_group or part, part)
        yield (
            group == 1 or any(part % fitting == 0 for fitting in range(2, group + 1)),
            f"progressive_gan.stddev_group = {gan.stddev_group}: {part} images cannot be split into groups of 2 to {group}",
        )
    optimizer = config.optimizer
    yield (
        optimizer.schedule == "constant" and optimizer.warmup_steps == 0,
        "optimizer.schedule must be 'constant' and warmup_steps 0: see config.progressive_gan.learning_rates",
    )
    yield (
        config.training.accumulation_steps == 1,
        f"training.accumulation_steps = {config.training.accumulation_steps} must be 1: a GAN's step is not split",
    )
    classes, resolution = config.model.num_classes, config.sampling.resolution
    yield classes >= -1, f"model.num_classes = {classes} must be -1 (as the data), 0 (none) or more"
    yield not config.text.enabled, "text.enabled = True: a progressive GAN reads no text"
    yield config.autoencoder == "", f"autoencoder = {config.autoencoder!r}: a progressive GAN makes pixels, not latents"
    yield config.data.source != "latents", "data.source = 'latents': a progressive GAN learns from images"
    yield (
        resolution in (0, *RESOLUTIONS[:levels]),
        f"sampling.resolution = {resolution} must be 0 or one of {', '.join(map(str, RESOLUTIONS[:levels]))}",
    )


RESOLUTIONS = tuple(4 * 2**stage for stage in range(12))  # that a progressive GAN can end with


def _text_rules(config: Config) -> Rules:
    text = config.text
    yield (
        text.width % text.num_heads == 0,
        f"text.num_heads = {text.num_heads} must divide config.text.width = {text.width}",
    )
    yield (
        text.vocabulary_size >= 514,
        f"text.vocabulary_size = {text.vocabulary_size} must be at least 514 (bytes, start, end)",
    )
    yield (
        text.context_length >= 3,
        f"text.context_length = {text.context_length} must be at least 3 (start, a word, end)",
    )
    yield (
        not text.enabled or config.model.num_classes == 0,
        f"text.enabled = True makes captions the condition: config.model.num_classes must be 0, not {config.model.num_classes}",
    )


def _evaluation_rules(config: Config) -> Rules:
    evaluation = config.evaluation
    yield len(evaluation.metrics) > 0, f"evaluation.metrics must name some of {', '.join(TRAINING_METRICS)}"
    for name in evaluation.metrics:
        yield name in TRAINING_METRICS, f"evaluation.metrics: {name!r} must be one of {', '.join(TRAINING_METRICS)}"
    yield (
        "sfid" not in evaluation.metrics or evaluation.extractor == "inception",
        f"evaluation.metrics: 'sfid' needs config.evaluation.extractor = 'inception', not {evaluation.extractor!r}",
    )
    yield evaluation.num_images >= 10, f"evaluation.num_images = {evaluation.num_images} must be at least 10"


TRAINING_METRICS = ("fid", "sfid", "is", "kid", "pr", "swd", "ms_ssim")


def _model_rules(config: Config) -> Rules:
    model = config.model
    yield (
        not model.position_embedding or model.channels % 4 == 0,
        f"model.channels = {model.channels} must be a multiple of 4 for position_embedding",
    )
    yield model.num_classes >= -1, f"model.num_classes = {model.num_classes} must be -1 (as the data), 0 (none) or more"
    multipliers = model.channel_multipliers
    yield min(multipliers, default=0) >= 1, f"model.channel_multipliers = {multipliers} must hold positive integers"
    yield (
        model.attention_implementation != "cudnn" or model.dtype == "bfloat16",
        f"model.attention_implementation = 'cudnn' needs config.model.dtype = 'bfloat16', not {model.dtype!r}",
    )
    for width in {model.channels * multiplier for multiplier in multipliers}:
        yield width % model.num_heads == 0, f"model.num_heads = {model.num_heads} must divide {width} channels"


def _floor_rules(config: Config) -> Rules:
    diffusion = config.diffusion
    yield (
        diffusion.min_snr_floor == 0 or diffusion.prediction != "noise",
        "diffusion.min_snr_floor must be 0 for prediction = 'noise', whose error at high noise would count without bound",
    )
    yield (
        diffusion.min_snr_floor < diffusion.min_snr_gamma,
        f"diffusion.min_snr_floor = {diffusion.min_snr_floor} must be below min_snr_gamma = {diffusion.min_snr_gamma}",
    )


def _size_rules(config: Config) -> Rules:
    if not config.autoencoder and not config.model.pretrained:  # whose latents' size is not known yet
        size = config.data.image_size
        yield from _fitting_rules(config, size, f"data.image_size = {size}")


def _fitting_rules(config: Config, size: int, name: str) -> Rules:
    model = config.model
    halvings = len(model.channel_multipliers) - 1
    factor = model.patch_size * 2**halvings
    yield (
        size % factor == 0,
        f"{name} must be divisible by {factor} (patch_size {model.patch_size}, halved {halvings} times)",
    )
    sides = [size // model.patch_size // 2**level for level in range(halvings + 1)]
    for side in model.attention_resolutions:
        listed = ", ".join(map(str, sides))
        yield side in sides, f"model.attention_resolutions: {side} is not a side of this U-Net, which has {listed}"


def _latent_rules(config: Config) -> Rules:
    latents, stage = config.data.source == "latents", config.autoencoder or config.model.pretrained
    yield (
        not latents or stage != "",
        "data.source = 'latents' needs the autoencoder that made them: config.autoencoder, or config.model.pretrained",
    )
    yield (
        not stage or config.sampling.clip == "none",
        f"sampling.clip = {config.sampling.clip!r} is for pixels in [-1, 1]: with an autoencoder it must be 'none'",
    )
    yield (
        not latents or not config.diffusion.inpainting,
        "diffusion.inpainting = True encodes what each mask leaves: it needs the images, not data.source = 'latents'",
    )
    yield (
        not latents or not config.evaluation.every,
        "evaluation.every: scores compare with the training images, which data.source = 'latents' does not have",
    )
    for name in ("pretrained", "pooled"):
        wanted = bool(getattr(config.text, name))
        yield config.text.enabled or not wanted, f"text.{name} is set, but config.text.enabled is False"
    yield (
        not (config.text.pretrained and config.text.tokenizer),
        "text.pretrained brings its own tokenizer: leave config.text.tokenizer empty",
    )


def _pretrained_rules(config: Config) -> Rules:
    path, text = config.model.pretrained, config.text
    yield not path or not config.autoencoder, "autoencoder must be empty: config.model.pretrained has its own"
    yield not path or not text.pretrained, "text.pretrained must be empty: config.model.pretrained has its own"
    yield (
        bool(path) or not config.model.pretrained_prediction,
        "model.pretrained_prediction is set, but config.model.pretrained is not",
    )
    yield bool(path) or not text.trained, "text.trained = True is for config.model.pretrained, which is not set"


def _lora_rules(config: Config) -> Rules:
    lora = config.lora
    if not lora.rank:
        return
    yield config.model.pretrained != "", f"lora.rank = {lora.rank} needs a model to adapt: config.model.pretrained"
    yield len(lora.targets) > 0, f"lora.targets must name some of {', '.join(LORA_TARGETS)}"
    for name in lora.targets:
        yield name in LORA_TARGETS, f"lora.targets: {name!r} must be one of {', '.join(LORA_TARGETS)}"
    yield not config.text.trained, "text.trained with lora.rank: add 'text_encoder' to config.lora.targets instead"


def _diffusion_rules(config: Config) -> Rules:
    diffusion = config.diffusion
    schedule, prediction = diffusion.schedule, diffusion.prediction
    discrete = schedule in ("linear", "scaled_linear", "cosine")
    yield (
        prediction != "velocity" or schedule == "flow",
        "diffusion.prediction = 'velocity' needs config.diffusion.schedule = 'flow'",
    )
    yield (
        prediction in ("edm", "x0") if schedule == "edm" else prediction != "edm",
        f"diffusion.prediction = {prediction!r} with config.diffusion.schedule = {schedule!r}: "
        "the schedule 'edm' takes predictions 'edm' and 'x0', and 'edm' is a prediction of that schedule only",
    )
    yield diffusion.sigma_max >= 1, f"diffusion.sigma_max = {diffusion.sigma_max} must be at least 1"
    yield (
        discrete or not diffusion.zero_terminal_snr,
        f"diffusion.zero_terminal_snr needs a schedule with betas (linear, scaled_linear, cosine), not {schedule!r}",
    )
    yield (
        prediction != "noise" or not (diffusion.zero_terminal_snr or schedule == "flow"),
        "diffusion.prediction = 'noise' cannot start from pure noise (zero terminal SNR, flow): use 'v', 'x0' or 'velocity'",
    )
    yield (
        0 < diffusion.beta_start < diffusion.beta_end < 1 or schedule not in ("linear", "scaled_linear"),
        f"diffusion needs 0 < beta_start < beta_end < 1, not {diffusion.beta_start} and {diffusion.beta_end}",
    )
    yield (
        discrete or not diffusion.learned_variance,
        f"diffusion.learned_variance needs a schedule with betas (linear, scaled_linear, cosine), not {schedule!r}",
    )
    yield (
        discrete or diffusion.loss not in ("vlb", "hybrid"),
        f"diffusion.loss = {diffusion.loss!r} needs a schedule with betas (linear, scaled_linear, cosine), not {schedule!r}",
    )
    yield (
        not diffusion.learned_variance or diffusion.loss in ("vlb", "hybrid"),
        f"diffusion.learned_variance needs config.diffusion.loss = 'hybrid' or 'vlb', not {diffusion.loss!r}",
    )
    yield (
        diffusion.learned_variance or diffusion.loss != "hybrid",
        "diffusion.loss = 'hybrid' needs config.diffusion.learned_variance = True",
    )


def _sampling_rules(config: Config) -> Rules:
    diffusion, sampling = config.diffusion, config.sampling
    discrete = diffusion.schedule in ("linear", "scaled_linear", "cosine")
    yield (
        diffusion.learned_variance or sampling.variance != "learned",
        "sampling.variance = 'learned' needs config.diffusion.learned_variance = True",
    )
    for name in ("sampler", "spacing"):
        yield (
            bool(config.model.pretrained) or getattr(sampling, name) != "file",
            f"sampling.{name} = 'file' needs a checkpoint with a scheduler's file: config.model.pretrained",
        )
    yield sampling.guidance_start < sampling.guidance_end, "sampling.guidance_start must be below guidance_end"
    yield (
        not discrete or sampling.steps <= diffusion.num_timesteps,
        f"sampling.steps = {sampling.steps} must not exceed config.diffusion.num_timesteps = {diffusion.num_timesteps}",
    )
    yield (
        discrete or sampling.spacing != "leading",
        f"sampling.spacing = 'leading' needs a schedule with betas, not {diffusion.schedule!r}: use 'trailing'",
    )
    yield (
        sampling.spacing != "karras" or not (diffusion.zero_terminal_snr or diffusion.schedule == "flow"),
        "sampling.spacing = 'karras' needs a finite noise level to start from (not zero terminal SNR or flow): use 'trailing'",
    )
