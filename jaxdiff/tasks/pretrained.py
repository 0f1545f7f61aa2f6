"""Beginning from a Stable Diffusion checkpoint: what `config.model.pretrained` names, with all that a run needs of it.

A run does not copy the checkpoint: `pretrained.json` in its workdir has the SHA-256 of each part, and whenever a part is needed
it must still be the same.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxdiff.config import Config, ConfigError
from jaxdiff.files import read_json, write_text
from jaxdiff.models.unet import UNet
from jaxdiff.progress import progress_bar
from jaxdiff.tasks.first_stage import FirstStage, digest_of
from jaxdiff.tasks.stable_diffusion import PARTS, StableDiffusion, open_stable_diffusion
from jaxdiff.tasks.text_model import TextModel
from jaxdiff.training.sharding import fsdp_shardings
from jaxdiff.training.state import Params
from jaxdiff.weights.checkpoint import Checkpoint, component_rules, load_params
from jaxdiff.weights.names import to_theirs
from jaxdiff.weights.tensors import StoredTensor
from jaxdiff.weights.tokenizer import FILES

KEPT, TOKENIZER = "pretrained.json", "tokenizer"  # of a workdir
MANY = 2**28  # bytes from which on reading gets a progress bar
# scheduler_config.json's words for the noise schedule -> ours
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """An opened checkpoint for training: networks and size of images as the config says; no tensor is read yet."""

    model: StableDiffusion

    @property
    def unet(self) -> UNet:
        """The network that is trained, or adapted."""
        return self.model.networks.unet

    @property
    def plain(self) -> "Pretrained":
        """The same with a U-Net that recomputes nothing and fuses no attention."""
        networks = self.model.networks
        unet = networks.unet.clone(remat=False, attention_implementation="xla")
        return Pretrained(dataclasses.replace(self.model, networks=dataclasses.replace(networks, unet=unet)))

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler_config.json, with the prediction that the user has said."""
        return cast(dict[str, Any], json.loads(self.model.networks.scheduler))

    def with_size(self, height: int | None = None, width: int | None = None) -> "Pretrained":
        """The same for images of another size. Raises SizeError."""
        return Pretrained(self.model.with_size(height, width))

    def load(self, part: str, shardings: Any) -> Params:
        """The parameters of a part, file to device, one tensor at a time; `shardings`: one for all, or a tree of them."""
        shapes = self.model.params[part]
        if isinstance(shardings, Sharding):
            shardings = jax.tree.map(lambda _, one=shardings: one, shapes)
        placed = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
        )
        return load_params(self.model.checkpoint, PARTS[part], placed)

    def load_on_host(self, part: str) -> Params:
        """The same as NumPy arrays."""
        return load_params(self.model.checkpoint, PARTS[part], self.model.params[part], lambda _, array: array)

    def begin(self, shardings: Params) -> Params:
        """What is trained of the checkpoint, as it is there: of each part that `shardings` has."""
        return {part: self.load(part, of_part) for part, of_part in shardings.items()}

    def first_stage(self) -> FirstStage:
        """The autoencoder with its parameters; known by the same SHA-256 as if it had been opened alone."""
        stage, checkpoint = self.model.networks.first_stage, self.model.checkpoint
        params = self.load_on_host("autoencoder")
        tensors = to_theirs(params, component_rules("vae", checkpoint.configs["vae"]))
        sha256 = digest_of(stage.model, stage.scaling_factor, stage.shift_factor, tensors)
        return dataclasses.replace(stage, params=params, sha256=sha256)

    def describe(self) -> str:
        """What it is, in words."""
        return f"{self.model.checkpoint.family} in {self.model.checkpoint.path}"


def open_pretrained(config: Config, workdir: pathlib.Path | None = None) -> Pretrained:
    """What `config.model.pretrained` names; the tokenizer of a run that has one is in its workdir. Raises ConfigError."""
    model = config.model
    tokenizer: Any = config.text.tokenizer or None
    if workdir is not None and (workdir / TOKENIZER / FILES[0]).is_file():
        tokenizer = workdir / TOKENIZER
    try:
        opened = open_stable_diffusion(
            model.pretrained,
            tokenizer=tokenizer,
            prediction=model.pretrained_prediction or None,
            attention_implementation="xla",
        )
    except ConfigError as error:
        known = workdir is not None and (workdir / KEPT).is_file()
        moved = f"; the run in {workdir} begins from it: if it has moved, say so in {workdir}/config.json (model.pretrained)"
        raise ConfigError(f"config.model.pretrained: {error}{moved * known}") from error
    dtype, param_dtype = jnp.dtype(model.dtype), jnp.dtype(model.param_dtype)
    attention = None if model.attention_implementation == "auto" else model.attention_implementation
    how: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "attention_implementation": attention}
    networks = dataclasses.replace(
        opened.networks,
        unet=opened.networks.unet.clone(dropout=model.dropout, remat=model.remat, **how),
        autoencoder=opened.networks.autoencoder.clone(attention_implementation=None),
        text_encoder=opened.networks.text_encoder.clone(**how),
    )
    side = config.data.image_size  # whether the autoencoder can halve it is told elsewhere, of a run's data
    sized = dataclasses.replace(opened, height=side, width=side)
    return Pretrained(dataclasses.replace(sized, networks=networks, params=networks.shapes()))


def resolved(config: Config, pretrained: Pretrained) -> Config:
    """The config with what the checkpoint says in the place of what it cannot choose.

    Raises ConfigError, also for a way to sample that its scheduler's file does not allow.
    """
    networks, checkpoint = pretrained.model.networks, pretrained.model.checkpoint
    unet, text_encoder = networks.unet, networks.text_encoder
    file = pretrained.scheduler
    if file.get("trained_betas") is not None:
        raise ConfigError(f"{checkpoint.path}: a scheduler with trained_betas cannot be trained with")
    image_model = pretrained.model.model
    levels = unet.attention_levels or ()
    diffusion = dataclasses.replace(
        config.diffusion,
        schedule=cast(Any, BETA_SCHEDULES[file.get("beta_schedule", "linear")]),
        num_timesteps=file.get("num_train_timesteps", 1000),
        beta_start=file.get("beta_start", 1e-4),
        beta_end=file.get("beta_end", 0.02),
        zero_terminal_snr=bool(file.get("rescale_betas_zero_snr", False)),
        prediction=cast(Any, image_model.prediction),
        learned_variance=False,
        inpainting=networks.mask_channels,
    )
    side = config.data.image_size // networks.autoencoder.downsampling
    model = dataclasses.replace(
        config.model,
        channels=unet.channels,
        channel_multipliers=tuple(unet.channel_multipliers),
        num_res_blocks=unet.num_res_blocks,
        attention_resolutions=tuple(-(-side // 2**level) for level in levels),
        num_heads=unet.num_heads if unet.head_dim is None else unet.channels // unet.head_dim,
        patch_size=1,
        scale_shift_norm=False,
        position_embedding=False,
        num_classes=0,
        pretrained=str(checkpoint.path.absolute()),
    )
    text = dataclasses.replace(
        config.text,
        enabled=True,
        tokenizer="",  # kept in the workdir
        vocabulary_size=text_encoder.vocabulary_size,
        context_length=pretrained.model.tokenizer.context_length,
        width=text_encoder.width,
        num_layers=text_encoder.num_layers,
        num_heads=text_encoder.num_heads,
        pooled=False,
    )
    pretrained.model.check(config.sampling)
    return dataclasses.replace(config, diffusion=diffusion, model=model, text=text)


def frozen_parts(config: Config) -> tuple[str, ...]:
    """The parts of the checkpoint that no step of such a run changes."""
    return (
        "autoencoder",
        *("unet",) * (config.lora.rank > 0),
        *("text_encoder",) * (not config.text.trained),
    )


def keep_pretrained(
    pretrained: Pretrained, config: Config, workdir: pathlib.Path, write: bool = True
) -> dict[str, str]:
    """The SHA-256 of each part of a run's checkpoint: a new run notes them (if `write`), and its tokenizer.

    Raises ConfigError where a part that the run still needs is not the one that it began from.
    """
    checkpoint, path = pretrained.model.checkpoint, workdir / KEPT
    if not path.is_file():
        found = {part: digest(checkpoint, part) for part in PARTS}
        if write:
            pretrained.model.tokenizer.save(workdir / TOKENIZER)
            write_text(path, json.dumps({"family": checkpoint.family, "sha256": found}, indent=2) + "\n")
        return found
    kept = _read_kept(path)
    for part in frozen_parts(config):
        found_now, before, name = digest(checkpoint, part), str(kept.get(part)), part.replace("_", " ")
        if found_now != before:
            raise ConfigError(
                f"config.model.pretrained = {str(checkpoint.path)!r} has another {name} (SHA-256 {found_now[:12]}...) than "
                f"the run in {workdir} began from ({before[:12]}...): give that one, or another --workdir for a new run"
            )
    return kept


def _read_kept(path: pathlib.Path) -> dict[str, str]:
    try:
        kept = read_json(path)["sha256"]
        if not isinstance(kept, dict):
            raise ValueError("sha256 must be an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: it does not say what the run began from ({error})") from error
    return kept


def digest(checkpoint: Checkpoint, part: str) -> str:
    """SHA-256 of a part: of its config and of every tensor's name and bytes."""
    component = PARTS[part]
    tensors: dict[str, StoredTensor] = checkpoint.tensors[component]
    total = sum(tensor.nbytes for tensor in tensors.values())
    found = hashlib.sha256(json.dumps(checkpoint.configs[component], sort_keys=True).encode())
    with progress_bar(
        0, total // 2**20, f"SHA-256 of the {part.replace('_', ' ')}", unit="MB", hidden=total < MANY
    ) as bar:
        for name in sorted(tensors):
            found.update(name.encode())
            found.update(np.ascontiguousarray(tensors[name].read()).view(np.uint8).data)
            bar.update(tensors[name].nbytes // 2**20)
    return found.hexdigest()


def frozen_on_devices(
    pretrained: Pretrained, config: Config, sha256: dict[str, str], stage: FirstStage, mesh: Mesh | None
) -> tuple[FirstStage, TextModel, Params | None]:
    """Autoencoder, text encoder and, under LoRA, the U-Net's parameters, on the devices of a mesh; without one on the first.

    A text encoder that is trained has no parameters here.
    """
    frozen, shapes = frozen_parts(config), pretrained.model.params

    def where(tree: Any) -> Any:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return single if mesh is None else fsdp_shardings(tree, mesh)

    stage = dataclasses.replace(stage, params=jax.device_put(stage.params, where(stage.params)))
    loaded = {part: pretrained.load(part, where(shapes[part])) for part in frozen if part != "autoencoder"}
    text_encoder, tokenizer = pretrained.model.networks.text_encoder, pretrained.model.tokenizer
    text_model = TextModel(text_encoder, loaded.get("text_encoder", {}), tokenizer, sha256["text_encoder"])
    return stage, text_model, loaded.get("unet")
