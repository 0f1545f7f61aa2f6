"""LoRA files of Stable Diffusion: the two factors of each adapted layer, in kohya's naming or in that of diffusers (PEFT).

Read by the same name rules as the models themselves, and as strictly: a layer that the model does not have is refused, and so
is what is no plain LoRA. Of a file in the names of diffusers alpha is in its metadata, else it is the rank.
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from jaxdiff.files import parse_json
from jaxdiff.weights.names import FLOATS, Rule, Tensor, shortened
from jaxdiff.weights.tensors import StoredTensor, open_tensors, read_metadata, write_tensors

Naming = Literal["kohya", "diffusers"]
NAMINGS: tuple[Naming, ...] = ("kohya", "diffusers")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings

# A tensor's name: the layer, then which factor it is. The second line: diffusers before PEFT.
FACTOR = re.compile(
    r"(?P<layer>.+?)(_lora)?\.("
    r"lora_(?P<kohya>down|up)\.weight|lora_(?P<peft>A|B)(\.default)?\.weight|(?P<alpha>alpha)"
    r"|(lora\.|lora_linear_layer\.)?(?P<old>down|up)\.weight)"
)
ADAPTERS = r"lora|dora_|hada_|lokr_|oft_|\.(diff|diff_b|set_weight|w_norm|b_norm)$"
# What other kinds of adapters have: a pattern of a tensor's name, and what it then is.
OTHERS = (
    (r"hada_|lokr_|oft_|\.(diff|diff_b|set_weight|w_norm|b_norm)$", "a LyCORIS of another kind than LoRA"),
    (r"lora_mid", "a LoRA in CP decomposition"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA"),
    (r"lora.*\.bias$", "a LoRA with biases"),
    (r"lora_te2_|text_encoder_2\.|lora_unet_(input|output)_blocks_\d+_\d+_transformer_blocks_[1-9]", "a LoRA of XL"),
    (r"lora_transformer_|transformer\.|(double|single)_blocks|diffusion_model\.", "a LoRA of another model"),
)


class Factors(NamedTuple):
    """The update of a kernel, alpha / r * A B in our layout: A [... i r], B [r o]."""

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.b.shape[0]


Adapters = dict[str, dict[str, Factors]]  # of "unet" and "text_encoder", by the path of the kernel
Layers = dict[str, tuple[str, Tensor, tuple[int, ...]]]  # name in a file -> part, our kernel, its shape


def load_lora(
    path: str | pathlib.Path, rules: Mapping[str, Sequence[Rule]], shapes: Mapping[str, Mapping[str, Any]]
) -> Adapters:
    """The factors in a file, float32, for the models that `rules` and `shapes` describe: "unet" and "text_encoder".

    Raises FileNotFoundError, or ValueError with one line that names the file and what is damaged, not LoRA, or not of this model.
    """
    path = pathlib.Path(path).expanduser()
    stored = open_tensors(path)
    try:
        return _read(stored, _layers(rules, shapes), read_metadata(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_lora(
    path: str | pathlib.Path,
    adapters: Mapping[str, Mapping[str, Factors]],
    rules: Mapping[str, Sequence[Rule]],
    naming: Naming = "kohya",
) -> None:
    """Write a file that `load_lora` and PyTorch's programs read, float32.

    In kohya's naming every layer has its alpha. That of diffusers has no place for it where all its versions look: there B
    is multiplied by alpha / rank, so that they are the same.
    """
    tensors: dict[str, np.ndarray] = {}
    for part, factors in adapters.items():
        names = {f"{rule.ours}/kernel": rule for rule in reversed(rules[part])}
        for kernel, (a, b, alpha) in factors.items():
            rule = names[kernel]
            down, up = Tensor(rule.theirs, kernel, rule.kind).to_theirs(a), b.T
            if down.ndim == 4:
                up = up[:, :, None, None]
            if naming == "kohya":
                name = KOHYA[part] + rule.theirs.replace(".", "_")
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = np.asarray(alpha, np.float32)
            else:
                name, scale = f"{part}.{rule.theirs}", np.float32(alpha / b.shape[0])
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * scale}
    write_tensors(path, {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()})


def _layers(rules: Mapping[str, Sequence[Rule]], shapes: Mapping[str, Mapping[str, Any]]) -> Layers:
    """Every name that a file may have for a layer."""
    found: Layers = {}
    for part, table in rules.items():
        kernels = flatten_dict(shapes[part], sep="/")
        for rule in table:
            kernel = f"{rule.ours}/kernel"
            if kernel not in kernels or rule.kind not in ("conv", "dense", "pointwise"):
                continue
            layer = part, Tensor(rule.theirs, kernel, rule.kind), tuple(kernels[kernel].shape)
            names = [rule.theirs] + ([rule.compvis] if part == "unet" and rule.compvis is not None else [])
            found |= {KOHYA[part] + name.replace(".", "_"): layer for name in names}
            found[f"{part}.{rule.theirs}"] = layer
            if part == "unet":
                found[rule.theirs] = layer
    return found


def _read(stored: Mapping[str, StoredTensor], layers: Layers, metadata: Mapping[str, str]) -> Adapters:
    if not stored:
        raise ValueError("it holds no tensors")
    files: dict[str, dict[str, StoredTensor]] = {}
    alphas = _peft_alphas(metadata)
    strange: list[str] = []
    for name, tensor in stored.items():
        layer, which = _parsed(name)
        if layer not in layers:
            strange.append(name)
        else:
            files.setdefault(layer, {})[which] = tensor
    if strange:
        like = [name for name in strange if re.search(ADAPTERS, name)]  # of a whole model there are none
        other = next((what for pattern, what in OTHERS if any(re.search(pattern, name) for name in like)), None)
        if other or not files:
            raise ValueError(
                f"it is {other or 'no LoRA of Stable Diffusion'}: it holds {shortened(sorted(strange), 3)}"
            )
        raise ValueError(f"it adapts layers that this model does not have: {shortened(sorted(strange))}")
    adapters: Adapters = {}
    for layer, factors in files.items():
        part, kernel, shape = layers[layer]
        if kernel.path in adapters.setdefault(part, {}):
            raise ValueError(f"{layer} is there twice, under two names")
        adapters[part][kernel.path] = _factors(layer, factors, kernel, shape, alphas)
    return adapters


def _parsed(name: str) -> tuple[str, str]:
    """The layer and "down", "up" or "alpha"; ("", "") for a name that is no factor's."""
    found = FACTOR.fullmatch(name)
    if found is None:
        return "", ""
    which = found["kohya"] or found["old"] or found["alpha"] or {"A": "down", "B": "up"}[found["peft"]]
    layer = found["layer"].removeprefix("base_model.model.").replace(".processor.", ".")
    return (f"{layer}.0" if layer.endswith(".to_out") else layer), which


def _factors(
    layer: str, stored: Mapping[str, StoredTensor], tensor: Tensor, shape: tuple[int, ...], alphas: Mapping[str, float]
) -> Factors:
    lacking = [name for name in ("down", "up") if name not in stored]
    if lacking:
        raise ValueError(f"{layer} has no factor {lacking[0]!r}")
    for name, found in stored.items():
        if found.dtype.name not in FLOATS and name != "alpha":
            raise ValueError(f"{layer} ({name}) holds {found.dtype}, should hold one of {', '.join(FLOATS)}")
    down, up = stored["down"].shape, stored["up"].shape
    rank = down[0] if down else 0
    wanted_down = tensor.shape_there((*shape[:-1], rank))
    wanted_up = (shape[-1], rank)
    if not rank or not _same(down, wanted_down) or not _same(up, wanted_up):
        raise ValueError(
            f"{layer} has factors {list(down)} and {list(up)}, should have {list(wanted_down)} and {list(wanted_up)} for some "
            "rank: it was made for another model"
        )
    a = tensor.to_ours(stored["down"].read().reshape(wanted_down)).astype(np.float32)
    b = stored["up"].read().reshape(wanted_up).T.astype(np.float32)
    alpha = _alpha(layer, stored["alpha"]) if "alpha" in stored else _peft_alpha(layer, alphas, rank)
    return Factors(np.ascontiguousarray(a), np.ascontiguousarray(b), alpha)


def _same(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the shapes are one, 1x1 of a convolution aside."""
    return found[:2] == wanted[:2] and {*found[2:], *wanted[2:]} <= {1} or found == wanted


def _alpha(layer: str, stored: StoredTensor) -> float:
    value = float(stored.read().astype(np.float64).reshape(-1)[0]) if math.prod(stored.shape) == 1 else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{layer}.alpha must be one number")
    return value


def _peft_alphas(metadata: Mapping[str, str]) -> dict[str, float]:
    """Alphas that diffusers noted, by layer, with the part's name alone for all its others."""
    try:
        settings = parse_json(metadata.get(METADATA, "{}"))
        if not isinstance(settings, dict):
            raise ValueError("it must hold a JSON object")
        found = {}
        for key, value in settings.items():
            part, _, name = key.partition(".")
            if name == "use_dora" and value or name == "use_rslora" and value:
                raise ValueError(f"{key} = {value!r} is not supported")
            if name == "lora_alpha":
                found[part] = float(value)
            if name == "alpha_pattern":
                found |= {f"{part}.{layer}": float(alpha) for layer, alpha in value.items()}
        if not all(math.isfinite(alpha) for alpha in found.values()):
            raise ValueError("every alpha must be a number")
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"its metadata {METADATA}: {error}") from error
    return found


def _peft_alpha(layer: str, alphas: Mapping[str, float], rank: int) -> float:
    """PEFT's pattern names the end of a layer's name, or all of it."""
    part, _, name = layer.partition(".")
    for pattern, alpha in alphas.items():
        of, _, end = pattern.partition(".")
        if end and of == part and (name == end or name.endswith(f".{end}")):
            return alpha
    return alphas.get(part, float(rank))
