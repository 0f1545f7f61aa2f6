"""What is known of a set of images: its moments and features, and where they come from; as an .npz file.

The keys `mu`, `sigma` (and `mu_s`, `sigma_s` of the inner layer) are those that pytorch-fid, EDM and ADM read and write;
`marginal`, `features` and `provenance` (JSON) are ours. Nothing in a file is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxdiff.files import parse_json, read_npz, replacing

MAX_DIMENSION = 16_384  # of features: a file that claims more is not one of ours


class NotComparableError(ValueError):
    """Two sets of features that were not made in the same way."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """How features came about. None: unknown, as in files of other tools."""

    extractor: str | None = None
    weights_sha256: str | None = None
    resize: str | None = None
    precision: str | None = None
    num_images: int | None = None
    data: str | None = None
    seed: int | None = None

    # What must agree before two sets may be compared.
    MUST_AGREE = ("extractor", "weights_sha256", "resize", "precision")

    def unknown(self) -> list[str]:
        """Names of the fields that are unknown; not having a seed is no lack of knowledge."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is None and f.name != "seed"]


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Moments (and, as far as they were kept, features) of a set of images."""

    provenance: Provenance
    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]
    spatial_mean: Float[np.ndarray, " s"] | None = None  # of the layer that sFID looks at
    spatial_covariance: Float[np.ndarray, "s s"] | None = None
    marginal: Float[np.ndarray, " k"] | None = None  # mean of p(y|x)
    features: Float[np.ndarray, "n d"] | None = None
    probabilities: Float[np.ndarray, "n k"] | None = None  # p(y|x); not written to files

    def save(self, path: str | pathlib.Path) -> None:
        """Write the .npz file."""
        arrays: dict[str, Any] = {key: getattr(self, name) for key, name in KEYS.items()}
        arrays = {key: value for key, value in arrays.items() if value is not None}
        arrays["provenance"] = np.array(json.dumps(dataclasses.asdict(self.provenance)))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)


KEYS = {
    "mu": "mean",
    "sigma": "covariance",
    "mu_s": "spatial_mean",
    "sigma_s": "spatial_covariance",
    "marginal": "marginal",
    "features": "features",
}


def check_comparable(generated: Provenance, reference: Provenance) -> None:
    """Raise NotComparableError, saying why, where a known field of both that matters differs."""
    for name in Provenance.MUST_AGREE:
        ours, theirs = getattr(generated, name), getattr(reference, name)
        if ours is not None and theirs is not None and ours != theirs:
            raise NotComparableError(
                f"not comparable: {name} is {ours} for the images ({generated.data}) and {theirs} for the reference "
                f"({reference.data})"
            )


def is_statistics(path: pathlib.Path) -> bool:
    """Whether a file is an .npz archive with moments in it (and not, say, one with images)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except Exception:  # zipfile raises many kinds of error on damaged bytes; whoever reads the file says what it is
        return False


def load_statistics(path: str | pathlib.Path) -> Statistics:
    """Read an .npz file, ours or another tool's. Raises ValueError naming the file and what is wrong with it."""
    path = pathlib.Path(path)
    try:
        arrays = read_npz(path, (*KEYS, "provenance"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a statistics file (.npz): {error}") from error
    for key in ("mu", "sigma"):
        if key not in arrays:
            raise ValueError(f"{path}: not a statistics file: it has no array {key!r}")
    fields = {
        KEYS[key]: np.asarray(value, np.float32 if key == "features" else np.float64)
        for key, value in arrays.items()
        if key in KEYS and _numeric(value, f"{path}: {key!r}")
    }
    _check_shapes(fields, path)
    return Statistics(_read_provenance(arrays.get("provenance"), path), **fields)


def _numeric(value: np.ndarray, what: str) -> bool:
    if value.dtype.kind not in "fiu" or not np.isfinite(value).all():
        raise ValueError(f"{what} must hold finite numbers only")
    return True


def _check_shapes(fields: dict[str, np.ndarray], path: pathlib.Path) -> None:
    for mean, covariance in (("mean", "covariance"), ("spatial_mean", "spatial_covariance")):
        if (mean in fields) != (covariance in fields):
            raise ValueError(f"{path}: {mean} and {covariance} must come together")
        if mean in fields:
            shape = fields[mean].shape
            if len(shape) != 1 or not 1 <= shape[0] <= MAX_DIMENSION or fields[covariance].shape != shape * 2:
                raise ValueError(
                    f"{path}: a mean of shape [d] and a covariance of shape [d, d] were expected, not {shape} and "
                    f"{fields[covariance].shape}"
                )
    features, d = fields.get("features"), len(fields["mean"])
    if features is not None and (features.ndim != 2 or features.shape[1] != d):
        raise ValueError(f"{path}: features of shape [n, {d}] were expected, not {features.shape}")
    if fields.get("marginal", np.zeros(1)).ndim != 1:
        raise ValueError(f"{path}: a marginal of shape [k] was expected, not {fields['marginal'].shape}")


def _read_provenance(value: np.ndarray | None, path: pathlib.Path) -> Provenance:
    if value is None:
        return Provenance(data=str(path))
    kinds = {"num_images": int, "seed": int}
    try:
        known = parse_json(str(value))
        given = {f.name: known[f.name] for f in dataclasses.fields(Provenance)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its provenance is damaged ({error})") from error
    for name, item in given.items():
        kind = kinds.get(name, str)
        if item is not None and (not isinstance(item, kind) or isinstance(item, bool)):
            raise ValueError(f"{path}: its provenance is damaged ({name} is {item!r})")
    return Provenance(**given)
