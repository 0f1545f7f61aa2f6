"""Stable Diffusion back to disk, as diffusers' folders or as a single file in the CompVis layout.

By the name rules that `checkpoint` reads with; what is written is bit by bit what was read.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxdiff.files import write_text
from jaxdiff.weights.checkpoint import COMPONENTS, INDEX, SCHEDULER, TENSORS, TOKENIZER, Config, component_rules
from jaxdiff.weights.names import to_theirs
from jaxdiff.weights.tensors import write_tensors

CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
}
Params = Mapping[str, Any]


def save_component(
    folder: str | pathlib.Path, component: str, params: Params, config: Config, dtype: DTypeLike | None = None
) -> None:
    """One component's folder (`unet/`): config.json and the tensors, as diffusers and transformers save and load them.

    dtype: of the tensors in the file; None keeps each parameter's own.
    """
    folder = pathlib.Path(folder)
    tensors = _converted(to_theirs(params, component_rules(component, config)), dtype)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tensors(folder / f"{TENSORS[component]}.safetensors", tensors)


def save_folder(
    folder: str | pathlib.Path,
    params: Mapping[str, Params],
    configs: Mapping[str, Config],
    tokenizer: str | pathlib.Path | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """A whole model that `StableDiffusionPipeline.from_pretrained` loads.

    params: by component. configs: by component, and "scheduler". tokenizer: a folder that is copied; without it the pipeline
    has to be given one. The index is written last: a folder that has it is whole.
    """
    folder = pathlib.Path(folder)
    for component in COMPONENTS:
        save_component(folder / component, component, params[component], configs[component], dtype)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / TOKENIZER, dirs_exist_ok=True)
    write_text(folder / SCHEDULER, json.dumps(configs["scheduler"], indent=2, sort_keys=True) + "\n")
    inpainting = configs["unet"].get("in_channels") == 9
    index = {
        "_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",  # whose layout this is; diffusers asks for it
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        "tokenizer": [None, None] if tokenizer is None else ["transformers", "CLIPTokenizer"],
        **CLASSES,
    }
    write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def save_single_file(
    path: str | pathlib.Path,
    params: Mapping[str, Params],
    configs: Mapping[str, Config],
    dtype: DTypeLike | None = None,
) -> None:
    """A whole model in one safetensors file with the names of Stable Diffusion's first authors.

    Of OpenCLIP's text encoder it has the layers that Stable Diffusion 2 reads: all but the last.
    """
    tensors: dict[str, np.ndarray] = {}
    for component in COMPONENTS:
        rules = component_rules(component, configs[component], as_single_file=True)
        tensors |= _converted(to_theirs(params[component], rules), dtype)
    write_tensors(path, tensors | _markers(configs))


def _markers(configs: Mapping[str, Config]) -> dict[str, np.ndarray]:
    """What the tensors do not say of the schedule, in the ways in which other programs look for it."""
    scheduler = configs.get("scheduler", {})
    second = configs["text_encoder"].get("hidden_act") == "gelu"
    found = {}
    if scheduler.get("prediction_type") == "v_prediction":
        found["v_pred"] = np.zeros(0, np.float32)
    elif second:  # else diffusers takes it for v
        found["global_step"] = np.full((), 875_000, np.int64)
    if scheduler.get("rescale_betas_zero_snr"):
        found["ztsnr"] = np.zeros(0, np.float32)
    return found


def _converted(tensors: Mapping[str, np.ndarray], dtype: DTypeLike | None) -> dict[str, np.ndarray]:
    return {name: tensor if dtype is None else tensor.astype(np.dtype(dtype)) for name, tensor in tensors.items()}
