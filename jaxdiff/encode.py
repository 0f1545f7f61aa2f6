"""Encode a data set once, to train a latent diffusion model without running its autoencoder at every step.

    python -m jaxdiff.encode --config configs/emoji_text.py --config.autoencoder=runs/emoji_vae --out data/emoji_latents
    python train.py --config configs/emoji_text.py --config.autoencoder=runs/emoji_vae \
        --config.data.source=latents --config.data.dir=data/emoji_latents

The config says which images, how large, and with config.data.flip also mirrored. What is kept are the moments of each image's
posterior, so training draws from it as it would from the images. Latents of another autoencoder are refused there.
"""

import pathlib
import sys

from jaxdiff.command_line import config_from_flags, one_line_errors, set_up_compilation_cache
from jaxdiff.config import ConfigError
from jaxdiff.tasks.latents import encode_data


def main() -> None:
    """Read the flags, encode."""
    with one_line_errors():
        out, rest = take_flag(sys.argv, "--out")
        config, _ = config_from_flags(rest, __doc__ or "")
        if out is None:
            raise ConfigError("--out is missing: the folder to be made, such as --out data/emoji_latents")
        set_up_compilation_cache()
        print(encode_data(config, pathlib.Path(out).expanduser()))


def take_flag(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `--flag VALUE` or `--flag=VALUE`, and the other arguments."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word == flag:
            value = next(words, None)
        elif word.startswith(flag + "="):
            value = word.split("=", 1)[1]
        else:
            rest.append(word)
    return value, rest


if __name__ == "__main__":
    main()
