"""What the TPU's compiler makes of training steps: compile time, memory, operations, bytes, padding, collectives.

    pip install -e '.[tpu]'                               # in an environment of its own; no TPU is needed
    python benchmarks/tpu_programs.py                     # the table of docs/tpu.md: half an hour on two cores
    python benchmarks/tpu_programs.py --only cifar10 --part forward
    python benchmarks/tpu_programs.py --only cifar10 --jax jax_exec_time_optimization_effort=-1.0
    python benchmarks/tpu_programs.py --only emoji --largest 20      # what takes most memory and cycles

Each program is compiled ahead of time for a described slice, in a process of its own that is ended after --limit seconds: what
was not compiled is called so. Weights and data are shapes. Nothing is run and no time of a step is measured.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).parent.parent))  # for configs/ and benchmarks/

from jaxdiff.config import Config, ShardingConfig, to_config
from jaxdiff.models.layers import ResidualBlock
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.first_stage import FirstStage, autoencoder_from_config
from jaxdiff.tasks.make import Parts, make_task, plain_update
from jaxdiff.tasks.pretrained import Pretrained
from jaxdiff.tasks.progressive_gan import resolve_length
from jaxdiff.tasks.stable_diffusion import GUIDANCE, Networks, StableDiffusion, unet_from_config
from jaxdiff.tasks.targets import choose_target, memory_wanting, open_target
from jaxdiff.tasks.text_model import TextModel, text_encoder_from_config
from jaxdiff.training.collectives import collectives, sent
from jaxdiff.training.sharding import batch_sharding, make_mesh, make_runner, replicated
from jaxdiff.training.watching import flops_of
from jaxdiff.weights.tokenizer import train_tokenizer

# Padding, read from a program's text -----------------------------------------------------------------------------------------

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]\{([\d,]*)(?::([^}]*))?\}")
_RUN_BY = {  # where an instruction names computations whose instructions have memory of their own
    "while": re.compile(r"\b(?:body|condition)=%?([\w.-]+)"),
    "call": re.compile(r"\bto_apply=%?([\w.-]+)"),
    "conditional": re.compile(r"\b(?:true|false)_computation=%?([\w.-]+)|%([\w.-]+)(?=[,}])"),
    "async-start": re.compile(r"\bcalls=%?([\w.-]+)"),
}
# What gives a name to memory that something else has written; of a pair the second half counts.
_WRITES_NOTHING = ("tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant", "after-all")


class Written(NamedTuple):
    """An array in a chip's main memory: an argument, or what an instruction writes."""

    bytes: int  # of its numbers
    padded: int  # as it lies there
    shape: str
    kind: str  # the instruction's
    source: str  # the operation of the model that it belongs to, as JAX names it


class Instruction(NamedTuple):
    """One that runs by itself: not inside a fusion. `text`: what follows its name, operands and attributes."""

    type: str
    name: str
    text: str
    argument: bool  # of the program

    @property
    def source(self) -> str:
        """The operation of the model that it belongs to, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


def instructions(text: str) -> list[Instruction]:
    """Those of a program and of the loops, branches and calls in it, each once. Raises ValueError if the text is not one's."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    calls: dict[str, list[str]] = collections.defaultdict(list)
    entry = here = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            here = header[2]
            bodies[here] = []
            entry = here if header[1] else entry
        elif here and (found := _INSTRUCTION.match(line)):
            kind, operation, rest = found.groups()
            bodies[here].append((kind, operation, rest))
            if operation in _RUN_BY:
                calls[here] += [name for match in _RUN_BY[operation].finditer(rest) for name in match.groups() if name]
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    run, new = [entry], [entry]
    while new:
        called = dict.fromkeys(name for one in new for name in calls[one])
        new = [name for name in called if name in bodies and name not in run]
        run += new
    return [Instruction(*one, argument=one[1] == "parameter" and name == entry) for name in run for one in bodies[name]]


def written(text: str) -> Iterator[Written]:
    """Each argument of a program and each array that one of its instructions writes to main memory, tiles and all.

    What is inside a fusion has no memory. A loop's body counts once. Arrays in a chip's own fast memory (S(1)) are left out.
    """
    for one in instructions(text):
        silent = one.name in _WRITES_NOTHING or one.name.endswith("-start")
        if silent or (one.name == "parameter" and not one.argument):
            continue
        for dtype, shape, order, layout in _ARRAY.findall(one.type):
            if not re.search(r"S\(\d+\)", layout):
                yield Written(*_sizes(dtype, shape, order, layout), f"{dtype}[{shape}]", one.name, one.source)


def _sizes(dtype: str, shape: str, order: str, layout: str) -> tuple[int, int]:
    """Bytes of an array's numbers, and of the array as tiles: {1,0:T(8,128)(2,1)} is rows in tiles of 8 x 128, of 2 x 1."""
    dims = [int(n) for n in shape.split(",") if n]
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
    minor_to_major = [int(n) for n in order.split(",") if n]
    laid = [dims[axis] for axis in reversed(minor_to_major)]
    tiles = re.search(r"T((?:\([\d,*]+\))+)", layout)
    for listed in re.findall(r"\(([\d,*]+)\)", tiles[1]) if tiles else ():
        tile = [int(n) for n in listed.split(",")]
        laid = [1] * (len(tile) - len(laid)) + laid
        rest, tiled = laid[: len(laid) - len(tile)], laid[len(laid) - len(tile) :]
        laid = rest + [-(-n // size) for n, size in zip(tiled, tile, strict=True)] + tile
    return math.prod(dims) * bits // 8, math.prod(laid) * bits // 8


def waste(text: str) -> float:
    """Bytes of padding for each byte of numbers, over all that is `written`."""
    arrays = list(written(text))
    return sum(a.padded for a in arrays) / max(1, sum(a.bytes for a in arrays)) - 1


def cycles(text: str) -> dict[str, int]:
    """What the compiler expects its instructions to take, by the operation of the model they belong to; a loop's body once."""
    found: collections.Counter[str] = collections.Counter()
    for one in instructions(text):
        guess = re.search(r'"estimated_cycles":"(\d+)"', one.text)
        if guess and int(guess[1]) < 2**63 - 1:  # the largest number is "unknown"
            found[f"{one.name} ({_short(one.source)})"] += int(guess[1])
    return dict(found.most_common())


def largest(text: str, count: int) -> str:
    """The arrays to which most memory goes, and the operations to which most cycles, alike ones together."""
    groups: dict[str, list[Written]] = collections.defaultdict(list)
    for one in written(text):
        groups[f"{one.shape} {one.kind} ({_short(one.source)})"].append(one)
    ranked = sorted(groups.items(), key=lambda item: -sum(one.padded for one in item[1]))[:count]
    lines = [
        f"{sum(a.padded for a in arrays) / 1e6:10,.1f} MB, {sum(a.bytes for a in arrays) / 1e6:10,.1f} without padding: "
        f"{len(arrays)} x {name}"
        for name, arrays in ranked
    ]
    guesses = cycles(text)
    total = max(1, sum(guesses.values()))
    return "\n".join(lines + [f"{n / total:10.1%} of cycles: {name}" for name, n in list(guesses.items())[:count]])


def _short(source: str) -> str:
    """The end of an operation's name, the same for like parts of a network."""
    return re.sub(r"_\d+\b|\b\d+$", "", "/".join(source.split("/")[-3:]))


# The programs ----------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A training step: its config, what else the task is made of, and the shapes of a batch of so many examples."""

    config: Config
    parts: Parts
    batch: Callable[[int], dict[str, jax.ShapeDtypeStruct]]


def shipped(name: str, batch: int, **changes: Any) -> Config:
    """A file of configs/ in bfloat16."""
    config = __import__(f"configs.{name}", fromlist=["get_config"]).get_config()
    config.update_from_flattened_dict({"training.batch_size": batch, "model.dtype": "bfloat16", **changes})
    return to_config(config)


def shapes_of(**inputs: tuple[tuple[int, ...], Any]) -> Callable[[int], dict[str, jax.ShapeDtypeStruct]]:
    """A function from a batch's size to the shapes of a batch, every example of which has these."""
    inputs |= {"index": ((), jnp.int32)}
    return lambda size: {k: jax.ShapeDtypeStruct((size, *shape), dtype) for k, (shape, dtype) in inputs.items()}


def cifar10(chips: int) -> Case:
    """DDPM, 128 images a chip."""
    return Case(
        shipped("cifar10", 128 * chips), Parts(), shapes_of(image=((32, 32, 3), jnp.uint8), label=((), jnp.int32))
    )


def emoji(chips: int) -> Case:
    """Text-to-image in the latents of the emoji autoencoder, a batch of the shipped size on each chip."""
    from configs import emoji_vae

    config = shipped("emoji_text", 32 * chips)
    task: Any = make_task(to_config(emoji_vae.get_config()))
    stage = FirstStage(task.model, jax.eval_shape(task.init, jax.random.key(0)))
    tokens = (config.text.context_length,)
    tokenizer = train_tokenizer(["a red heart"], 520, *tokens)
    height, width, channels = stage.latent_shape((64, 64, 3))
    inputs = shapes_of(moments=((height, width, 2 * channels), jnp.float32), tokens=(tokens, jnp.int32))
    return Case(config, Parts(tokenizer, stage), inputs)


def stable_diffusion(chips: int, batch: int = 4, **changes: Any) -> Case:
    """Fine-tuning Stable Diffusion 1.5 at 512x512 by the shipped config, from latents that were encoded before."""
    from benchmarks.stable_diffusion_unet import TEXT, TOKENS, config_of

    config = shipped("stable_diffusion_finetune", batch * chips, **changes)
    dtypes: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.dtype(config.model.param_dtype)}
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    text: dict[str, Any] = {
        "hidden_size": TEXT,
        "intermediate_size": 4 * TEXT,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    text |= {"vocab_size": 49_408, "max_position_embeddings": TOKENS, "hidden_act": "quick_gelu"}
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    networks = Networks(
        unet_from_config(config_of(320, 64)).clone(remat=config.model.remat, **dtypes),
        autoencoder_from_config(vae),
        text_encoder_from_config(text).clone(**dtypes),
        0.18215,
        0.0,
        json.dumps(schedule),
        mask_channels=False,
    )
    params, tokenizer = networks.shapes(), train_tokenizer([], 514, TOKENS)
    model: Any = StableDiffusion(None, networks, tokenizer, 512, 512, config.sampling, params)  # type: ignore[arg-type]
    stage = FirstStage(networks.autoencoder, params["autoencoder"], 0.18215, 0.0)
    diffusion = dataclasses.replace(config.diffusion, schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    sampling = dataclasses.replace(config.sampling, sampler="ddim", spacing="leading", guidance=GUIDANCE)
    config = dataclasses.replace(config, diffusion=diffusion, sampling=sampling)
    text_model = TextModel(networks.text_encoder, params["text_encoder"], tokenizer, sha256="")
    unet = params["unet"] if config.lora.rank else None
    inputs = shapes_of(moments=((64, 64, 8), jnp.float32), tokens=((TOKENS,), jnp.int32))
    return Case(config, Parts(tokenizer, stage, text_model, Pretrained(model), unet), inputs)


def gan(chips: int) -> Case:
    """The progressive GAN's last stage, 1024x1024, 4 images a chip."""
    config = shipped("celeba_hq_progressive_gan", 4 * chips, **{"progressive_gan.batch_sizes": (4 * chips,)})
    return Case(resolve_length(config), Parts(), shapes_of(image=((1024, 1024, 3), jnp.uint8), label=((), jnp.int32)))


def of_task(make_case: Callable[[int], Case], part: str, mesh: Mesh) -> tuple[Any, float]:
    """A program before it is compiled, and its operations on each chip if nothing is recomputed."""
    case = make_case(mesh.size)
    task = make_task(case.config, case.parts)
    trainable = task.trainable(mesh)
    state, key = jax.eval_shape(trainable.init, jax.random.key(0)), jax.eval_shape(jax.random.key, 0)
    size = trainable.stages[-1].batch_size if trainable.stages else case.config.training.batch_size
    batch, frozen = case.batch(size), () if trainable.frozen is None else (_plain(trainable.frozen),)
    stage = max(0, len(trainable.stages) - 1)
    if part == "step":
        make: Any = (
            (lambda axis: trainable.make_update(axis, number=stage)) if trainable.stages else trainable.make_update
        )
        runner = make_runner(make, state, mesh, case.config.sharding.mode, *frozen)
        minimum = flops_of(plain_update(case.config, case.parts, mesh, stage), state, batch, key, *frozen)
        arguments = (jax.tree.map(_placed, state, runner.state_shardings), batch, key, *runner.frozen)
        return runner.step.lower(*arguments), (minimum or math.nan) / mesh.size  # type: ignore[attr-defined]
    if not isinstance(task, DiffusionTask):
        raise SystemExit(f"--part {part}: only of diffusion; this is a {type(task).__name__}")
    loss: Any = task.loss if part == "forward" else jax.value_and_grad(task.loss, has_aux=True)
    return _of_function(loss, (state.params, batch, key, *frozen), mesh)


def of_block(part: str, mesh: Mesh) -> tuple[Any, float]:
    """The same of one residual block of DDPM's U-Net in training, which compiles sooner."""
    if part == "step":
        raise SystemExit("a block alone has no step: --part gradient")
    count, block = 128 * mesh.size, ResidualBlock(256, dropout=0.1, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((count, 16, 16, 256), jnp.bfloat16)
    embedding = jax.ShapeDtypeStruct((count, 512), jnp.float32)
    params = jax.eval_shape(block.init, jax.random.key(0), x, embedding)

    def loss(params: Any, inputs: Any, key: Any) -> Any:
        y: Any = block.apply(params, *inputs, train=True, rngs={"dropout": key})
        return (y.astype(jnp.float32) ** 2).mean()

    program = loss if part == "forward" else jax.value_and_grad(loss, (0, 1))
    return _of_function(program, (params, (x, embedding), jax.eval_shape(jax.random.key, 0)), mesh)


def _of_function(function: Any, arguments: tuple[Any, ...], mesh: Mesh) -> tuple[Any, float]:
    """Of a function whose second argument is a batch."""
    copied, split = replicated(mesh), batch_sharding(mesh)
    where = (copied, split, *(copied for _ in arguments[2:]))
    program = jax.jit(function, in_shardings=where, out_shardings=None)
    return program.lower(*arguments), (flops_of(function, *arguments) or math.nan) / mesh.size


def _plain(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _placed(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


CASES: dict[str, tuple[str, Callable[[str, Mesh], tuple[Any, float]]]] = {
    "cifar10": ("DDPM CIFAR-10, 128 a chip", functools.partial(of_task, cifar10)),
    "emoji": ("latent text-to-image (emoji), 32 a chip", functools.partial(of_task, emoji)),
    "sd": ("Stable Diffusion 1.5 at 512, LoRA, 4 a chip", functools.partial(of_task, stable_diffusion)),
    "gan": ("progressive GAN at 1024, 4 a chip", functools.partial(of_task, gan)),
    "block": ("a residual block of DDPM's, 256 channels, 16x16, 128 a chip", of_block),
}
PARTS = ("step", "gradient", "forward")  # the last two, not of a GAN: of the loss, without the optimiser


# One of them, in a process of its own ----------------------------------------------------------------------------------------


def compile_one(args: argparse.Namespace) -> None:
    """Print what is known of a program as JSON: one line once it is lowered, one once it is compiled."""
    choose_target(args.target)
    for setting in args.jax:
        name, _, value = setting.partition("=")
        jax.config.update(name, json.loads(value))
    slice_ = open_target(args.target)
    program, minimum = CASES[args.only][1](args.part, make_mesh(ShardingConfig(), slice_.devices))
    print(json.dumps({"minimum": minimum}), flush=True)
    began, processor = time.perf_counter(), time.process_time()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        wanting = memory_wanting(error)
        if wanting is None:
            raise
        compiled = None
    found: dict[str, Any] = {"seconds": time.perf_counter() - began, "processor": time.process_time() - processor}
    found["load"] = os.getloadavg()[0]
    if compiled is None:
        print(json.dumps(found | {"needed": wanting}), flush=True)  # type: ignore[possibly-undefined]
        return
    text, plan, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis()
    traffic = {kind: (one.count, one.bytes) for kind, one in collectives(text).items()}
    found |= {"arguments": plan.argument_size_in_bytes, "temporaries": plan.temp_size_in_bytes}
    found |= {
        "operations": cost["flops"],
        "bytes": cost["bytes accessed"],
        "waste": waste(text),
        "cycles": sum(cycles(text).values()),
    }
    found |= {"traffic": traffic, "sent": sent(text, len(slice_.devices)), "largest": largest(text, args.largest)}
    if args.text:
        args.text.write_text(text)
    print(json.dumps(found), flush=True)


def compiled_apart(args: argparse.Namespace, name: str, part: str) -> dict[str, Any]:
    """What `compile_one` printed of a program, as far as it came within the limit."""
    command = [sys.executable, __file__, "--child", "--only", name, "--part", part, "--target", args.target]
    command += ["--largest", str(args.largest)] + [word for setting in args.jax for word in ("--jax", setting)]
    command += ["--text", str(args.text)] if args.text else []
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdout is not None
        found: dict[str, Any] = json.loads(child.stdout.readline() or "{}")
        try:
            output = child.communicate(timeout=args.limit)[0]
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return found | {"ended": True}
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"error: {name}, {part}:\n{errors.read()[-3000:]}")
    return found | json.loads(output)


HEADER = """\
| program | compiled in | memory a chip | TFLOP a chip | over the minimum | bytes a chip | padding | cycles | collectives |
|---|---|---|---|---|---|---|---|---|"""


def row(title: str, part: str, found: dict[str, Any], limit: int) -> str:
    """Of the table."""
    name, least = f"{title}: {part}", found["minimum"] / 1e12
    if "ended" in found:
        return f"| {name} | not in {limit} s | | ({least:.3f} at least) | | | | | |"
    took = f"{found['seconds']:.0f} s ({found['processor']:.0f} s of processor time, load {found['load']:.1f})"
    if "needed" in found:
        needed, room = (size / 2**30 for size in found["needed"])
        return f"| {name} | {took} | needs {needed:.2f} GiB of {room:.2f}: does not fit | ({least:.3f} at least) | | | | | |"
    memory = f"{found['arguments'] / 1e9:.3f} + {found['temporaries'] / 1e9:.3f} GB"
    traffic = ", ".join(f"{count} {kind} of {size / 1e6:,.1f} MB" for kind, (count, size) in found["traffic"].items())
    return (
        f"| {name} | {took} | {memory} | {found['operations'] / 1e12:.3f} | "
        f"{found['operations'] / found['minimum']:.2f} | {found['bytes'] / 1e9:.1f} GB | {found['waste']:.1%} | "
        f"{found['cycles'] / 1e6:,.1f} million | "
        f"{traffic or 'none'} |"
    )


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one model only")
    parser.add_argument("--part", choices=PARTS, default="step", help="the whole step, the gradient or the loss alone")
    parser.add_argument("--target", default="v5e:2x2", help="the slice (default v5e:2x2)")
    parser.add_argument("--limit", type=int, default=540, help="seconds that a program may take to compile")
    parser.add_argument("--jax", action="append", default=[], metavar="NAME=VALUE", help="an option of JAX, as JSON")
    parser.add_argument("--largest", type=int, default=0, metavar="N", help="print what takes most memory and cycles")
    parser.add_argument("--text", type=Path, help="write the compiled program's text to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        compile_one(args)
        return
    print(HEADER, flush=True)
    for name, (title, _) in CASES.items():
        if args.only == name or (args.only is None and name != "block"):
            found = compiled_apart(args, name, args.part)
            print(row(title, args.part, found, args.limit), flush=True)
            if args.largest and "largest" in found:
                print(found["largest"], flush=True)


if __name__ == "__main__":
    main()
