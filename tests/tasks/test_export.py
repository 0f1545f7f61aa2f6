"""Samplers written for programs without this library: called in a process that can import neither it nor Flax."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import jaxdiff
from jaxdiff import export as command
from jaxdiff.config import ConfigError
from jaxdiff.generation.pipelines import image_to_image, inpaint, text_to_image
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.run import Run
from jaxdiff.tasks.stable_diffusion import load_stable_diffusion
from jaxdiff.weights.tokenizer import train_tokenizer
from tests.generation.gaussian_model import left_half, pictures
from tests.tasks import small_checkpoint as small
from tests.tasks.test_image_editing import random_params
from tests.tasks.test_text import TEXT
from tests.tiny import tiny_config

PAGE = pathlib.Path(__file__).parents[2] / "docs/serving.md"
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jaxdiff", "flax", "tests"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Blocker())
"""


def called_elsewhere(folder, seeds, inputs, knobs):
    """What the page's snippet makes in a new process, with these seeds, inputs and changes of the knobs."""
    snippet = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S).group(1)
    given = f'about["knobs"] |= {knobs!r}\ninputs = dict(np.load("given.npz"))\nseeds = inputs.pop("seeds")'
    snippet, count = re.subn(
        r"^seeds = .*\ninputs = .*$", given, snippet.replace("exported/mnist", str(folder)), flags=re.M
    )
    assert count == 1
    script = BLOCKED + snippet + '\nassert not {"jaxdiff", "flax"} & set(sys.modules)\nnp.save("images.npy", images)\n'
    work = pathlib.Path(folder).parent
    np.savez(work / "given.npz", seeds=np.asarray(seeds, np.uint32), **inputs)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(work / "images.npy")


def assert_same_images(images, expected):
    """Up to one level here and there: the programs are compiled apart."""
    assert images.dtype == np.uint8 and images.shape == expected.shape and expected.std() > 5
    difference = np.abs(images.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def run_of(**changes):
    task = DiffusionTask(tiny_config(**{"sampling.guidance": 2.0, "sampling.sampler": "ddim", **changes}))
    return Run(task, random_params(task), 0, tuple("abcdefghij"))


@pytest.fixture(scope="module")
def run():
    return run_of()


def test_a_run_makes_its_images_in_another_process(run, tmp_path):
    """For any number of images, with another guidance."""
    folder = jaxdiff.export_sampler(run, tmp_path / "sampler")
    assert {path.name for path in folder.iterdir()} == {"sampler.stablehlo", "params.safetensors", "sampler.json"}
    about = json.loads((folder / "sampler.json").read_text())
    assert about["knobs"] == {"guidance": 2.0, "eta": 0.0} and about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["inputs"] == {"label": {"shape": ["b"], "dtype": "int32"}}
    for labels, knobs in (([7, 3, 1], {}), ([7], {"guidance": 5.0, "eta": 1.0})):
        seeds, labels = range(3, 3 + len(labels)), np.array(labels, np.int32)
        images = called_elsewhere(folder, seeds, {"label": labels}, knobs)
        settings = dataclasses.replace(run.settings, **knobs)
        assert_same_images(images, text_to_image(run, labels, list(seeds), settings=settings))


@pytest.mark.slow
def test_images_and_masks_are_inputs(run, tmp_path):
    for kind, function in (("image_to_image", image_to_image), ("inpaint", inpaint)):
        folder = jaxdiff.export_sampler(run, tmp_path / kind / "sampler", kind=kind)
        image, mask, labels = pictures(2), np.stack([left_half()] * 2), np.array([7, 3], np.int32)
        inputs = {"label": labels, "image": image} | ({"mask": mask} if kind == "inpaint" else {})
        images = called_elsewhere(folder, [3, 4], inputs, {"start": 1})
        given = (list(image), list(mask)) if kind == "inpaint" else (list(image),)
        assert_same_images(images, function(run, labels, *given, [3, 4], strength=0.75))


@pytest.mark.slow
def test_a_run_that_reads_text_and_one_that_is_asked_for_nothing(tmp_path):
    task = DiffusionTask(tiny_config(**TEXT), train_tokenizer(["a red circle", "a blue square"], 560, 16))
    run = Run(task, random_params(task), 0, (), ("a red circle",))
    folder = jaxdiff.export_sampler(run, tmp_path / "text")
    request = run.text(["a red circle", "a square"], "blue")
    assert_same_images(called_elsewhere(folder, [3, 4], request, {}), run.make([3, 4], request))
    run = run_of(**{"model.num_classes": 0})
    folder = jaxdiff.export_sampler(run, tmp_path / "nothing")
    assert_same_images(called_elsewhere(folder, [3, 4], {}, {}), run.make([3, 4]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [small.KINDS[0], small.KINDS[1], small.KINDS[2]])
def test_stable_diffusion_makes_its_images_in_another_process(kind, tmp_path):
    """A latent model; the one with mask channels fills in."""
    sd = load_stable_diffusion(small.write(tmp_path / "model", kind), mesh=small.one_device())
    settings = dataclasses.replace(sd.settings, steps=3)
    filling = "inpainting" in kind
    folder = tmp_path / "sampler"
    jaxdiff.export_sampler(sd, folder, kind="inpaint" if filling else "text_to_image", settings=settings)
    prompts = ["a cat", "my dog"]
    inputs = {"tokens": sd.tokenizer.encode(prompts), "negative": sd.tokenizer.encode(["", ""])}
    if filling:
        inputs |= {"image": np.stack([small.image()] * 2), "mask": np.stack([small.mask()] * 2)}
        expected = inpaint(sd, prompts, small.image(), small.mask(), [3, 4], settings=settings)
    else:
        expected = text_to_image(sd, prompts, [3, 4], settings=settings)
    assert_same_images(called_elsewhere(folder, [3, 4], inputs, {}), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "interpolate"}, "kind 'interpolate': must be one of text_to_image"),
        ({"platforms": ("cpu", "gpu")}, "platforms cpu, gpu: must be one or more of cpu, cuda"),
        ({"platforms": ()}, r"platforms \(\): must be"),
        ({"folder": "."}, "exists already"),
        ({"strength": 2.0, "kind": "inpaint"}, "strength 2 must lie from 0"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(run, tmp_path, options, message):
    (tmp_path / "something").touch()
    folder = tmp_path / options.pop("folder", "new")
    with pytest.raises(ConfigError, match=message):
        jaxdiff.export_sampler(run, folder, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_the_missing_package_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"without flatbuffers: pip install 'jaxdiff\[export\]'"):
        jaxdiff.export_sampler(run, tmp_path / "new")


def test_the_command_writes_what_the_function_does(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_model", lambda args: run)
    flags = ["--workdir=x", f"--out={tmp_path / 'new'}", "--steps=2", "--platforms=cpu", "--kind=image_to_image"]
    monkeypatch.setattr(sys, "argv", ["export", *flags])
    command.main()
    assert "image_to_image, ddim, 2 steps" in capsys.readouterr().out
    about = json.loads((tmp_path / "new/sampler.json").read_text())
    assert about["steps"] == 2 and about["platforms"] == ["cpu"] and about["knobs"]["start"] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--out new", "give either --workdir"),
        ("--workdir nowhere --out new", "nowhere"),
        ("--model nowhere --out new", "nowhere: there is no such file or folder"),
        ("--workdir x --out new --platforms gpu", "platforms gpu: must be"),
        ("--workdir x --out new --batch_per_device 2", "--batch_per_device: the sampler makes"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(monkeypatch, tmp_path, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", *argv.split()])
    with pytest.raises(SystemExit) as caught:
        command.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error
    assert not (tmp_path / "new").exists()
