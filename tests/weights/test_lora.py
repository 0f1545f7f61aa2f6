"""LoRA files: both namings and older ones, alphas, and what is none or not of this model."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.models.lora import TARGETS, target_kernels
from jaxdiff.weights.checkpoint import component_rules
from jaxdiff.weights.lora import METADATA, NAMINGS, Factors, load_lora, save_lora
from tests.tasks import tiny_checkpoint as tiny

RANK = 2
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
QUERY, KEY, OUT = (f"down_0_0/transformer/block_0/self_attention/{name}/kernel" for name in ("query", "key", "out"))


@functools.cache
def model(kind=tiny.SD1):
    configs = tiny.configs(kind)
    parts = ("unet", "text_encoder")
    return {part: component_rules(part, configs[part]) for part in parts}, tiny.networks(kind).shapes()


@pytest.fixture(scope="module")
def sd1():
    return model()


def random_adapters(shapes, alpha=1.0):
    rng, found = np.random.default_rng(0), {}
    for part, kernels in target_kernels(shapes, tuple(TARGETS)).items():
        for path, (inputs, outputs) in kernels.items():
            a, b = rng.standard_normal((inputs, RANK)), rng.standard_normal((RANK, outputs))
            found.setdefault(part, {})[path] = Factors(a.astype(np.float32), b.astype(np.float32), alpha)
    return found


def updates(adapters):
    return {(part, path): f.scale * (f.a @ f.b) for part, found in adapters.items() for path, f in found.items()}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("kind", [tiny.SD1, tiny.SD2])
def test_what_is_written_is_read(kind, naming, tmp_path):
    rules, shapes = model(kind)
    adapters = random_adapters(shapes, alpha=1.0)
    save_lora(tmp_path / "l.safetensors", adapters, rules, naming)
    found = load_lora(tmp_path / "l.safetensors", rules, shapes)
    before, after = updates(adapters), updates(found)
    assert before.keys() == after.keys()
    for name, update in before.items():
        np.testing.assert_array_equal(after[name], update)  # alpha / rank = 1/2: no bit is lost
    assert all(f.alpha == (1.0 if naming == "kohya" else RANK) for part in found.values() for f in part.values())


def test_the_names_are_kohyas_and_those_of_diffusers(sd1, tmp_path):
    rules, shapes = sd1
    for naming in NAMINGS:
        save_lora(tmp_path / naming, random_adapters(shapes), rules, naming)
    kohya, diffusers = (load_file(tmp_path / naming) for naming in NAMINGS)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert kohya[f"{name}.lora_down.weight"].shape == (RANK, 16) and kohya[f"{name}.lora_up.weight"].shape == (16, RANK)
    assert kohya[f"{name}.alpha"].shape == () and f"unet.{LAYER}.to_out.0.lora_A.weight" in diffusers
    assert kohya["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].shape == (RANK, 16, 1, 1)
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha" in kohya
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in diffusers


def factors(outputs=16, inputs=16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (RANK, inputs), (outputs, RANK)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize(
    ("layer", "down", "up", "path"),
    [
        (f"unet.{LAYER}.to_q", "lora_A.default.weight", "lora_B.default.weight", QUERY),
        (f"base_model.model.unet.{LAYER}.to_k", "lora_A.weight", "lora_B.weight", KEY),
        (f"unet.{LAYER}.processor.to_q_lora", "down.weight", "up.weight", QUERY),
        (f"{LAYER}.processor.to_out_lora", "down.weight", "up.weight", OUT),
        (f"unet.{LAYER}.to_q.lora", "down.weight", "up.weight", QUERY),
        (f"unet.{LAYER}.to_q.lora_linear_layer", "down.weight", "up.weight", QUERY),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k", "lora_down.weight", "lora_up.weight", KEY),
    ],
)
def test_older_names_are_read(sd1, tmp_path, layer, down, up, path):
    a, b = factors()
    save_file({f"{layer}.{down}": a, f"{layer}.{up}": b}, tmp_path / "l.safetensors")
    found = load_lora(tmp_path / "l.safetensors", *sd1)["unet"]
    assert list(found) == [path] and found[path].scale == 1  # without an alpha
    np.testing.assert_array_equal(found[path].a, a.T)
    np.testing.assert_array_equal(found[path].b, b.T)


def test_convolutions_are_read(sd1, tmp_path):
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((RANK, 16, 3, 3)), rng.standard_normal((16, RANK, 1, 1))
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.float64(3)}
    save_file({f"{name}.{k}": np.asarray(v, np.float32) for k, v in tensors.items()}, tmp_path / "l.safetensors")
    found = load_lora(tmp_path / "l.safetensors", *sd1)["unet"]["down_0_0/residual/conv1/kernel"]
    update = found.scale * np.tensordot(found.a, found.b, 1)
    theirs = 1.5 * np.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    np.testing.assert_allclose(update.transpose(3, 2, 0, 1), theirs, atol=1e-5)


def test_alphas_that_diffusers_noted_are_read(sd1, tmp_path):
    a, b = factors()
    tensors = {
        f"unet.{LAYER}.{name}.lora_{which}.weight": t
        for name in ("to_q", "to_k")
        for which, t in zip("AB", (a, b), strict=True)
    }
    noted = {"unet.r": RANK, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_k": 6}}
    save_file(tensors, tmp_path / "l.safetensors", {METADATA: json.dumps(noted)})
    found = load_lora(tmp_path / "l.safetensors", *sd1)["unet"]
    assert (found[QUERY].scale, found[KEY].scale) == (4, 3)


BASE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
A, B = factors()
GOOD = {f"{BASE}.lora_down.weight": A, f"{BASE}.lora_up.weight": B}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{BASE}.lora_down.weight": A}, "has no factor 'up'"),
        (GOOD | {f"{BASE}.lora_up.weight": factors(outputs=8)[1]}, "made for another model"),
        (GOOD | {f"{BASE}.lora_up.weight": B[:, :1].copy()}, "made for another model"),
        (GOOD | {f"{BASE}.dora_scale": A}, "a DoRA"),
        (GOOD | {f"{BASE}.alpha": np.ones(2, np.float32)}, "one number"),
        (GOOD | {f"{BASE}.alpha": np.full((), np.nan, np.float32)}, "one number"),
        (GOOD | {"lora_unet_down_blocks_7_attn1_to_q.lora_up.weight": B}, "layers that this model does not have"),
        ({f"{BASE}.hada_w1_a": A}, "a LyCORIS of another kind"),
        ({"lora_te2_x.lora_up.weight": B}, "a LoRA of XL"),
        ({"conv_in.weight": A}, "no LoRA of Stable Diffusion"),
        (GOOD | {f"unet.{LAYER}.to_q.lora_A.weight": A, f"unet.{LAYER}.to_q.lora_B.weight": B}, "there twice"),
        ({name: t.astype(np.int32) for name, t in GOOD.items()}, "holds int32"),
        ({}, "no tensors"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused_in_a_line(sd1, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_lora(tmp_path / "l.safetensors", *sd1)
    assert "\n" not in str(caught.value) and "l.safetensors" in str(caught.value)


def test_a_damaged_file_is_refused(sd1, tmp_path):
    path = tmp_path / "l.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_lora(path, *sd1)
    save_file(GOOD, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        load_lora(path, *sd1)
    for noted in ("[", "[]", json.dumps({"unet.use_dora": True}), json.dumps({"unet.alpha_pattern": 3})):
        save_file(GOOD, path, {METADATA: noted})
        with pytest.raises(ValueError, match=METADATA):
            load_lora(path, *sd1)
