"""Fine-tune Stable Diffusion 1.x or 2.x (inpainting models too) on captioned photographs: LoRA, or the whole U-Net.

    python train.py --config configs/stable_diffusion_finetune.py --config.model.pretrained=path/to/sd \
        --config.data.dir=my_captioned_photos --workdir runs/finetune
    python sample.py --workdir runs/finetune --prompt "..."
    python -m jaxdiff.weights export --workdir runs/finetune --out my-sd/
    python -m jaxdiff.weights export --workdir runs/finetune --out my-lora.safetensors --format lora

my_captioned_photos has images and metadata.jsonl, a line each: {"file_name": "1.png", "text": "..."} (docs/data.md). The whole
U-Net: --config.lora.rank=0 --config.optimizer.learning_rate=1e-5. Networks, noise levels and prediction are the checkpoint's;
data.image_size should be what it was trained for (512; 768 for 2.1). Encoding once saves the autoencoder's work at every step:

    python -m jaxdiff.encode --config configs/stable_diffusion_finetune.py --config.model.pretrained=path/to/sd \
        --config.data.dir=my_captioned_photos --out my_latents

and then --config.data.source=latents --config.data.dir=my_latents.

Not tuned: it has only been run with small random checkpoints on a CPU. Memory and time with a whole one have not been measured.
"""

from ml_collections import ConfigDict

from jaxdiff.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.source = "folder"
    config.data.dir = "my_captioned_photos"
    config.data.image_size = 512
    config.model.pretrained = "path/to/sd"
    config.model.dropout = 0.0
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.text.enabled = True
    config.lora.rank = 16
    config.diffusion.loss = "min_snr"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-2
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.999
    config.training.batch_size = 8
    config.training.num_steps = 2000
    config.training.log_every = 20
    config.training.checkpoint_every = 500
    config.training.sample_every = 500
    config.sampling.sampler = "file"  # the checkpoint's own, its steps where its file says
    config.sampling.spacing = "file"
    config.sampling.steps = 30
    config.sampling.guidance = 7.5
    config.sampling.clip = "none"
    config.sampling.num_images = 8
    config.sampling.batch_per_device = 1
    return config
