"""Images per second that the input pipeline delivers, one line a source.

    python benchmarks/input_pipeline.py                              # digits and mnist
    python benchmarks/input_pipeline.py --dir ~/tensorflow_datasets  # and tfds:cifar10

"first epoch" decodes and resizes; "later" finds the images in memory (as far as the loader's limit lets it).
"""

import argparse
import itertools
import time

from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import Source, open_source


def images_per_second(loader: Loader, start: int, num_batches: int) -> float:
    """Speed of `num_batches` batches from `start` on, threads started and the first batch waited for beforehand."""
    batches = loader.iterate(start)
    next(batches)
    begin = time.perf_counter()
    for _ in itertools.islice(batches, num_batches):
        pass
    seconds = time.perf_counter() - begin
    batches.close()
    return num_batches * loader.batch_size / seconds


def report(source: Source, batch_size: int, num_threads: int | None) -> None:
    """Print the line of one source at its own image size."""
    assert source.image_shape is not None
    loader = Loader(
        source,
        batch_size,
        seed=0,
        image_size=min(source.image_shape),
        channels=source.channels,
        flip=True,
        num_threads=num_threads,
    )
    epoch = max(1, len(source) // batch_size - loader.num_threads - 2)
    first = images_per_second(loader, 0, epoch)
    for n in range(len(source) // batch_size + 2):  # the rest of the epoch, so that all is in memory
        loader[n]
    later = images_per_second(loader, 10**6, max(200, min(epoch, 400)))
    print(
        f"{source.describe()}: first epoch {first:,.0f} images/s, later {later:,.0f} images/s "
        f"(batch {batch_size}, {loader.num_threads} threads)",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", help="TFDS data_dir with cifar10 prepared in it; without it, cifar10 is left out")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_threads", type=int, default=None, help="threads of the loader (default: its own choice)")
    options = parser.parse_args()
    sources = [open_source("digits"), open_source("mnist")]
    if options.dir:
        sources.append(open_source("tfds:cifar10", options.dir))
    for source in sources:
        report(source, options.batch_size, options.num_threads)


if __name__ == "__main__":
    main()
