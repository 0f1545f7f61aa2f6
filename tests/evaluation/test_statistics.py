"""Statistics files: ours, other tools', and damaged ones; what may be compared with what."""

import dataclasses
import json

import numpy as np
import pytest

from jaxdiff.evaluation.statistics import (
    NotComparableError,
    Provenance,
    Statistics,
    check_comparable,
    is_statistics,
    load_statistics,
)

KNOWN = Provenance("inception-2015-12-05", "ab" * 32, "tf1-bilinear-299", "float32", 100, "photos", 3)


def some_statistics(d=4, **changes):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, d)).astype(np.float32)
    values = {"mean": features.mean(0, dtype=np.float64), "covariance": np.cov(features.T), "features": features}
    values |= {"marginal": np.full(5, 0.2), "spatial_mean": np.zeros(3), "spatial_covariance": np.eye(3)}
    return Statistics(KNOWN, **(values | changes))


def test_round_trip(tmp_path):
    path = tmp_path / "s.npz"
    some_statistics().save(path)
    found = load_statistics(path)
    assert found.provenance == KNOWN
    for field in dataclasses.fields(Statistics)[1:]:
        ours = getattr(some_statistics(), field.name)
        if ours is None:
            assert getattr(found, field.name) is None
        else:
            np.testing.assert_array_equal(getattr(found, field.name), ours)
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]
    assert is_statistics(path)


def test_file_of_another_tool(tmp_path):
    """pytorch-fid's `mu, sigma`, and ADM's with `mu_s, sigma_s` and images beside them."""
    path = tmp_path / "their.npz"
    np.savez(
        path,
        mu=np.zeros(3),
        sigma=np.eye(3),
        mu_s=np.zeros(2),
        sigma_s=np.eye(2),
        arr_0=np.zeros((2, 4, 4, 3), np.uint8),
    )
    found = load_statistics(path)
    assert found.provenance == Provenance(data=str(path))
    assert found.provenance.unknown() == ["extractor", "weights_sha256", "resize", "precision", "num_images"]
    np.testing.assert_array_equal(found.spatial_covariance, np.eye(2))


def test_our_file_reads_as_theirs(tmp_path):
    some_statistics().save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:  # as pytorch-fid does it
        np.testing.assert_array_equal(file["mu"][:], some_statistics().mean)
        np.testing.assert_array_equal(file["sigma"][:], some_statistics().covariance)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "no array 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"not \(3,\) and \(2, 2\)"),
        ({"mu": np.zeros((3, 3)), "sigma": np.eye(3)}, r"shape \[d\]"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "'mu' must hold finite numbers"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "'mu' must hold finite numbers"),
        ({"mu": np.array([None, {}], object), "sigma": np.eye(2)}, "cannot be read"),  # a pickle
        ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2)}, "must come together"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "features": np.zeros((5, 3))}, r"shape \[n, 2\]"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "provenance": np.array("{")}, "provenance is damaged"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "provenance": np.array("{}")}, "provenance is damaged"),
        (
            {
                "mu": np.zeros(2),
                "sigma": np.eye(2),
                "provenance": np.array(json.dumps(dataclasses.asdict(KNOWN) | {"seed": "x"})),
            },
            "seed is 'x'",
        ),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"bad.npz.*{message}"):
        load_statistics(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", None])
def test_files_that_are_no_archives(tmp_path, content):
    path = tmp_path / "bad.npz"
    if content is None:
        some_statistics().save(path)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.npz: cannot be read"):
        load_statistics(path)
    assert not is_statistics(path)


@pytest.mark.parametrize("field", ["extractor", "weights_sha256", "resize", "precision"])
def test_what_was_made_otherwise_is_refused(field):
    other = dataclasses.replace(KNOWN, **{field: "else", "data": "reference"})
    with pytest.raises(
        NotComparableError, match=f"not comparable: {field} is .* for the images .photos. and else for the reference"
    ):
        check_comparable(KNOWN, other)
    check_comparable(KNOWN, dataclasses.replace(KNOWN, **{field: None}))  # unknown: a matter for a warning


def test_other_data_seed_and_number_may_be_compared():
    check_comparable(KNOWN, dataclasses.replace(KNOWN, data="x", seed=None, num_images=7))
