"""What a run leaves to read and to look at: metrics.jsonl, TensorBoard files, pictures, a loss curve, a progress bar."""

import json
import pathlib
import re
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter

from jaxdiff.config import ConfigError
from jaxdiff.files import parse_json, replacing, save_gif, save_png, write_text
from jaxdiff.training.processes import agreed, is_first


class MetricsLog:
    """Scalars and pictures of one run. What an interrupted run logged beyond `start_step` is dropped: it will be made again.

    Of several processes the first one writes.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        self.workdir, self._writes = workdir, is_first()
        if not self._writes:
            return
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            kept = [record for record in read_metrics(self._path) if record["step"] <= start_step]
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(re.sub(r"[^\w./-]+", "_", name).strip("_"), value, step)  # its tags are words

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "... h w c"]) -> pathlib.Path | None:
        """A PNG `<name>/step_<step>.png`, and the same to TensorBoard; of several images a GIF, to TensorBoard all in a row."""
        if not self._writes:
            return None
        path = self.workdir / name / _picture_name(step)
        if image.ndim == 4:
            path = path.with_suffix(".gif")
            save_gif(path, image)
            image = np.concatenate(image, axis=1)
        else:
            save_png(path, image)
        self._tensorboard.add_image(name, image, step, dataformats="HWC")
        self._tensorboard.flush()
        return path

    def has_picture(self, step: int) -> bool:
        """Whether there are pictures of this step, perhaps from before an interruption; every process must ask."""
        return agreed(any(self.workdir.glob(f"*/{_picture_name(step)}")))

    def close(self) -> None:
        """Flush everything to disk."""
        if self._writes:
            self._file.close()
            self._tensorboard.close()


def _picture_name(step: int) -> str:
    return f"step_{step:07d}.png"


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, if there is one; a last line cut off by a kill is left out. Raises ConfigError."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("it is no object with a step")
            if wrong := [name for name, value in record.items() if not isinstance(value, int | float)]:
                raise ValueError(f"{wrong[0]!r} is no number")
        except ValueError as error:
            if number == len(lines):  # what follows the last line's end: nothing, or what a kill cut off
                break
            raise ConfigError(f"{path} line {number} is damaged: {error}; mend it or delete the line") from error
        records.append(record)
    return records


def save_curve(workdir: pathlib.Path, names: list[str]) -> pathlib.Path | None:
    """A PNG `curves.png` of the named metrics over the steps, one panel each; None while there is nothing to draw."""
    from matplotlib.figure import Figure

    if not is_first():
        return None
    records = read_metrics(workdir / "metrics.jsonl")
    drawn = [name for name in names if sum(name in record for record in records) > 1]
    if not drawn:
        return None
    figure = Figure(figsize=(5 * len(drawn), 3.5), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(drawn))), drawn, strict=True):
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set(xlabel="step", ylabel=name)
        if all(value > 0 for _, value in points):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    path = workdir / "curves.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path
