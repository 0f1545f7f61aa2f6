"""What a run is said to take, before it begins: against the compiled program, by hand, and where it does not fit."""

import dataclasses
import math
import re
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import train
from jaxdiff.command_line import process_flags
from jaxdiff.config import ConfigError, ShardingConfig
from jaxdiff.generation.pictures import image_grid
from jaxdiff.tasks import preflight as module
from jaxdiff.tasks.preflight import Step, changed, expected_traffic, picture, preflight, remedy, roofline
from jaxdiff.tasks.targets import choose_target, memory_wanting
from jaxdiff.training.chips import CHIPS
from jaxdiff.training.collectives import collectives, sent
from jaxdiff.training.sharding import make_mesh
from tests.tasks.families import FAMILIES, family
from tests.tiny import tiny_config


def said(capsys):
    """The printed lines by their first word."""
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}


def number(pattern, text):
    return float(re.search(pattern, text)[1].replace(",", ""))


def test_of_a_step_on_eight_devices(tmp_path, capsys, monkeypatch):
    """Numbers of the program that was compiled; and nothing is written but a picture of the batch that training begins with."""
    steps, runs = [], []
    compile_, open_ = module._compile, module._open
    monkeypatch.setattr(module, "_compile", lambda run: steps.append(compile_(run)) or steps[-1])
    monkeypatch.setattr(module, "_open", lambda *args: runs.append(open_(*args)) or runs[-1])
    preflight(tiny_config(**{"task": "vae", "model.num_classes": 0}), tmp_path / "run")
    (step,), (run,), lines = steps, runs, said(capsys)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["first_batch.png"]
    with Image.open(tmp_path / "run" / "first_batch.png") as image:
        np.testing.assert_array_equal(np.asarray(image), image_grid(run.batch["image"])[..., 0])
    text, plan = step.compiled.as_text(), step.compiled.memory_analysis()
    # The gradient travels once, as expected; besides it only metrics and norms do. Kernels of convolutions after a doubling
    # travel as they are used, 16 numbers for 9.
    expected, found = sum(expected_traffic(run).values()), sent(text, 8)
    leaves = jax.tree_util.tree_leaves_with_path(run.state.params)
    folded = sum(math.prod(a.shape) * 4 for path, a in leaves if "decoder_conv" in str(path) and a.shape[:2] == (3, 3))
    usual = expected + 2 * 7 / 8 * (16 / 9 - 1) * folded
    assert folded and set(collectives(text)) == {"all-reduce"} and usual < found < 1.01 * usual
    assert number(r"sends ([\d.]+) MB", lines["expected"]) == pytest.approx(expected / 1e6, rel=1e-3)
    # State and a share of the batch go in, and the state is replaced in place.
    share = sum(array.nbytes for array in run.batch.values()) / 8
    assert abs(plan.argument_size_in_bytes - run.kept - share) < 0.01 * run.kept
    assert plan.alias_size_in_bytes > 0.9 * run.kept
    assert step.needed > plan.argument_size_in_bytes + plan.temp_size_in_bytes
    assert "fits" in lines["memory"] and "1,797 grey images" in lines["data"]


def run_of(mesh, params=None, kept=0, room=0, frozen=(), batch=64, **changes):
    config = tiny_config(**{"training.batch_size": batch, **changes})
    state = SimpleNamespace(params=params)
    return SimpleNamespace(
        config=config, mesh=mesh, state=state, frozen=frozen, kept=kept, room=room, stage=SimpleNamespace(batch_size=batch)
    )  # fmt: skip


def test_expected_traffic_by_hand():
    array, bias = jax.ShapeDtypeStruct((64, 1024), np.float32), jax.ShapeDtypeStruct((100,), np.float32)
    tree = {"kernel": array, "bias": bias}
    whole = 64 * 1024 * 4
    data = run_of(make_mesh(ShardingConfig()), tree)
    assert expected_traffic(data) == {"all-reduce": 2 * 7 * (whole + 400) // 8}
    both = run_of(make_mesh(ShardingConfig(fsdp=4)), tree, frozen=({"kernel": array},))
    assert expected_traffic(both) == {
        "all-gather": 2 * whole * 3 // 4,  # what is trained, and what is frozen
        "reduce-scatter": whole * 3 // 4,
        "all-reduce": whole // 4 + 2 * 7 * 400 // 8,
    }
    # Of a table the gradient is averaged whole, wherever its rows are kept (tests/tasks/test_traffic.py).
    table = run_of(make_mesh(ShardingConfig(fsdp=4)), {"words": {"embedding": array}}, frozen=({"embedding": array},))
    assert expected_traffic(table) == {"all-gather": 2 * whole * 3 // 4, "all-reduce": 2 * 7 * whole // 8}
    assert expected_traffic(run_of(make_mesh(ShardingConfig(), jax.devices()[:1]), tree)) == {}


GIB = 2**30


@pytest.mark.parametrize(
    ("needed", "kept", "changes", "found"),
    [
        (40, 9, {}, {"sharding.fsdp": 8}),  # the state is most of it
        (40, 1, {}, {"model.remat": True}),
        (40, 1, {"model.remat": True}, {"training.batch_size": 16}),  # (0.95 * 16 - 1) / 39 of 64 is 23
        (17, 1, {"model.remat": True}, {"training.batch_size": 32}),
        (900, 1, {"model.remat": True}, {"training.batch_size": 8}),  # one a device is the least
        (900, 1, {"model.remat": True, "training.accumulation_steps": 2}, {"training.batch_size": 16}),
        (40, 1, {"task": "vae", "model.num_classes": 0}, {"training.batch_size": 16}),  # which has nothing to recompute
        (900, 1, {"model.remat": True, "training.batch_size": 8}, {"sharding.fsdp": 8}),
        (900, 1, {"model.remat": True, "training.batch_size": 8, "sharding.mode": "pmap"}, None),
    ],
)
def test_what_helps(needed, kept, changes, found):
    mesh = make_mesh(ShardingConfig())
    batch = changes.pop("training.batch_size", 64)
    run = run_of(mesh, kept=kept * GIB, room=16 * GIB, batch=batch, **changes)
    assert remedy(run, needed * GIB) == found


def test_it_goes_on_until_it_fits(tmp_path, capsys, monkeypatch):
    """With a compiler that says so much a state and so much an image, half of it with remat."""
    monkeypatch.setattr(module, "device_memory", lambda *_: 1 * GIB)

    def needed(run):
        activations = run.config.training.batch_size * 2**27 // (1 + run.config.model.remat)
        return Step(run.kept + activations, SimpleNamespace(memory_analysis=plan, as_text=lambda: "ENTRY %m () {"), 0.0)

    def plan():
        names = ("argument", "output", "alias", "temp")
        return SimpleNamespace(**{f"{name}_size_in_bytes": 0 for name in names})

    monkeypatch.setattr(module, "_compile", needed)
    monkeypatch.setattr(module, "_operations", lambda run: None)
    preflight(tiny_config(), tmp_path)
    out = capsys.readouterr().out
    assert "DOES NOT FIT, by" in out.split("memory")[1].splitlines()[0]
    assert out.splitlines()[-1] == "to type    --config.model.remat=True --config.training.batch_size=8"
    assert "fits, " in out.splitlines()[-2]


def test_changes_are_of_the_config():
    config = changed(tiny_config(), {"model.remat": True, "sharding.fsdp": 2})
    assert config.model.remat and config.sharding.fsdp == 2 and config.model.channels == 16


def test_roofline_by_hand():
    v5e = next(chip for chip in CHIPS if chip.name == "v5e")
    assert roofline(1.97e12, 8.19e9, 2e9, v5e) == pytest.approx({"computing": 0.01, "memory": 0.01, "traffic": 0.01})


def test_latents_are_shown_as_colours():
    moments = np.random.default_rng(0).normal(size=(4, 8, 8, 8)).astype(np.float16)
    shown = picture({"moments": moments})
    assert shown.dtype == np.uint8 and shown.shape[-1] == 3 and shown.std() > 30


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G).", (20.5, 15.75)),
        ("Ran out of memory in memory space hbm. Used 1.50T of 31.25G hbm. Exceeded by 1.4T", (1536, 31.25)),
        ("INTERNAL: something else", None),
    ],
)
def test_what_the_tpu_compiler_says_for_want_of_memory(message, found):
    assert memory_wanting(RuntimeError(message)) == (found and tuple(round(n * GIB) for n in found))


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:", "v5e:2by4", "v5e:2", "tpu", ""])
def test_what_is_no_slice_is_named(name):
    with pytest.raises(ConfigError, match=rf"--target {name}: must be a TPU slice.*v5e:2x4.*v6e:1x1.*v5p:2x2x1"):
        choose_target(name)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxdiff\[tpu\]'"):
        choose_target("v5e:2x4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target=v5e:2by4"], "error: --target v5e:2by4: must be a TPU slice"),  # which alone says --dry_run, too
        (["--dry_run", "--profile"], "error: --profile writes a trace of training steps, and --dry_run takes none"),
        (["--target=v5e:2x4", "--profile"], "error: --profile writes a trace of training steps, and --target v5e:2x4"),
        (["--dry_run", "--target=v5e:2by4"], "error: --target v5e:2by4: must be a TPU slice"),
        (["--dry_run", "--target"], "error: --target: expected one argument"),
        (
            ["--dry_run", "--config.sharding.fsdp=3"],
            "error: config.sharding.fsdp = 3 must divide the number of devices, 8",
        ),
    ],
)
def test_a_wrong_command_is_one_line_and_writes_nothing(flags, message, monkeypatch, tmp_path, capsys):
    workdir = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=configs/digits.py", f"--workdir={workdir}", *flags])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and error.startswith(message) and not workdir.exists()


def test_a_target_means_a_dry_run():
    args, rest = process_flags(["train.py", "--target=v5e:2x4"])
    assert args.dry_run and args.target == "v5e:2x4" and rest == ["train.py"]
    assert not process_flags(["train.py", "--profile"])[0].dry_run


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_asked(name, tmp_path, capsys):
    preflight(family(name, tmp_path), tmp_path / "run")
    lines = said(capsys)
    assert number(r"([\d.,]+) GFLOP a step", lines["operations"]) > 0 and "fits" in lines["memory"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["first_batch.png"]
    assert number(r"sends ([\d.]+) MB", lines["compiled"]) >= 0.99 * number(r"sends ([\d.]+) MB", lines["expected"])


@pytest.mark.slow
def test_of_a_checkpoint_no_weight_is_read(tmp_path, capsys, monkeypatch):
    config = family("fine-tuning", tmp_path)
    monkeypatch.setattr("jaxdiff.tasks.pretrained.load_params", lambda *_: pytest.fail("read"))
    preflight(config, tmp_path / "run")
    assert "fits" in said(capsys)["memory"]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [{"sharding.mode": "pmap"}, {"sharding.fsdp": 4}, {"sharding.fsdp": 0}])
def test_in_every_mode(sharding, tmp_path, capsys):
    preflight(tiny_config(**sharding), tmp_path)
    lines = said(capsys)
    assert "fits" in lines["memory"] and number(r"sends ([\d.]+) MB", lines["compiled"]) > 0


@pytest.mark.slow
def test_operations_are_the_models_own(tmp_path):
    """However the step goes about it: recomputed, in parts, on several devices."""

    def operations(**changes):
        return module._operations(module._open(tiny_config(**changes), tmp_path, None))

    plain = operations()
    assert operations(**{"model.remat": True}) == plain
    assert operations(**{"training.accumulation_steps": 2}) == plain
    assert operations(**{"sharding.fsdp": 4}) == plain
    assert operations(**{"training.batch_size": 32}) == pytest.approx(2 * plain, rel=0.1)  # less the optimiser's


def test_dataclasses_of_the_config_are_left_alone():
    config = tiny_config()
    changed(config, {"model.remat": True})
    assert config == tiny_config() and dataclasses.is_dataclass(config)
