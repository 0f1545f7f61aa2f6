"""A Stable Diffusion checkpoint on disk: a folder in diffusers' layout or a single file; only safetensors are read.

`open_checkpoint` says what is there without building a model or reading a tensor; `load_params` brings one component's
tensors to the devices, one at a time.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxdiff.files import read_json
from jaxdiff.weights import single_file
from jaxdiff.weights.names import (
    Rule,
    autoencoder_rules,
    in_single_file,
    match,
    shortened,
    text_encoder_rules,
    unet_rules,
)
from jaxdiff.weights.tensors import StoredTensor, open_tensors
from jaxdiff.weights.tokenizer import WHOLE

Config = dict[str, Any]
ComponentName = Literal["unet", "vae", "text_encoder"]
COMPONENTS: tuple[ComponentName, ...] = ("unet", "vae", "text_encoder")

INDEX, SCHEDULER, TOKENIZER = "model_index.json", "scheduler/scheduler_config.json", "tokenizer"
TENSORS: dict[str, str] = {  # stem of the file of tensors
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
OTHER_PIPELINES = {  # by how the pipeline's name begins
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "StableCascade": "Stable Cascade",
    "StableDiffusionControlNet": "Stable Diffusion with a ControlNet",
}
VARIANTS = (None, "fp16", "bf16")  # tried in this order where none is asked for
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
SAFE_WAY = (
    "a pickle can run any program when it is opened, so it is not read: take the .safetensors file of this model, or "
    "convert it in an environment that you can afford to lose (torch.load with weights_only=True, then "
    "safetensors.torch.save_file)"
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a path holds.

    configs: of "unet", "vae", "text_encoder" and "scheduler", under diffusers' and transformers' names.
    tensors, rules: of each component: what is stored under which name, and which parameter of ours it is.
    notes: what had to be supposed, for the user to read.
    """

    path: pathlib.Path
    kind: Literal["folder", "single file"]
    family: str  # "Stable Diffusion 1", "Stable Diffusion 2 inpainting" ...
    configs: dict[str, Config]
    tensors: dict[str, dict[str, StoredTensor]]
    rules: dict[str, list[Rule]]
    tokenizer: pathlib.Path | None = None
    notes: tuple[str, ...] = ()


def open_checkpoint(path: str | pathlib.Path, variant: str | None = None) -> Checkpoint:
    """Say what is at a path: a folder with a model_index.json, or a .safetensors file.

    variant: of a folder's files ("fp16"), for those components that have it; None takes the full ones where they are, else the
    halves.
    Raises FileNotFoundError, or ValueError with one line that names the file and what is wrong or not supported.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path, variant)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.suffix in PICKLES:
        raise ValueError(f"{path}: {SAFE_WAY}")
    return _open_file(path)


def load_params(
    checkpoint: Checkpoint,
    component: ComponentName,
    shapes: Mapping[str, Any],
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """A component's parameters: the tree, shapes and dtypes of `shapes` (eval_shape of init), file to device.

    put: takes a parameter's path ("encoder/conv_in/kernel") and array; by default it goes to the devices, by the `sharding` of
    its leaf in `shapes` where that has one. Tensors are read one at a time, the largest first, so that the memory needed
    besides the parameters is that of the largest tensor.
    Raises ValueError with one line that lists what is missing, unused, misshapen or wrongly typed; then nothing was read.
    """
    tensors = checkpoint.tensors[component]
    try:
        found = match(tensors, checkpoint.rules[component], shapes)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {component}: {error}") from error
    params = {}
    for name in sorted(found, key=lambda name: -tensors[name].nbytes):
        array = tensors[name].read()
        for tensor, leaf in found[name]:
            ours = np.ascontiguousarray(tensor.to_ours(array), dtype=leaf.dtype)
            if put is None:
                # Waited for: else a queue of transfers to an accelerator would hold the whole file.
                params[tensor.path] = jax.block_until_ready(jax.device_put(ours, getattr(leaf, "sharding", None)))
            else:
                params[tensor.path] = put(tensor.path, ours)
            del ours
        del array
    return unflatten_dict(params, sep="/")


def component_rules(component: str, config: Config, *, as_single_file: bool = False) -> list[Rule]:
    """The name rules of a component that a config describes. Raises ValueError for a config that makes no sense."""
    if component == "text_encoder":
        layers = _size(config, "num_hidden_layers", 12, single_file.MOST_LAYERS)
        openclip = config.get("hidden_act", "quick_gelu") == "gelu"
        rules, prefix = (
            text_encoder_rules(layers, openclip=openclip),
            single_file.OPENCLIP if openclip else single_file.CLIP,
        )
        return in_single_file(rules, prefix) if as_single_file else rules
    levels = config.get("block_out_channels")
    if not isinstance(levels, list | tuple) or not 1 <= len(levels) <= single_file.MOST_LEVELS:
        raise ValueError(f"block_out_channels = {str(levels)[:80]} must hold 1 to {single_file.MOST_LEVELS} numbers")
    blocks = _size(config, "layers_per_block", 2 if component == "unet" else 1, single_file.MOST_BLOCKS)
    if component == "vae":
        rules, prefix = autoencoder_rules(len(levels), blocks), single_file.VAE
    else:
        types = config.get("down_block_types", ["CrossAttnDownBlock2D"] * (len(levels) - 1))
        if not isinstance(types, list | tuple):
            raise ValueError(f"down_block_types = {str(types)[:80]} must be a list")
        attends = [level for level, name in enumerate(types) if name == "CrossAttnDownBlock2D"]
        linear = bool(config.get("use_linear_projection", False))
        rules = unet_rules(len(levels), blocks, linear_projection=linear, attention_levels=attends)
        prefix = single_file.UNET
    return in_single_file(rules, prefix) if as_single_file else rules


def open_component(
    folder: pathlib.Path, component: str, variant: str | None = None
) -> tuple[Config, dict[str, StoredTensor]]:
    """Config and tensors of a component's folder in diffusers' layout. Raises ValueError with one line."""
    return _read_json(folder / "config.json"), _find_tensors(folder, TENSORS[component], variant)


def _open_folder(path: pathlib.Path, variant: str | None) -> Checkpoint:
    if not (path / INDEX).is_file():
        raise ValueError(f"{path}: {_not_a_model(path)}")
    name = ascii(_read_json(path / INDEX).get("_class_name"))[:60].strip("'")
    if name not in PIPELINES:
        known = next(
            (what for start, what in OTHER_PIPELINES.items() if name.startswith(start)), "another kind of model"
        )
        raise ValueError(f"{path}: it is {known} ({name}); supported are Stable Diffusion 1.x and 2.x")
    configs: dict[str, Config] = {}
    tensors: dict[str, dict[str, StoredTensor]] = {}
    rules: dict[str, list[Rule]] = {}
    plain = [part for part in COMPONENTS if not _tensor_file(path / part, TENSORS[part], variant)]
    plain = plain if variant and len(plain) < len(COMPONENTS) else []  # a variant that nothing has is refused
    for component in COMPONENTS:
        if not (path / component).is_dir():
            raise ValueError(f"{path}: {INDEX} says {name}, but there is no folder {component}/")
        wanted = None if component in plain else variant
        configs[component], tensors[component] = open_component(path / component, component, wanted)
        try:
            rules[component] = component_rules(component, configs[component])
        except ValueError as error:
            raise ValueError(f"{path / component / 'config.json'}: {error}") from error
    configs["scheduler"] = _read_json(path / SCHEDULER)
    try:
        inputs = single_file.input_kind(_size(configs["unet"], "in_channels", 4, 10_000))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    family = f"Stable Diffusion {2 if configs['unet'].get('use_linear_projection') else 1}{inputs}"
    notes = (f"the variant {variant} is not there of {' and '.join(plain)}: another is taken",) if plain else ()
    tokenizer = path / TOKENIZER if (path / TOKENIZER).is_dir() else None
    return Checkpoint(path, "folder", family, configs, tensors, rules, tokenizer, notes)


def _open_file(path: pathlib.Path) -> Checkpoint:
    stored = open_tensors(path)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    tokenizer = _tokenizer_beside(path)
    takes = f"that in {tokenizer} beside it is taken" if tokenizer else "CLIP's own is taken"
    notes = [f"a single file has no tokenizer: {takes}"]
    try:
        family = single_file.identify(shapes)
        if strangers := single_file.unknown(shapes):
            raise ValueError(f"it has tensors that no Stable Diffusion has: {shortened(strangers)}")
        configs = single_file.configs(shapes, _global_step(stored))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if family.startswith("Stable Diffusion 2") and "v_pred" not in shapes:
        prediction = configs["scheduler"]["prediction_type"]
        notes.append(f"the file does not say what the U-Net predicts: {prediction} is supposed, as diffusers does")
    if any(name.startswith("model_ema.") for name in shapes):
        notes.append("the file holds averaged weights too (model_ema): they are not read")
    tensors: dict[str, dict[str, StoredTensor]] = {component: {} for component in COMPONENTS}
    for name, tensor in stored.items():
        if component := single_file.component_of(name):
            tensors[component][name] = tensor
    rules: dict[str, list[Rule]] = {
        name: component_rules(name, configs[name], as_single_file=True) for name in COMPONENTS
    }
    return Checkpoint(path, "single file", family, configs, tensors, rules, tokenizer, tuple(notes))


def _tokenizer_beside(path: pathlib.Path) -> pathlib.Path | None:
    """The folder of a tokenizer that somebody put beside a file."""
    wanted = (("vocab.json", "merges.txt"), (WHOLE,))
    folders = (path.parent / TOKENIZER, path.parent)
    return next((at for at in folders for names in wanted if all((at / name).is_file() for name in names)), None)


def _global_step(stored: Mapping[str, StoredTensor]) -> int | None:
    tensor = stored.get("global_step")
    return (
        int(tensor.read().reshape(())) if tensor and tensor.shape in ((), (1,)) and tensor.dtype.kind in "iu" else None
    )


def _find_tensors(folder: pathlib.Path, stem: str, variant: str | None) -> dict[str, StoredTensor]:
    """The tensors of a folder: one file, or several that an index names."""
    for wanted in (variant,) if variant else VARIANTS:
        if file := _tensor_file(folder, stem, wanted):
            return _open_shards(file) if file.suffix == ".json" else open_tensors(file)
    there = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    expected = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    if (pickles := [name for name in there if name.endswith(PICKLES)]) and not any("safetensors" in n for n in there):
        raise ValueError(f"{folder}: it holds {pickles[0]} and no {expected}; {SAFE_WAY}")
    raise ValueError(f"{folder}: there is no {expected}, only {shortened(there) or 'nothing'}")


def _tensor_file(folder: pathlib.Path, stem: str, variant: str | None) -> pathlib.Path | None:
    """The file of a variant, or the index of its shards."""
    part = f".{variant}" if variant else ""
    files = folder / f"{stem}{part}.safetensors", folder / f"{stem}.safetensors.index{part}.json"
    return next((file for file in files if file.is_file()), None)


def _open_shards(index: pathlib.Path) -> dict[str, StoredTensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: it has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A plain name: nothing outside the folder is opened, whatever the index says.
        if not isinstance(file, str) or not file.endswith(".safetensors") or any(c in file for c in "/\\\0"):
            raise ValueError(f"{index}: {ascii(file)[:80]} is not the name of a .safetensors file beside it")
        shards.setdefault(file, set()).add(name)
    tensors: dict[str, StoredTensor] = {}
    for file, names in sorted(shards.items()):
        if not (index.parent / file).is_file():
            raise ValueError(f"{index}: it names {ascii(file)[:200]}, which is not there: the download is not complete")
        shard = open_tensors(index.parent / file)
        if shard.keys() != names:
            lacking, more = sorted(names - shard.keys()), sorted(shard.keys() - names)
            what = (
                f"lacks {shortened([ascii(name)[:200] for name in lacking])}"
                if lacking
                else f"also has {shortened(more)}"
            )
            raise ValueError(f"{index.parent / file}: it {what}, unlike {index.name} says")
        tensors |= shard
    return tensors


def _not_a_model(path: pathlib.Path) -> str:
    """Why a folder without model_index.json may be none."""
    if (path / "config.json").is_file():
        name = ascii(_read_json(path / "config.json").get("_class_name", "model of transformers"))[:60].strip("'")
        return f"a {name} alone; a Stable Diffusion folder has {INDEX} and unet/, vae/, text_encoder/"
    if files := sorted(file.name for file in path.glob("*.safetensors")):
        return f"it has no {INDEX}; if {files[0]} is a single-file checkpoint, give that file and not the folder"
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLES):
        return f"it has no {INDEX}, but {pickles[0]}; {SAFE_WAY}"
    if snapshots := sorted(path.glob(f"snapshots/*/{INDEX}")):
        return f"it is a cache folder of the hub; give {snapshots[0].parent}"
    return f"it is not a model: a Stable Diffusion folder has {INDEX} and unet/, vae/, text_encoder/"


def _read_json(path: pathlib.Path) -> Config:
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: it cannot be read ({type(error).__name__}: {ascii(str(error))[:120]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: it must hold a JSON object")
    return content


def _size(config: Config, name: str, default: int, most: int) -> int:
    value = config.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} = {str(value)[:40]} must be an integer from 1 to {most}")
    return value
