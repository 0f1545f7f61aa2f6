"""What is said of prompts that are too long."""

import pytest

from jaxdiff.generation.prompts import request
from jaxdiff.weights.tokenizer import train_tokenizer


@pytest.mark.parametrize(
    ("prompts", "negative", "more"),
    [
        (["a", "b"], "", None),
        (["a b c d e f g", "b"], "", 0),
        (["a b c d e f g"] * 4, "", 0),  # one prompt for four images
        (["a b c d e f g", "b", "a b c d e f x"], "", 1),
        (["a b c d e f g", "a b c d e f x"], "b b b b b b b", 2),
    ],
)
def test_a_note_says_how_many_were_cut(prompts, negative, more, capsys):
    asked = request(train_tokenizer([], 514, 8), prompts, negative)
    assert asked["tokens"].shape == asked["negative"].shape == (len(prompts), 8)
    said = capsys.readouterr().err
    if more is None:
        assert said == ""
        return
    first = "note: a prompt of 7 tokens was cut to 6; the model does not see 'g'"
    assert said == first + f" (and {more} more prompts were cut)" * (more > 0) + "\n"
