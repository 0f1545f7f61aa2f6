"""Diffusion (DDPM, Ho et al. 2020) on pixels or latents: network, noise schedule, loss and sampler from a config.

The condition is a label, a caption or nothing. A caption becomes the context of the U-Net's cross-attention (Rombach et al. 2022,
https://arxiv.org/abs/2112.10752, section 3.3) through a text encoder that is trained along, or a pretrained one that stays as it
is. With a first stage, x0 are the latents of an autoencoder (section 3.1), and samples are decoded. What begins from a Stable
Diffusion checkpoint is trained whole, or by LoRA. Nothing else differs.
"""

import contextlib
import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from jaxdiff.config import Config, ConfigError, DiffusionConfig, SamplingConfig
from jaxdiff.diffusion import scheduler
from jaxdiff.diffusion.guidance import bind_condition
from jaxdiff.diffusion.likelihood import dequantize, ode_log_likelihood, variational_bound
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.generation import sampling
from jaxdiff.generation.generate import Sample, from_uint8, make_generator
from jaxdiff.generation.image_model import ImageModel, Known
from jaxdiff.generation.masks import random_mask
from jaxdiff.generation.pictures import image_grid
from jaxdiff.losses import batch_mean, diffusion_loss
from jaxdiff.models.gaussian import Gaussian
from jaxdiff.models.lora import adapted, init_factors, merge, target_kernels
from jaxdiff.models.text_encoder import CLIPTextEncoder
from jaxdiff.models.unet import UNet
from jaxdiff.tasks.first_stage import FirstStage
from jaxdiff.tasks.pretrained import Pretrained
from jaxdiff.tasks.text_model import TextModel
from jaxdiff.training.loop import Trainable, minimise
from jaxdiff.training.state import Batch, Metrics, Params, TrainState
from jaxdiff.weights.tokenizer import Tokenizer


def make_schedule(config: DiffusionConfig) -> scheduler.Schedule:
    """The noise schedule that a config names."""
    if config.schedule == "flow":
        return scheduler.FlowSchedule()
    if config.schedule == "edm":
        return scheduler.EDMSchedule(
            sigma_max=config.sigma_max, sigma_data=config.sigma_data, P_mean=config.p_mean, P_std=config.p_std
        )
    if config.schedule == "cosine":
        betas = scheduler.cosine_betas(config.num_timesteps)
    else:
        make_betas = {"linear": scheduler.linear_betas, "scaled_linear": scheduler.scaled_linear_betas}[config.schedule]
        betas = make_betas(config.num_timesteps, config.beta_start, config.beta_end)
    if config.zero_terminal_snr:
        betas = scheduler.rescale_zero_terminal_snr(betas)
    return scheduler.DiscreteSchedule.from_betas(betas)


def make_model(config: Config, channels: int, context_dim: int | None) -> UNet:
    """The U-Net that a config describes, for x of so many channels and a context of that width."""
    model = config.model
    implementation = None if model.attention_implementation == "auto" else model.attention_implementation
    return UNet(
        out_channels=channels * (1 + config.diffusion.learned_variance),
        channels=model.channels,
        channel_multipliers=model.channel_multipliers,
        num_res_blocks=model.num_res_blocks,
        attention_resolutions=model.attention_resolutions,
        num_heads=model.num_heads,
        dropout=model.dropout,
        num_classes=max(model.num_classes, 0),
        context_dim=context_dim,
        pooled_context=config.text.pooled,
        scale_shift_norm=model.scale_shift_norm,
        position_embedding=model.position_embedding,
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


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionTask:
    """A diffusion model: pure functions of its parameters. With a `tokenizer` its condition is text.

    What an image is asked to show is None, labels int32 [b], or {"tokens", "negative"}, both int32 [b n].
    Parameters are {"unet"} and, where it is trained along, {"text_encoder"}; with LoRA they are {"lora"}, the factors of both.
    Everything but `init` and `loss` wants them `whole`: with those of the first stage and of a pretrained text encoder, and
    with the factors merged. The loss takes factors as they are (see `adapted`).
    """

    config: Config
    tokenizer: Tokenizer | None = None
    first_stage: FirstStage | None = None
    text_model: TextModel | None = None  # pretrained; its tokenizer is `tokenizer`
    pretrained: Pretrained | None = None  # what training begins from
    unet: Params | None = None  # of it, where LoRA leaves it as it is

    @functools.cached_property
    def model(self) -> UNet:
        """The network."""
        if self.pretrained is not None:
            return self.pretrained.unet
        width = None if self.tokenizer is None else self.text_encoder.width
        return make_model(self.config, self.latent_shape[-1], width)

    @functools.cached_property
    def schedule(self) -> scheduler.Schedule:
        """The noise schedule."""
        return make_schedule(self.config.diffusion)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[h w c] of an image: as trained, or of a fine-tuned Stable Diffusion as asked for (`with_size`)."""
        side, channels = self.config.data.image_size, self.config.data.channels
        if self.pretrained is None:
            return side, side, channels
        return self.pretrained.model.height, self.pretrained.model.width, channels

    def with_size(self, height: int | None = None, width: int | None = None) -> "DiffusionTask":
        """A fine-tuned Stable Diffusion for images of another size: one object a size, so that its samplers compile once.

        Raises SizeError for one that the autoencoder cannot halve.
        """
        assert self.pretrained is not None
        pretrained = self.pretrained.with_size(height, width)
        size = pretrained.model.height, pretrained.model.width
        if size == self.image_shape[:2]:
            return self
        return self._of_sizes.setdefault(size, dataclasses.replace(self, pretrained=pretrained))

    @functools.cached_property
    def _of_sizes(self) -> dict[tuple[int, int], "DiffusionTask"]:
        return {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h w d] of what the network denoises: of the image itself, or of its latents."""
        return self.image_shape if self.first_stage is None else self.first_stage.latent_shape(self.image_shape)

    @functools.cached_property
    def frozen(self) -> Params:
        """Parameters that are not trained: of "autoencoder", "text_encoder" and "unet", where there are such."""
        text_model = None if self.config.text.trained else self.text_model
        parts = {"autoencoder": self.first_stage, "text_encoder": text_model}
        found = {name: part.params for name, part in parts.items() if part is not None}
        return found if self.unet is None else found | {"unet": self.unet}

    def whole(self, params: Params) -> Params:
        """Trained parameters together with the frozen ones; the factors of LoRA merged into those that they adapt."""
        params = params | self.frozen
        if "lora" not in params:
            return params
        parts = {name: part for name, part in params.items() if name != "lora"}
        return parts | {name: merge(parts[name], factors, self.lora_scale) for name, factors in params["lora"].items()}

    def _adapted(self, params: Params, part: str) -> contextlib.AbstractContextManager[dict[str, Params]]:
        """What a network is applied with: its parameters, and those factors of LoRA that are not merged into them."""
        factors = params.get("lora", {}).get(part, {})
        return adapted(params[part], factors, self.lora_scale if factors else 1.0)

    @property
    def lora_scale(self) -> float:
        """What A B is multiplied by: alpha / rank."""
        lora = self.config.lora
        return (lora.alpha or lora.rank) / lora.rank

    @functools.cached_property
    def image_model(self) -> ImageModel:
        """The task as generation wants it."""
        diffusion = self.config.diffusion
        return ImageModel(
            schedule=self.schedule,
            prediction=diffusion.prediction,
            learned_variance=diffusion.learned_variance,
            image_shape=self.image_shape,
            latent_shape=self.latent_shape,
            network=lambda params, x, time, condition: self.network(params)(x, time, condition),
            conditions=self.conditions,
            mask_channels=diffusion.inpainting,
            num_classes=self.num_classes,
            scheduler=None if self.pretrained is None else self.pretrained.scheduler,
            **self._first_stage_functions(),
        )

    def _first_stage_functions(self) -> dict[str, Any]:
        stage = self.first_stage
        if stage is None:
            return {}
        return {
            "encode": lambda params, x, keys: stage.encode(params["autoencoder"], x, keys),
            "decode": lambda params, latents: stage.decode(params["autoencoder"], latents),
        }

    @property
    def num_classes(self) -> int:
        """Classes the model can be asked for; 0 where it is unconditional. The null label is `num_classes` itself."""
        return self.config.model.num_classes

    def describe(self) -> dict[str, str]:
        """What is trained, in words."""
        networks, condition = "U-Net", f", {self.num_classes} classes" if self.num_classes else ""
        if self.tokenizer is not None:
            networks = "U-Net" if self.text_model and not self.config.text.trained else "U-Net and text encoder"
            condition = (
                f", captions of up to {self.tokenizer.context_length} of {self.tokenizer.vocabulary_size:,} tokens"
            )
        condition += ", sees a mask and what it leaves" * self.config.diffusion.inpainting
        size, diffusion = "x".join(map(str, self.image_shape)), self.config.diffusion
        frozen = {"latents": self.first_stage, "text": None if self.config.text.trained else self.text_model}
        begun = {} if self.pretrained is None else {"begins as": self.pretrained.describe()}
        return (
            begun
            | ({"lora": self._describe_lora()} if self.config.lora.rank else {})
            | {
                "model": f"{networks}, {size} images{condition}, computing in {self.config.model.dtype}",
                "diffusion": f"{diffusion.schedule} schedule, {diffusion.prediction} prediction, {diffusion.loss} loss",
            }
            | {name: part.describe() for name, part in frozen.items() if part is not None}
        )

    def _describe_lora(self) -> str:
        lora, kernels = self.config.lora, target_kernels(self._network_shapes(), self.config.lora.targets)
        where = " and ".join(f"{len(found)} of the {part.replace('_', ' ')}" for part, found in kernels.items())
        return f"rank {lora.rank}, scale {self.lora_scale:g}, of {where} ({', '.join(lora.targets)})"

    def describe_sampling(self, settings: SamplingConfig) -> str:
        """How samples are made, in words. Raises ConfigError for what the checkpoint that training began from cannot do."""
        if self.pretrained is not None:
            self.pretrained.model.check(settings)
        sampler = sampling.sampler_of(self.image_model.scheduler, settings)
        return f"{sampler}, {settings.steps} steps, guidance {settings.guidance:g}"

    @property
    def conditional(self) -> bool:
        """Whether the model can be asked for something."""
        return bool(self.num_classes) or self.tokenizer is not None

    @functools.cached_property
    def text_encoder(self) -> CLIPTextEncoder:
        """The network that reads captions."""
        if self.text_model is not None:
            return self.text_model.model
        assert self.tokenizer is not None
        return make_text_encoder(self.config, self.tokenizer)

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters of all that is trained: {"unet"} and perhaps {"text_encoder"}, or {"lora"}."""
        lora = self.config.lora
        if lora.rank:
            return {"lora": init_factors(key, self._network_shapes(), lora.targets, lora.rank)}
        return self._init_networks(key)

    def _network_shapes(self) -> Params:
        """Of the networks that LoRA adapts."""
        assert self.pretrained is not None
        return {part: self.pretrained.model.params[part] for part in ("unet", "text_encoder")}

    def _init_networks(self, key: Key[Array, ""]) -> Params:
        height, width, channels = self.latent_shape
        seen = 2 * channels + 1 if self.config.diffusion.inpainting else channels  # x_t, and of a `Known`
        x, time = jnp.zeros((1, height, width, seen)), jnp.zeros((1,))
        label = jnp.zeros((1,), jnp.int32) if self.num_classes else None
        if self.tokenizer is None:
            return {"unet": self.model.init(key, x, time, label)["params"]}
        keys, tokens = jax.random.split(key), jnp.zeros((1, self.tokenizer.context_length), jnp.int32)
        context = jnp.zeros((*tokens.shape, self.text_encoder.width))
        params = {"unet": self.model.init(keys[0], x, time, context=context)["params"]}
        if self.text_model is None or self.config.text.trained:
            params["text_encoder"] = self.text_encoder.init(keys[1], tokens)["params"]
        return params

    def encode_text(self, params: Params, tokens: Int[Array, "b n"]) -> Float[Array, "b n k"]:
        """The context that the U-Net attends to."""
        with self._adapted(params, "text_encoder") as variables:
            return cast(Array, self.text_encoder.apply(variables, tokens))

    def network(self, params: Params, train: bool = False, dropout_key: Key[Array, ""] | None = None) -> Any:
        """The U-Net with these parameters, as a function of (x, time, condition): labels, a text's context, or None.

        With mask channels the condition is a `Known` of one of these.
        """

        def apply(x: Array, time: Array, condition: Any) -> Array:
            rngs = {"dropout": dropout_key} if dropout_key is not None else None
            if isinstance(condition, Known):
                condition, channels = condition
                x = jnp.concatenate([x, channels.astype(x.dtype)], axis=-1)
            inputs = {"context": condition} if self.tokenizer is not None else {"label": condition}
            with self._adapted(params, "unet") as variables:
                return cast(Array, self.model.apply(variables, x, time, **inputs, train=train, rngs=rngs))

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

    def clean(self, params: Params, batch: Batch, keys: Key[Array, " b"]) -> Float[Array, "b l k d"]:
        """The x0 of a batch: its pixels, or latents drawn anew from the posterior of each image (or from its kept moments)."""
        if self.first_stage is None:
            return from_uint8(batch["image"])
        if "moments" in batch:
            return self.first_stage.scaled(Gaussian.from_moments(batch["moments"]).sample(keys))
        return self.first_stage.encode(params["autoencoder"], from_uint8(batch["image"]), keys)

    def masked(self, params: Params, x: Float[Array, "b h w c"], keys: Key[Array, " b"]) -> Float[Array, "b l k d+1"]:
        """What a network with mask channels sees of training images: each under a mask of its own (see `random_mask`)."""
        mask_keys, latent_keys = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in (1, 2))
        masks = jax.vmap(lambda key: random_mask(key, *self.image_shape[:2]))(mask_keys)
        return self.image_model.mask_and_known(params, x, masks, latent_keys)

    def loss(
        self, params: Params, batch: Batch, key: Key[Array, ""], frozen: Params | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean loss over a batch; every example draws from a key of its own, so that sharding does not change the numbers.

        `frozen`: what `params` lacks to be whole; no gradient reaches it.
        """
        params = params | (frozen or {})
        noise_key, condition_key, dropout_key = jax.random.split(key, 3)
        dropout_key = jax.random.fold_in(
            dropout_key, batch["index"][0]
        )  # under pmap each device holds a share of its own
        per_example = jax.vmap(jax.random.fold_in, (None, 0))
        config = self.config.diffusion
        condition_keys = per_example(condition_key, batch["index"])
        x0 = self.clean(params, batch, jax.vmap(jax.random.fold_in, (0, None))(condition_keys, 3))
        condition = self.training_condition(params, batch, condition_keys)
        if config.inpainting:
            condition = Known(condition, self.masked(params, from_uint8(batch["image"]), condition_keys))
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
            floor=config.min_snr_floor,
        )
        parts = ("mse", "vlb") if config.loss != "simple" else ()  # of which the loss consists
        mean = functools.partial(batch_mean, weight=batch.get("weight"))
        return mean(losses), {name: mean(metrics[name]) for name in parts if name in metrics}

    def denoiser(self, params: Params) -> Denoiser:
        """The denoiser with these parameters, as a function of (x_t, t, condition)."""
        return self.image_model.denoiser(params)

    def conditions(self, params: Params, request: Any, guided: bool) -> tuple[Any, Any]:
        """What the network is told of a request, and what guidance leads away from (None without guidance)."""
        if self.tokenizer is None:
            return request, jnp.full_like(request, self.num_classes) if guided else None
        context = self.encode_text(params, request["tokens"])
        return context, self.encode_text(params, request["negative"]) if guided else None

    def make_sample(self, settings: SamplingConfig, guided: bool, paste: bool = True) -> Sample:
        """From keys to images in one program (see `jaxdiff.generation.sampling`)."""
        return sampling.make_sample(self.image_model, settings, guided, paste)

    def make_knobs(self, settings: SamplingConfig, strength: float = 1.0) -> dict[str, Any]:
        """The numbers of `settings`, and image to image's strength, that may change without a recompilation."""
        return sampling.knobs_of(self.image_model, settings, strength)

    def likelihoods(self, ode_steps: int) -> dict[str, Any]:
        """Functions (params, images, requests, keys) -> {name: bits/dim of each image}, by a note on what they do.

        The bound, where it is defined, takes as many network calls as there are noise levels, the ODE four times `ode_steps`,
        with their derivatives. Conditional models are asked for p(x | label or caption). Raises ConfigError for a latent model.
        """
        if self.first_stage is not None:
            raise ConfigError("bpd: a latent model has no likelihood of images, only of its latents")
        variance = "learned" if self.config.diffusion.learned_variance else self.config.sampling.variance

        def denoiser(params: Params, requests: Any, keys: Any) -> Denoiser:
            condition = self.conditions(params, requests, guided=False)[0]
            if self.config.diffusion.inpainting:
                condition = Known(condition, self.image_model.nothing_known(params, keys))
            return bind_condition(self.denoiser(params), condition)

        def bound(params: Params, images: UInt8[Array, "b h w c"], requests: Any, keys: Any) -> dict[str, Array]:
            assert isinstance(self.schedule, scheduler.DiscreteSchedule)
            denoise = denoiser(params, requests, keys)
            return {"bpd_bound": variational_bound(denoise, self.schedule, from_uint8(images), keys, variance).total}

        def ode(params: Params, images: UInt8[Array, "b h w c"], requests: Any, keys: Any) -> dict[str, Array]:
            spread, probes = jax.vmap(lambda key: jax.random.split(key))(keys).T
            x0, denoise = dequantize(from_uint8(images), spread), denoiser(params, requests, keys)
            return {"bpd_ode": ode_log_likelihood(denoise, self.schedule, x0, probes, ode_steps).bits_per_dim}

        levels = f"variational bound, {self.config.diffusion.num_timesteps} levels, variance {variance}"
        flow = f"probability-flow ODE, {ode_steps} steps of RK4, one Hutchinson probe, uniform dequantisation"
        return ({levels: bound} if isinstance(self.schedule, scheduler.DiscreteSchedule) else {}) | {flow: ode}

    def is_guided(self, settings: SamplingConfig) -> bool:
        """Whether classifier-free guidance acts."""
        return self.conditional and settings.guidance != 1

    def trainable(self, mesh: Mesh, preview: Any = None) -> Trainable:
        """The task as the training loop wants it. `preview`: what the pictures are asked to show (see `_pictures`)."""
        pictures, curves = self._pictures(mesh, preview), ("loss", "grad_norm")
        given = self.pretrained.begin if self.pretrained is not None and not self.config.lora.rank else None
        return minimise(self.loss, self.init, self.config, pictures, curves, self.frozen or None, given)

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
            params = self.whole(state.ema_params)
            images = np.concatenate(list(generate(params, seeds, preview, self.make_knobs(settings))))
            return {"samples": image_grid(images, columns=self.num_classes if 0 < self.num_classes <= 16 else None)}

        return pictures
