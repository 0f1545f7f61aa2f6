"""Scores by name, what they need, and what they say beside the number."""

import dataclasses

import numpy as np
import pytest

from jaxdiff.evaluation.collect import Collector
from jaxdiff.evaluation.frechet import frechet_distance
from jaxdiff.evaluation.inception_score import inception_score
from jaxdiff.evaluation.scores import METRICS, Options, check_metrics, score, warnings
from jaxdiff.evaluation.statistics import NotComparableError, Provenance
from jaxdiff.models.features import Features

KNOWN = Provenance("tiny", "00", "none", "float32", None, "images")


def statistics(seed, shift=0.0, n=40, d=5, **changes):
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(n, d)) + shift
    collector = Collector(spatial=True)
    collector.add(Features(pool, rng.normal(size=(n, 3)) * 2, pool[:, :2] ** 2))
    return dataclasses.replace(collector.statistics(KNOWN), **changes)


def test_all_scores_by_name():
    generated, real = statistics(0, 0.5), statistics(1)
    found = {s.name: s for s in score(list(METRICS), generated, real)}
    assert list(found) == ["fid", "sfid", "is", "kid", "precision", "recall"]
    assert found["fid"].value == frechet_distance(generated.mean, generated.covariance, real.mean, real.covariance)
    assert found["sfid"].value == frechet_distance(
        generated.spatial_mean, generated.spatial_covariance, real.spatial_mean, real.spatial_covariance
    )
    assert (found["is"].value, found["is"].error) == inception_score(generated.probabilities)
    assert found["is"].note == "p(y) of the generated images"
    assert found["kid"].note == "100 subsets of 40"


def test_options():
    generated, real = statistics(0, 0.5), statistics(1)
    fid, infinite = score(["fid"], generated, real, Options(bootstrap=5, infinite=True))
    assert fid.error > 0
    assert "bootstrap standard error, 5 replicates" in fid.error_kind
    assert infinite.name == "fid_infinite"
    (inception,) = score(["is"], generated, real, Options(splits=2, marginal="real"))
    assert inception.value == inception_score(generated.probabilities, 2, real.marginal).mean
    assert inception.note == "p(y) of the real images"
    (kid,) = score(["kid"], generated, real, Options(bootstrap=5, kid_subset_size=10))
    assert (kid.note, "bootstrap" in kid.error_kind) == ("100 subsets of 10", True)


def test_inception_score_needs_no_reference():
    assert len(score(["is"], statistics(0))) == 1


def test_other_extractors_features_are_refused_unless_forced():
    real = statistics(1, provenance=dataclasses.replace(KNOWN, extractor="other"))
    with pytest.raises(NotComparableError, match="not comparable: extractor is tiny"):
        score(["fid"], statistics(0), real)
    (forced,) = score(["fid"], statistics(0), real, Options(force=True))
    assert "not comparable: extractor" in forced.note
    assert score(["is"], statistics(0), real)[0].note == "p(y) of the generated images"  # has nothing to do with it


@pytest.mark.parametrize(
    ("metrics", "lacking", "options", "message"),
    [
        (["fid"], None, Options(), "fid: a reference is needed"),
        (["is"], None, Options(marginal="real"), "is with p.y. of real images: a reference is needed"),
        (["kid"], "features", Options(), "kid needs the features themselves"),
        (["pr"], "features", Options(), "pr needs the features themselves"),
        (["sfid"], "spatial_mean", Options(), "sfid needs the moments of an inner layer"),
        (["is"], "marginal", Options(marginal="real"), "of real images was asked for"),
        (["swd"], "features", Options(), "unknown metric 'swd': there are fid, sfid"),
        ([], "features", Options(), "no metric was asked for"),
    ],
)
def test_what_is_missing_is_named(metrics, lacking, options, message):
    real = statistics(1, **{lacking: None}) if lacking else None
    with pytest.raises(ValueError, match=message):
        score(metrics, statistics(0), real, options)


def test_warnings():
    few, unknown = statistics(0, n=4), statistics(1, provenance=Provenance(data="their.npz"))
    lines = warnings(["fid"], few, unknown)
    assert "their.npz: a file of another tool: its extractor, weights_sha256, resize, precision, num_images" in lines[0]
    assert "the images are only 4, fewer than the features' 5 dimensions" in lines[1]
    assert warnings(["fid"], statistics(0), statistics(1)) == []
    assert len(warnings(["is"], few, None)) == 0


def test_check_metrics_of_the_command():
    check_metrics(["bpd"], ("bpd",))
