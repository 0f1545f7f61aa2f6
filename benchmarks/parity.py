"""The parity table of docs/stable_diffusion.md: Stable Diffusion here against diffusers and transformers, part by part.

    pip install -e '.[peer]' && python benchmarks/parity.py                   # prints the table
    pip install -e '.[peer]' && python benchmarks/parity.py --write           # and puts it into the page

Small checkpoints of the kinds 1, 1 inpainting, 2 and 2 inpainting with random numbers in every parameter are written
by this library and opened by both, float32 on this machine's CPU. Blocks and networks get the same inputs; samplers
take 20 steps with one formula as their network; pipelines take 6 steps from the same noise, guidance 7.5, with a
negative prompt, and their images are compared before they are clipped. Ends with status 1 where a difference is above
its bound.
"""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for tests/

PAGE = ROOT / "docs/stable_diffusion.md"
BEGIN, END = "<!-- printed by benchmarks/parity.py: -->", "<!-- so far -->"
BLOCK, NETWORK, SAMPLER, PIPELINE = 2e-5, 5e-5, 1e-4, 1e-3  # the bounds
SAMPLERS = {  # case of tests/golden/make_samplers.py -> what it is
    "ddim_sd1": "DDIM",
    "ddim_zero_snr": "DDIM, v, zero terminal SNR",
    "pndm_sd1": "PNDM",
    "pndm_v": "PNDM, v",
    "euler_sd1": "Euler",
    "euler_karras": "Euler, Karras",
    "eulerancestral_sd1": "Euler ancestral",
    "heun_sd1": "Heun",
    "heun_karras": "Heun, Karras",
    "dpmsolver_sd1": "DPM-Solver++ 2M",
    "dpmsolver_karras": "DPM-Solver++ 2M, Karras",
    "dpmsolver_v": "DPM-Solver++ 2M, v",
    "lcm_sd1": "LCM",
    "ddpm_sd1": "DDPM",
}


class Row(NamedTuple):
    """One line of the table."""

    part: str
    model: str
    what: str
    difference: float
    bound: float

    def __str__(self) -> str:
        return f"| {self.part} | {self.model} | {self.what} | {self.difference:.1e} | {self.bound:.0e} |"


def rows(only: str) -> Iterator[Row]:
    """Every comparison, or those of one part; of pipelines the difference itself, else by the largest number."""
    from jaxdiff.tasks.stable_diffusion import load_stable_diffusion
    from tests.generation import test_foreign_schedule as samplers
    from tests.golden import make_samplers
    from tests.golden import make_stable_diffusion as peers
    from tests.tasks import parity_of_networks, small_checkpoint

    def wanted(part: str) -> bool:
        return only in ("", part)

    if wanted("samplers"):
        cases, noise = make_samplers.cases(), make_samplers.noises(make_samplers.NUM)
        for case, what in SAMPLERS.items():
            theirs = make_samplers.theirs(cases[case], noise)
            yield Row("sampler", "", what, samplers.relative_error(samplers.ours(cases[case]), theirs), SAMPLER)
    for kind in small_checkpoint.KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = small_checkpoint.write(pathlib.Path(name), kind)
            sd, short = load_stable_diffusion(folder, mesh=small_checkpoint.one_device()), kind.split("Diffusion ")[1]
            if wanted("blocks"):
                for what, (difference, number) in parity_of_networks.blocks(folder, sd).items():
                    yield Row("block", short, f"{what} ({number})", difference, BLOCK)
            if wanted("networks"):
                for what, difference in parity_of_networks.whole_networks(folder, sd).items():
                    yield Row("network", short, what, difference, NETWORK)
            for case in peers.CASES.values() if wanted("pipelines") else ():
                if case.kind == kind:
                    ours, theirs = small_checkpoint.images_of(sd, peers, case), peers.theirs(folder, case)
                    difference = float(np.abs(ours - theirs).max())
                    yield Row("pipeline", short, described(case, sd.settings.sampler), difference, PIPELINE)
        jax.clear_caches()


def described(case: Any, own: str) -> str:
    """A case of tests/golden/make_stable_diffusion.py in words."""
    what = "text to image" if case.strength is None else "inpainting" if case.masked else "image to image"
    what += f", {case.sampler or own}" + ", zero terminal SNR" * bool(case.scheduler)
    if case.strength is not None:
        what += f", strength {case.strength:g}"
    return what if case.size[0] == case.size[1] else f"{what}, {case.size[1]}x{case.size[0]} pixels"


def main() -> None:
    """Compare, print a line a comparison, perhaps write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--only", choices=["samplers", "blocks", "networks", "pipelines"], default="")
    args = parser.parse_args()
    if args.write and args.only:
        parser.error("--write is of the whole table: leave out --only")
    try:
        import diffusers
        import torch
        import transformers
    except ImportError as error:
        print(
            f"error: {error.name} is missing: pip install -e '.[peer]' brings what this compares with", file=sys.stderr
        )
        raise SystemExit(2) from error
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
    jax.config.update("jax_platforms", "cpu")
    versions = f"jax {jax.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
    lines = [f"{versions}transformers {transformers.__version__}, float32:", ""]
    lines += ["| part | Stable Diffusion | | largest difference | bound |", "|---|---|---|---|---|"]
    print("\n".join(lines))
    failed = 0
    for row in rows(args.only):
        lines.append(str(row))
        failed += not row.difference < row.bound
        print(row, flush=True)
    if failed:
        print(f"{failed} above the bound", file=sys.stderr)
        raise SystemExit(1)
    if args.write:
        from jaxdiff.files import write_text

        before, rest = PAGE.read_text().split(BEGIN)
        table = "\n".join(lines)
        write_text(PAGE, f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}")
        print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
