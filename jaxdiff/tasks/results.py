"""Scores with all that it takes to make them again: as a table, in a file, with a picture."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxdiff.config import ConfigError, SamplingConfig
from jaxdiff.evaluation.scores import Options, Score
from jaxdiff.evaluation.statistics import Provenance
from jaxdiff.files import read_json, replacing, write_text
from jaxdiff.generation.pictures import image_grid
from jaxdiff.training.processes import is_first


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """Scores, and all that it takes to make them again."""

    scores: Sequence[Score]
    images: Provenance
    reference: Provenance | None = None
    options: Options | None = None
    sampling: SamplingConfig | None = None
    warnings: Sequence[str] = ()
    preview: UInt8[np.ndarray, "n h w c"] | None = None
    marginals: tuple[Any, Any] | None = (
        None  # p(y) of the images and of the reference (or None), where `is` was asked for
    )

    def table(self) -> str:
        """The scores as lines of text."""
        width = max((len(s.name) for s in self.scores), default=0)
        sets = {"images": self.images} | ({} if self.reference is None else {"reference": self.reference})
        lines = []
        for name, provenance in sets.items():
            count = "N unknown" if provenance.num_images is None else f"N = {provenance.num_images:,}"
            lines.append(f"{name:9}  {provenance.data}, {count}")
        for s in self.scores:
            error = "" if s.error is None else f" +- {s.error:.4g}"
            notes = "; ".join(filter(None, (s.error_kind, s.note)))
            lines.append(f"{s.name:{width}}  {s.value:.6g}{error}" + (f"  ({notes})" if notes else ""))
        return "\n".join(lines)

    def save(self, path: pathlib.Path) -> list[pathlib.Path]:
        """Add the scores to the list in the JSON file `path`; draw evaluation.png beside it. Returns what was written.

        Of several processes the first one writes.
        """
        if not is_first():
            return []
        entry = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        fields = ("scores", "images", "reference", "options", "sampling")
        entry |= {name: _plain(getattr(self, name)) for name in fields}
        write_text(path, json.dumps([*read_results(path), entry], indent=2) + "\n")
        if self.preview is None:
            return [path]
        picture = path.with_name(path.name.replace("results.json", "evaluation.png"))
        self._draw(picture)
        return [path, picture]

    def _draw(self, path: pathlib.Path) -> None:
        """Images and, for the inception score, the classes that the extractor sees in all of them, most frequent first."""
        from matplotlib.figure import Figure

        assert self.preview is not None
        figure = Figure(figsize=(11, 5) if self.marginals else (5.5, 5.5), layout="constrained")
        axes = figure.subplots(1, 2 if self.marginals else 1, squeeze=False)[0]
        grid = image_grid(self.preview, padding=2)
        axes[0].imshow(grid[..., 0] if grid.shape[-1] == 1 else grid, cmap="gray", vmin=0, vmax=255)
        axes[0].set_axis_off()
        axes[0].set_title(self.images.data)
        if self.marginals:
            ours, theirs = self.marginals
            order = np.argsort(ours)[::-1][:50]
            axes[1].bar(range(len(order)), ours[order], label="these images")
            if theirs is not None and theirs.shape == ours.shape:
                axes[1].plot(range(len(order)), theirs[order], "k.", label="reference")
            axes[1].set(xlabel=f"the 50 most frequent classes of {self.images.extractor}", ylabel="p(y)")
            axes[1].legend()
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")


def _plain(value: Any) -> Any:
    """Dataclasses, alone or in a sequence, as dictionaries."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_results(path: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of a results file; none where there is no file. Raises ConfigError where it holds something else."""
    if not path.exists():
        return []
    try:
        entries = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path}: not a results file ({error}): move it away") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: not a results file, which holds a list: move it away")
    return entries
