"""Checkpoints on disk: found, told apart, read strictly and streamed; what is written is what was read."""

import json
import math
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxdiff.models.text_encoder import CLIPTextEncoder
from jaxdiff.models.unet import UNet
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.weights import single_file
from jaxdiff.weights.checkpoint import COMPONENTS, component_rules, load_params, open_checkpoint
from jaxdiff.weights.export import save_folder, save_single_file
from jaxdiff.weights.names import shapes_there
from tests.tasks import small_checkpoint
from tests.weights import small_stable_diffusion as small

FIRST, INPAINTING, SECOND, _ = small.KINDS


def loaded(checkpoint, kind):
    return {name: load_params(checkpoint, name, small.shapes(kind, name)) for name in COMPONENTS}


def refused(path, match, **how):
    """What is said of a path; one line that begins with a path."""
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        open_checkpoint(path, **how)
    message = str(error.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 700, message
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the first kind in diffusers' layout; tests that spoil it spoil a copy."""
    path = tmp_path_factory.mktemp("model")
    save_folder(path, small.all_params(FIRST), small.configs(FIRST))
    return path


@pytest.fixture
def spoiled(folder, tmp_path):
    copy = tmp_path / "copy"
    for file in folder.rglob("*.*"):
        (copy / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        os.link(file, copy / file.relative_to(folder))
    return copy


@pytest.mark.parametrize("kind", small.KINDS)
def test_folder_there_and_back_is_the_same_to_the_bit(kind, tmp_path):
    params, configs = small.all_params(kind), small.configs(kind)
    save_folder(tmp_path / "a", params, configs)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert (checkpoint.kind, checkpoint.family, checkpoint.configs) == ("folder", kind, configs)
    assert checkpoint.tokenizer is None and checkpoint.notes == ()
    again = loaded(checkpoint, kind)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again))
    small.assert_same(again, params)
    save_folder(tmp_path / "b", again, checkpoint.configs)
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file


@pytest.mark.parametrize("kind", small.KINDS)
def test_single_file_there_and_back_is_the_same_to_the_bit(kind, tmp_path):
    params, configs = small.all_params(kind), small.configs(kind)
    save_single_file(tmp_path / "a.safetensors", params, configs)
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert (checkpoint.kind, checkpoint.family) == ("single file", kind)
    for component in (*COMPONENTS, "scheduler"):  # what cannot be seen in the file: sizes of images, tokens
        found = {k: v for k, v in checkpoint.configs[component].items() if k in configs[component]}
        told = configs[component] | {k: found[k] for k in found if k.endswith("token_id") or k == "sample_size"}
        assert found == told, component
    again = loaded(checkpoint, kind)
    small.assert_same(again, params)
    save_single_file(tmp_path / "b.safetensors", again, checkpoint.configs)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_names_of_single_files(tmp_path):
    """Names and shapes as they stand in the published files, where they are not diffusers'."""
    path = tmp_path / "a.safetensors"
    save_single_file(path, small.all_params(FIRST), small.configs(FIRST))
    first = load_file(path)
    save_single_file(path, small.all_params(SECOND), small.configs(SECOND))
    second = load_file(path)
    unet, vae, text = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
    for name, shape in {
        f"{unet}input_blocks.3.0.op.weight": (32, 32, 3, 3),
        f"{unet}input_blocks.4.0.skip_connection.weight": (64, 32, 1, 1),
        f"{unet}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (64, 64),
        f"{unet}output_blocks.2.1.conv.weight": (64, 64, 3, 3),  # no transformer before it
        f"{unet}output_blocks.5.2.conv.weight": (64, 64, 3, 3),
        f"{unet}output_blocks.8.0.out_layers.3.bias": (32,),
        f"{unet}time_embed.2.weight": (128, 128),
        f"{unet}out.2.weight": (4, 32, 3, 3),
        f"{vae}encoder.down.1.block.0.nin_shortcut.weight": (64, 32, 1, 1),
        f"{vae}decoder.up.1.upsample.conv.weight": (64, 64, 3, 3),
        f"{vae}decoder.up.0.block.0.nin_shortcut.weight": (32, 64, 1, 1),
        f"{vae}decoder.mid.attn_1.proj_out.weight": (64, 64, 1, 1),
        f"{vae}encoder.mid.block_2.norm1.weight": (64,),
        f"{vae}post_quant_conv.weight": (4, 4, 1, 1),
    }.items():
        assert first[name].shape == second[name].shape == shape, name
    assert first[f"{unet}middle_block.1.proj_in.weight"].shape == (64, 64, 1, 1)
    assert second[f"{unet}middle_block.1.proj_in.weight"].shape == (64, 64)
    assert "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight" in first
    for name, shape in {
        "positional_embedding": (11, 64),
        "token_embedding.weight": (99, 64),
        "ln_final.bias": (64,),
        "transformer.resblocks.1.attn.in_proj_weight": (192, 64),
        "transformer.resblocks.1.attn.in_proj_bias": (192,),
        "transformer.resblocks.1.attn.out_proj.weight": (64, 64),
        "transformer.resblocks.0.mlp.c_fc.weight": (256, 64),
        "transformer.resblocks.0.ln_2.weight": (64,),
    }.items():
        assert second[text + name].shape == shape, name
    # The three parts of a fused tensor, in their order.
    layer = small.params(SECOND, "text_encoder")["block_1"]["attention"]
    parts = np.split(second[f"{text}transformer.resblocks.1.attn.in_proj_weight"], 3)
    for part, name in zip(parts, ("query", "key", "value"), strict=True):
        np.testing.assert_array_equal(part, layer[name]["kernel"].T)


def full_size(second):
    """Our networks of the published models, by component."""
    unet = UNet(
        4,
        channels=320,
        channel_multipliers=(1, 2, 4, 4),
        attention_levels=(0, 1, 2),
        num_heads=8,
        head_dim=64 if second else None,
        context_dim=1024 if second else 768,
    )
    context = jax.ShapeDtypeStruct((1, 1, unet.context_dim), np.float32)
    text = CLIPTextEncoder(width=1024, num_layers=23, num_heads=16, activation="gelu") if second else CLIPTextEncoder()
    inputs = jax.ShapeDtypeStruct((1, 8, 8, 4), np.float32), jax.ShapeDtypeStruct((1,), np.float32), None, context
    image, token = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32), jax.ShapeDtypeStruct((1, 1), np.int32)
    made = {"unet": (unet, inputs), "vae": (AutoencoderKL(), (image,)), "text_encoder": (text, (token,))}
    return {name: jax.eval_shape(network.init, jax.random.key(0), *i)["params"] for name, (network, i) in made.items()}


@pytest.mark.parametrize("second", [False, True])
def test_published_models_have_so_many_tensors_and_are_told_from_their_shapes(second):
    """Stable Diffusion 1.5's networks have 859,520,964 + 83,653,863 + 123,060,480 parameters."""
    configs = {
        "unet": {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "use_linear_projection": second},
        "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
        "text_encoder": {"num_hidden_layers": 23 if second else 12, "hidden_act": "gelu" if second else "quick_gelu"},
    }
    file, counts, sizes = {}, [], []
    for component, shapes in full_size(second).items():
        there = shapes_there(shapes, component_rules(component, configs[component], as_single_file=True))
        counts.append(len(there))
        sizes.append(sum(math.prod(shape) for shape in there.values()))
        file |= there
    assert counts == [686, 248, 23 * 12 + 4 if second else 196]
    assert sizes == [865_910_724 if second else 859_520_964, 83_653_863, 340_387_840 if second else 123_060_480]
    prefix = "model.diffusion_model."  # by these diffusers knows the first and the second
    assert file[f"{prefix}output_blocks.11.0.skip_connection.weight"] == (320, 640, 1, 1)
    assert file[f"{prefix}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 1024 if second else 768)
    assert single_file.identify(file) == (SECOND if second else FIRST)
    found = single_file.configs(file)
    for component, config in configs.items():
        assert config.items() <= found[component].items()
    assert found["unet"]["attention_head_dim"] == ([5, 10, 20, 20] if second else 8)
    assert found["unet"]["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert found["unet"]["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert found["unet"]["sample_size"] == (96 if second else 64)
    text = found["text_encoder"]
    assert (text["hidden_size"], text["num_attention_heads"]) == ((1024, 16) if second else (768, 12))
    assert (text["vocab_size"], text["max_position_embeddings"], text["eos_token_id"]) == (49_408, 77, 49_407)


def test_what_a_training_run_leaves_is_known_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    save_single_file(path, small.all_params(SECOND), small.configs(SECOND))
    tensors = load_file(path)
    del tensors["v_pred"]
    last, text = f"transformer.resblocks.{small.LAYERS}", "cond_stage_model.model."
    known = {
        f"{text}{last}.attn.in_proj_weight": np.zeros((192, 64), np.float32),
        f"{text}{last}.ln_1.bias": np.zeros(64, np.float32),
        f"{text}text_projection": np.zeros((64, 64), np.float32),
        f"{text}logit_scale": np.zeros((), np.float32),
        "model_ema.decay": np.zeros((), np.float32),
        "model_ema.diffusion_modelinput_blocks00weight": np.zeros(9, np.float32),
        "betas": np.zeros(1000, np.float64),
        "sqrt_recipm1_alphas_cumprod": np.zeros(1000, np.float32),
        "alphas_cumprod_prev": np.zeros(1000, np.float32),
        "global_step": np.full((), 220_000, np.int64),
    }
    save_file(tensors | known, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.configs["text_encoder"]["num_hidden_layers"] == small.LAYERS
    assert "v_prediction is supposed" in checkpoint.notes[1] and "model_ema" in checkpoint.notes[2]
    small.assert_same(loaded(checkpoint, SECOND), small.all_params(SECOND))
    for step, prediction in ((np.full(1, 875_000, np.int64), "epsilon"), (np.zeros(3, np.int64), "v_prediction")):
        save_file(tensors | {"global_step": step}, path)
        assert open_checkpoint(path).configs["scheduler"]["prediction_type"] == prediction
    save_file(tensors | {"optimizer.state": np.zeros(3)}, path)
    refused(path, "it has tensors that no Stable Diffusion has: optimizer.state")
    save_file(tensors | {"model.diffusion_model.extra.weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"a.safetensors: unet: .* unused: model.diffusion_model.extra.weight"):
        load_params(open_checkpoint(path), "unet", small.shapes(SECOND, "unet"))

    save_single_file(path, small.all_params(FIRST), small.configs(FIRST))
    clip = "cond_stage_model.transformer.text_model."
    more = {f"{clip}embeddings.position_ids": np.arange(11)[None], "cond_stage_model.logit_scale": np.zeros(())}
    save_file(load_file(path) | more, path)
    small.assert_same(loaded(open_checkpoint(path), FIRST), small.all_params(FIRST))


@pytest.mark.parametrize("kind", [FIRST, SECOND])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_single_file_that_we_write_keeps_what_the_network_predicts(kind, prediction, tmp_path):
    configs = small.configs(kind)
    configs["scheduler"] |= {"prediction_type": prediction, "rescale_betas_zero_snr": prediction == "v_prediction"}
    save_single_file(tmp_path / "a.safetensors", small.all_params(kind), configs)
    scheduler = open_checkpoint(tmp_path / "a.safetensors").configs["scheduler"]
    assert scheduler["prediction_type"] == prediction
    assert scheduler.get("rescale_betas_zero_snr", False) == (prediction == "v_prediction")


def files(*names, shape=(2, 2)):
    return {name: np.zeros(shape, np.float32) for name in names}


@pytest.mark.parametrize(
    "said, names",
    {
        "Stable Diffusion XL;": ("conditioner.embedders.1.model.ln_final.bias", "model.diffusion_model.out.2.bias"),
        "the refiner of Stable Diffusion XL;": ("conditioner.embedders.0.model.ln_final.bias",),
        "Stable Diffusion 3;": ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",),
        "Flux;": ("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"),
        "Stable Cascade;": ("clip_txt_mapper.weight",),
        "a ControlNet;": ("control_model.time_embed.0.weight",),
        "a LoRA, not a whole model;": ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",),
        "a LoRA, not a whole": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",),
        "a textual inversion": ("emb_params",),
        "AnimateDiff": ("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias",),
        "Stable Diffusion unCLIP": ("embedder.model.visual.proj", "model.diffusion_model.out.2.bias"),
        "a U-Net alone;": ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
        "a U-Net alone; a single": ("input_blocks.0.0.weight",),
        "an autoencoder alone;": ("encoder.conv_in.weight", "decoder.conv_in.weight"),
        "an autoencoder alone; a": ("first_stage_model.decoder.conv_in.weight",),
        "a text encoder alone;": ("text_model.embeddings.token_embedding.weight",),
        "no model that is known here: 1 tensors, the first is 'fc.weight'": ("fc.weight",),
        "Stable Diffusion without autoencoder and text encoder": ("model.diffusion_model.out.2.bias",),
    }.items(),
)
def test_other_files_are_named(said, names, tmp_path):
    save_file(files(*names), tmp_path / "a.safetensors")
    assert said in refused(tmp_path / "a.safetensors", "it is |no model")


def test_other_u_nets_and_damaged_ones_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_single_file(path, small.all_params(FIRST), small.configs(FIRST))
    tensors = load_file(path)
    door = "model.diffusion_model.input_blocks.0.0.weight"
    for channels, what in (
        (5, "Stable Diffusion with depth"),
        (7, "upscaler"),
        (8, "InstructPix2Pix"),
        (6, "with 6 input"),
    ):
        save_file(tensors | files(door, shape=(32, channels, 3, 3)), path)
        refused(path, f"{what}.*; supported are 4 input channels, and 9 for inpainting")
    for change, said in (
        (files(door, shape=(3,)), "input_blocks.0.0.weight has shape .3., but should have 4 axes"),
        (files("model.diffusion_model.input_blocks.999999999.0.op.weight"), "its blocks are not numbered 0, 1, 2"),
        (files("model.diffusion_model.input_blocks.9.0.op.weight"), "its U-Net has 10 input blocks and 4 levels"),
        (files("first_stage_model.encoder.down.7.block.0.conv1.weight"), "its blocks are not numbered"),
    ):
        save_file(tensors | change, path)
        refused(path, said)
    del tensors["model.diffusion_model.out.2.weight"]
    save_file(tensors, path)
    refused(path, "it has no tensor out.2.weight")


def test_folders_that_are_no_model_are_told_so(spoiled, tmp_path):
    refused(tmp_path / "nowhere", "there is no such file or folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "it is not a model: a Stable Diffusion folder has model_index.json and unet/, vae/, text_encoder/")
    refused(spoiled / "unet", "a UNet2DConditionModel alone")
    refused(spoiled / "text_encoder", "a model of transformers alone")
    (empty / "v1-5.ckpt").write_bytes(b"PK")
    refused(
        empty, "it has no model_index.json, but v1-5.ckpt; a pickle can run any program when it is opened, so it is not"
    )
    refused(empty / "v1-5.ckpt", "convert it in an environment that you can afford to lose")
    (empty / "v1-5.safetensors").write_bytes(b"")
    refused(empty, "if v1-5.safetensors is a single-file checkpoint, give that file and not the folder")
    index = spoiled / "model_index.json"
    for name, said in (
        ("StableDiffusionXLPipeline", "it is Stable Diffusion XL .StableDiffusionXLPipeline.; supported are"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "Flux"),
        ("StableDiffusionUpscalePipeline", "it is another kind of model"),
        ("a\nb", r"a\\nb"),
    ):
        index.unlink()
        index.write_text(json.dumps({"_class_name": name}))
        refused(spoiled, said)
    for content, said in (("{", "cannot be read"), ("[]", "must hold a JSON object"), ("[" * 99_999, "cannot be read")):
        index.unlink()
        index.write_text(content)
        refused(spoiled, said)


def rewrite(path, config):
    path.unlink()
    path.write_text(json.dumps(config))


def test_components_that_are_not_there_or_make_no_sense(spoiled):
    unet, config = spoiled / "unet", small.configs(FIRST)["unet"]
    for change, said in (
        ({"layers_per_block": 10**9}, "layers_per_block = 1000000000 must be an integer from 1 to 64"),
        ({"block_out_channels": 3}, "block_out_channels = 3 must hold 1 to 16 numbers"),
        ({"down_block_types": 3}, "down_block_types = 3 must be a list"),
        ({"in_channels": 8}, "InstructPix2Pix"),
    ):
        rewrite(unet / "config.json", config | change)
        refused(spoiled, said)
    rewrite(unet / "config.json", config)
    os.rename(unet / "diffusion_pytorch_model.safetensors", unet / "diffusion_pytorch_model.bin")
    refused(
        spoiled, "unet: it holds diffusion_pytorch_model.bin and no diffusion_pytorch_model.safetensors; a pickle can"
    )
    os.rename(unet / "diffusion_pytorch_model.bin", unet / "other.safetensors")
    refused(spoiled, "there is no diffusion_pytorch_model.safetensors, only config.json, other.safetensors")
    os.rename(unet / "other.safetensors", unet / "diffusion_pytorch_model.fp16.safetensors")
    open_checkpoint(spoiled)
    refused(spoiled, "unet: there is no diffusion_pytorch_model.bf16.safetensors", variant="bf16")
    (unet / "config.json").unlink()
    refused(spoiled, "config.json: there is no such file")
    for file in unet.iterdir():
        file.unlink()
    unet.rmdir()
    refused(spoiled, "model_index.json says StableDiffusionPipeline, but there is no folder unet/")


def test_a_variant_of_the_unet_alone_is_taken_with_the_other_parts_plain(spoiled):
    """Published folders have their U-Net without averaging as non_ema, and nothing else; diffusers takes them so, too."""
    plain = spoiled / "unet" / "diffusion_pytorch_model.safetensors"
    other = {name: tensor + 1 for name, tensor in load_file(plain).items()}
    save_file(other, spoiled / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    whole, found = open_checkpoint(spoiled), open_checkpoint(spoiled, "non_ema")
    name = min(other)
    np.testing.assert_array_equal(found.tensors["unet"][name].read(), other[name])
    assert not np.array_equal(whole.tensors["unet"][name].read(), other[name])
    assert found.tensors["vae"] == whole.tensors["vae"] and whole.notes == ()
    assert found.notes == ("the variant non_ema is not there of vae and text_encoder: another is taken",)
    refused(spoiled, "unet: there is no diffusion_pytorch_model.fp8.safetensors", variant="fp8")


def test_shards_and_variants(spoiled):
    """Two files and their index, with and without a variant in their names; and every lie an index can tell."""
    unet = spoiled / "unet"
    whole = unet / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.fp16.safetensors": names[:9], "model-00002-of-00002.fp16.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, unet / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = unet / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = open_checkpoint(spoiled)
    small.assert_same(load_params(checkpoint, "unet", small.shapes(FIRST, "unet")), small.params(FIRST, "unet"))
    # The full one is preferred to the half one, unless that is asked for.
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, whole)
    twice = jax.tree.map(lambda x: 2 * x, small.params(FIRST, "unet"))
    small.assert_same(load_params(open_checkpoint(spoiled), "unet", small.shapes(FIRST, "unet")), twice)
    whole.unlink()
    lies = {
        "is not the name of a .safetensors file beside it": {names[0]: "../vae/diffusion_pytorch_model.safetensors"},
        "'/etc/passwd' is not the name": {names[0]: "/etc/passwd"},
        "3 is not the name": {names[0]: 3},
        "it names 'gone.safetensors', which is not there": {names[0]: "gone.safetensors"},
        "00001-of-00002.fp16.safetensors: it lacks 'made.up', unlike": {"made.up": next(iter(parts))},
    }
    for said, lie in lies.items():
        index.write_text(json.dumps({"weight_map": weight_map | lie}))
        refused(spoiled, said)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != names[0]}}))
    refused(spoiled, f"it also has {names[0]}, unlike")
    index.write_text("{}")
    refused(spoiled, "it has no weight_map")


def test_loading_is_strict_and_says_all_at_once(spoiled):
    path = spoiled / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["quant_conv.bias"]
    tensors["quant_conv.bia"] = np.zeros(8, np.float32)
    tensors["decoder.conv_in.bias"] = np.zeros(8, np.float32)
    tensors["decoder.conv_out.bias"] = np.zeros(3, np.int32)
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load_params(open_checkpoint(spoiled), "vae", small.shapes(FIRST, "vae"))
    assert str(error.value) == (
        f"{spoiled}: vae: the weights are not this model's. missing: quant_conv.bias; unused: quant_conv.bia; misshapen: "
        "decoder.conv_in.bias is [8], should be [64], "
        "decoder.conv_out.bias holds int32, should hold one of float16, bfloat16, float32, float64"
    )


def test_parameters_get_the_dtype_and_the_sharding_of_their_shapes(folder):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def wanted(leaf):
        spec = PartitionSpec("fsdp") if leaf.shape[0] % 8 == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, np.float16, sharding=NamedSharding(mesh, spec))

    shapes = jax.tree.map(wanted, small.shapes(FIRST, "text_encoder"))
    checkpoint = open_checkpoint(folder)
    params = load_params(checkpoint, "text_encoder", shapes)
    for leaf, shape in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert leaf.sharding == shape.sharding and leaf.dtype == np.float16
    assert len(params["block_0"]["dense_in"]["kernel"].addressable_shards[0].data) == small.CONTEXT // 8
    halves = jax.tree.map(lambda x: x.astype(np.float16), small.params(FIRST, "text_encoder"))
    small.assert_same(params, halves)
    taken = load_params(checkpoint, "text_encoder", shapes, put=lambda path, array: (path, array.dtype, array.shape))
    assert taken["block_0"]["norm1"]["scale"] == ("block_0/norm1/scale", np.float16, (64,))


PEAK = """
import pathlib, sys, jax, numpy as np
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.weights.checkpoint import Checkpoint, component_rules, load_params
from jaxdiff.weights.names import to_theirs
from jaxdiff.weights.tensors import open_tensors, write_tensors

def memory(what):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))

path, config = sys.argv[1], {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
network, rules = AutoencoderKL(), component_rules("vae", config)
shapes = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32))["params"]
if sys.argv[2] == "write":
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    write_tensors(path, to_theirs(params, rules))
else:
    jax.block_until_ready(jax.device_put(np.zeros(3)))
    tensors = open_tensors(path)
    size = sum(tensor.nbytes for tensor in tensors.values())
    before = memory("VmRSS")
    params = load_params(Checkpoint(path, "folder", "", {}, {"vae": tensors}, {"vae": rules}), "vae", shapes)
    print(size, (memory("VmHWM") - before) / size, (memory("VmRSS") - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_while_loading_is_hardly_more_than_the_file(tmp_path):
    """Peak resident memory of a process that loads 335 MB, where the device's memory is the host's."""
    for what in ("write", "read"):
        command = [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path / "a.safetensors"), what]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    size, peak, after = map(float, output.stdout.split())
    assert size > 300e6 and after > 0.95
    assert peak < 1.3, peak


WHOLE = """
import pathlib, sys, jax
from jaxdiff.config import ShardingConfig
from jaxdiff.tasks.stable_diffusion import load_stable_diffusion
from jaxdiff.training.sharding import make_mesh

def memory(what):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))

small, large, dtype, fsdp = sys.argv[1:]
mesh = make_mesh(ShardingConfig(fsdp=int(fsdp)))
assert mesh.size == int(fsdp)
load_stable_diffusion(small, dtype=dtype, mesh=mesh)  # what a first load takes, of whatever size
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins from now
before = memory("VmRSS")
sd = load_stable_diffusion(large, dtype=dtype, mesh=mesh)
size = sum(file.stat().st_size for file in pathlib.Path(large).rglob("*.safetensors"))
split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sd.params))
print(size, (memory("VmHWM") - before) / size, (memory("VmRSS") - before) / size, split)
"""


def large_configs():
    """A small checkpoint's with wider networks; the largest tensor is, as in real ones, a small part of the whole."""
    found, context = small_checkpoint.configs(FIRST), 256
    found["unet"] |= {"block_out_channels": [128, 256, 256], "cross_attention_dim": context}
    found["vae"] |= {"block_out_channels": [64, 128, 256]}
    found["text_encoder"] |= {"hidden_size": context, "intermediate_size": 4 * context, "vocab_size": 8192}
    return found


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory):
    """A small checkpoint, and a large one by the dtype of its files."""
    folder, parts = tmp_path_factory.mktemp("sizes"), large_configs()
    small_checkpoint.write(folder / "small", FIRST)
    params = small_checkpoint.params_of(parts, FIRST)
    for dtype in (np.float32, np.float16):
        cast = jax.tree.map(lambda leaf, to=dtype: np.asarray(leaf, to), params)
        save_folder(folder / np.dtype(dtype).name, cast, parts, folder / "small" / "words")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize("file, dtype", [("float32", "float32"), ("float16", "float16"), ("float16", "bfloat16")])
def test_memory_while_a_whole_model_is_loaded_is_hardly_more_than_its_files(two_sizes, file, dtype, fsdp):
    """As above, of load_stable_diffusion, also split over simulated devices, whose memories are all the host's."""
    where = [str(two_sizes / name) for name in ("small", file)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(fsdp)}
    command = [sys.executable, "-c", WHOLE, *where, dtype, str(fsdp)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    size, peak, after, split = map(float, output.stdout.split())
    print(f"{file} files of {size / 1e6:.0f} MB as {dtype}, fsdp {fsdp}: peak {peak:.2f}, after {after:.2f} of them")
    assert size > 90e6 and after > 0.95
    assert (split > 100) == (fsdp > 1)
    assert peak < 1.3, peak
