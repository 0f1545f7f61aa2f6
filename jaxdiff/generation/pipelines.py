"""Text to image, image to image, inpainting and interpolation with any diffusion model, as a notebook calls them.

`key` says where an image's noise comes from: one key (image i has `fold_in(key, i)`), a key for each image, or seeds. Image i
depends on its own key and request alone. Images come and go as uint8. What the model is asked for (`prompts`) are texts, or,
of models without text, labels int32 [n] or None. Settings that are not given are the pipeline's own; the second call with the
same settings, steps and sampler compiles nothing, whatever guidance, strength, prompts and seeds.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, Key, UInt8, UInt32

from jaxdiff.config import SamplingConfig
from jaxdiff.generation import prompts as texts
from jaxdiff.generation.generate import make_generator
from jaxdiff.generation.image_model import Blend, ImageModel, Request
from jaxdiff.generation.inputs import check_seen, fit_images, fit_masks
from jaxdiff.generation.sampling import knobs_of, make_sample
from jaxdiff.progress import progress_bar
from jaxdiff.weights.tokenizer import Tokenizer

Prompts = str | Sequence[str] | Int[np.ndarray, " n"] | None
Keys = Key[Array, ""] | Key[Array, " n"] | Sequence[int] | np.ndarray | int
Images = UInt8[np.ndarray, "n h w c"]

IMAGE_STRENGTH = 0.8  # of image to image, where none is given; inpainting makes its part anew


class Pipeline(Protocol):
    """A model ready to be asked: a run, or a loaded checkpoint."""

    @property
    def model(self) -> ImageModel:
        """Network, schedule and first stage."""

    @property
    def params(self) -> Any:
        """The parameters."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What reads the prompts; None where the model is not asked by text."""

    @property
    def settings(self) -> SamplingConfig:
        """How images are made unless something else is asked for."""


def text_to_image(
    pipeline: Pipeline,
    prompts: Prompts,
    key: Keys,
    *,
    negative: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    settings: SamplingConfig | None = None,
    mesh: Mesh | None = None,
) -> Images:
    """An image for each prompt (each seed, where nothing is asked for)."""
    settings = changed(settings or pipeline.settings, steps, guidance, sampler)
    request = Request(condition_of(pipeline, prompts, negative))
    return make_images(pipeline, request, seeds_of(key, count(request, key)), settings, mesh=mesh)


def image_to_image(
    pipeline: Pipeline,
    prompts: Prompts,
    images: Any,
    key: Keys,
    *,
    strength: float = IMAGE_STRENGTH,
    negative: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    settings: SamplingConfig | None = None,
    mesh: Mesh | None = None,
) -> Images:
    """Images that begin from those given, noised as far as `strength` says (SDEdit, Meng et al. 2022).

    `images`: one for all, or one for each prompt, scaled and cropped to the model's size. `strength`: the share of the steps
    that are taken; 1 leaves next to nothing of the image, 0 all of it.
    """
    settings = changed(settings or pipeline.settings, steps, guidance, sampler)
    request = edit_request(pipeline, condition_of(pipeline, prompts, negative), images, None, key)
    return make_images(pipeline, request, seeds_of(key, count(request, key)), settings, strength, mesh=mesh)


def inpaint(
    pipeline: Pipeline,
    prompts: Prompts,
    images: Any,
    masks: Any,
    key: Keys,
    *,
    strength: float = 1.0,
    paste: bool = True,
    negative: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    settings: SamplingConfig | None = None,
    mesh: Mesh | None = None,
) -> Images:
    """Images made anew where their mask is white and kept where it is black.

    By mask channels for a model trained so, else by putting back the known part, noised, after each step. `masks`: uint8, bool
    or float in [0, 1], of the images' size. `paste`: kept pixels are exactly those given (the scaled image's, where it was
    scaled); without it a latent model's are what its decoder makes of them.
    """
    settings = changed(settings or pipeline.settings, steps, guidance, sampler)
    request = edit_request(pipeline, condition_of(pipeline, prompts, negative), images, masks, key)
    return make_images(pipeline, request, seeds_of(key, count(request, key)), settings, strength, paste, mesh)


def interpolate(
    pipeline: Pipeline,
    prompts: Prompts,
    key: Keys,
    num: int,
    *,
    negative: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    settings: SamplingConfig | None = None,
    mesh: Mesh | None = None,
) -> Images:
    """`num` images from one image to another, ends included: from the first of two keys to the second, and of two prompts.

    Noise x_T goes the spherical way, texts in a line (of their contexts). What a stochastic sampler draws later comes from the
    first key all along; with a deterministic one both ends are what `text_to_image` makes. One key alone is that of its image
    0, and one seed that seed.
    """
    settings = changed(settings or pipeline.settings, steps, guidance, sampler)
    condition = condition_of(pipeline, prompts, negative)
    seeds = seeds_of(key, 1 if np.ndim(key) == 0 else len(key))  # type: ignore[arg-type]
    request, seeds = blend_request(condition, seeds, num)
    return make_images(pipeline, request, seeds, settings, mesh=mesh)


def condition_of(pipeline: Pipeline, prompts: Prompts, negative: str = "") -> Any:
    """What the model is told: tokens of texts, or labels or None as they are. Raises ValueError for what it cannot read."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if pipeline.tokenizer is None:
        if negative or (prompts is not None and any(isinstance(prompt, str) for prompt in prompts)):
            raise ValueError("this model was trained without captions: it cannot be asked by a prompt")
        return None if prompts is None else np.asarray(prompts, np.int32)
    if prompts is None or not len(prompts):
        raise ValueError("no prompt was given")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("this model reads text: its prompts must be strings")
    return texts.request(pipeline.tokenizer, list(prompts), negative)  # type: ignore[arg-type]


def edit_request(pipeline: Pipeline, condition: Any, images: Any, masks: Any, key: Keys) -> Request:
    """The request to change images, or (with masks) a part of each, brought to the model's size."""
    num, shape = count(Request(condition), key, images), pipeline.model.image_shape
    if masks is not None:
        masks = fit_masks(masks, images, shape, num)
        check_seen(masks, pipeline.model.latent_shape)
    return Request(condition, fit_images(images, shape, num), masks)


def blend_request(
    condition: Any, seeds: UInt32[np.ndarray, "m ..."], num: int
) -> tuple[Request, UInt32[np.ndarray, "n ..."]]:
    """The request for `num` images from the first seed and condition to the second (or the same), and their seeds."""
    if num < 2:
        raise ValueError(f"an interpolation of {num}: must be at least 2 images, the ends included")
    conditions = 0 if condition is None else len(jax.tree.leaves(condition)[0])
    if max(len(seeds), conditions) != 2:
        raise ValueError(f"an interpolation needs two seeds or two prompts, not {len(seeds)} and {conditions}")

    def repeat(tree: Any, place: int) -> Any:
        return jax.tree.map(lambda a: np.repeat(a[place : place + 1], num, axis=0), tree)

    weight = np.linspace(0, 1, num, dtype=np.float32)
    far = repeat(condition, 1) if conditions == 2 else None
    blend = Blend(repeat(seeds, len(seeds) - 1), far, weight)
    return Request(repeat(condition, 0), blend=blend), repeat(seeds, 0)


def count(request: Request, key: Keys, images: Any = None) -> int:
    """How many images are asked for: as many as prompts or labels, else as keys, else as images given."""
    if leaves := jax.tree.leaves(request):
        return len(leaves[0])
    if np.ndim(key) > 0:  # type: ignore[arg-type]
        return len(key)  # type: ignore[arg-type]
    several = images is not None and (isinstance(images, list | tuple) or np.ndim(images) == 4)
    return len(images) if several else 1


def seeds_of(key: Keys, num: int) -> UInt32[np.ndarray, "n ..."]:
    """The seeds, or key data, of `num` images (see the top of this file)."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num)) if key.ndim == 0 else key
        seeds = np.asarray(jax.random.key_data(keys))
    else:
        seeds = np.atleast_1d(np.asarray(key)).astype(np.uint32)
    if len(seeds) != num:
        raise ValueError(
            f"{len(seeds)} seeds or keys for {num} images: give one for each, or one jax.random.key for all"
        )
    return seeds


def changed(settings: SamplingConfig, steps: int | None, guidance: float | None, sampler: str | None) -> SamplingConfig:
    """The settings with those changes that are given."""
    changes = {"steps": steps, "guidance": guidance, "sampler": sampler}
    return dataclasses.replace(settings, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]


def make_images(
    pipeline: Pipeline,
    request: Request,
    seeds: UInt32[np.ndarray, "n ..."],
    settings: SamplingConfig,
    strength: float = 1.0,
    paste: bool = True,
    mesh: Mesh | None = None,
) -> Images:
    """The images of a request, made on the devices of the mesh: that given, else that of the parameters, else all there are."""
    guided = request.condition is not None and settings.guidance != 1
    sample = make_sample(pipeline.model, settings, guided, paste)
    knobs = knobs_of(pipeline.model, settings, strength)
    generate = make_generator(sample, mesh or mesh_of(pipeline.params), settings.batch_per_device)
    return gathered(generate(pipeline.params, seeds, request, knobs), len(seeds))


def mesh_of(params: Any) -> Mesh:
    """The mesh that parameters are spread over; all devices where they lie on none."""
    for leaf in jax.tree.leaves(params)[:1]:
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            return leaf.sharding.mesh  # type: ignore[return-value]
    return Mesh(np.array(jax.devices()), ("data",))


def gathered(parts: Iterable[Images], num: int) -> Images:
    """All `num` images as one array, with a progress bar while they are being made."""
    images = []
    with progress_bar(0, num, "sampling", unit="image") as bar:
        for part in parts:
            images.append(part)
            bar.update(len(part))
    return np.concatenate(images)
