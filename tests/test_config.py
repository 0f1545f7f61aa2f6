"""The typed config: strict about names, types and impossible combinations."""

import json

import pytest

from jaxdiff.config import (
    CHANGEABLE_KEYS,
    CHANGEABLE_SECTIONS,
    Config,
    ConfigError,
    default_config,
    flatten,
    may_change,
    to_config,
    to_json,
)
from tests.tiny import tiny_config


def test_defaults_are_valid_and_survive_json():
    config = to_config(default_config())
    assert config == Config()
    assert to_config(json.loads(to_json(config))) == config


def test_a_config_file_cannot_misspell_a_key():
    config = default_config()
    with pytest.raises(AttributeError, match='Did you mean "batch_size"'):
        config.training.batchsize = 3


def test_an_unknown_key_in_a_stored_config_is_refused_with_a_suggestion():
    values = default_config().to_dict()
    values["training"]["batchsize"] = 3
    with pytest.raises(ConfigError, match="unknown config key config.training.batchsize; did you mean batch_size?"):
        to_config(values)


def test_integers_pass_for_floats_and_lists_for_tuples_and_nothing_else():
    config = default_config().to_dict()
    config["optimizer"]["learning_rate"] = 1
    config["model"]["channel_multipliers"] = [1, 2]
    config["model"]["attention_resolutions"] = []
    built = to_config(config)
    assert built.optimizer.learning_rate == 1.0 and isinstance(built.optimizer.learning_rate, float)
    assert built.model.channel_multipliers == (1, 2)
    config["data"]["flip"] = 1
    with pytest.raises(ConfigError, match="config.data.flip = 1 must be of type bool, not int"):
        to_config(config)


IMPOSSIBLE = [
    ({"data.image_size": 9}, "config.data.image_size = 9 must be divisible by 2"),
    ({"data.channels": 2}, "must be 1 .grey. or 3 .RGB."),
    ({"model.attention_resolutions": (3,)}, "3 is not a side of this U-Net, which has 4"),
    ({"model.num_heads": 3}, "config.model.num_heads = 3 must divide 16 channels"),
    ({"model.attention_implementation": "cudnn"}, "needs config.model.dtype = 'bfloat16'"),
    ({"model.dropout": 1.0}, "config.model.dropout = 1.0 must be at least 0 and below 1"),
    ({"diffusion.schedule": "cosin"}, "config.diffusion.schedule = 'cosin' must be one of 'linear'"),
    ({"diffusion.prediction": "velocity"}, "needs config.diffusion.schedule = 'flow'"),
    ({"diffusion.prediction": "edm"}, "a prediction of that schedule only"),
    ({"diffusion.schedule": "edm"}, "'noise' with config.diffusion.schedule = 'edm'"),
    ({"diffusion.zero_terminal_snr": True}, "cannot start from pure noise"),
    ({"diffusion.loss": "hybrid"}, "needs config.diffusion.learned_variance = True"),
    (
        {"diffusion.learned_variance": True, "diffusion.schedule": "flow", "diffusion.prediction": "velocity"},
        "with betas",
    ),
    ({"diffusion.beta_start": 0.5}, "0 < beta_start < beta_end < 1"),
    ({"diffusion.label_dropout": 1.5}, "must lie between 0 and 1"),
    ({"diffusion.min_snr_floor": 1.0}, "min_snr_floor must be 0 for prediction = 'noise'"),
    ({"diffusion.min_snr_floor": 5.0, "diffusion.prediction": "x0"}, "must be below min_snr_gamma"),
    ({"model.position_embedding": True, "model.channels": 18}, "model.channels = 18 must be a multiple of 4"),
    ({"text.pooled": True}, "text.pooled is set, but config.text.enabled is False"),
    ({"training.batch_size": 0}, "must be at least 1"),
    ({"training.accumulation_steps": 3}, "must be divisible by accumulation_steps = 3"),
    ({"optimizer.learning_rate": 0.0}, "must be positive"),
    ({"sampling.variance": "learned"}, "needs config.diffusion.learned_variance = True"),
    ({"sampling.steps": 101}, "must not exceed"),
    ({"sampling.guidance_start": 1.0}, "must be below guidance_end"),
    ({"seed": -1}, "must not be negative"),
    ({"evaluation.metrics": ("fid", "bpd")}, "evaluation.metrics: 'bpd' must be one of fid, sfid, is, kid, pr"),
    ({"evaluation.metrics": ()}, "evaluation.metrics must name some of"),
    ({"evaluation.metrics": ("sfid",), "evaluation.extractor": "efficientnet-lite0"}, "'sfid' needs .* 'inception'"),
    ({"evaluation.num_images": 3}, "evaluation.num_images = 3 must be at least 10"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE, ids=lambda v: ",".join(v) if isinstance(v, dict) else "")
def test_the_impossible_is_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_config(**changes)
    assert "\n" not in str(caught.value)


def test_what_may_change_exists():
    names = flatten(Config())
    assert set(names) >= CHANGEABLE_KEYS
    assert all(any(name.startswith(prefix) for name in names) for prefix in CHANGEABLE_SECTIONS)
    assert may_change("autoencoder") and not may_change("autoencoder_kl.channels")


def test_choices_are_those_of_the_library():
    """config.py stands below everything and repeats a few names: they must be the real ones."""
    from typing import get_args

    from jaxdiff import config
    from jaxdiff.diffusion.predictions import PREDICTIONS
    from jaxdiff.diffusion.samplers import SAMPLERS, VARIANCES
    from jaxdiff.diffusion.timesteps import SPACINGS
    from jaxdiff.evaluation.extractors import EXTRACTORS
    from jaxdiff.tasks.evaluate import IMAGE_METRICS

    def choices(section, name):
        return get_args(next(f.type for f in section.__dataclass_fields__.values() if f.name == name))

    assert choices(config.EvaluationConfig, "extractor") == EXTRACTORS
    assert config.TRAINING_METRICS == IMAGE_METRICS
    assert choices(config.SamplingConfig, "sampler") == (*SAMPLERS, "file")
    assert choices(config.SamplingConfig, "variance") == VARIANCES
    assert choices(config.SamplingConfig, "spacing") == (*SPACINGS, "file")
    assert choices(config.DiffusionConfig, "prediction") == PREDICTIONS
