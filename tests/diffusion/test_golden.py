"""The golden files are what the installed peer says today."""

import importlib.util

import numpy as np
import pytest


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_schedules_are_those_of_diffusers(golden_dir):
    spec = importlib.util.spec_from_file_location("make_schedules", golden_dir / "make_schedules.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    fresh, stored = script.make(), np.load(golden_dir / "schedules.npz")
    assert set(fresh) == set(stored.files)
    for key, value in fresh.items():
        np.testing.assert_allclose(value, stored[key], rtol=1e-6, atol=1e-7, err_msg=key)
