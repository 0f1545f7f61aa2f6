"""A model that reads captions: the same loop, checkpoints, sampling and scores as one that reads labels."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import ConfigError
from jaxdiff.data.sources import open_source
from jaxdiff.evaluation.scores import Options
from jaxdiff.tasks import captions
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.evaluate import Reference, evaluate_likelihood, evaluate_samples
from jaxdiff.tasks.run import Run, load_run
from jaxdiff.tasks.train import train_run
from jaxdiff.weights.tokenizer import train_tokenizer
from tests.tasks.test_evaluate import scorer
from tests.tiny import tiny_config

TEXT = {
    "data.source": "shapes",
    "data.channels": 3,
    "model.num_classes": 0,
    "model.patch_size": 2,
    "text.enabled": True,
    "text.width": 16,
    "text.num_layers": 1,
    "text.num_heads": 2,
    "text.vocabulary_size": 600,
    "text.context_length": 16,
    "sampling.guidance": 2.0,
    "training.sample_every": 0,
}


@pytest.fixture(scope="module")
def task():
    tokenizer = train_tokenizer(["a red circle", "a blue square"], 560, 16)
    return DiffusionTask(tiny_config(**TEXT), tokenizer)


@pytest.fixture(scope="module")
def params(task):
    """Random in every leaf: freshly initialised, the network would answer zero whatever it is told."""
    leaves, tree = jax.tree.flatten(task.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)])


def test_prompts_decide_the_image_and_nothing_but_theirs(task, params):
    run = Run(task, params, 0, (), ("a red circle", "a blue square"))
    prompts = ["a red circle", "a blue square", "a red circle"]
    images = run.text_to_image(prompts, [3, 3, 4])
    assert images.shape == (3, 8, 8, 3)
    assert not np.array_equal(images[0], images[1])
    np.testing.assert_array_equal(run.text_to_image(["a blue square"], [3])[0], images[1])
    assert not np.array_equal(run.text_to_image(prompts[:1], [3], negative="blue")[0], images[0])
    unguided = dataclasses.replace(task.config.sampling, guidance=1.0)
    np.testing.assert_array_equal(
        run.text_to_image(prompts[:1], [3], "blue", unguided), run.text_to_image(prompts[:1], [3], "", unguided)
    )


def test_captions_are_dropped_at_their_rate_and_replaced_by_the_empty_one(task, params):
    batch = {"tokens": jnp.asarray(task.tokenizer.encode(["a red circle"] * 400))}
    found = task.training_condition(params, batch, jax.random.split(jax.random.key(0), 400))
    full, empty = (task.encode_text(params, jnp.asarray(task.tokenizer.encode([t])))[0] for t in ("a red circle", ""))
    is_full = np.isclose(found, full[None], atol=1e-4).all((1, 2))
    is_empty = np.isclose(found, empty[None], atol=1e-4).all((1, 2))
    assert (is_full ^ is_empty).all()
    assert is_empty.mean() == pytest.approx(0.1, abs=0.05)


def test_the_loss_teaches_the_text_encoder(task, params):
    batch = {
        "image": np.zeros((4, 8, 8, 3), np.uint8),
        "index": np.arange(4, dtype=np.int32),
        "tokens": task.tokenizer.encode(["a red circle"] * 4),
    }
    gradient = jax.grad(lambda p: task.loss(p, batch, jax.random.key(0))[0])(params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient["text_encoder"]["block_0"]))


def test_a_run_from_training_to_samples_and_scores(tmp_path):
    """Stopped at 4 and gone on to 6: the tokenizer is the run's own; then prompts, scores and likelihood."""
    config, workdir = tiny_config(**TEXT, **{"training.num_steps": 4}), tmp_path / "run"
    train_run(config, workdir)
    vocabulary = (workdir / "tokenizer" / "vocab.json").read_bytes()
    more = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=6))
    assert train_run(more, workdir).step == 6
    assert (workdir / "tokenizer" / "vocab.json").read_bytes() == vocabulary
    run = load_run(workdir)
    assert run.text_to_image(["a large red star", "nothing"], [0, 1]).shape == (2, 8, 8, 3)
    found = evaluate_samples(["fid"], run, workdir, Reference("digits", image_size=8), scorer, Options(), num=6)
    assert np.isfinite(found.scores[0].value)
    likelihood = evaluate_likelihood(run, num=2, ode_steps=1)
    assert "shapes (test)" in likelihood.images.data
    assert all(np.isfinite(s.value) for s in likelihood.scores)


def test_wrong_requests_are_refused(task, params):
    with pytest.raises(ConfigError, match="no prompt was given"):
        Run(task, params, 0, ()).text([])
    unconditional = DiffusionTask(tiny_config())
    with pytest.raises(ConfigError, match="trained without captions"):
        Run(unconditional, None, 0, ()).text(["a cat"])


@pytest.mark.parametrize("content", ["", "{}", "[]", "[1]"])
def test_damaged_captions_are_named(tmp_path, content):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ConfigError, match=r"captions.json: "):
        captions.read(tmp_path)


def test_a_text_encoders_tokenizer_is_taken_when_a_run_goes_on_too(tmp_path):
    """Its context is as long as the encoder's; the file of many a tokenizer says another length."""
    config, source = tiny_config(**TEXT), open_source("shapes")
    own = train_tokenizer(["a red circle"], 560, 12)
    own._replace(context_length=77).save(tmp_path / "tokenizer")
    begun, kept = captions.prepare(config, source, tmp_path, write=True, given=own)
    gone_on, again = captions.prepare(config, source, tmp_path, write=True, given=own)
    assert begun.context_length == gone_on.context_length == 12 and again == kept


def test_missing_tokenizer_is_named(tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(["a"]))
    with pytest.raises(ConfigError, match="tokenizer"):
        captions.read(tmp_path)


def test_data_without_captions_are_refused_before_anything_is_written(tmp_path):
    config = tiny_config(**{**TEXT, "data.source": "digits", "data.channels": 1})
    with pytest.raises(ConfigError, match="needs captions, and there are none"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_classes": 10}, "config.model.num_classes must be 0, not 10"),
        ({"text.num_heads": 3}, "text.num_heads = 3 must divide config.text.width = 16"),
        ({"text.vocabulary_size": 100}, "must be at least 514"),
        ({"text.context_length": 2}, "must be at least 3"),
        ({"text.dropout": 1.5}, "must lie between 0 and 1"),
    ],
)
def test_impossible_text_configs(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**{**TEXT, **changes})


def test_a_run_with_a_tokenizer_of_its_users(tmp_path):
    """It is not trained on, and not needed any more: the workdir has it, with the run's own context length."""
    folder = tmp_path / "tokenizer"
    train_tokenizer(["a red circle", "a blue square"], 530, 77).save(folder)
    config = tiny_config(**TEXT, **{"text.tokenizer": str(folder), "training.num_steps": 2})
    vocabulary = json.loads((folder / "vocab.json").read_text())
    params = train_run(config, tmp_path / "run").state.params
    assert len(params["text_encoder"]["token_embedding"]["embedding"]) == len(vocabulary)
    shutil.rmtree(folder)
    run = load_run(tmp_path / "run")
    assert run.tokenizer.vocabulary == vocabulary and run.tokenizer.context_length == 16
    assert run.text_to_image(["a red circle"], [0]).shape == (1, 8, 8, 3)


def test_a_tokenizer_folder_that_is_none(tmp_path):
    config = tiny_config(**TEXT, **{"text.tokenizer": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"config.text: .* is no tokenizer: it has no vocab.json"):
        train_run(config, tmp_path / "run")
