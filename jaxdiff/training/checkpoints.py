"""Checkpoints by Orbax: asynchronous, atomic, restored onto whatever mesh asks for them.

A checkpoint is a folder `checkpoints/<step>` with an item for each field of the state, so that sampling reads `ema_params` alone.
Step n of a run depends on (config, seed, n) only, so the state is all there is to save.
"""

import dataclasses
import pathlib
import shutil
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

TO_DELETE = (
    "to_delete"  # old steps are moved here before they are removed: a kill in between leaves no half step behind
)


class CheckpointError(RuntimeError):
    """No checkpoint of a run can be read."""


class Checkpoints:
    """The checkpoints of one run.

    `keep`: how many of the newest stay; None opens them for reading only (CheckpointError where the folder is missing).
    """

    def __init__(self, folder: pathlib.Path, keep: int | None = None):
        self.folder = folder.absolute()
        self._keep = keep
        if keep is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.folder / TO_DELETE, ignore_errors=True)
        elif not self.folder.is_dir():
            raise CheckpointError(self._missing())
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        if self._keep is None:
            return ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(create=False))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, todelete_subdir=TO_DELETE, cleanup_tmp_directories=True, create=True
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Start saving a state dataclass; returns once it is copied to the host, the writing goes on behind."""
        fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        items = {name: ocp.args.StandardSave({name: value}) for name, value in fields.items()}  # Orbax wants trees
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore_latest(self, target: Any) -> tuple[int, Any] | None:
        """The newest readable state as (step, state), shaped and sharded like `target`; None where there is no checkpoint.

        A damaged checkpoint is moved aside (never deleted) with a line on stderr and the one before it is read.
        Raises CheckpointError where there are checkpoints but none can be read.
        """
        names = [f.name for f in dataclasses.fields(target)]
        found = self._newest({name: getattr(target, name) for name in names})
        return found and (found[0], type(target)(**found[1]))

    def restore_items(self, **targets: Any) -> tuple[int, dict[str, Any]]:
        """Some items of the newest readable checkpoint, as (step, {name: item}). Raises CheckpointError where there is none."""
        found = self._newest(targets)
        if found is None:
            raise CheckpointError(self._missing())
        return found

    def _missing(self) -> str:
        return f"{self.folder} holds no checkpoint: train first, or give another --workdir"

    def _newest(self, targets: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        steps = self.steps()
        for step in reversed(steps):
            args = {name: ocp.args.StandardRestore({name: target}) for name, target in targets.items()}
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            except Exception as error:  # whatever the damage, the step before may be good
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                print(f"checkpoint {self.folder / str(step)} cannot be read ({reason[:200]})", file=sys.stderr)
                self._move_aside(step)
                continue
            return step, {name: restored[name][name] for name in targets}
        if steps:
            raise CheckpointError(f"none of the checkpoints in {self.folder} can be read (steps {steps})")
        return None

    def _move_aside(self, step: int) -> None:
        if self._keep is None or jax.process_index():
            return
        aside = self.folder.parent / "damaged_checkpoints"
        aside.mkdir(exist_ok=True)
        number = sum(path.name.startswith(f"{step}.") for path in aside.iterdir())
        self._manager.close()
        (self.folder / str(step)).rename(aside / f"{step}.{number}")
        print(f"it was moved to {aside / f'{step}.{number}'}", file=sys.stderr)
        self._manager = self._open()

    def wait(self) -> None:
        """Wait until everything is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish saving and let go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def abstract_state(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings, as `restore_latest` wants them."""
    return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)
