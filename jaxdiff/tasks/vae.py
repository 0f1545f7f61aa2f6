"""The textbook's variational autoencoder (Kingma & Welling 2014, https://arxiv.org/abs/1312.6114).

An encoder gives q(z | x), a decoder p(x | z), and both learn to raise the evidence lower bound
log p(x) >= E_q log p(x | z) - KL(q(z | x) || p(z)). Samples are what the decoder makes of z ~ N(0, 1).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from jaxdiff.config import Config, SamplingConfig
from jaxdiff.generation.generate import Sample, from_uint8, make_generator, to_uint8
from jaxdiff.generation.pictures import image_grid
from jaxdiff.losses import (
    autoencoder_elbo,
    batch_mean,
    bernoulli_log_likelihood,
    discretized_normal_log_likelihood,
    iwae_bound,
    log_importance_weight,
    nats_to_bits_per_dim,
    normal_log_density,
)
from jaxdiff.models.gaussian import Gaussian
from jaxdiff.models.vae import ConvVAE
from jaxdiff.training.loop import Trainable, minimise
from jaxdiff.training.sharding import replicated
from jaxdiff.training.state import Batch, Metrics, Params, TrainState

PREVIEW = 32  # images whose reconstructions are drawn
TRAVERSAL = np.linspace(-3, 3, 11)  # values of one latent while the others are 0
IWAE_SAMPLES = 100  # k of the tighter bound that `evaluate.py --metrics bpd` prints


@dataclasses.dataclass(frozen=True)
class VAETask:
    """A variational autoencoder: pure functions of its parameters."""

    config: Config
    tokenizer: None = None
    num_classes: int = 0

    @functools.cached_property
    def model(self) -> ConvVAE:
        """Encoder and decoder."""
        vae, model = self.config.vae, self.config.model
        return ConvVAE(
            image_shape=self.image_shape,
            latent_dim=vae.latent_dim,
            channels=vae.channels,
            hidden=vae.hidden,
            learned_std=vae.likelihood != "bernoulli",
            dtype=jnp.dtype(model.dtype),
            param_dtype=jnp.dtype(model.param_dtype),
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[h w c] of an image."""
        return (self.config.data.image_size, self.config.data.image_size, self.config.data.channels)

    @property
    def dimensions(self) -> int:
        """Numbers in an image."""
        return math.prod(self.image_shape)

    def describe(self) -> dict[str, str]:
        """What is trained, in words."""
        vae = self.config.vae
        size = "x".join(map(str, self.image_shape))
        return {
            "model": f"variational autoencoder, {size} images, {vae.latent_dim} latents, computing in {self.config.model.dtype}",
            "loss": f"ELBO, {vae.likelihood} decoder, beta {vae.beta:g}, free bits {vae.free_bits:g}",
        }

    def describe_sampling(self, settings: SamplingConfig) -> str:
        """How samples are made, in words."""
        return "decoded from z ~ N(0, 1)"

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters."""
        return self.model.init(key, jnp.zeros((1, *self.image_shape)))["params"]

    def encode(self, params: Params, x: Float[Array, "b h w c"]) -> Gaussian:
        """q(z | x)."""
        posterior: Gaussian = self.model.apply({"params": params}, x, method="encode")  # type: ignore[assignment]
        return posterior

    def log_likelihood(self, params: Params, x: Float[Array, "b h w c"], z: Float[Array, "b d"]) -> Float[Array, " b"]:
        """The log p(x | z) in nats."""
        decoded: Any = self.model.apply({"params": params}, z, method="decode")
        if self.config.vae.likelihood == "bernoulli":
            return bernoulli_log_likelihood(x, decoded)
        density = {"gaussian": normal_log_density, "discretized": discretized_normal_log_likelihood}
        return density[self.config.vae.likelihood](x, decoded, params["log_std"])

    def decode(self, params: Params, z: Float[Array, "b d"]) -> Float[Array, "b h w c"]:
        """The mean of p(x | z): an image in [-1, 1], more or less."""
        decoded: Any = self.model.apply({"params": params}, z, method="decode")
        return 2 * jax.nn.sigmoid(decoded) - 1 if self.config.vae.likelihood == "bernoulli" else decoded

    def loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        """Minus the bound in bits/dim; every example draws from a key of its own, so that sharding changes nothing."""
        vae, x = self.config.vae, from_uint8(batch["image"])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        posterior = self.encode(params, x)
        reconstruction = self.log_likelihood(params, x, posterior.sample(keys))
        bound = autoencoder_elbo(reconstruction, posterior, vae.beta, vae.free_bits)
        kl = posterior.kl_to_standard()
        mean = functools.partial(batch_mean, weight=batch.get("weight"))
        metrics = {"elbo": mean(reconstruction - kl), "kl": mean(kl), "reconstruction": mean(reconstruction)}
        return mean(nats_to_bits_per_dim(bound, self.dimensions)), metrics

    def likelihoods(self, ode_steps: int) -> dict[str, Any]:
        """Functions (params, images, requests, keys) -> {name: a number for each image}, by a note on what they do."""

        def bounds(params: Params, images: UInt8[Array, "b h w c"], _: Any, keys: Key[Array, " b"]) -> dict[str, Any]:
            x = from_uint8(images)
            posterior = self.encode(params, x)

            def log_weight(_: None, i: Array) -> tuple[None, Float[Array, " b"]]:
                z = posterior.sample(jax.vmap(jax.random.fold_in, (0, None))(keys, i))
                return None, log_importance_weight(self.log_likelihood(params, x, z), posterior, z)

            _, log_weights = jax.lax.scan(log_weight, None, jnp.arange(IWAE_SAMPLES))
            nats = {"elbo": log_weights.mean(0), f"iwae_{IWAE_SAMPLES}": iwae_bound(log_weights)}
            found = {f"{name}_nats": value for name, value in nats.items()}
            if self.config.vae.likelihood == "discretized":  # the others give no likelihood of the 256 levels
                found |= {f"bpd_{name}": nats_to_bits_per_dim(value, self.dimensions) for name, value in nats.items()}
            return found

        return {f"{self.config.vae.likelihood} decoder, {IWAE_SAMPLES} draws of z an image": bounds}

    def make_sample(self, settings: SamplingConfig, guided: bool) -> Sample:
        """From keys to images in one program."""

        def sample(params: Params, keys: Any, request: Any, knobs: Any) -> Float[Array, "b h w c"]:
            z = jax.vmap(lambda key: jax.random.normal(key, (self.config.vae.latent_dim,)))(keys)
            return self.decode(params, z)

        return sample

    def make_knobs(self, settings: SamplingConfig) -> dict[str, Any]:
        """Nothing may be turned."""
        return {}

    def is_guided(self, settings: SamplingConfig) -> bool:
        """There is no guidance."""
        return False

    def trainable(self, mesh: Mesh, preview: Any = None) -> Trainable:
        """The task as the training loop wants it. `preview`: uint8 images whose reconstructions are drawn."""
        return minimise(
            self.loss, self.init, self.config, self._pictures(mesh, preview), ("loss", "elbo", "kl", "reconstruction")
        )

    def _pictures(self, mesh: Mesh, preview: UInt8[np.ndarray, "n h w c"] | None) -> Any:
        """Samples (the same z every time); originals above their reconstructions; a walk along the most used latents."""
        settings = self.config.sampling
        generate = make_generator(self.make_sample(settings, False), mesh, settings.batch_per_device)
        seeds = np.arange(settings.num_images)

        @functools.partial(jax.jit, out_shardings=replicated(mesh))
        def reconstruct(params: Params, images: UInt8[Array, "n h w c"]) -> tuple[Array, Array]:
            posterior = self.encode(params, from_uint8(images))
            # What a latent is used for is seen from how far its posterior means spread.
            return to_uint8(self.decode(params, posterior.mean)), posterior.mean.std(0)

        @functools.partial(jax.jit, out_shardings=replicated(mesh))
        def traverse(params: Params, z: Float[Array, "n d"]) -> UInt8[Array, "n h w c"]:
            return to_uint8(self.decode(params, z))

        def pictures(state: TrainState) -> dict[str, UInt8[np.ndarray, "h w c"]]:
            params = state.ema_params
            drawn = {"samples": image_grid(np.concatenate(list(generate(params, seeds, None, {}))))}
            if preview is None:
                return drawn
            again, spread = (np.asarray(a) for a in reconstruct(params, preview))
            columns = min(16, len(preview))
            rows = [part[i : i + columns] for i in range(0, len(preview), columns) for part in (preview, again)]
            latents = np.argsort(spread)[::-1][:10]
            z = np.zeros((len(latents), len(TRAVERSAL), len(spread)), np.float32)
            z[np.arange(len(latents)), :, latents] = TRAVERSAL
            walk = np.asarray(traverse(params, z.reshape(-1, len(spread))))
            drawn["reconstructions"] = image_grid(np.concatenate(rows), columns)
            drawn["traversal"] = image_grid(walk, len(TRAVERSAL))
            return drawn

        return pictures
