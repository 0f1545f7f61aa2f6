"""Name rules between PyTorch checkpoints and our parameters: one table a model, read in both directions.

A rule says which module of the checkpoint is which module of ours and what kind of layer it is; the kind says how its
tensors are turned. A table may have rules for modules that a given model lacks: the shapes of our parameters decide.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# conv: [o i h w] there, [h w i o] here. dense: [o i], [i o]. pointwise: a 1x1 convolution there, a Dense here.
# fused_*: a third of the rows of one tensor there, a Dense here. table: an embedding that is no module there.
# ignored: a tensor of the checkpoint, or all tensors of a module, that this model does not read.
Kind = Literal[
    "conv", "dense", "pointwise", "norm", "embedding", "table", "fused_query", "fused_key", "fused_value", "ignored"
]
Arrays = Mapping[str, np.ndarray]

FUSED: dict[str, int] = {"fused_query": 0, "fused_key": 1, "fused_value": 2}
FLOATS = ("float16", "bfloat16", "float32", "float64")

# Their tensor -> our leaf, by kind.
LEAVES: dict[str, dict[str, str]] = {
    "conv": {".weight": "kernel", ".bias": "bias"},
    "dense": {".weight": "kernel", ".bias": "bias"},
    "pointwise": {".weight": "kernel", ".bias": "bias"},
    "norm": {".weight": "scale", ".bias": "bias"},
    "embedding": {".weight": "embedding"},
    "table": {"": "embedding"},
    **{kind: {".in_proj_weight": "kernel", ".in_proj_bias": "bias"} for kind in FUSED},
    "ignored": {},
}


class Stored(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its numbers in the file."""


class Rule(NamedTuple):
    """`theirs`: dotted name of a module in diffusers' checkpoint. `ours`: path of a module here, with slashes.

    `compvis`: the module's name in the single files of Stable Diffusion's first authors, without the prefix of the
    component; None where those have no such name. `compvis_kind`: its kind there, where that differs.
    Where several rules have the same path here, the first is written; the others are older names, which are read too.
    """

    theirs: str
    ours: str
    kind: Kind
    compvis: str | None = None
    compvis_kind: Kind | None = None


class Tensor(NamedTuple):
    """One tensor of the checkpoint, or a third of one, and where it goes."""

    name: str
    path: str
    kind: Kind

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """The array in our layout: a view."""
        if self.kind in FUSED:
            array = np.split(array, 3)[FUSED[self.kind]]
        if not self.path.endswith("/kernel"):
            return array
        if self.kind == "conv":
            return array.transpose(2, 3, 1, 0)
        return (array[:, :, 0, 0] if self.kind == "pointwise" else array).T

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The array in the checkpoint's layout: a view; of a fused tensor this model's third."""
        if not self.path.endswith("/kernel"):
            return array
        if self.kind == "conv":
            return array.transpose(3, 2, 0, 1)
        return array.T[:, :, None, None] if self.kind == "pointwise" else array.T

    def shape_there(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor in the checkpoint when ours has `shape`."""
        there = self.to_theirs(np.broadcast_to(np.zeros((), np.int8), shape)).shape
        return (3 * there[0], *there[1:]) if self.kind in FUSED else there


def match(
    tensors: Mapping[str, Stored], rules: Sequence[Rule], shapes: Mapping[str, Any]
) -> dict[str, list[tuple[Tensor, Any]]]:
    """Every tensor of a checkpoint that is read, by name, and the leaves of `shapes` that it fills; nothing is read yet.

    Strict: every parameter gets its tensor and every tensor is used; else one ValueError says which were not.
    """
    alternatives = _alternatives(rules, shapes)
    missing: list[str] = []
    wrong: dict[str, str] = {}
    found: dict[str, list[tuple[Tensor, Any]]] = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        tensor = next((tensor for tensor in alternatives[path] if tensor.name in tensors), None)
        if tensor is None:
            missing.append(alternatives[path][0].name)
            continue
        found.setdefault(tensor.name, []).append((tensor, leaf))
        stored, wanted = tensors[tensor.name], tensor.shape_there(leaf.shape)
        if tuple(stored.shape) != wanted:
            wrong[tensor.name] = f"{tensor.name} is {list(stored.shape)}, should be {list(wanted)}"
        elif stored.dtype.name not in FLOATS:
            wrong[tensor.name] = f"{tensor.name} holds {stored.dtype}, should hold one of {', '.join(FLOATS)}"
    ignored = [rule.theirs for rule in rules if rule.kind == "ignored"]
    unused = sorted(name for name in set(tensors) - set(found) if not _is_under(name, ignored))
    problems = {"missing": list(dict.fromkeys(missing)), "unused": unused, "misshapen": list(wrong.values())}
    if any(problems.values()):
        listed = "; ".join(f"{what}: {shortened(names)}" for what, names in problems.items() if names)
        raise ValueError(f"the weights are not this model's. {listed}")
    return found


def to_ours(tensors: Arrays, rules: Sequence[Rule], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's tensors as our parameters, which have the tree, shapes and dtypes of `shapes` (eval_shape of init).

    Strict, as `match` is.
    """
    params = {}
    for name, leaves in match(tensors, rules, shapes).items():
        for tensor, leaf in leaves:
            params[tensor.path] = tensor.to_ours(tensors[name]).astype(leaf.dtype, copy=False)
    return unflatten_dict(params, sep="/")


def to_theirs(params: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Our parameters as the checkpoint's tensors: the inverse of `to_ours`, bit by bit."""
    alternatives = _alternatives(rules, params)
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        tensor = alternatives[path][0]
        parts.setdefault(tensor.name, {})[FUSED.get(tensor.kind, 0)] = tensor.to_theirs(np.asarray(leaf))
    return {
        name: np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate([arrays[i] for i in range(3)]))
        for name, arrays in parts.items()
    }


def shapes_there(shapes: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `to_theirs` makes of parameters of these shapes; nothing is computed."""
    alternatives = _alternatives(rules, shapes)
    leaves = flatten_dict(shapes, sep="/").items()
    return {alternatives[path][0].name: alternatives[path][0].shape_there(leaf.shape) for path, leaf in leaves}


def in_single_file(rules: Sequence[Rule], prefix: str) -> list[Rule]:
    """The same table for a single file, where the component's tensors have a prefix ("model.diffusion_model.")."""
    return [
        Rule(prefix + rule.compvis, rule.ours, rule.compvis_kind or rule.kind)
        for rule in rules
        if rule.compvis is not None
    ]


def shortened(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, for an error of one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _is_under(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules if module)


def _alternatives(rules: Sequence[Rule], tree: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """For every leaf of the tree the tensors that may hold it, the preferred one first."""
    found: dict[str, list[Tensor]] = {path: [] for path in flatten_dict(tree, sep="/")}
    for rule in rules:
        for suffix, leaf in LEAVES[rule.kind].items():
            path = f"{rule.ours}/{leaf}"
            if path in found:
                found[path].append(Tensor(f"{rule.theirs}{suffix}", path, rule.kind))
    lost = [path for path, tensors in found.items() if not tensors]
    if lost:
        raise ValueError(f"no name rule for {shortened(lost)}: are the rules made for this model's levels and blocks?")
    return found


# The tables ---------------------------------------------------------------------------------------------------------

# diffusers' ResnetBlock2D, ours, kind, CompVis's in the U-Net, CompVis's in the autoencoder.
RESIDUAL: tuple[tuple[str, str, Kind, str, str], ...] = (
    ("norm1", "norm1", "norm", "in_layers.0", "norm1"),
    ("conv1", "conv1", "conv", "in_layers.2", "conv1"),
    ("time_emb_proj", "embedding_projection", "dense", "emb_layers.1", "temb_proj"),
    ("norm2", "norm2", "norm", "out_layers.0", "norm2"),
    ("conv2", "conv2", "conv", "out_layers.3", "conv2"),
    ("conv_shortcut", "shortcut", "pointwise", "skip_connection", "nin_shortcut"),
)

# transformers' CLIPEncoderLayer, ours, kind, OpenCLIP's, kind there.
TEXT_LAYER: tuple[tuple[str, str, Kind, str, Kind], ...] = (
    ("layer_norm1", "norm1", "norm", "ln_1", "norm"),
    ("self_attn.q_proj", "attention/query", "dense", "attn", "fused_query"),
    ("self_attn.k_proj", "attention/key", "dense", "attn", "fused_key"),
    ("self_attn.v_proj", "attention/value", "dense", "attn", "fused_value"),
    ("self_attn.out_proj", "attention/out", "dense", "attn.out_proj", "dense"),
    ("layer_norm2", "norm2", "norm", "ln_2", "norm"),
    ("mlp.fc1", "dense_in", "dense", "mlp.c_fc", "dense"),
    ("mlp.fc2", "dense_out", "dense", "mlp.c_proj", "dense"),
)


def unet_residual_rules(theirs: str, ours: str, compvis: str) -> Iterator[Rule]:
    """A residual block of the U-Net."""
    for there, here, kind, name, _ in RESIDUAL:
        yield Rule(f"{theirs}.{there}", f"{ours}/{here}", kind, f"{compvis}.{name}")


def autoencoder_residual_rules(theirs: str, ours: str, compvis: str) -> Iterator[Rule]:
    """A residual block of the autoencoder."""
    for there, here, kind, _, name in RESIDUAL:
        yield Rule(f"{theirs}.{there}", f"{ours}/{here}", kind, f"{compvis}.{name}")


def transformer_rules(theirs: str, ours: str, compvis: str, linear_projection: bool) -> Iterator[Rule]:
    """Transformer2DModel of diffusers; its projections are 1x1 convolutions in Stable Diffusion 1, linear in 2."""
    projection: Kind = "dense" if linear_projection else "pointwise"

    def rule(there: str, here: str, kind: Kind) -> Rule:  # the one module whose parts all have the same names
        return Rule(f"{theirs}.{there}", f"{ours}/{here}", kind, f"{compvis}.{there}")

    yield rule("norm", "norm", "norm")
    yield rule("proj_in", "project_in", projection)
    yield rule("proj_out", "project_out", projection)
    there, here = "transformer_blocks.0", "block_0"
    for n in (1, 2, 3):
        yield rule(f"{there}.norm{n}", f"{here}/norm{n}", "norm")
    for their_attention, our_attention in (("attn1", "self_attention"), ("attn2", "cross_attention")):
        for name, ours_name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
            yield rule(f"{there}.{their_attention}.{name}", f"{here}/{our_attention}/{ours_name}", "dense")
    yield rule(f"{there}.ff.net.0.proj", f"{here}/feed_forward/dense_in", "dense")
    yield rule(f"{there}.ff.net.2", f"{here}/feed_forward/dense_out", "dense")


def unet_rules(
    num_levels: int,
    num_res_blocks: int,
    *,
    linear_projection: bool = False,
    attention_levels: Sequence[int] | None = None,
) -> list[Rule]:
    """UNet2DConditionModel of diffusers, and our UNet with a context.

    linear_projection: how the file keeps the transformers' projections: False for Stable Diffusion 1, True for 2.
    attention_levels: levels with transformers, on which the numbers in single files depend; None for all but the last.
    """
    rules = [
        Rule("conv_in", "conv_in", "conv", "input_blocks.0.0"),
        Rule("time_embedding.linear_1", "time_embedding/dense_0", "dense", "time_embed.0"),
        Rule("time_embedding.linear_2", "time_embedding/dense_1", "dense", "time_embed.2"),
        Rule("conv_norm_out", "norm_out", "norm", "out.0"),
        Rule("conv_out", "conv_out", "conv", "out.2"),
    ]
    attends = range(num_levels - 1) if attention_levels is None else attention_levels

    def block(theirs: str, i: int, ours: str, residual: str, transformer: str) -> None:
        rules.extend(unet_residual_rules(f"{theirs}.resnets.{i}", f"{ours}/residual", residual))
        there = f"{theirs}.attentions.{i}"
        rules.extend(transformer_rules(there, f"{ours}/transformer", transformer, linear_projection))

    for level in range(num_levels):
        down, above = f"down_blocks.{level}", num_levels - 1 - level
        up = f"up_blocks.{above}"  # theirs count from the smallest feature map upwards
        for i in range(num_res_blocks):
            name = f"input_blocks.{1 + level * (num_res_blocks + 1) + i}"  # a downsampling counts as a block
            block(down, i, f"down_{level}_{i}", f"{name}.0", f"{name}.1")
        for i in range(num_res_blocks + 1):
            name = f"output_blocks.{above * (num_res_blocks + 1) + i}"  # an upsampling is part of the last block
            block(up, i, f"up_{level}_{i}", f"{name}.0", f"{name}.1")
        downsample = f"input_blocks.{(level + 1) * (num_res_blocks + 1)}.0.op"
        rules.append(Rule(f"{down}.downsamplers.0.conv", f"down_{level}_downsample/conv", "conv", downsample))
        upsample = f"{name}.{2 if level in attends else 1}.conv"
        rules.append(Rule(f"{up}.upsamplers.0.conv", f"up_{level}_upsample/conv", "conv", upsample))
    for i in range(2):
        block("mid_block", i, f"middle_{i}", f"middle_block.{2 * i}", f"middle_block.{2 * i + 1}")
    return rules


def autoencoder_rules(num_levels: int, num_res_blocks: int) -> list[Rule]:
    """AutoencoderKL of diffusers, with the attention's names before and after diffusers 0.17."""
    rules = [
        Rule("quant_conv", "moments_projection", "pointwise", "quant_conv"),
        Rule("post_quant_conv", "latents_projection", "pointwise", "post_quant_conv"),
    ]
    for part in ("encoder", "decoder"):
        for there, here, kind, compvis in (
            ("conv_in", "conv_in", "conv", "conv_in"),
            ("conv_norm_out", "norm_out", "norm", "norm_out"),
            ("conv_out", "conv_out", "conv", "conv_out"),
            ("mid_block.attentions.0.group_norm", "middle/attention/norm", "norm", "mid.attn_1.norm"),
        ):
            rules.append(Rule(f"{part}.{there}", f"{part}/{here}", kind, f"{part}.{compvis}"))  # type: ignore[arg-type]
        for i in range(2):
            there, compvis = f"{part}.mid_block.resnets.{i}", f"{part}.mid.block_{i + 1}"
            rules.extend(autoencoder_residual_rules(there, f"{part}/middle/residual_{i}", compvis))
        for new, old, here, compvis in (
            ("to_q", "query", "query", "q"),
            ("to_k", "key", "key", "k"),
            ("to_v", "value", "value", "v"),
            ("to_out.0", "proj_attn", "out", "proj_out"),
        ):
            there, ours = f"{part}.mid_block.attentions.0", f"{part}/middle/attention/attention/{here}"
            rules.append(Rule(f"{there}.{new}", ours, "dense", f"{part}.mid.attn_1.{compvis}", "pointwise"))
            rules.append(Rule(f"{there}.{old}", ours, "dense"))
    for level in range(num_levels):
        for part, there, here, blocks in (
            ("encoder", f"down_blocks.{level}", "down", num_res_blocks),
            ("decoder", f"up_blocks.{num_levels - 1 - level}", "up", num_res_blocks + 1),
        ):
            ours, compvis = f"{part}/{here}_{level}", f"{part}.{here}.{level}"
            for i in range(blocks):
                names = f"{part}.{there}.resnets.{i}", f"{ours}_{i}", f"{compvis}.block.{i}"
                rules.extend(autoencoder_residual_rules(*names))
            sample = f"{part}.{there}.{here}samplers.0.conv"
            rules.append(Rule(sample, f"{ours}_{here}sample/conv", "conv", f"{compvis}.{here}sample.conv"))
    return rules


def text_encoder_rules(num_layers: int, *, openclip: bool = False) -> list[Rule]:
    """CLIPTextModel of transformers: with the prefix of published checkpoints, or without it as transformers 5 saves.

    openclip: single files have OpenCLIP's names (Stable Diffusion 2) and not transformers' (1).
    """
    rules = []
    for prefix in ("text_model.", ""):
        for there, here, kind, compvis, compvis_kind in (
            ("embeddings.token_embedding", "token_embedding", "embedding", "token_embedding", "embedding"),
            ("embeddings.position_embedding", "position_embedding", "embedding", "positional_embedding", "table"),
            ("final_layer_norm", "norm_out", "norm", "ln_final", "norm"),
            *(
                (f"encoder.layers.{i}.{there}", f"block_{i}/{here}", kind, f"transformer.resblocks.{i}.{name}", as_kind)
                for i in range(num_layers)
                for there, here, kind, name, as_kind in TEXT_LAYER
            ),
        ):
            theirs = f"{prefix}{there}"
            names = (compvis, compvis_kind) if openclip else (theirs, kind)
            rules.append(Rule(theirs, here, kind, *names))  # type: ignore[arg-type]
        # 0, 1, 2 ...: kept by transformers before 4.31
        rules.append(Rule(f"{prefix}embeddings.position_ids", "", "ignored", f"{prefix}embeddings.position_ids"))
    # What compares a text with an image; and OpenCLIP's last layer, for Stable Diffusion 2 reads the last but one.
    for compvis in ("text_projection", "logit_scale", "attn_mask", f"transformer.resblocks.{num_layers}"):
        rules.append(Rule("", "", "ignored", compvis))
    return rules
