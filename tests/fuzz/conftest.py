"""Hypothesis: the same examples at every run, few of them by default and many under `-m slow`; it keeps nothing on disk."""

import pytest
from hypothesis import HealthCheck, configuration, settings

settings.register_profile(
    "jaxdiff",
    derandomize=True,
    database=None,
    deadline=None,  # seconds of the processor are counted instead (guarded.py): a busy machine is no fault
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("jaxdiff")


@pytest.fixture(scope="session", autouse=True)
def hypothesis_home(tmp_path_factory):
    configuration.set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))
