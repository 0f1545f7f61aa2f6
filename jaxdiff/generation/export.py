"""A sampler as a file: the whole program from seeds to uint8 images as StableHLO, its parameters beside it as safetensors.

What is written makes images in any program with JAX, without this library or Flax (https://docs.jax.dev/en/latest/export/). It
holds network, sampler, steps, size of images and whether there is guidance; parameters, number of images, seeds, what to show,
and the guidance scale are given when it is called. docs/serving.md shows how.
"""

import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, UInt8, UInt32

from jaxdiff.config import ConfigError, SamplingConfig
from jaxdiff.files import write_bytes, write_text
from jaxdiff.generation.generate import keys_of, to_uint8
from jaxdiff.generation.image_model import ImageModel, Request
from jaxdiff.generation.pipelines import IMAGE_STRENGTH, Pipeline, condition_of
from jaxdiff.generation.sampling import first_step, knobs_of, make_sample
from jaxdiff.weights.tensors import write_tensors

PROGRAM, TENSORS, ABOUT, TOKENIZER = "sampler.stablehlo", "params.safetensors", "sampler.json", "tokenizer"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
USUAL = ("cpu", "cuda", "tpu")
FORMAT = 1

Kind = Literal["text_to_image", "image_to_image", "inpaint"]
KINDS: tuple[Kind, ...] = ("text_to_image", "image_to_image", "inpaint")


def export_sampler(
    pipeline: Pipeline,
    folder: str | pathlib.Path,
    *,
    kind: Kind = "text_to_image",
    settings: SamplingConfig | None = None,
    strength: float | None = None,
    platforms: Sequence[str] = USUAL,
) -> pathlib.Path:
    """Write a sampler into a folder: sampler.stablehlo, params.safetensors, sampler.json and, of text, tokenizer/.

    kind: what the sampler starts from, named as the functions of this library are: nothing ("text_to_image", also of models
    without text), an image, or an image and a mask. platforms: of "cpu", "cuda", "rocm", "tpu"; one artifact is for all of
    them. Raises ConfigError for what cannot be exported, before anything is written.
    """
    folder = check_export(folder, kind, platforms)
    model, settings = pipeline.model, settings or pipeline.settings
    strength = (1.0 if kind == "inpaint" else IMAGE_STRENGTH) if strength is None else strength
    knobs = _knobs(model, settings, strength, kind, _example(pipeline) is not None)
    inputs = _inputs(pipeline, kind, "guidance" in knobs)
    exported = _export(model, settings, pipeline.params, inputs, knobs, platforms)
    about = {
        "format": FORMAT,
        "kind": kind,
        "image_shape": list(model.image_shape),
        "sampler": settings.sampler,
        "steps": settings.steps,
        "inputs": {name: {"shape": ["b", *leaf.shape[1:]], "dtype": leaf.dtype.name} for name, leaf in inputs.items()},
        "knobs": {name: value.item() for name, value in knobs.items()},
        "platforms": list(platforms),
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
    }
    if pipeline.tokenizer is not None:
        pipeline.tokenizer.save(folder / TOKENIZER)
    write_tensors(folder / TENSORS, {name: np.asarray(leaf) for name, leaf in _flat(pipeline.params).items()})
    write_bytes(folder / PROGRAM, bytes(exported.serialize()))
    write_text(folder / ABOUT, json.dumps(about, indent=2) + "\n")  # last: a folder that has it is whole
    return folder


def check_export(folder: str | pathlib.Path, kind: str, platforms: Sequence[str]) -> pathlib.Path:
    """The folder to be made. Raises ConfigError for what can be known to fail without a model."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError("a sampler cannot be exported without flatbuffers: pip install 'jaxdiff[export]' brings it")
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ConfigError(f"platforms {', '.join(platforms) or '()'}: must be one or more of {', '.join(PLATFORMS)}")
    folder = pathlib.Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already: choose another place for the sampler, or remove it first")
    return folder


def _knobs(
    model: ImageModel, settings: SamplingConfig, strength: float, kind: Kind, conditional: bool
) -> dict[str, np.ndarray]:
    """The numbers that may be given when the sampler is called, at their defaults."""
    try:
        every = knobs_of(model, settings, strength)
        first_step(settings.steps, strength)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    names = ["guidance"] * (conditional and settings.guidance != 1) + ["eta"] * (settings.sampler == "ddim")
    names += ["start"] * (kind != "text_to_image")
    return {name: np.asarray(every[name]) for name in names}


def _inputs(pipeline: Pipeline, kind: Kind, guided: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """What is given with the seeds: shapes and dtypes, with a leading axis b."""
    condition, found = _example(pipeline), {}
    if isinstance(condition, dict):
        found = {name: leaf for name, leaf in condition.items() if guided or name != "negative"}
    elif condition is not None:
        found = {"label": condition}
    height, width, channels = pipeline.model.image_shape
    if kind != "text_to_image":
        found["image"] = np.zeros((1, height, width, channels), np.uint8)
    if kind == "inpaint":
        found["mask"] = np.zeros((1, height, width, 1), np.uint8)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in found.items()}


def _example(pipeline: Pipeline) -> Any:
    """A request for one image; None where the model is asked for nothing."""
    if pipeline.tokenizer is not None:
        return condition_of(pipeline, [""])
    return np.zeros(1, np.int32) if pipeline.model.num_classes else None


def _export(
    model: ImageModel,
    settings: SamplingConfig,
    params: Any,
    inputs: dict[str, jax.ShapeDtypeStruct],
    knobs: dict[str, np.ndarray],
    platforms: Sequence[str],
) -> jax.export.Exported:
    """The program, for any number of images."""
    sample = make_sample(model, settings, "guidance" in knobs)
    fixed = {name: value for name, value in knobs_of(model, settings).items() if name not in knobs}

    def program(
        params: dict[str, Array], seeds: UInt32[Array, " b"], inputs: dict[str, Array], knobs: dict[str, Array]
    ) -> UInt8[Array, "b h w c"]:
        text = {name: inputs[name] for name in ("tokens", "negative") if name in inputs}
        request = Request(text or inputs.get("label"), inputs.get("image"), inputs.get("mask"))
        tree = unflatten_dict(params, sep=".")
        return to_uint8(sample(tree, keys_of(seeds), request, fixed | knobs))

    (b,) = jax.export.symbolic_shape("b")
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _flat(params).items()}
    asked = {name: jax.ShapeDtypeStruct((b, *leaf.shape[1:]), leaf.dtype) for name, leaf in inputs.items()}
    numbers = {name: jax.ShapeDtypeStruct((), value.dtype) for name, value in knobs.items()}
    seeds = jax.ShapeDtypeStruct((b,), jnp.uint32)
    try:
        return jax.export.export(jax.jit(program), platforms=platforms)(shapes, seeds, asked, numbers)
    except NotImplementedError as error:  # an operation that one of the platforms does not have
        raise ConfigError(f"this sampler cannot be exported for {', '.join(platforms)}: {error}") from error


def _flat(params: Any) -> dict[str, Any]:
    return flatten_dict(params, sep=".")
