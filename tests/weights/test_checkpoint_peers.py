"""Checkpoints against diffusers and transformers: what they save is read here, what is written here they read."""

import logging

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdiff.weights.checkpoint import COMPONENTS, component_rules, load_params, open_checkpoint
from jaxdiff.weights.export import save_folder, save_single_file
from jaxdiff.weights.names import to_theirs
from tests.any_torchvision import import_torchvision
from tests.weights import small_stable_diffusion as small

# Without a checker of images diffusers warns, unless it is told so.
QUIET = {"safety_checker": None, "tokenizer": None, "requires_safety_checker": False}
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


def classes():
    import_torchvision()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    return {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


def pipeline(kind):
    """Diffusers' own pipeline of a kind, with random numbers in every parameter of its three networks."""
    import torch

    made = classes()
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline
    from transformers import CLIPTextConfig

    configs = small.configs(kind)
    text = {k: v for k, v in configs["text_encoder"].items() if k not in ("architectures", "model_type")}
    modules = {name: made[name].from_config(configs[name]) for name in ("unet", "vae")}
    modules["text_encoder"] = made["text_encoder"](CLIPTextConfig(**text))
    torch.manual_seed(0)
    for module in modules.values():
        module.load_state_dict({k: torch.randn(v.shape) for k, v in module.state_dict().items()})
    scheduler = {"PNDMScheduler": PNDMScheduler, "DDIMScheduler": DDIMScheduler}[configs["scheduler"]["_class_name"]]
    build = StableDiffusionInpaintPipeline if "inpainting" in kind else StableDiffusionPipeline
    return build(
        **modules,
        tokenizer=None,
        scheduler=scheduler.from_config(configs["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def state(module):
    return {name.removeprefix("text_model."): tensor.numpy() for name, tensor in module.state_dict().items()}


def assert_read(path, kind, pipe, **how):
    """Every tensor of the pipeline is a parameter here, and goes back to the same bits."""
    checkpoint = open_checkpoint(path, **how)
    assert checkpoint.family == kind
    for component in COMPONENTS:
        params = load_params(checkpoint, component, small.shapes(kind, component))
        back = to_theirs(params, component_rules(component, checkpoint.configs[component]))
        theirs = state(getattr(pipe, component))
        assert {name.removeprefix("text_model.") for name in back} == set(theirs)
        for name, tensor in back.items():
            other = theirs[name.removeprefix("text_model.")]
            assert tensor.tobytes() == other.astype(np.float32).tobytes(), name
    return checkpoint


@pytest.mark.parametrize("kind", small.KINDS)
def test_what_diffusers_saves_is_read(kind, tmp_path):
    """Whole, in shards, and as an fp16 variant of both."""
    import torch

    pipe = pipeline(kind)
    pipe.save_pretrained(tmp_path / "whole")
    assert_read(tmp_path / "whole", kind, pipe)
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 2
    assert_read(tmp_path / "shards", kind, pipe)
    pipe.to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    pipe.save_pretrained(tmp_path / "half shards", variant="fp16", max_shard_size="300KB")
    for name in ("half", "half shards"):
        files = [file.name for file in (tmp_path / name / "unet").glob("diffusion*")]
        assert files and all("fp16" in file for file in files), files
        assert_read(tmp_path / name, kind, pipe)
        assert_read(tmp_path / name, kind, pipe, variant="fp16")


@pytest.mark.parametrize("kind", small.KINDS)
def test_what_is_written_here_diffusers_and_transformers_read(kind, tmp_path, caplog):
    """Without a missing or unexpected key, and without a word of warning."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    params, configs = small.all_params(kind), small.configs(kind)
    save_folder(tmp_path, params, configs)
    for component, made in classes().items():
        module, info = made.from_pretrained(tmp_path / component, output_loading_info=True)
        assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        written = to_theirs(params[component], component_rules(component, configs[component]))
        theirs = state(module)
        assert {name.removeprefix("text_model.") for name in written} == set(theirs)
        for name, tensor in written.items():
            assert tensor.tobytes() == theirs[name.removeprefix("text_model.")].tobytes(), name
    for library in (diffusers_logging, transformers_logging):
        library.enable_propagation()
    with caplog.at_level(logging.WARNING):
        pipe = DiffusionPipeline.from_pretrained(tmp_path, **QUIET)
    for library in (diffusers_logging, transformers_logging):
        library.disable_propagation()
    assert type(pipe).__name__ == (
        "StableDiffusionInpaintPipeline" if "inpainting" in kind else "StableDiffusionPipeline"
    )
    said = [record.getMessage() for record in caplog.records]
    assert not [message for message in said if "`accelerate` was not found" not in message]
    assert pipe.scheduler.config.prediction_type == configs["scheduler"]["prediction_type"]


@pytest.mark.parametrize("kind", small.KINDS)
def test_single_files_are_those_that_diffusers_converts(kind, tmp_path):
    """Diffusers' own converters of CompVis files, given ours, give the tensors of our folders."""
    import torch

    import_torchvision()
    from diffusers.loaders import single_file_utils as theirs

    params, configs = small.all_params(kind), small.configs(kind)
    save_single_file(tmp_path / "a.safetensors", params, configs)
    file = {name: torch.from_numpy(np.array(tensor)) for name, tensor in load_file(tmp_path / "a.safetensors").items()}
    assert theirs.is_clip_model(file) == ("1" in kind) and theirs.is_open_clip_model(file) == ("2" in kind)
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(file), configs["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(file), configs["vae"]),
    }
    if "1" in kind:
        converted["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(file))
    else:
        module = pipeline(kind).text_encoder
        converted["text_encoder"] = theirs.convert_open_clip_checkpoint(module, dict(file))
    for component, tensors in converted.items():
        ours = to_theirs(params[component], component_rules(component, configs[component]))
        assert ours.keys() == tensors.keys(), component
        for name, tensor in ours.items():
            assert tensor.tobytes() == tensors[name].contiguous().numpy().tobytes(), name
    step = file.get("global_step")
    v = configs["scheduler"]["prediction_type"] == "v_prediction"
    assert v == ("v_pred" in file) and ("2" in kind and not v) == (step is not None and step == 875_000)


def test_the_text_encoder_that_was_whole_is_cut_as_diffusers_cuts_it():
    """Of 24 layers of OpenCLIP the last is not read, told by the keys that diffusers leaves out."""
    import_torchvision()
    from diffusers.loaders.single_file_utils import SD_2_TEXT_ENCODER_KEYS_TO_IGNORE as left_out

    rules = component_rules("text_encoder", {"num_hidden_layers": 23, "hidden_act": "gelu"}, as_single_file=True)
    ignored = tuple(rule.theirs for rule in rules if rule.kind == "ignored")
    assert all(name.startswith(ignored) for name in left_out)


def test_a_whole_pipeline_comes_out_of_a_single_file(tmp_path):
    """Diffusers' from_single_file, which is told the small sizes by a folder."""
    pipe_of = {small.KINDS[0]: "StableDiffusionPipeline", small.KINDS[2]: "StableDiffusionPipeline"}
    import_torchvision()
    import diffusers

    for kind, name in pipe_of.items():
        params, configs = small.all_params(kind), small.configs(kind)
        save_folder(tmp_path / "folder", params, configs)
        save_single_file(tmp_path / "a.safetensors", params, configs)
        build = getattr(diffusers, name).from_single_file
        pipe = build(str(tmp_path / "a.safetensors"), config=str(tmp_path / "folder"), local_files_only=True, **QUIET)
        for component in COMPONENTS:
            written = to_theirs(params[component], component_rules(component, configs[component]))
            theirs = state(getattr(pipe, component))
            for key, tensor in written.items():
                np.testing.assert_array_equal(tensor, theirs[key.removeprefix("text_model.")])
