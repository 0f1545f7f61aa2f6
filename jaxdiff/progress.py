"""A bar for everything that a person waits for."""

import jax
from tqdm import tqdm


def progress_bar(start: int, total: int, description: str, unit: str = "step", hidden: bool = False) -> tqdm:
    """A tqdm bar from `start` to `total` with speed and ETA; of several processes the first one's is shown."""
    hidden = hidden or (jax.distributed.is_initialized() and jax.process_index() > 0)
    return tqdm(
        initial=start, total=total, desc=description, unit=unit, dynamic_ncols=True, disable=hidden, mininterval=0.5
    )
