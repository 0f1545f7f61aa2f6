"""Feature extraction and the Frechet distance against pytorch-fid: the same images, this machine's CPU; ratios come last.

    pip install -e '.[peer]' && python benchmarks/evaluation_speed.py

The same images of 299x299 go through FID's Inception network with the same random weights, then the distance of the same moments
at 2048 dimensions is taken, in turns, after a check that both sides get the same numbers. pytorch-fid is given arrays, so it
reads no files, and spared the resizing, which ours does.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.linalg import sqrtm

from jaxdiff import Moments, frechet_distance
from jaxdiff.command_line import one_cpu_device_a_core
from jaxdiff.evaluation.collect import make_extract
from jaxdiff.evaluation.extractors import Extractor
from jaxdiff.models.inception import inception_features
from jaxdiff.weights.inception import params_from_torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests/


def our_extract(tensors: Any) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images to features on the host, in evaluate.py's way."""
    params = params_from_torch(tensors, "random weights")
    extractor = Extractor("random", "", "tf1-bilinear-299", "float32", 2048, True, params, inception_features)
    devices = jax.devices("cpu")
    extract = make_extract(extractor, Mesh(np.array(devices), ("data",)), batch_per_device=16)
    return lambda images: np.concatenate([features.pool for features in extract([(images, len(images))])])


def peer_extract(network: Any, images: np.ndarray) -> np.ndarray:
    """The same by pytorch-fid's network, in batches of 50, its default."""
    import torch

    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        return np.concatenate([network((part.float() - 128) / 128)[0][:, :, 0, 0] for part in x.split(50)])


def peer_distance(m1: np.ndarray, s1: np.ndarray, m2: np.ndarray, s2: np.ndarray) -> float:
    """pytorch-fid's own function or, where SciPy no longer has the argument that it passes, what it does."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    try:
        return calculate_frechet_distance(m1, s1, m2, s2)
    except TypeError:
        return (m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2).real)


def race(what: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, say: Callable[[Any], str]) -> str:
    """Let the two take turns and print what `say` makes of their seconds; the line with the ratios is returned."""
    seconds = np.empty((rounds, 2))
    for n, side in np.ndindex(seconds.shape):
        start = time.perf_counter()
        (ours, theirs)[side]()
        seconds[n, side] = time.perf_counter() - start
    median, best = np.median(seconds, axis=0), seconds.min(axis=0)
    for side, name in enumerate(("jaxdiff:", "pytorch-fid:")):
        print(f"  {what}, {name:12} median {say(median[side])}, best {say(best[side])}", flush=True)
    return f"{what}: jaxdiff is {median[1] / median[0]:.2f} times as fast (best rounds: {best[1] / best[0]:.2f})"


def main() -> None:
    """Read the flags, check that both sides agree, race, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96, help="in a round (default 96)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="16 images, 2 rounds, 512 dimensions: does it work?")
    args = parser.parse_args()
    one_cpu_device_a_core()
    warnings.simplefilter("ignore", DeprecationWarning)  # of SciPy, for an argument that pytorch-fid passes
    num, rounds, dimensions = (16, 2, 512) if args.quick else (args.images, args.rounds, 2048)
    try:
        from tests.models.random_inception import random_images, random_tensors
        from tests.models.torch_inception import pytorch_fid_network
    except ImportError as error:
        sys.exit(f"error: {error.name} is missing: pip install -e '.[peer]'")
    tensors, images = random_tensors(0), random_images(1, num, 299, 299, 3)
    ours, theirs = our_extract(tensors), partial(peer_extract, pytorch_fid_network(tensors))
    np.testing.assert_allclose(ours(images), theirs(images), rtol=1e-3, atol=1e-4)  # this also compiles
    both = (Moments.of(np.random.default_rng(seed).normal(size=(2 * dimensions, dimensions))) for seed in (0, 1))
    sets = [array for moments in both for array in (moments.mean, moments.covariance)]
    np.testing.assert_allclose(frechet_distance(*sets), peer_distance(*sets), rtol=1e-6)
    print(f"{num} images of 299x299, {dimensions} dimensions, {rounds} rounds; jax {jax.__version__}", flush=True)
    ratios = [
        race("extraction", partial(ours, images), partial(theirs, images), rounds, lambda s: f"{num / s:.3g} images/s"),
        race("distance", partial(frechet_distance, *sets), partial(peer_distance, *sets), rounds, "{:.3g} s".format),
    ]
    print("\n".join(ratios))


if __name__ == "__main__":
    main()
