"""Checkpoints come back bit by bit, onto any mesh; damaged ones are passed over, never deleted, never hidden."""

import contextlib
import dataclasses
import errno
import gc
import itertools
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from jaxdiff.config import ShardingConfig
from jaxdiff.tasks.make import make_task
from jaxdiff.tasks.train import train_run
from jaxdiff.training import checksums
from jaxdiff.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    ReadError,
    SaveError,
    _is_no_damage,
    abstract_state,
)
from jaxdiff.training.sharding import fsdp_shardings, make_mesh
from jaxdiff.training.state import create_state
from tests.tiny import tiny_config


def example_state(seed=0):
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(seed), (64, 128)), "bias": jnp.arange(3.0)}}
    return create_state(params, optax.adam(1e-3))


def target(mesh):
    shapes = jax.eval_shape(example_state)
    return abstract_state(shapes, fsdp_shardings(shapes, mesh))


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert x.dtype == y.dtype


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2, 3, of which two are kept; each holds another state."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, example_state(step))
    checkpoints.close()
    return tmp_path / "checkpoints"


def test_newest_comes_back_bit_identical_on_another_mesh(saved):
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.steps() == [2, 3]
    step, state = checkpoints.restore_latest(target(make_mesh(ShardingConfig(fsdp=4))))
    assert step == 3
    assert_equal(state, example_state(3))
    assert state.params["dense"]["kernel"].addressable_shards[0].data.shape == (64, 32)
    checkpoints.close()


def test_one_item_is_read_alone(saved):
    ema = target(make_mesh(ShardingConfig())).ema_params
    step, items = Checkpoints(saved).restore_items(ema_params=ema)
    assert step == 3
    assert_equal(items["ema_params"], example_state(3).ema_params)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in files_of(folder)}


def damage(path, how):
    """Damage a file in one of four ways."""
    whole = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "bit-flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    else:
        path.write_bytes(whole[: len(whole) // 2] if how == "truncated" else b"")


HOWS = ("truncated", "emptied", "bit-flipped", "removed")


@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used(saved, how, capsys):
    for path in files_of(saved / "3" / "params"):
        damage(path, how)
    left = contents(saved / "3")
    checkpoints = Checkpoints(saved, keep=2)
    step, state = checkpoints.restore_latest(target(make_mesh(ShardingConfig())))
    assert step == 2
    assert_equal(state, example_state(2))
    (line,) = capsys.readouterr().err.splitlines()
    aside = saved.parent / "damaged_checkpoints" / "3.0"
    assert line.startswith(f"checkpoint {saved / '3'} cannot be read (params/") and str(aside) in line
    assert line.endswith("that of step 2 is used")
    assert contents(aside) == left
    checkpoints.save(3, example_state(7))  # the place of the damaged step is free again
    checkpoints.close()
    assert_equal(Checkpoints(saved, keep=2).restore_latest(target(make_mesh(ShardingConfig())))[1], example_state(7))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Small:
    """A state of two arrays: few files."""

    step: jax.Array
    params: jax.Array


def small_state(seed):
    return Small(jnp.asarray(seed), jax.random.normal(jax.random.key(seed), (100,)))


# Orbax's notes about a checkpoint: the state does not depend on them. Without checksums nothing else is wrong.
HARMLESS = {"_CHECKPOINT_METADATA": HOWS, "commit_success.txt": HOWS, "checksums.json": ("removed",)}


@pytest.mark.parametrize("how", HOWS)
def test_whichever_file_is_damaged_nothing_wrong_is_read(tmp_path, how, capsys):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (2, 3):
        checkpoints.save(step, small_state(step))
    checkpoints.close()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), small_state(0))
    files = files_of(folder / "3")
    assert len(files) > 15
    for path in files:
        whole, name = path.read_bytes(), path.relative_to(folder / "3").as_posix()
        damage(path, how)
        reader = Checkpoints(folder)
        step, state = reader.restore_latest(shapes)
        told = capsys.readouterr().err
        assert_equal(state, small_state(step))
        if how in HARMLESS.get(name, ()):
            note = f"note: checkpoint {folder / '3'} has no checksums.json: it is read without a check\n"
            assert step == 3 and told == note * (name == "checksums.json"), (name, told)
        else:
            assert step == 2 and told.count("\n") == 1, (name, told)
            assert name in told or name == "checksums.json", (name, told)  # of a wrong sum nobody can tell
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"], "who only reads moves nothing"
        path.write_bytes(whole)
    assert Checkpoints(folder).restore_latest(shapes)[0] == 3


def damage_each_file(workdir, newest, before, hows, shapes, capsys):
    """As above by a reader that trains: what it cannot read is moved aside as it is, and put back here for the next file."""
    hows = itertools.cycle(hows)
    folder, aside = workdir / "checkpoints", workdir / "damaged_checkpoints" / f"{newest}.0"
    for path in files_of(folder / str(newest)):
        whole, name = path.read_bytes(), path.relative_to(folder / str(newest)).as_posix()
        damage(path, how := next(hows))
        left = contents(folder / str(newest))
        reader = Checkpoints(folder, keep=2)
        step, _ = reader.restore_latest(shapes)
        reader.close()
        told = capsys.readouterr().err
        if how in HARMLESS.get(name, ()):
            assert step == newest and not aside.exists(), name
        else:
            assert step == before and told.count("\n") == 1 and str(aside) in told, (name, told)
            assert contents(aside) == left and reader.steps() == [before], name
            shutil.move(aside, folder / str(newest))
        path.write_bytes(whole)
    assert Checkpoints(folder).restore_latest(shapes)[0] == newest


@pytest.mark.parametrize("how", HOWS)
def test_whichever_file_is_damaged_who_trains_moves_the_checkpoint_aside(tmp_path, how, capsys):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (2, 3):
        checkpoints.save(step, small_state(step))
    checkpoints.close()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), small_state(0))
    damage_each_file(tmp_path, 3, 2, [how], shapes, capsys)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two steps of a real run, each saved: its workdir, and the shapes of its state."""
    workdir = tmp_path_factory.mktemp("real") / "run"
    config = tiny_config(**{
        "training.num_steps": 2, "training.checkpoint_every": 1, "training.keep_checkpoints": 2, "training.sample_every": 0,
        "sampling.steps": 1, "sampling.num_images": 1,
    })  # fmt: skip
    train_run(config, workdir)
    mesh = make_mesh(config.sharding)
    shapes = jax.eval_shape(make_task(config).trainable(mesh).init, jax.random.key(0))
    return workdir, abstract_state(shapes, fsdp_shardings(shapes, mesh))


@pytest.mark.slow
def test_whichever_file_of_a_real_runs_newest_checkpoint_is_damaged_the_one_before_is_used(real, tmp_path, capsys):
    """In one way each, in turn: a real run has some hundred files, and the test above tries all ways on fewer."""
    workdir, shapes = real
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    assert {path.name for path in (tmp_path / "checkpoints" / "2").iterdir()} >= {"params", "ema_params", "opt_state"}
    damage_each_file(tmp_path, 2, 1, HOWS, shapes, capsys)


@pytest.mark.parametrize("content", ["[" * 100_000, "3", '{"sha256": 3}', "{", "\xff"])
def test_of_damaged_checksums_the_step_before_is_used(saved, content, capsys):
    (saved / "3" / "checksums.json").write_bytes(content.encode("latin-1"))
    assert Checkpoints(saved).restore_latest(target(make_mesh(ShardingConfig())))[0] == 2
    assert "checkpoints/3 cannot be read (checksums.json is damaged: " in capsys.readouterr().err


def test_a_run_never_starts_afresh_over_unreadable_checkpoints(saved):
    for step in ("2", "3"):
        damage(saved / step / "params" / "manifest.ocdbt", "truncated")
    before = contents(saved.parent)
    for _ in range(2):  # nor the second time
        with pytest.raises(CheckpointError, match="none of the checkpoints .*step 3: params/manifest.ocdbt is damaged"):
            Checkpoints(saved, keep=2).restore_latest(target(make_mesh(ShardingConfig())))
    assert contents(saved.parent) == before


FAULTS = [
    MemoryError(),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError(errno.EACCES, "Permission denied"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("where", ["find_damage", "restore"])
def test_a_fault_that_may_pass_is_no_damage(saved, fault, where, monkeypatch):
    def fail(*_, **__):
        raise fault

    before = contents(saved.parent)
    checkpoints = Checkpoints(saved, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(*((checksums, "_sha256") if where == "find_damage" else (checkpoints._manager, "restore")), fail)
        with pytest.raises(ReadError, match=rf"{saved / '3'} cannot be read now .*: it may be good, so it stays where"):
            checkpoints.restore_latest(target(make_mesh(ShardingConfig())))
    assert contents(saved.parent) == before
    assert checkpoints.restore_latest(target(make_mesh(ShardingConfig())))[0] == 3


def test_what_tensorstore_says_of_the_machine_is_no_damage_and_of_missing_files_is(saved):
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{saved}/"}).result()
    (saved / "pipe").symlink_to("pipe")  # which leads in a circle

    with pytest.raises(Exception, match="os_error_code") as caught:
        store.read("pipe").result()
    assert _is_no_damage(caught.value)
    for error in (FileNotFoundError(errno.ENOENT, "gone"), ValueError("NOT_FOUND: [os_error_code='2']"), KeyError("a")):
        assert not _is_no_damage(error)


def test_a_checkpoint_of_which_only_the_name_is_left_is_no_beginning(saved):
    for step in ("2", "3"):
        shutil.rmtree(saved / step)
        (saved / step).mkdir()
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        Checkpoints(saved, keep=2).restore_latest(target(make_mesh(ShardingConfig())))


def test_no_checkpoint_is_not_an_error_for_training_but_one_for_sampling(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints", keep=1).restore_latest(target(make_mesh(ShardingConfig()))) is None
    with pytest.raises(CheckpointError, match="holds no checkpoint: train first"):
        Checkpoints(tmp_path / "elsewhere").restore_items(ema_params={})


@contextlib.contextmanager
def no_file_above(size):
    """A disk that is full: no file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Files of Orbax and JAX that could not be flushed say so once more when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_fails_says_so_and_leaves_the_older_ones(saved, capfd):
    before = contents(saved)
    checkpoints = Checkpoints(saved, keep=2)
    with no_file_above(5000):
        checkpoints.save(4, example_state(4))
        with pytest.raises(
            SaveError, match=r"step 4 could not be written to .* \(File too large\); the newest there is .* 3$"
        ):
            checkpoints.wait()
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err
    again = Checkpoints(saved, keep=2)
    assert again.restore_latest(target(make_mesh(ShardingConfig())))[0] == 3
    assert contents(saved) == before
    again.save(4, example_state(4))
    again.close()
    assert again.steps() == [3, 4]
