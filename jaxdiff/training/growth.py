"""When a progressive GAN grows: stage, fade, batch size and learning rate as functions of the images seen (Karras et al. 2018).

A resolution is stable for so many images, then the next fades in over so many, and so on; the last stays (appendix A.1). What
holds at step n is a function of n and of these numbers only, so a run that goes on from a checkpoint is the same run.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Phase:
    """What holds for the next images, when so many have been seen.

    `leg` counts stable times and fades (0: the first resolution; 1: the fade after it; ...): where it differs from that of the
    step before, Adam's moments are reset. lod, the level of detail, is how many doublings are missing, a fraction in a fade.
    """

    images: int
    stage: int  # of both networks, from the first resolution: 0
    leg: int
    resolution: int
    lod: float
    alpha: float  # 1 where nothing fades
    batch_size: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Growth:
    """Of a network that ends at `resolution`, for a run of at least `total_images`.

    The schedule is looked at every `hold_steps` steps (one step: one update of the discriminator, so a batch of reals), and
    holds until the next look; a run ends at a look. batch_sizes, learning_rates: by resolution, where not the usual.
    """

    resolution: int
    total_images: int
    first_resolution: int = 4
    stable_images: int = 600_000
    fade_images: int = 600_000
    batch_size: int = 16
    batch_sizes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    learning_rate: float = 1e-3
    learning_rates: Mapping[int, float] = dataclasses.field(default_factory=dict)
    hold_steps: int = 4

    def __post_init__(self) -> None:
        """Raise ValueError for what can not be."""
        sides = [self.first_resolution * 2**stage for stage in range(12)]
        if self.first_resolution < 1 or self.resolution not in sides:
            raise ValueError(f"growth: {self.resolution} is not {self.first_resolution} doubled some times")
        if min(self.stable_images, self.fade_images) < 0 or self.stable_images + self.fade_images == 0:
            raise ValueError("growth: stable_images and fade_images must not be negative, nor both 0")
        if min(self.batch_size, self.hold_steps, self.total_images, *self.batch_sizes.values()) < 1:
            raise ValueError("growth: batch sizes, hold_steps and total_images must be at least 1")
        unknown = sorted((self.batch_sizes.keys() | self.learning_rates.keys()) - set(sides[: self.last_stage + 1]))
        if unknown:
            raise ValueError(
                f"growth: batch_sizes or learning_rates at {unknown}, which are no resolutions of this run"
            )

    @property
    def last_stage(self) -> int:
        """The stage of `resolution`."""
        return (self.resolution // self.first_resolution).bit_length() - 1

    def resolution_of(self, stage: int) -> int:
        """Pixels a side."""
        return self.first_resolution * 2**stage

    def at(self, images: int) -> Phase:
        """The phase when `images` have been seen."""
        stage, into = divmod(images, self.stable_images + self.fade_images)
        faded = into - self.stable_images  # the fade begins after, not at, the last image of the stable time
        if stage >= self.last_stage:
            stage, leg, alpha = self.last_stage, 2 * self.last_stage, 1.0
        elif faded > 0:
            stage, leg, alpha = stage + 1, 2 * stage + 1, faded / self.fade_images
        else:
            leg, alpha = 2 * stage, 1.0
        resolution = self.resolution_of(stage)
        return Phase(
            images=images,
            stage=stage,
            leg=leg,
            resolution=resolution,
            lod=self.last_stage - stage + (1 - alpha),
            alpha=alpha,
            batch_size=self.batch_sizes.get(resolution, self.batch_size),
            learning_rate=self.learning_rates.get(resolution, self.learning_rate),
        )

    @functools.cached_property
    def _stages(self) -> list[tuple[int, int, int]]:
        """Of each stage: its first step, the images seen before it, its batch size; all steps of a stage are equally large."""
        rows, step, images = [], 0, 0
        for stage in range(self.last_stage + 1):
            batch_size = self.batch_sizes.get(self.resolution_of(stage), self.batch_size)
            rows.append((step, images, batch_size))
            # The stage ends at the first look at which more than these have been seen.
            most = (stage + 1) * self.stable_images + stage * self.fade_images - (self.fade_images == 0)
            looks = max(0, (most - images) // (self.hold_steps * batch_size) + 1)
            step, images = step + looks * self.hold_steps, images + looks * self.hold_steps * batch_size
        return rows

    def _row(self, step: int) -> tuple[int, int, int]:
        return self._stages[bisect.bisect_right(self._stages, step, key=lambda row: row[0]) - 1]

    def images_before(self, step: int) -> int:
        """Images seen before step `step` (from 0)."""
        first_step, images, batch_size = self._row(step)
        return images + (step - first_step) * batch_size

    def at_step(self, step: int) -> Phase:
        """The phase of step `step`: that of the last look."""
        first_step = self._row(step)[0]
        return self.at(self.images_before(step - (step - first_step) % self.hold_steps))

    def first_step(self, stage: int) -> int:
        """The step at which a stage begins to fade in, however short the run."""
        return self._stages[stage][0]

    def traced_alpha(self, stage: int, step: Int[Array, ""]) -> Float[Array, ""]:
        """`at_step(step).alpha` of a step that is known to a compiled program only, while `stage` lasts."""
        first_step, images, batch_size = self._stages[stage]
        before = stage * (self.stable_images + self.fade_images) - self.fade_images  # images when the fade begins
        if stage == 0 or self.fade_images == 0:
            return jnp.ones((), jnp.float32)
        look = (step - first_step) // self.hold_steps * self.hold_steps
        faded = jnp.minimum(images - before + look * batch_size, self.fade_images)
        return faded.astype(jnp.float32) / self.fade_images

    def resets(self, stage: int) -> tuple[int, int]:
        """Steps before which the optimisers forget: the stage's first, and the first that fades no more."""
        first_step, images, batch_size = self._stages[stage]
        missing = stage * (self.stable_images + self.fade_images) - images
        return first_step, first_step + self.hold_steps * max(0, -(-missing // (self.hold_steps * batch_size)))

    @property
    def num_steps(self) -> int:
        """Steps until `total_images` have been seen."""
        first_step, images, batch_size = next(row for row in reversed(self._stages) if row[1] < self.total_images)
        looks = -(-(self.total_images - images) // (self.hold_steps * batch_size))
        return first_step + looks * self.hold_steps
