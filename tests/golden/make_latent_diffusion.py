"""Make latent_diffusion.npz: what diffusers and transformers compute with random weights in every parameter.

pip install -e '.[peer]', then from the repository: python -m tests.golden.make_latent_diffusion
"""

import pathlib

import numpy as np

from tests.any_torchvision import import_torchvision
from tests.weights.small_networks import CONTEXT, END, IMAGES, LATENTS, ODD, START, TIME, TOKENS, random_tensor


def randomise(module):
    """The module with the tensors that our networks get."""
    import torch

    state = {name: torch.from_numpy(random_tensor(name, tuple(t.shape))) for name, t in module.state_dict().items()}
    module.load_state_dict(state, strict=True)
    return module.eval()


def autoencoder(quant_conv=True):
    import_torchvision()
    from diffusers import AutoencoderKL

    return randomise(
        AutoencoderKL(
            block_out_channels=(128, 256),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            use_quant_conv=quant_conv,
            use_post_quant_conv=quant_conv,
        )
    )


def text_encoder(activation):
    import_torchvision()
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=11,
        hidden_act=activation,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )
    return randomise(CLIPTextModel(config))


def unet(version):
    import_torchvision()
    from diffusers import UNet2DConditionModel

    return randomise(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(128, 256),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=8 if version == 1 else (2, 4),
            use_linear_projection=version == 2,
        )
    )


def channels_first(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def channels_last(x):
    return x.numpy().transpose(0, 2, 3, 1)


def their_outputs():
    """The peers' side of tests.weights.small_networks.our_outputs."""
    import torch

    with torch.no_grad():
        peer = autoencoder()
        posterior = peer.encode(channels_first(IMAGES)).latent_dist
        outputs = {"mean": channels_last(posterior.mean), "log_variance": channels_last(posterior.logvar)}
        outputs["image"] = channels_last(peer.decode(channels_first(LATENTS)).sample)
        for activation in ("quick_gelu", "gelu"):
            peer = text_encoder(activation)
            states = peer(torch.from_numpy(TOKENS).long(), output_hidden_states=True)
            final_norm = next(m for name, m in peer.named_modules() if name.endswith("final_layer_norm"))
            outputs[activation] = states.last_hidden_state.numpy()
            outputs[f"{activation} penultimate"] = final_norm(states.hidden_states[-2]).numpy()
        for version in (1, 2):
            peer = unet(version)
            output = peer(channels_first(LATENTS), torch.from_numpy(TIME), torch.from_numpy(CONTEXT)).sample
            outputs[f"unet {version}"] = channels_last(output)
            if version == 1:
                output = peer(channels_first(ODD), torch.from_numpy(TIME), torch.from_numpy(CONTEXT)).sample
                outputs["unet 1 odd"] = channels_last(output)
    return {name: np.ascontiguousarray(output, np.float32) for name, output in outputs.items()}


if __name__ == "__main__":
    np.savez(pathlib.Path(__file__).with_name("latent_diffusion.npz"), **their_outputs())
