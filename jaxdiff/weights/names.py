"""Name rules between PyTorch checkpoints and our parameters: one table a model, read in both directions.

A rule says which module of the checkpoint is which module of ours and what kind of layer it is; the kind says how its
tensors are turned. A table may have rules for modules that a given model lacks: the shapes of our parameters decide.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# conv: [o i h w] there, [h w i o] here. dense: [o i], [i o]. pointwise: a 1x1 convolution there, a Dense here.
# ignored: a tensor of the checkpoint that carries nothing.
Kind = Literal["conv", "dense", "pointwise", "norm", "embedding", "ignored"]
Arrays = Mapping[str, np.ndarray]

# Their tensor -> our leaf, by kind.
LEAVES: dict[str, dict[str, str]] = {
    "conv": {"weight": "kernel", "bias": "bias"},
    "dense": {"weight": "kernel", "bias": "bias"},
    "pointwise": {"weight": "kernel", "bias": "bias"},
    "norm": {"weight": "scale", "bias": "bias"},
    "embedding": {"weight": "embedding"},
    "ignored": {},
}


class Rule(NamedTuple):
    """`theirs`: dotted name of a module in the checkpoint. `ours`: path of a module here, with slashes.

    Where several rules have the same path here, the first is written; the others are older names, which are read too.
    """

    theirs: str
    ours: str
    kind: Kind


class Tensor(NamedTuple):
    """One tensor of the checkpoint and where it goes."""

    name: str
    path: str
    kind: Kind

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """The array in our layout: a view."""
        if not self.path.endswith("/kernel"):
            return array
        if self.kind == "conv":
            return array.transpose(2, 3, 1, 0)
        return (array[:, :, 0, 0] if self.kind == "pointwise" else array).T

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The array in the checkpoint's layout: a view."""
        if not self.path.endswith("/kernel"):
            return array
        if self.kind == "conv":
            return array.transpose(3, 2, 0, 1)
        return array.T[:, :, None, None] if self.kind == "pointwise" else array.T

    def shape_there(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor in the checkpoint when ours has `shape`."""
        return self.to_theirs(np.broadcast_to(np.zeros((), np.int8), shape)).shape


def to_ours(tensors: Arrays, rules: Sequence[Rule], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's tensors as our parameters, which have the tree, shapes and dtypes of `shapes` (eval_shape of init).

    Strict: every parameter gets its tensor and every tensor is used; else one ValueError says which were not.
    """
    alternatives = _alternatives(rules, shapes)
    missing, misshapen, params, used = [], [], {}, set()
    for path, leaf in flatten_dict(shapes, sep="/").items():
        tensor = next((tensor for tensor in alternatives[path] if tensor.name in tensors), None)
        if tensor is None:
            missing.append(alternatives[path][0].name)
            continue
        used.add(tensor.name)
        array, wanted = tensors[tensor.name], tensor.shape_there(leaf.shape)
        if array.shape != wanted:
            misshapen.append(f"{tensor.name} is {list(array.shape)}, should be {list(wanted)}")
        elif array.dtype.kind in "iubO":  # NumPy calls bfloat16 "V"
            misshapen.append(f"{tensor.name} holds {array.dtype}, should hold floating-point numbers")
        else:
            params[path] = tensor.to_ours(array).astype(leaf.dtype, copy=False)
    unused = sorted(set(tensors) - used - {rule.theirs for rule in rules if rule.kind == "ignored"})
    problems = {"missing": missing, "unused": unused, "misshapen": misshapen}
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_shortened(names)}" for what, names in problems.items() if names)
        raise ValueError(f"the weights are not this model's. {listed}")
    return unflatten_dict(params, sep="/")


def to_theirs(params: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Our parameters as the checkpoint's tensors: the inverse of `to_ours`, bit by bit."""
    alternatives = _alternatives(rules, params)
    tensors = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        tensor = alternatives[path][0]
        tensors[tensor.name] = np.ascontiguousarray(tensor.to_theirs(np.asarray(leaf)))
    return tensors


def _alternatives(rules: Sequence[Rule], tree: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """For every leaf of the tree the tensors that may hold it, the preferred one first."""
    found: dict[str, list[Tensor]] = {path: [] for path in flatten_dict(tree, sep="/")}
    for rule in rules:
        for suffix, leaf in LEAVES[rule.kind].items():
            path = f"{rule.ours}/{leaf}"
            if path in found:
                found[path].append(Tensor(f"{rule.theirs}.{suffix}", path, rule.kind))
    lost = [path for path, tensors in found.items() if not tensors]
    if lost:
        raise ValueError(f"no name rule for {_shortened(lost)}: are the rules made for this model's levels and blocks?")
    return found


def _shortened(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# The tables ---------------------------------------------------------------------------------------------------------


def residual_rules(theirs: str, ours: str) -> Iterator[Rule]:
    """ResnetBlock2D of diffusers."""
    yield Rule(f"{theirs}.norm1", f"{ours}/norm1", "norm")
    yield Rule(f"{theirs}.conv1", f"{ours}/conv1", "conv")
    yield Rule(f"{theirs}.time_emb_proj", f"{ours}/embedding_projection", "dense")
    yield Rule(f"{theirs}.norm2", f"{ours}/norm2", "norm")
    yield Rule(f"{theirs}.conv2", f"{ours}/conv2", "conv")
    yield Rule(f"{theirs}.conv_shortcut", f"{ours}/shortcut", "pointwise")


def attention_rules(theirs: str, ours: str) -> Iterator[Rule]:
    """Attention of diffusers."""
    for there, here in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
        yield Rule(f"{theirs}.{there}", f"{ours}/{here}", "dense")


def transformer_rules(theirs: str, ours: str, linear_projection: bool, depth: int) -> Iterator[Rule]:
    """Transformer2DModel of diffusers; its projections are 1x1 convolutions in Stable Diffusion 1, linear in 2."""
    projection: Kind = "dense" if linear_projection else "pointwise"
    yield Rule(f"{theirs}.norm", f"{ours}/norm", "norm")
    yield Rule(f"{theirs}.proj_in", f"{ours}/project_in", projection)
    yield Rule(f"{theirs}.proj_out", f"{ours}/project_out", projection)
    for i in range(depth):
        there, here = f"{theirs}.transformer_blocks.{i}", f"{ours}/block_{i}"
        for n in (1, 2, 3):
            yield Rule(f"{there}.norm{n}", f"{here}/norm{n}", "norm")
        yield from attention_rules(f"{there}.attn1", f"{here}/self_attention")
        yield from attention_rules(f"{there}.attn2", f"{here}/cross_attention")
        yield Rule(f"{there}.ff.net.0.proj", f"{here}/feed_forward/dense_in", "dense")
        yield Rule(f"{there}.ff.net.2", f"{here}/feed_forward/dense_out", "dense")


def unet_rules(num_levels: int, num_res_blocks: int, *, linear_projection: bool = False) -> list[Rule]:
    """UNet2DConditionModel of diffusers, and our UNet with a context.

    linear_projection: how the file keeps the transformers' projections: False for Stable Diffusion 1, True for 2.
    """
    rules = [
        Rule("conv_in", "conv_in", "conv"),
        Rule("time_embedding.linear_1", "time_embedding/dense_0", "dense"),
        Rule("time_embedding.linear_2", "time_embedding/dense_1", "dense"),
        Rule("conv_norm_out", "norm_out", "norm"),
        Rule("conv_out", "conv_out", "conv"),
    ]

    def block(theirs: str, i: int, ours: str) -> None:
        rules.extend(residual_rules(f"{theirs}.resnets.{i}", f"{ours}/residual"))
        rules.extend(transformer_rules(f"{theirs}.attentions.{i}", f"{ours}/transformer", linear_projection, depth=1))

    for level in range(num_levels):
        up = f"up_blocks.{num_levels - 1 - level}"  # theirs count from the smallest feature map upwards
        for i in range(num_res_blocks):
            block(f"down_blocks.{level}", i, f"down_{level}_{i}")
        for i in range(num_res_blocks + 1):
            block(up, i, f"up_{level}_{i}")
        rules.append(Rule(f"down_blocks.{level}.downsamplers.0.conv", f"down_{level}_downsample/conv", "conv"))
        rules.append(Rule(f"{up}.upsamplers.0.conv", f"up_{level}_upsample/conv", "conv"))
    for i in range(2):
        block("mid_block", i, f"middle_{i}")
    return rules


def autoencoder_rules(num_levels: int, num_res_blocks: int) -> list[Rule]:
    """AutoencoderKL of diffusers, with the attention's names before and after diffusers 0.17."""
    rules = [
        Rule("quant_conv", "moments_projection", "pointwise"),
        Rule("post_quant_conv", "latents_projection", "pointwise"),
    ]
    for part in ("encoder", "decoder"):
        rules.append(Rule(f"{part}.conv_in", f"{part}/conv_in", "conv"))
        for i in range(2):
            rules.extend(residual_rules(f"{part}.mid_block.resnets.{i}", f"{part}/middle/residual_{i}"))
        there, here = f"{part}.mid_block.attentions.0", f"{part}/middle/attention"
        rules.append(Rule(f"{there}.group_norm", f"{here}/norm", "norm"))
        rules.extend(attention_rules(there, f"{here}/attention"))
        for old, ours in (("query", "query"), ("key", "key"), ("value", "value"), ("proj_attn", "out")):
            rules.append(Rule(f"{there}.{old}", f"{here}/attention/{ours}", "dense"))
        rules.append(Rule(f"{part}.conv_norm_out", f"{part}/norm_out", "norm"))
        rules.append(Rule(f"{part}.conv_out", f"{part}/conv_out", "conv"))
    for level in range(num_levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{num_levels - 1 - level}"
        for i in range(num_res_blocks):
            rules.extend(residual_rules(f"{down}.resnets.{i}", f"encoder/down_{level}_{i}"))
        for i in range(num_res_blocks + 1):
            rules.extend(residual_rules(f"{up}.resnets.{i}", f"decoder/up_{level}_{i}"))
        rules.append(Rule(f"{down}.downsamplers.0.conv", f"encoder/down_{level}_downsample/conv", "conv"))
        rules.append(Rule(f"{up}.upsamplers.0.conv", f"decoder/up_{level}_upsample/conv", "conv"))
    return rules


def text_encoder_rules(num_layers: int) -> list[Rule]:
    """CLIPTextModel of transformers: with the prefix of published checkpoints, or without it as transformers 5 saves."""
    layer = (
        ("layer_norm1", "norm1", "norm"),
        ("self_attn.q_proj", "attention/query", "dense"),
        ("self_attn.k_proj", "attention/key", "dense"),
        ("self_attn.v_proj", "attention/value", "dense"),
        ("self_attn.out_proj", "attention/out", "dense"),
        ("layer_norm2", "norm2", "norm"),
        ("mlp.fc1", "dense_in", "dense"),
        ("mlp.fc2", "dense_out", "dense"),
    )
    rules = []
    for prefix in ("text_model.", ""):
        rules += [
            Rule(f"{prefix}embeddings.token_embedding", "token_embedding", "embedding"),
            Rule(f"{prefix}embeddings.position_embedding", "position_embedding", "embedding"),
            Rule(f"{prefix}embeddings.position_ids", "", "ignored"),  # 0, 1, 2 ...: kept by transformers before 4.31
            Rule(f"{prefix}final_layer_norm", "norm_out", "norm"),
        ]
        for i in range(num_layers):
            for there, here, kind in layer:
                rules.append(Rule(f"{prefix}encoder.layers.{i}.{there}", f"block_{i}/{here}", kind))  # type: ignore[arg-type]
    return rules
