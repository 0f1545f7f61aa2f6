"""Small whole checkpoints of Stable Diffusion on disk, written by our own export, with random numbers in every parameter."""

import dataclasses
import functools
import json

import jax
import numpy as np

from jaxdiff.config import ShardingConfig
from jaxdiff.generation import prompts as texts
from jaxdiff.generation.image_model import Request
from jaxdiff.generation.sampling import knobs_of, make_sample
from jaxdiff.tasks.first_stage import autoencoder_from_config
from jaxdiff.tasks.stable_diffusion import PARTS, Networks, unet_from_config
from jaxdiff.tasks.text_model import text_encoder_from_config
from jaxdiff.training.sharding import make_mesh
from jaxdiff.weights.checkpoint import component_rules
from jaxdiff.weights.export import save_folder, save_single_file
from jaxdiff.weights.names import to_ours, to_theirs
from jaxdiff.weights.tokenizer import END, Tokenizer, train_tokenizer
from tests.weights import small_stable_diffusion as small
from tests.weights.small_networks import random_tensor

KINDS, TOKENS, SIDE = small.KINDS, 16, 32
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles sooner


def configs(kind):
    """Those of small_stable_diffusion, with a text encoder for the tokenizer below."""
    found = small.configs(kind)
    text = {"vocab_size": 514, "max_position_embeddings": TOKENS, "bos_token_id": 512, "eos_token_id": 513}
    text["pad_token_id"] = tokenizer(kind).vocabulary["!" if "2" in kind else END]
    # As published files have it: diffusers' inpainting would clip without a word, its other pipelines would not.
    scheduler = {"clip_sample": False}
    if found["scheduler"]["_class_name"] == "PNDMScheduler":
        scheduler["skip_prk_steps"] = True
    unet = {"attention_head_dim": [2, 4, 4]} if "2" in kind else {}
    changes = {"unet": unet, "text_encoder": text, "scheduler": scheduler}
    return found | {name: found[name] | change for name, change in changes.items()}


def tokenizer(kind, length=TOKENS):
    """Bytes alone; Stable Diffusion 2 pads with another token than the end."""
    made = train_tokenizer([], 514, length)
    return Tokenizer.create(made.vocabulary, made.merges, length, "!" if "2" in kind else END)


def networks_of(parts, kind):
    """The networks of some configs."""
    return Networks(
        unet_from_config(parts["unet"]),
        autoencoder_from_config(parts["vae"]),
        text_encoder_from_config(parts["text_encoder"]),
        scaling_factor=1.0,
        shift_factor=0.0,
        scheduler="{}",
        mask_channels="inpainting" in kind,
    )


def params_of(parts, kind, scale=1.0):
    """By the checkpoint's names of the components; at `scale` 1 kernels keep the size of what goes through."""
    found = {}
    for part, shapes in networks_of(parts, kind).shapes().items():
        rules = component_rules(PARTS[part], parts[PARTS[part]])
        empty = to_theirs(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), rules)
        tensors = {name: scale * random_tensor(name, t.shape) for name, t in empty.items()}
        found[PARTS[part]] = to_ours(tensors, rules, shapes)
    return found


def params(kind):
    """Of these configs."""
    return params_of(configs(kind), kind)


def write(folder, kind, single_file=False, **changes):
    """A folder, or a file; the folder `words` beside it is a tokenizer.

    changes: of a component's config, as scheduler={...}.
    """
    parts = {name: config | changes.get(name, {}) for name, config in configs(kind).items()}
    tokenizer(kind).save(folder / "words")
    if single_file:
        save_single_file(folder / "model.safetensors", params(kind), parts)
        return folder / "model.safetensors"
    save_folder(folder, params(kind), parts, folder / "words")
    return folder


def image(seed=0, size=(SIDE, SIDE)):
    """A picture to begin from."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def mask(size=(SIDE, SIDE)):
    """White on the left."""
    found = np.zeros((*size, 1), np.uint8)
    found[:, : size[1] // 2] = 255
    return found


def one_device():
    """A mesh of one of the simulated devices: eight would make eight images for one."""
    return make_mesh(ShardingConfig(), jax.devices()[:1])


def settings_of(sd, sampler, **changes):
    """The model's own settings with another sampler, "karras" after its name."""
    name, _, karras = (sampler or sd.settings.sampler).partition(" ")
    spacing = {"spacing": "karras"} if karras else {}
    return dataclasses.replace(sd.settings, sampler=name, **spacing, **changes)


def with_scheduler(sd, changes):
    """The same model with other options in its scheduler's file."""
    scheduler = json.dumps(json.loads(sd.networks.scheduler) | changes)
    return dataclasses.replace(sd, networks=dataclasses.replace(sd.networks, scheduler=scheduler))


def images_of(sd, peers, case):
    """Our side of make_stable_diffusion.theirs: float images, not clipped, nothing pasted."""
    sd = with_scheduler(sd, case.scheduler).with_size(*case.size)
    settings = settings_of(sd, case.sampler, steps=case.steps, guidance=peers.GUIDANCE)
    pictures = None if case.strength is None else np.stack([image(i, case.size) for i in range(2)])
    masks = np.stack([mask(case.size)] * 2) if case.masked else None
    request = Request(texts.request(sd.tokenizer, peers.PROMPTS, peers.NEGATIVE), pictures, masks)
    sample = jit(make_sample(sd.model, settings, True, paste=False))
    keys = jax.vmap(jax.random.key)(np.array(peers.SEEDS, np.uint32))
    return np.asarray(sample(sd.params, keys, request, knobs_of(sd.model, settings, case.strength or 1.0)))
