"""A fine-tuned Stable Diffusion back to PyTorch's world: a folder in diffusers' layout, a single file, or a LoRA file.

What is written are the moving averages of the newest checkpoint's parameters, and what the run left as it was.
"""

import pathlib
import tempfile
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict

from jaxdiff.config import ConfigError
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.pretrained import TOKENIZER, Pretrained
from jaxdiff.tasks.run import read_config, restore_run
from jaxdiff.tasks.stable_diffusion import PARTS
from jaxdiff.weights.checkpoint import component_rules
from jaxdiff.weights.export import save_folder, save_single_file
from jaxdiff.weights.lora import Adapters, Factors, Naming, save_lora

Format = Literal["diffusers", "single-file", "lora"]
FORMATS: tuple[Format, ...] = ("diffusers", "single-file", "lora")
DTYPES = ("float32", "float16")


def export_run(
    workdir: pathlib.Path,
    out: pathlib.Path,
    format: Format = "diffusers",
    naming: Naming = "kohya",
    dtype: str = "float32",
) -> str:
    """Write the run's model to `out`, at once or not at all; returns what was written, in words.

    naming: of a LoRA file. dtype: of the tensors; a LoRA's are always float32. Raises ConfigError for a run that did not begin
    from Stable Diffusion, a place that is taken, and "lora" of a run without; CheckpointError where there is no checkpoint.
    """
    config = read_config(workdir)
    if not config.model.pretrained:
        raise ConfigError(f"{workdir} did not begin from a Stable Diffusion checkpoint (config.model.pretrained)")
    if format == "lora" and not config.lora.rank:
        raise ConfigError(f"--format lora: the run in {workdir} trained the whole network (config.lora.rank = 0)")
    if format != "diffusers" and out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: --format {format} writes one file, whose name must end in .safetensors")
    if out.exists():
        raise ConfigError(f"--out {out} exists already: choose another place, or remove it first")
    task, step, trained, _ = restore_run(workdir)
    assert isinstance(task, DiffusionTask) and task.pretrained is not None
    if format == "lora":
        rules = _rules(task.pretrained)
        save_lora(out, adapters_of(trained["lora"], config.lora.alpha or config.lora.rank), rules, naming)
    else:
        _save_model(out, task, trained, workdir, format, np.dtype(dtype))
    kind = {
        "diffusers": "a folder in diffusers' layout",
        "single-file": "a single file",
        "lora": f"a LoRA, {naming} naming",
    }
    return f"wrote {out}: {kind[format]}, {task.pretrained.model.checkpoint.family}, step {step:,} of {workdir}"


def adapters_of(factors: Any, alpha: float) -> Adapters:
    """The factors of a run as a LoRA file has them."""
    found: Adapters = {}
    for part, tree in factors.items():
        leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}
        kernels = sorted({path.rpartition("/")[0] for path in leaves})
        found[part] = {name: Factors(leaves[f"{name}/a"], leaves[f"{name}/b"], float(alpha)) for name in kernels}
    return found


def _rules(pretrained: Pretrained) -> dict[str, Any]:
    configs = pretrained.model.checkpoint.configs
    return {part: component_rules(PARTS[part], configs[PARTS[part]]) for part in ("unet", "text_encoder")}


def _save_model(
    out: pathlib.Path, task: DiffusionTask, trained: Any, workdir: pathlib.Path, format: Format, dtype: np.dtype[Any]
) -> None:
    assert task.pretrained is not None
    checkpoint, whole = task.pretrained.model.checkpoint, task.whole(trained)
    params: dict[str, Any] = {component: whole[part] for part, component in PARTS.items()}
    configs = checkpoint.configs | {"scheduler": task.pretrained.scheduler}
    if format == "single-file":
        save_single_file(out, params, configs, dtype)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = pathlib.Path(temporary) / out.name
        save_folder(folder, params, configs, checkpoint.tokenizer or workdir / TOKENIZER, dtype)
        folder.rename(out)
