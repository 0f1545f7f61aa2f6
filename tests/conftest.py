"""Strictness for every test: 8 simulated CPU devices, no silent rank promotion, a persistent compilation cache."""

import os
import pathlib

import jax
import pytest

from jaxdiff.files import cache_folder

CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """Folder of the golden .npz files (each is made by the script beside it)."""
    return pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Programs of one file are of no use to the next, and there are gigabytes of them by the end."""
    yield
    jax.clear_caches()
