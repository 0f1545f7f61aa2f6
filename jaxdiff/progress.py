"""A bar for everything that a person waits for."""

from tqdm import tqdm


def progress_bar(start: int, total: int, description: str, unit: str = "step", hidden: bool = False) -> tqdm:
    """A tqdm bar from `start` to `total` with speed and ETA."""
    return tqdm(
        initial=start, total=total, desc=description, unit=unit, dynamic_ncols=True, disable=hidden, mininterval=0.5
    )
