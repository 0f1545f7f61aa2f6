"""The first stage of latent diffusion: AutoencoderKL against a patch discriminator (Rombach et al. 2022, app. G).

What is minimised is, of each image,

    |x - x_hat| + w_p perceptual(x, x_hat) + (kl_weight / D) KL(q(z | x) || N(0, 1)) + w lambda adversarial(x_hat)

with |.| the mean (not the sum) over the image's D numbers, lambda the adaptive weight of Esser et al. 2021, eq. 7, and w the
discriminator's weight, 0 until it starts. The code of latent diffusion sums over the pixels: it minimises D times this, lambda
included, so that weights mean here what they mean there, while losses, gradient clipping and logs do not depend on the size.
The perceptual distance is a number an image, which that code adds to the error of every pixel: hence no 1 / D before w_p.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from jaxdiff import losses
from jaxdiff.config import Config, ConfigError, SamplingConfig
from jaxdiff.evaluation.images import ImageSet
from jaxdiff.generation.generate import Sample, from_uint8, to_uint8
from jaxdiff.generation.pictures import image_grid
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.gaussian import Gaussian
from jaxdiff.models.layers import num_groups
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.progress import progress_bar
from jaxdiff.tasks.first_stage import FOLDER, save_first_stage
from jaxdiff.tasks.perceptual import Perceptual, load_perceptual, network_of
from jaxdiff.training.adversarial import AdversarialState, Objective, Weight, make_adversarial_update
from jaxdiff.training.loop import Trainable
from jaxdiff.training.optimizer import learning_rate_schedule, make_optimizer
from jaxdiff.training.sharding import replicated
from jaxdiff.training.state import Batch, Metrics, Params, create_state

PREVIEW = 32  # images whose reconstructions are drawn
MEASURED = 1000  # images whose latents' mean and standard deviation are taken, at most
PLAYERS = {
    "hinge": (losses.hinge_generator_loss, losses.hinge_discriminator_loss),
    "non_saturating": (losses.non_saturating_generator_loss, losses.non_saturating_discriminator_loss),
}


@dataclasses.dataclass(frozen=True)
class AutoencoderTask:
    """An autoencoder: pure functions of its parameters. The discriminator lives in the training state alone."""

    config: Config
    tokenizer: None = None
    num_classes: int = 0

    @functools.cached_property
    def model(self) -> AutoencoderKL:
        """Encoder and decoder."""
        settings, model = self.config.autoencoder_kl, self.config.model
        return AutoencoderKL(
            image_channels=self.config.data.channels,
            latent_channels=settings.latent_channels,
            channels=settings.channels,
            channel_multipliers=settings.channel_multipliers,
            num_res_blocks=settings.num_res_blocks,
            norm_groups=num_groups(settings.channels),  # diffusers' format has one number for all layers
            dtype=jnp.dtype(model.dtype),
            param_dtype=jnp.dtype(model.param_dtype),
        )

    @functools.cached_property
    def discriminator(self) -> PatchDiscriminator | None:
        """The opponent, if there is one."""
        settings, model = self.config.autoencoder_kl, self.config.model
        if not settings.discriminator_weight:
            return None
        return PatchDiscriminator(
            channels=settings.discriminator_channels,
            num_layers=settings.discriminator_layers,
            dtype=jnp.dtype(model.dtype),
            param_dtype=jnp.dtype(model.param_dtype),
        )

    @functools.cached_property
    def perceptual(self) -> Perceptual | None:
        """The network that looks at originals and reconstructions; its weights are read here."""
        return load_perceptual(self.config.autoencoder_kl)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[h w c] of an image."""
        return (self.config.data.image_size, self.config.data.image_size, self.config.data.channels)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h/f w/f d] of its latents."""
        side = self.config.data.image_size // self.model.downsampling
        return (side, side, self.model.latent_channels)

    def describe(self) -> dict[str, str]:
        """What is trained, in words."""
        settings = self.config.autoencoder_kl
        sizes = ("x".join(map(str, shape)) for shape in (self.image_shape, self.latent_shape))
        terms = [settings.reconstruction.upper()]
        if settings.perceptual != "none":
            terms.append(f"{settings.perceptual_weight:g} {network_of(settings)}")
        terms.append(f"KL weight {settings.kl_weight:g}")
        if settings.discriminator_weight:
            terms.append(f"{settings.adversarial} discriminator from step {settings.discriminator_start:,}")
        return {
            "model": f"AutoencoderKL, images {' to latents '.join(sizes)}, computing in {self.config.model.dtype}",
            "loss": ", ".join(terms),
        }

    def describe_sampling(self, settings: SamplingConfig) -> str:
        """An autoencoder makes no images of its own: ConfigError."""
        raise ConfigError(
            "this run is an autoencoder, which makes no images of its own: train a diffusion model in its latents, "
            "with --config.autoencoder=<this workdir>; how it reconstructs: python evaluate.py --metrics psnr,ssim,rfid"
        )

    def make_sample(self, settings: SamplingConfig, guided: bool) -> Sample:
        """There is nothing to sample from: ConfigError."""
        self.describe_sampling(settings)
        raise AssertionError

    def make_knobs(self, settings: SamplingConfig) -> dict[str, Any]:
        """Nothing may be turned."""
        return {}

    def is_guided(self, settings: SamplingConfig) -> bool:
        """There is no guidance."""
        return False

    def likelihoods(self, ode_steps: int) -> dict[str, Any]:
        """Trained for what images look like, it has no useful likelihood: ConfigError."""
        raise ConfigError("bpd: an autoencoder of latent diffusion has no likelihood: ask for psnr, ssim, rfid")

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters of encoder and decoder."""
        return self.model.init(key, jnp.zeros((1, *self.image_shape)))["params"]

    def encode(self, params: Params, x: Float[Array, "b h w c"]) -> Gaussian:
        """q(z | x), not scaled."""
        return cast(Gaussian, self.model.apply({"params": params}, x, method="encode"))

    def decode(self, params: Params, z: Float[Array, "b p q d"]) -> Float[Array, "b h w c"]:
        """Images of latents that are not scaled; about [-1, 1]."""
        return cast(Array, self.model.apply({"params": params}, z, method="decode"))

    def reconstruct(self, params: Params, images: UInt8[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
        """Images through the bottleneck and back, by the mean of q(z | x)."""
        return to_uint8(self.decode(params, self.encode(params, from_uint8(images)).mean))

    def objective(self) -> Objective:
        """What autoencoder and discriminator minimise, a function for each term."""
        settings, discriminator, perceptual = self.config.autoencoder_kl, self.discriminator, self.perceptual
        error = {"l1": losses.absolute_error, "l2": losses.squared_error}[settings.reconstruction]
        for_generator, for_discriminator = PLAYERS[settings.adversarial]
        dimensions, latents = math.prod(self.image_shape), math.prod(self.latent_shape)

        def reconstruct(params: Params, batch: Batch, key: Key[Array, ""]) -> Any:
            """Every example draws from a key of its own, so that sharding changes nothing."""
            x, keys = from_uint8(batch["image"]), jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
            posterior = self.encode(params, x)
            kl = losses.batch_mean(posterior.kl_to_standard(), batch.get("weight"))
            x_hat = self.decode(params, posterior.sample(keys))
            return (x_hat, settings.kl_weight / dimensions * kl), (x, {"kl": kl / latents})

        def reconstruction(frozen: Any, x: Array, x_hat: Array, weight: Weight) -> tuple[Array, Metrics]:
            mean = functools.partial(losses.batch_mean, weight=weight)
            value = mean(error(x_hat, x))
            squared = losses.squared_error(jnp.clip(x_hat, -1, 1), x)
            metrics = {"reconstruction": value, "psnr": 10 * mean(jnp.log10(4 / jnp.maximum(squared, 1e-10)))}
            if perceptual is not None:
                metrics["perceptual"] = mean(perceptual.distance(frozen, x_hat, x))
                value = value + settings.perceptual_weight * metrics["perceptual"]
            return value, metrics

        def judge(params: Params, x: Array) -> Array:
            assert discriminator is not None
            return cast(Array, discriminator.apply({"params": params}, x))

        def generator(params: Params, x_hat: Array, weight: Weight) -> Array:
            return losses.batch_mean(for_generator(judge(params, x_hat)), weight)

        def discriminate(params: Params, x: Array, x_hat: Array, weight: Weight) -> tuple[Array, Metrics]:
            # Side by side, so that there is one gradient to average over devices, not one of each half; no image moves.
            both = jnp.stack([x, x_hat], axis=1)
            logits = judge(params, both.reshape(-1, *x.shape[1:]))
            real, fake = jnp.moveaxis(logits.reshape(*both.shape[:2], *logits.shape[1:]), 1, 0)
            mean = functools.partial(losses.batch_mean, weight=weight)
            return mean(for_discriminator(real, fake)), {"logits_real": mean(real), "logits_fake": mean(fake)}

        return Objective(
            reconstruct,
            reconstruction,
            last_kernel=lambda params: params["decoder"]["conv_out"]["kernel"],
            generator=None if discriminator is None else generator,
            discriminator=None if discriminator is None else discriminate,
            weight=settings.discriminator_weight,
            start=settings.discriminator_start,
        )

    def trainable(self, mesh: Mesh, preview: ImageSet | None = None) -> Trainable:
        """The task as the training loop wants it. `preview`: the training images, of which some are drawn and some measured.

        The discriminator's optimiser counts its own steps: its warm-up comes when it starts, its end with the run's.
        """
        config, objective = self.config, self.objective()
        steps = config.training.num_steps
        optimizer, rate = make_optimizer(config.optimizer, steps), learning_rate_schedule(config.optimizer, steps)
        opponent = make_optimizer(config.optimizer, max(1, steps - config.autoencoder_kl.discriminator_start))

        def init(key: Key[Array, ""]) -> AdversarialState:
            state, params, opt_state = create_state(self.init(key), optimizer), {}, ()
            if self.discriminator is not None:
                example = jnp.zeros((1, *self.image_shape))
                params = self.discriminator.init(jax.random.fold_in(key, 1), example)["params"]
                opt_state = opponent.init(params)
            return AdversarialState(state.step, state.params, state.ema_params, state.opt_state, params, opt_state)

        def update(axis_name: str | None) -> Any:
            return make_adversarial_update(objective, optimizer, opponent, config.optimizer, rate, axis_name)

        curves = ["loss", "reconstruction", "psnr", "kl"]
        curves += ["perceptual"] if self.perceptual is not None else []
        curves += ["adversarial", "discriminator_loss"] if self.discriminator is not None else []
        return Trainable(
            init,
            update,
            self._pictures(mesh, preview),
            tuple(curves),
            frozen={} if self.perceptual is None else self.perceptual.params,
            publish=None if preview is None else functools.partial(self._publish, mesh, preview),
        )

    def _pictures(self, mesh: Mesh, images: ImageSet | None) -> Any:
        """A row of originals above a row of what is made of them, by the moving average of the parameters."""
        shown = None if images is None else np.stack([images.image(i) for i in range(min(PREVIEW, len(images)))])
        reconstruct = jax.jit(self.reconstruct, out_shardings=replicated(mesh))

        def pictures(state: AdversarialState) -> dict[str, UInt8[np.ndarray, "h w c"]]:
            if shown is None:
                return {}
            again = np.asarray(reconstruct(state.ema_params, shown))
            return {"reconstructions": side_by_side(shown, again)}

        return pictures

    def _publish(self, mesh: Mesh, images: ImageSet, state: AdversarialState, workdir: pathlib.Path) -> None:
        """Measure the latents, and write the autoencoder into the workdir in diffusers' layout."""
        params = host_copy(state.ema_params, mesh)
        if jax.process_index() == 0:
            mean, std = self.measure_latents(params, images)
            stage = save_first_stage(workdir / FOLDER, self.model, params, mean, std, self.config.data.image_size)
            print(f"wrote {workdir / FOLDER}: {stage.describe()}", flush=True)

    def measure_latents(self, params: Params, images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel of the latents of up to 1,000 images.

        No latent is drawn: the variance of a draw is the variance of the means plus the mean of the variances.
        """
        chosen = dataclasses.replace(images, indices=images.indices[:MEASURED])

        @jax.jit
        def moments(params: Params, batch: UInt8[Array, "b h w c"]) -> tuple[Array, Array]:
            posterior = self.encode(params, from_uint8(batch))
            return posterior.mean.mean((1, 2)), (posterior.mean**2 + posterior.std**2).mean((1, 2))

        firsts, seconds, size = [], [], self.config.sampling.batch_per_device
        with progress_bar(0, len(chosen), "measuring the latents", unit="image") as bar:
            for batch, count in chosen.batches(size):
                padded = np.concatenate([batch, np.repeat(batch[-1:], size - count, axis=0)])
                first, second = (np.asarray(part, np.float64)[:count] for part in moments(params, padded))
                firsts.append(first)
                seconds.append(second)
                bar.update(count)
        mean = np.concatenate(firsts).mean(0)
        std = np.sqrt(np.concatenate(seconds).mean(0) - mean**2)
        return tuple(mean.tolist()), tuple(std.tolist())


def host_copy(tree: Any, mesh: Mesh) -> Any:
    """Arrays that may be split over the devices of many hosts, whole, on this one."""
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(np.asarray, whole)


def side_by_side(
    originals: UInt8[np.ndarray, "n h w c"], again: UInt8[np.ndarray, "n h w c"], columns: int = 8
) -> UInt8[np.ndarray, "height width c"]:
    """A row of originals, a row of reconstructions, and so on."""
    return image_grid(interleaved(originals, again, columns), min(columns, len(originals)))


def interleaved(
    originals: UInt8[np.ndarray, "n h w c"], again: UInt8[np.ndarray, "n h w c"], columns: int = 8
) -> UInt8[np.ndarray, "2*n h w c"]:
    """`columns` originals, then their reconstructions, and so on."""
    rows = [part[i : i + columns] for i in range(0, len(originals), columns) for part in (originals, again)]
    return np.concatenate(rows)
