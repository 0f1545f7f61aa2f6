"""What tracemalloc cannot see counts, too: a process that the system gives no more memory than is stated."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.fuzz.hungry import MEALS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
def test_no_file_takes_more_memory_than_is_stated(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.hungry", str(tmp_path)]
    at_once = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}  # what is large goes back to the system when it is freed
    environment = {**os.environ, **at_once, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    said = dict(map(json.loads, done.stdout.splitlines()))
    assert list(said) == list(MEALS)
    assert "MemoryError" in said.pop("an honest glutton")  # or nothing would be shown
    for name, told in said.items():
        assert re.match(r"(ValueError|CorruptImage): ", told), (name, told)
        assert "MemoryError" not in told and "allocate" not in told, (name, told)


def test_the_page_states_the_same_bounds():
    rows = re.findall(r"^\| (.+?) \| .* \| (\d+) MiB \|$", (ROOT / "docs/untrusted_files.md").read_text(), re.M)
    assert dict(rows) == {name: str(meal.most) for name, meal in MEALS.items() if name != "an honest glutton"}
