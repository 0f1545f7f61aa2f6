"""A fine-tuned run given back: what the command writes opens in diffusers without a complaint, and is the same model."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxdiff.tasks.run import load_run
from jaxdiff.tasks.train import train_run
from tests.tasks import tiny_checkpoint as tiny
from tests.tasks.test_finetune import LORA, config_of
from tests.weights.test_lora_peer import complaints, pipeline, theirs

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
ROOT = pathlib.Path(__file__).parents[2]


def test_an_exported_run_opens_in_diffusers_without_a_complaint(tmp_path):
    sd, photos = tiny.write(tmp_path / "sd", tiny.SD2), tiny.write_photos(tmp_path / "photos")
    train_run(config_of(sd, photos, **LORA), tmp_path / "run")
    command = [sys.executable, "-m", "jaxdiff.weights", "export", "--workdir", str(tmp_path / "run")]
    for out in (["--out", str(tmp_path / "out")], ["--out", str(tmp_path / "l.safetensors"), "--format", "lora"]):
        subprocess.run([*command, *out], check=True, cwd=ROOT)
    with complaints() as found:
        exported = pipeline(tmp_path / "out")
    assert not found
    whole, state = load_run(tmp_path / "run").params, exported.unet.state_dict()
    query = whole["unet"]["middle_0"]["transformer"]["block_0"]["self_attention"]["query"]["kernel"]
    there = state["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    np.testing.assert_array_equal(there.numpy(), np.asarray(query).T)
    adapted, base = pipeline(sd), theirs(pipeline(sd))
    adapted.load_lora_weights(tmp_path, weight_name="l.safetensors")
    for a, b, before in zip(theirs(exported), theirs(adapted), base, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)  # merged by us, and by PEFT as it goes
        assert np.abs(a - before).max() > 1e-3
