"""Checkpoints by Orbax: asynchronous, atomic, checked, restored onto whatever mesh asks for them.

A checkpoint is a folder `checkpoints/<step>` with an item for each field of the state, so that sampling reads `ema_params` alone.
Step n of a run depends on (config, seed, n) only, so the state is all there is to save.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxdiff.training.checksums import NAME as CHECKSUMS
from jaxdiff.training.checksums import find_damage, write_checksums
from jaxdiff.training.processes import is_first

DAMAGED = "damaged_checkpoints"
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # what the system says of files that are not there, or not files


class CheckpointError(RuntimeError):
    """No checkpoint of a run can be read."""


class SaveError(RuntimeError):
    """A checkpoint could not be written."""


class ReadError(RuntimeError):
    """A checkpoint cannot be read now, for want of memory say; that it is damaged is not known."""


class Checkpoints:
    """The checkpoints of one run.

    `keep`: how many of the newest stay; None opens them for reading only (CheckpointError where the folder is missing).
    """

    def __init__(self, folder: pathlib.Path, keep: int | None = None):
        self.folder = folder.absolute()
        self._keep = keep
        self._saving: int | None = None  # the step that was saved last, or still is
        if keep is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        elif not self.folder.is_dir():
            raise CheckpointError(self._missing())
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        if self._keep is None:
            return ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(create=False))
        # A kill while an old step is being deleted leaves a part of it: its checksums tell, and the next save removes it.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            cleanup_tmp_directories=True,
            create=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first, whether it can be read or not."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def save(self, step: int, state: Any) -> None:
        """Start saving a state dataclass; returns once it is copied to the host, the writing goes on behind.

        Raises SaveError where this or the one before cannot be written: older ones are deleted only after a newer is whole.
        """
        fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        items = {name: ocp.args.StandardSave({name: value}) for name, value in fields.items()}  # Orbax wants trees
        with self._save_errors():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _seal(self) -> None:
        """Write the checksums into the folder that is complete but for its name. Orbax calls it in the first process."""
        for folder in self._unnamed() or [self.folder / str(self._saving)]:
            write_checksums(folder)

    def _unnamed(self) -> list[pathlib.Path]:
        """Where the present step is being written."""
        return [path for path in self.folder.glob(f"{self._saving}.*") if path.is_dir()]

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Say in one line what went wrong with a save, in the background or here."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # another process was lost, or a device: not a matter of files
        except Exception as error:
            if is_first():
                for folder in self._unnamed():  # a full disk has room again
                    shutil.rmtree(folder, ignore_errors=True)
            whole = [step for step in self.steps() if step != self._saving]
            newest = f"the newest there is that of step {whole[-1]}" if whole else "there is none yet"
            raise SaveError(
                f"the checkpoint of step {self._saving} could not be written to {self.folder} ({_reason(error)}); {newest}"
            ) from error

    def restore_latest(self, target: Any) -> tuple[int, Any] | None:
        """The newest readable state as (step, state), shaped and sharded like `target`; None where there is no checkpoint.

        A damaged checkpoint is moved aside (never deleted) with a line on stderr and the one before it is read.
        Raises CheckpointError, and leaves all as it is, where there are checkpoints but none can be read; ReadError where one
        might be read at another time.
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
        args = {name: ocp.args.StandardRestore({name: target}) for name, target in targets.items()}
        damaged: dict[int, str] = {}
        while (step := self._choose(list(targets), damaged)) is not None:
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            except Exception as error:  # whatever the damage, the step before may be good
                if _is_no_damage(error):
                    raise self._not_now(step, error) from error
                if jax.process_count() > 1:  # where the others may be elsewhere by now
                    raise
                if isinstance(error, jax.errors.JaxRuntimeError):  # no room on the devices, say
                    raise CheckpointError(
                        f"checkpoint {self.folder / str(step)} cannot be used: {_reason(error)}"
                    ) from error
                damaged[step] = _reason(error)
                continue
            self._leave_out(damaged, step)
            return step, {name: restored[name][name] for name in targets}
        return None

    def _choose(self, items: list[str], damaged: dict[int, str]) -> int | None:
        """The newest step whose files are what was written, as the first process sees them; damaged ones are entered.

        Raises CheckpointError where there are only damaged ones.
        """
        chosen, none, all_damaged = -1, -1, -2
        if is_first():
            # Who only reads may find that a training has deleted a step meanwhile: it looks again for newer ones.
            while left := [step for step in self.steps() if step not in damaged]:
                try:
                    reason = find_damage(self.folder / str(left[-1]), items)
                except (OSError, MemoryError) as error:
                    raise self._not_now(left[-1], error) from error
                if reason is None:
                    chosen = left[-1]
                    self._tell_of_no_checksums(chosen)
                    break
                damaged[left[-1]] = reason
            else:
                chosen = all_damaged if damaged else none
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(chosen))
        if chosen == all_damaged:
            told = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} can be read ({told or 'see process 0'}): put one back from a copy, "
                "or give another --workdir"
            )
        return None if chosen == none else chosen

    def _tell_of_no_checksums(self, step: int) -> None:
        folder = self.folder / str(step)
        if not (folder / CHECKSUMS).exists():
            print(f"note: checkpoint {folder} has no {CHECKSUMS}: it is read without a check", file=sys.stderr)

    def _not_now(self, step: int, error: BaseException) -> ReadError:
        return ReadError(
            f"checkpoint {self.folder / str(step)} cannot be read now ({_reason(error)}): it may be good, so it stays where it is"
        )

    def _leave_out(self, damaged: dict[int, str], used: int) -> None:
        """Tell of damaged steps, and move them aside where this run will write new ones in their place."""
        present = {step: reason for step, reason in damaged.items() if (self.folder / str(step)).is_dir()}
        moved = self._keep is not None and bool(present)
        if jax.process_count() > 1:
            moved = bool(multihost_utils.broadcast_one_to_all(moved))
        if moved:
            self._manager.close()
        for step, reason in present.items():
            where = f"; it is now {self._move_aside(step)}" if moved else ""
            print(
                f"checkpoint {self.folder / str(step)} cannot be read ({reason}){where}; that of step {used} is used",
                file=sys.stderr,
            )
        if moved:
            self._manager = self._open()  # which waits for all processes

    def _move_aside(self, step: int) -> pathlib.Path:
        aside = self.folder.parent / DAMAGED
        aside.mkdir(exist_ok=True)
        number = sum(path.name.startswith(f"{step}.") for path in aside.iterdir())
        return (self.folder / str(step)).rename(aside / f"{step}.{number}")

    def check(self) -> None:
        """Raise SaveError where a save has failed behind; does not wait."""
        if jax.process_count() == 1 and self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on disk; raises what went wrong in the background."""
        with self._save_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish saving and let go of the folder."""
        self.wait()
        self._manager.close()


def _is_no_damage(error: BaseException) -> bool:
    """Whether memory, open files, a disk or a network are to blame and not what is in the files."""
    told = re.search(r"os_error_code=\W*(\d+)", str(error))  # TensorStore says it in words
    number = int(told[1]) if told else getattr(error, "errno", None)
    return isinstance(error, MemoryError) or (number is not None and number not in MISSING)


def _reason(error: BaseException) -> str:
    """The gist of an error: what the disk said, else the first line."""
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        if getattr(error, "errno", None) == code or os.strerror(code) in text:
            return os.strerror(code)
    return text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__


def _is_not_told_otherwise(record: logging.LogRecord) -> bool:
    """False for Orbax's pages about errors that it raises as well: the user gets one line."""
    return record.levelno < logging.ERROR or "orbax" not in pathlib.Path(record.pathname).parts


def _is_no_part_of_a_save(record: logging.LogRecord) -> bool:
    """False for what asyncio says of the other arrays of a save that has failed: the first was told."""
    return "orbax" not in record.getMessage()


logging.getLogger("absl").addFilter(_is_not_told_otherwise)
logging.getLogger("asyncio").addFilter(_is_no_part_of_a_save)
_usual_hook = sys.unraisablehook


def _hook(unraisable: Any) -> None:
    """As usual, but for arrays still being written when a save has failed: their event loop is gone, and that was told."""
    if str(unraisable.exc_value) != "Event loop is closed":
        _usual_hook(unraisable)


sys.unraisablehook = _hook


def abstract_state(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings, as `restore_latest` wants them."""
    return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)
