"""Diffusion on pixels (DDPM, Ho et al. 2020): network, noise schedule, loss and sampler from a config.

The condition is a label, a caption or nothing. A caption becomes the context of the U-Net's cross-attention (Rombach et al. 2022,
https://arxiv.org/abs/2112.10752, section 3.3) through a text encoder that is trained along; nothing else differs.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from jaxdiff.config import Config, DiffusionConfig, SamplingConfig
from jaxdiff.diffusion import scheduler
from jaxdiff.diffusion.guidance import bind_condition, classifier_free_guidance, clip_x0, dynamic_threshold
from jaxdiff.diffusion.likelihood import dequantize, ode_log_likelihood, variational_bound
from jaxdiff.diffusion.predictions import Denoiser, make_denoiser
from jaxdiff.diffusion.samplers import SAMPLERS, initial_noise
from jaxdiff.diffusion.timesteps import make_timesteps
from jaxdiff.generation.generate import Sample, from_uint8, make_generator
from jaxdiff.generation.pictures import image_grid
from jaxdiff.losses import diffusion_loss
from jaxdiff.models.text_encoder import CLIPTextEncoder
from jaxdiff.models.unet import UNet
from jaxdiff.training.loop import Trainable, minimise
from jaxdiff.training.state import Batch, Metrics, Params, TrainState
from jaxdiff.weights.tokenizer import Tokenizer


def make_schedule(config: DiffusionConfig) -> scheduler.Schedule:
    """The noise schedule that a config names."""
    if config.schedule == "flow":
        return scheduler.FlowSchedule()
    if config.schedule == "edm":
        return scheduler.EDMSchedule(sigma_data=config.sigma_data)
    if config.schedule == "cosine":
        betas = scheduler.cosine_betas(config.num_timesteps)
    else:
        make_betas = {"linear": scheduler.linear_betas, "scaled_linear": scheduler.scaled_linear_betas}[config.schedule]
        betas = make_betas(config.num_timesteps, config.beta_start, config.beta_end)
    if config.zero_terminal_snr:
        betas = scheduler.rescale_zero_terminal_snr(betas)
    return scheduler.DiscreteSchedule.from_betas(betas)


def make_model(config: Config) -> UNet:
    """The U-Net that a config describes."""
    model = config.model
    implementation = None if model.attention_implementation == "auto" else model.attention_implementation
    return UNet(
        out_channels=config.data.channels * (1 + config.diffusion.learned_variance),
        channels=model.channels,
        channel_multipliers=model.channel_multipliers,
        num_res_blocks=model.num_res_blocks,
        attention_resolutions=model.attention_resolutions,
        num_heads=model.num_heads,
        dropout=model.dropout,
        num_classes=max(model.num_classes, 0),
        context_dim=config.text.width if config.text.enabled else None,
        patch_size=model.patch_size,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        remat=model.remat,
        attention_implementation=implementation,
    )


def make_text_encoder(config: Config, tokenizer: Tokenizer) -> CLIPTextEncoder:
    """The text encoder that a config describes, for this tokenizer's vocabulary."""
    text, model = config.text, config.model
    return CLIPTextEncoder(
        vocabulary_size=tokenizer.vocabulary_size,
        context_length=tokenizer.context_length,
        width=text.width,
        num_layers=text.num_layers,
        num_heads=text.num_heads,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
    )


@dataclasses.dataclass(frozen=True)
class DiffusionTask:
    """A diffusion model: pure functions of its parameters. With a `tokenizer` its condition is text.

    A request (what an image is asked to show) is None, labels int32 [b], or {"tokens", "negative"}, both int32 [b n].
    """

    config: Config
    tokenizer: Tokenizer | None = None

    @functools.cached_property
    def model(self) -> UNet:
        """The network."""
        return make_model(self.config)

    @functools.cached_property
    def schedule(self) -> scheduler.Schedule:
        """The noise schedule."""
        return make_schedule(self.config.diffusion)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[h w c] of an image."""
        return (self.config.data.image_size, self.config.data.image_size, self.config.data.channels)

    @property
    def num_classes(self) -> int:
        """Classes the model can be asked for; 0 where it is unconditional. The null label is `num_classes` itself."""
        return self.config.model.num_classes

    def describe(self) -> dict[str, str]:
        """What is trained, in words."""
        networks, condition = "U-Net", f", {self.num_classes} classes" if self.num_classes else ""
        if self.tokenizer is not None:
            networks = "U-Net and text encoder"
            condition = (
                f", captions of up to {self.tokenizer.context_length} of {self.tokenizer.vocabulary_size:,} tokens"
            )
        size, diffusion = "x".join(map(str, self.image_shape)), self.config.diffusion
        return {
            "model": f"{networks}, {size} images{condition}, computing in {self.config.model.dtype}",
            "diffusion": f"{diffusion.schedule} schedule, {diffusion.prediction} prediction, {diffusion.loss} loss",
        }

    def describe_sampling(self, settings: SamplingConfig) -> str:
        """How samples are made, in words."""
        return f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}"

    @property
    def conditional(self) -> bool:
        """Whether the model can be asked for something."""
        return bool(self.num_classes) or self.tokenizer is not None

    @functools.cached_property
    def text_encoder(self) -> CLIPTextEncoder:
        """The network that reads captions."""
        assert self.tokenizer is not None
        return make_text_encoder(self.config, self.tokenizer)

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters: of the U-Net alone, or {"unet", "text_encoder"}."""
        x, time = jnp.zeros((1, *self.image_shape)), jnp.zeros((1,))
        label = jnp.zeros((1,), jnp.int32) if self.num_classes else None
        if self.tokenizer is None:
            return self.model.init(key, x, time, label)["params"]
        keys, tokens = jax.random.split(key), jnp.zeros((1, self.tokenizer.context_length), jnp.int32)
        context = jnp.zeros((*tokens.shape, self.config.text.width))
        return {
            "unet": self.model.init(keys[0], x, time, context=context)["params"],
            "text_encoder": self.text_encoder.init(keys[1], tokens)["params"],
        }

    def encode_text(self, params: Params, tokens: Int[Array, "b n"]) -> Float[Array, "b n k"]:
        """The context that the U-Net attends to."""
        return cast(Array, self.text_encoder.apply({"params": params["text_encoder"]}, tokens))

    def network(self, params: Params, train: bool = False, dropout_key: Key[Array, ""] | None = None) -> Any:
        """The U-Net with these parameters, as a function of (x, time, condition): labels, a text's context, or None."""
        unet = params if self.tokenizer is None else params["unet"]

        def apply(x: Array, time: Array, condition: Any) -> Array:
            rngs = {"dropout": dropout_key} if dropout_key is not None else None
            inputs = {"context": condition} if self.tokenizer is not None else {"label": condition}
            return cast(Array, self.model.apply({"params": unet}, x, time, **inputs, train=train, rngs=rngs))

        return apply

    def training_condition(self, params: Params, batch: Batch, keys: Key[Array, " b"]) -> Any:
        """The condition of each example, replaced by the null condition now and then (Ho & Salimans 2022, section 3.1)."""
        if not self.conditional:
            return None
        rate = self.config.text.dropout if self.tokenizer is not None else self.config.diffusion.label_dropout
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
        if self.tokenizer is None:
            return jnp.where(dropped, self.num_classes, batch["label"])
        empty = jnp.asarray(self.tokenizer.encode([""]))
        return self.encode_text(params, jnp.where(dropped[:, None], empty, batch["tokens"]))

    def loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        """Mean loss over a batch; every example draws from a key of its own, so that sharding does not change the numbers."""
        noise_key, condition_key, dropout_key = jax.random.split(key, 3)
        dropout_key = jax.random.fold_in(
            dropout_key, batch["index"][0]
        )  # under pmap each device holds a share of its own
        per_example = jax.vmap(jax.random.fold_in, (None, 0))
        x0 = from_uint8(batch["image"])
        config = self.config.diffusion
        condition = self.training_condition(params, batch, per_example(condition_key, batch["index"]))
        losses, metrics = diffusion_loss(
            self.network(params, train=True, dropout_key=dropout_key if self.config.model.dropout else None),
            self.schedule,
            x0,
            condition,
            per_example(noise_key, batch["index"]),
            prediction=config.prediction,
            loss=config.loss,
            learned_variance=config.learned_variance,
            sigma_data=config.sigma_data if config.schedule == "edm" else None,
            gamma=config.min_snr_gamma,
        )
        parts = ("mse", "vlb") if config.loss != "simple" else ()  # of which the loss consists
        return losses.mean(), {name: metrics[name].mean() for name in parts if name in metrics}

    def denoiser(self, params: Params) -> Denoiser:
        """The denoiser with these parameters, as a function of (x_t, t, condition)."""
        diffusion = self.config.diffusion
        return make_denoiser(self.network(params), self.schedule, diffusion.prediction, diffusion.learned_variance)

    def conditions(self, params: Params, request: Any, guided: bool) -> tuple[Any, Any]:
        """What the network is told of a request, and what guidance leads away from (None without guidance)."""
        if self.tokenizer is None:
            return request, jnp.full_like(request, self.num_classes) if guided else None
        context = self.encode_text(params, request["tokens"])
        return context, self.encode_text(params, request["negative"]) if guided else None

    def make_sample(self, settings: SamplingConfig, guided: bool) -> Sample:
        """From keys to images in one program.

        What is a word or a count in `settings` is compiled in, the `knobs` (see `make_knobs`) are traced. `guided`: with
        classifier-free guidance, at twice the cost.
        """
        timesteps = make_timesteps(self.schedule, settings.steps, settings.spacing)
        sampler = SAMPLERS[settings.sampler]
        options: dict[str, Any] = {"variance": settings.variance} if settings.sampler == "ddpm" else {}
        everywhere = (settings.guidance_start, settings.guidance_end) == (
            0,
            1,
        )  # an interval compiles the network twice

        def sample(params: Params, keys: Any, request: Any, knobs: dict[str, Any]) -> Float[Array, "b h w c"]:
            denoise = self.denoiser(params)
            condition, null = self.conditions(params, request, guided)
            if guided:
                denoise = classifier_free_guidance(
                    denoise,
                    condition,
                    null,
                    knobs["guidance"],
                    interval=None if everywhere else knobs["interval"],
                    rescale=knobs["rescale"] if settings.guidance_rescale else 0.0,
                    schedule=self.schedule,
                    prediction=self.config.diffusion.prediction,
                )
            else:
                denoise = bind_condition(denoise, condition)
            if settings.clip == "clip":
                denoise = clip_x0(denoise, self.schedule)
            elif settings.clip == "dynamic":
                denoise = dynamic_threshold(denoise, self.schedule)
            if settings.sampler == "ddim":
                options["eta"] = knobs["eta"]
            x_T = initial_noise(self.schedule, keys, (len(keys), *self.image_shape))
            return sampler(denoise, self.schedule, x_T, timesteps, keys, **options)

        return sample

    def make_knobs(self, settings: SamplingConfig) -> dict[str, Any]:
        """The numbers of `settings` that may change without a recompilation."""
        times = make_timesteps(self.schedule, settings.steps, settings.spacing)
        last = len(times) - 1
        low = times[min(int(np.ceil(settings.guidance_end * last)), last)]
        high = times[int(settings.guidance_start * last)]
        return {
            "guidance": np.float32(settings.guidance),
            "rescale": np.float32(settings.guidance_rescale),
            "interval": (np.float32(low), np.float32(high)),
            "eta": np.float32(settings.eta),
        }

    def likelihoods(self, ode_steps: int) -> dict[str, Any]:
        """Functions (params, images, requests, keys) -> {name: bits/dim of each image}, by a note on what they do.

        The bound, where it is defined, takes as many network calls as there are noise levels, the ODE four times `ode_steps`,
        with their derivatives. Conditional models are asked for p(x | label or caption).
        """
        variance = "learned" if self.config.diffusion.learned_variance else self.config.sampling.variance

        def denoiser(params: Params, requests: Any) -> Denoiser:
            return bind_condition(self.denoiser(params), self.conditions(params, requests, guided=False)[0])

        def bound(params: Params, images: UInt8[Array, "b h w c"], requests: Any, keys: Any) -> dict[str, Array]:
            assert isinstance(self.schedule, scheduler.DiscreteSchedule)
            denoise = denoiser(params, requests)
            return {"bpd_bound": variational_bound(denoise, self.schedule, from_uint8(images), keys, variance).total}

        def ode(params: Params, images: UInt8[Array, "b h w c"], requests: Any, keys: Any) -> dict[str, Array]:
            spread, probes = jax.vmap(lambda key: jax.random.split(key))(keys).T
            x0, denoise = dequantize(from_uint8(images), spread), denoiser(params, requests)
            return {"bpd_ode": ode_log_likelihood(denoise, self.schedule, x0, probes, ode_steps).bits_per_dim}

        levels = f"variational bound, {self.config.diffusion.num_timesteps} levels, variance {variance}"
        flow = f"probability-flow ODE, {ode_steps} steps of RK4, one Hutchinson probe, uniform dequantisation"
        return ({levels: bound} if isinstance(self.schedule, scheduler.DiscreteSchedule) else {}) | {flow: ode}

    def is_guided(self, settings: SamplingConfig) -> bool:
        """Whether classifier-free guidance acts."""
        return self.conditional and settings.guidance != 1

    def trainable(self, mesh: Mesh, preview: Any = None) -> Trainable:
        """The task as the training loop wants it. `preview`: what the pictures are asked to show (see `_pictures`)."""
        return minimise(self.loss, self.init, self.config, self._pictures(mesh, preview), ("loss", "grad_norm"))

    def _pictures(self, mesh: Mesh, preview: Any) -> Any:
        """A grid of samples from the moving average of the parameters: the same seeds every time, and the same requests.

        Without a `preview` (a request for each image) labels go by column.
        """
        settings = self.config.sampling
        generate = make_generator(self.make_sample(settings, self.is_guided(settings)), mesh, settings.batch_per_device)
        seeds = np.arange(settings.num_images)
        if preview is None and self.num_classes:
            preview = seeds.astype(np.int32) % self.num_classes

        def pictures(state: TrainState) -> dict[str, UInt8[np.ndarray, "h w c"]]:
            images = np.concatenate(list(generate(state.ema_params, seeds, preview, self.make_knobs(settings))))
            return {"samples": image_grid(images, columns=self.num_classes if 0 < self.num_classes <= 16 else None)}

        return pictures
