"""A checkpoint's files that change between opening and loading."""

import pytest

from jaxdiff.config import ConfigError
from jaxdiff.tasks.stable_diffusion import open_stable_diffusion
from tests.tasks import tiny_checkpoint


@pytest.mark.parametrize("spoil", [lambda file: file.write_bytes(file.read_bytes()[:-100]), lambda file: file.unlink()])
def test_a_file_that_is_cut_or_gone_is_one_line(tmp_path, spoil):
    tiny_checkpoint.write(tmp_path / "sd")
    opened = open_stable_diffusion(tmp_path / "sd")
    file = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    spoil(file)
    with pytest.raises(ConfigError, match=f"{file}") as error:
        opened.load()
    assert "\n" not in str(error.value)
