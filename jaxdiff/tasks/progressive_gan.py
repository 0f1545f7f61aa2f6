"""The progressive GAN (Karras et al. 2018, https://arxiv.org/abs/1710.10196): two networks that grow from 4x4 pixels.

A step is one update of each. Which resolution it works on, and how far that has faded in, follows from the images seen before
it (`jaxdiff.training.growth`), so a run that goes on in the middle of a fade is the same run. The reals are shrunk to the
stage's resolution, and fade as the generator's images do.
"""

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from jaxdiff import losses
from jaxdiff.config import Config, ConfigError, SamplingConfig
from jaxdiff.generation.generate import Sample, from_uint8, keys_of, make_generator
from jaxdiff.generation.image_model import Request
from jaxdiff.generation.interpolation import slerp
from jaxdiff.generation.pictures import image_grid
from jaxdiff.generation.pipelines import blend_request
from jaxdiff.models.layers import space_to_depth
from jaxdiff.models.progressive_gan import Discriminator, Generator, active_part, fade_images, halve_pixels
from jaxdiff.training.gan import Game, GANState, create_gan_state, make_gan_update
from jaxdiff.training.growth import Growth, Phase
from jaxdiff.training.loop import Trainable
from jaxdiff.training.optimizer import make_optimizer
from jaxdiff.training.stages import Stage
from jaxdiff.training.state import Batch, Metrics, Params

# Where a TPU's rows of 128 numbers would be less than half full of channels: at 512 and 1024 pixels, as configured.
FOLD_BELOW = 64
SHOWN = 128  # pixels: images of a grid are enlarged to the run's resolution, but not beyond this
FRAMES = 24  # of the interpolation that is drawn
CURVES = ("discriminator_loss", "generator_loss", "penalty", "wasserstein", "alpha", "skipped")


def growth_of(config: Config) -> Growth:
    """When the networks of a config grow."""
    gan, size = config.progressive_gan, config.data.image_size

    def by_resolution(values: tuple[Any, ...]) -> dict[int, Any]:
        sides = [4 * 2**stage for stage in range(size.bit_length() - 2)] if values else []
        return {side: values[min(place, len(values) - 1)] for place, side in enumerate(sides)}

    return Growth(
        resolution=size,
        total_images=max(1, round(1000 * gan.total_kimg)),
        stable_images=round(1000 * gan.stable_kimg),
        fade_images=round(1000 * gan.fade_kimg),
        batch_size=config.training.batch_size,
        batch_sizes=by_resolution(gan.batch_sizes),
        learning_rate=config.optimizer.learning_rate,
        learning_rates=by_resolution(gan.learning_rates),
        hold_steps=gan.hold_steps,
    )


def resolve_length(config: Config) -> Config:
    """`training.num_steps` becomes the number of steps in which `progressive_gan.total_kimg` are seen, where that is given."""
    if config.task != "progressive_gan" or not config.progressive_gan.total_kimg:
        return config
    training = dataclasses.replace(config.training, num_steps=growth_of(config).num_steps)
    return dataclasses.replace(config, training=training)


@dataclasses.dataclass(frozen=True)
class ProgressiveGANTask:
    """A generator as it is after `step` steps; the discriminator lives in the training state alone."""

    config: Config
    step: int = 0
    tokenizer: None = None

    @functools.cached_property
    def growth(self) -> Growth:
        """When what grows."""
        return growth_of(self.config)

    @property
    def phase(self) -> Phase:
        """What held in the last step."""
        return self.growth.at_step(max(0, self.step - 1))

    @property
    def num_classes(self) -> int:
        """Of the labels that generator and discriminator know; 0: none."""
        return self.config.model.num_classes

    def _fold_below(self, platform: str) -> int:
        folded = self.config.progressive_gan.folded
        return FOLD_BELOW if folded == "always" or (folded == "auto" and platform == "tpu") else 0

    def generator(self, platform: str = "cpu") -> Generator:
        """From latents to images."""
        gan, model = self.config.progressive_gan, self.config.model
        return Generator(
            resolution=self.config.data.image_size,
            image_channels=self.config.data.channels,
            latent_dim=gan.latent_dim,
            channel_base=gan.channel_base,
            channel_max=gan.channel_max,
            num_classes=self.num_classes,
            fold_below=self._fold_below(platform),
            dtype=jnp.dtype(model.dtype),
            param_dtype=jnp.dtype(model.param_dtype),
        )

    def discriminator(self, devices: int = 1, platform: str = "cpu") -> Discriminator:
        """From images to verdicts; `devices`: how many share a batch without seeing each other's images (pmap)."""
        gan, model = self.config.progressive_gan, self.config.model
        return Discriminator(
            resolution=self.config.data.image_size,
            channel_base=gan.channel_base,
            channel_max=gan.channel_max,
            num_classes=self.num_classes,
            group_size=gan.stddev_group or None,
            shards=gan.stddev_parts // devices,
            fold_below=self._fold_below(platform),
            dtype=jnp.dtype(model.dtype),
            param_dtype=jnp.dtype(model.param_dtype),
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[h w c] of an image, fully grown."""
        return (self.config.data.image_size, self.config.data.image_size, self.config.data.channels)

    def describe(self) -> dict[str, str]:
        """What is trained, in words."""
        gan, size = self.config.progressive_gan, "x".join(map(str, self.image_shape))
        known = f", {self.num_classes} classes" if self.num_classes else ""
        loss = f"WGAN-GP, gamma {gan.gamma:g}, drift {gan.drift:g}" if gan.loss == "wgan_gp" else "non-saturating, R1"
        return {
            "model": f"progressive GAN, {size} images, {gan.latent_dim} latents{known}, computing in {self.config.model.dtype}",
            "loss": f"{loss}, penalty weight {gan.penalty_weight:g}"
            + f", class weight {gan.class_weight:g}" * bool(known),
            "growth": ", ".join(
                f"{stage.name} from step {stage.first_step:,}"
                + f" in batches of {stage.batch_size}" * (stage.batch_size != self.config.training.batch_size)
                for stage in self.stages()
            ),
        }

    def stages(self) -> tuple[Stage, ...]:
        """The resolutions that the run comes to; one that a single look at the schedule passes by is left out."""
        numbers = self._stage_numbers
        sides = [self.growth.resolution_of(number) for number in numbers]
        return tuple(
            Stage(f"{side}x{side}", self.growth.first_step(number), self.growth.at_step(first).batch_size)
            for side, number, first in zip(sides, numbers, map(self.growth.first_step, numbers), strict=True)
        )

    def loading(self) -> list[tuple[Stage, dict[str, Any]]]:
        """The stages, each with what its loader has to know: how far to shrink, and with which image it begins at which step."""
        found = []
        for stage, number in zip(self.stages(), self._stage_numbers, strict=True):
            shrink_by = self.config.data.image_size // self.growth.resolution_of(number)
            begin = (stage.first_step, self.growth.images_before(stage.first_step))
            found.append((stage, {"shrink_by": shrink_by, "begin": begin}))
        return found

    @functools.cached_property
    def _stage_numbers(self) -> tuple[int, ...]:
        growth, steps = self.growth, self.config.training.num_steps
        firsts = [growth.first_step(number) for number in range(growth.last_stage + 1)]
        ends = [*firsts[1:], max(firsts[-1], steps) + 1]
        return tuple(n for n, (first, end) in enumerate(zip(firsts, ends, strict=True)) if first < min(end, steps))

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters of the generator, of all resolutions."""
        label = jnp.zeros((1,), jnp.int32) if self.num_classes else None
        return self.generator().init(key, jnp.zeros((1, self.config.progressive_gan.latent_dim)), label)["params"]

    # What the two minimise --------------------------------------------------------------------------------------------

    def game(self, stage: int, devices: int = 1, platform: str = "cpu") -> Game:
        """The losses of a stage. Every example draws from a key of its own, so that sharding changes nothing."""
        gan, maker, judge = self.config.progressive_gan, self.generator(platform), self.discriminator(devices, platform)
        folded = maker.folds(stage)  # images too: of three channels they would fill a TPU's memory with padding

        def keys_for(use: int, key: Key[Array, ""], batch: Batch) -> Key[Array, " b"]:
            return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.split(key)[use], batch["index"])

        def fakes(params: Params, batch: Batch, key: Key[Array, ""], alpha: Array) -> Array:
            z = jax.vmap(lambda key: jax.random.normal(key, (gan.latent_dim,)))(keys_for(0, key, batch))
            label = batch["label"] if self.num_classes else None  # those of other reals: as frequent as in the data
            made = maker.apply({"params": params}, z, label, stage=stage, alpha=alpha, unfold=False)
            return cast(Array, made)

        def discriminate(params: Params, other: Params, batch: Batch, key: Any, alpha: Array) -> tuple[Array, Metrics]:
            def verdicts(x: Array) -> tuple[Array, Array | None]:
                return judge.apply({"params": params}, x, stage=stage, alpha=alpha)  # type: ignore[return-value]

            def critic(x: Array) -> Array:
                return verdicts(x)[0]

            x = from_uint8(space_to_depth(batch["image"], 2) if folded else batch["image"])
            x = fade_images(x, alpha, folded) if stage else x
            x_fake = fakes(other, batch, key, alpha)
            (real, real_logits), (fake, fake_logits) = verdicts(x), verdicts(x_fake)
            if gan.loss == "wgan_gp":
                between = losses.mix_images(x, x_fake, keys_for(1, key, batch))
                penalty = losses.gradient_penalty(critic, between, gan.gamma)
                loss = losses.wgan_gp_discriminator_loss(real, fake, penalty, gan.penalty_weight, gan.drift)
            else:
                penalty = losses.r1_penalty(critic, x)
                loss = losses.r1_discriminator_loss(real, fake, penalty, gan.penalty_weight)
            metrics = {"wasserstein": (real - fake).mean(), "penalty": penalty.mean()}
            if real_logits is not None and fake_logits is not None:
                known = losses.class_loss(real_logits, batch["label"])
                loss += gan.class_weight * (known + losses.class_loss(fake_logits, batch["label"]))
                metrics["class_loss"] = known.mean()
            return loss.mean(), metrics

        def generate(params: Params, other: Params, batch: Batch, key: Any, alpha: Array) -> tuple[Array, Metrics]:
            x_fake = fakes(params, batch, key, alpha)
            verdict: Any = judge.apply({"params": other}, x_fake, stage=stage, alpha=alpha)
            scores, logits = verdict
            wasserstein = gan.loss == "wgan_gp"
            loss = (losses.hinge_generator_loss if wasserstein else losses.non_saturating_generator_loss)(scores)
            if logits is not None:
                loss += gan.class_weight * losses.class_loss(logits, batch["label"])
            return loss.mean(), {}

        return Game(
            discriminate,
            generate,
            active=functools.partial(active_part, stage=stage),
            alpha=functools.partial(self.growth.traced_alpha, stage),
            resets=self.growth.resets(stage),
            together=gan.together,
        )

    def separate_devices(self, mesh: Mesh) -> int:
        """How many devices judge their share of a batch by itself. Raises ConfigError where they would split a group."""
        devices = mesh.size if self.config.sharding.mode == "pmap" else 1
        parts = self.config.progressive_gan.stddev_parts
        if parts % devices:
            raise ConfigError(
                f"config.progressive_gan.stddev_parts = {parts} must be divisible by the {devices} devices of pmap, which do not "
                "see each other's images"
            )
        return devices

    def trainable(self, mesh: Mesh, preview: Any = None) -> Trainable:
        """The task as the training loop wants it. Raises ConfigError where pmap's devices would split a group."""
        config, devices = self.config, self.separate_devices(mesh)

        def optimizer_at(stage: int) -> Any:
            rate = self.growth.learning_rates.get(self.growth.resolution_of(stage), self.growth.learning_rate)
            return make_optimizer(dataclasses.replace(config.optimizer, learning_rate=rate), config.training.num_steps)

        def init(key: Key[Array, ""]) -> GANState:
            optimizer = optimizer_at(0)
            image = jnp.zeros((config.progressive_gan.stddev_parts, *self.image_shape))
            judge = self.discriminator().init(jax.random.fold_in(key, 1), image)["params"]
            return create_gan_state(self.init(key), judge, optimizer, optimizer)

        def update(axis_name: str | None, number: int) -> Any:
            stage = self._stage_numbers[number]
            optimizer = optimizer_at(stage)
            game = self.game(stage, 1 if axis_name is None else devices, mesh.devices.flat[0].platform)
            return make_gan_update(game, optimizer, optimizer, config.optimizer, axis_name)

        curves = (*CURVES, "class_loss") if self.num_classes else CURVES
        return Trainable(init, update, self._pictures(mesh), curves, stages=self.stages())

    # Images -----------------------------------------------------------------------------------------------------------

    def describe_sampling(self, settings: SamplingConfig) -> str:
        """How samples are made, in words. Raises ConfigError for a resolution that the run has not grown to."""
        side, phase = self.side(settings), self.phase
        grown = "" if phase.resolution == self.config.data.image_size else f" (grown to {phase.resolution} so far)"
        cut = f", latents truncated at {settings.truncation:g}" if settings.truncation else ""
        return f"{side}x{side} pixels{grown}{cut}"

    def side(self, settings: SamplingConfig) -> int:
        """Pixels a side of the images made. Raises ConfigError for a resolution that the run has not grown to."""
        reached = self.phase.resolution
        if settings.resolution > reached:
            raise ConfigError(
                f"resolution {settings.resolution}: at step {self.step:,} this run has grown to {reached}x{reached} pixels"
            )
        return settings.resolution or reached

    def make_sample(self, settings: SamplingConfig, guided: bool) -> Sample:
        """From keys to images in one program; where fewer pixels are asked for, they are means of those made."""
        return _make_sample(
            self.generator(jax.default_backend()), self.phase.stage, self.phase.resolution // self.side(settings)
        )

    def make_knobs(self, settings: SamplingConfig) -> dict[str, Any]:
        """How far the stage has faded in, and how much of the normal distribution lies within the truncation."""
        within = math.erf(settings.truncation / math.sqrt(2)) if settings.truncation else 1.0
        return {"alpha": np.float32(self.phase.alpha), "within": np.float32(within)}

    def is_guided(self, settings: SamplingConfig) -> bool:
        """There is no guidance."""
        return False

    def likelihoods(self, ode_steps: int) -> dict[str, Any]:
        """A generator gives no likelihood: ConfigError."""
        raise ConfigError("bpd: a progressive GAN has no likelihood: ask for swd, ms_ssim, fid or is")

    def _pictures(self, mesh: Mesh) -> Any:
        """Samples of the same latents every time, and a way through the latents."""
        settings = dataclasses.replace(self.config.sampling, resolution=0)
        seeds = np.arange(settings.num_images)
        columns = self.num_classes if 0 < self.num_classes <= 16 else None
        labels = (seeds % self.num_classes).astype(np.int32) if self.num_classes else None
        one = None if labels is None else labels[:1]
        way, way_seeds = blend_request(one, np.array([0, 1], np.uint32), FRAMES)
        shown = max(32, min(self.config.data.image_size, SHOWN))

        def pictures(state: GANState) -> dict[str, UInt8[np.ndarray, "... h w c"]]:
            task = dataclasses.replace(self, step=int(state.step))
            generate = make_generator(task.make_sample(settings, False), mesh, settings.batch_per_device)
            knobs = task.make_knobs(settings)
            images = np.concatenate(list(generate(state.ema_params, seeds, labels, knobs)))
            frames = np.concatenate(list(generate(state.ema_params, way_seeds, way, knobs)))
            enlarged = [image_grid(frame[None], padding=0, min_side=shown) for frame in frames]
            return {"samples": image_grid(images, columns, min_side=shown), "interpolation": np.stack(enlarged)}

        return pictures


@functools.lru_cache(maxsize=16)
def _make_sample(generator: Generator, stage: int, factor: int) -> Sample:
    """The same arguments give the same function, so that it compiles once."""

    def sample(params: Params, keys: Key[Array, " b"], request: Any, knobs: dict[str, Any]) -> Float[Array, "b h w c"]:
        request = request if isinstance(request, Request) else Request(request)
        z = latents(keys, generator.latent_dim, knobs["within"])
        if request.blend is not None:
            far = latents(keys_of(jnp.asarray(request.blend.seed)), generator.latent_dim, knobs["within"])
            z = slerp(z, far, jnp.asarray(request.blend.weight))
        x: Any = generator.apply({"params": params}, z, request.condition, stage=stage, alpha=knobs["alpha"])
        for _ in range(factor.bit_length() - 1):
            x = halve_pixels(x)
        return cast(Array, x)

    return sample


def latents(keys: Key[Array, " b"], size: int, within: Float[Array, ""]) -> Float[Array, "b z"]:
    """Normal numbers of each image's key, none outside the middle `within` of the distribution (Brock et al. 2019, app. E).

    With 1 they are those of `jax.random.normal`.
    """

    def draw(key: Array) -> Array:
        u = jax.random.uniform(key, (size,), minval=np.nextafter(np.float32(-1), np.float32(0)), maxval=1.0)
        return math.sqrt(2) * jax.lax.erf_inv(u * within)

    return jax.vmap(draw)(keys)
