"""metrics.jsonl: what a kill cut off is forgotten, and nothing else is."""

import json

import pytest

from jaxdiff.config import ConfigError
from jaxdiff.training.log import MetricsLog, read_metrics

LINES = [json.dumps({"step": step, "loss": 1.0 / step}) for step in (1, 2, 3)]
WHOLE = "\n".join(LINES) + "\n"


def test_a_line_counts_once_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    for length in range(len(WHOLE) + 1):
        path.write_text(WHOLE[:length])
        written = sum(length >= len("\n".join(LINES[:count])) for count in (1, 2, 3))
        assert read_metrics(path) == [json.loads(line) for line in LINES[:written]]


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "3", "\0" * 9, '{"loss": 1}', '{"step": 2, "loss": "1"}'])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_line_is_named_and_every_record_stays(tmp_path, content, number):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in [*LINES[: number - 1], content, *LINES[number:]]))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"metrics.jsonl line {number} is damaged: .*; mend it or delete the line$"):
        MetricsLog(tmp_path, 3)
    assert path.read_bytes() == before


def test_what_goes_beyond_the_checkpoint_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(WHOLE + '{"step": 4, "lo')
    log = MetricsLog(tmp_path, 2)
    log.scalars(3, {"loss": 0.5})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [*map(json.loads, LINES[:2]), {"step": 3, "loss": 0.5}]
