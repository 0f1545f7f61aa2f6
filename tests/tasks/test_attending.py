"""Which attention images are made with, on the devices there are and on those that there could be."""

import types

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.config import ConfigError
from jaxdiff.tasks.attending import attention_of
from jaxdiff.tasks.stable_diffusion import open_stable_diffusion
from tests.tasks import tiny_checkpoint


@pytest.fixture
def with_kernel(monkeypatch):
    """A GPU with cuDNN, as far as anybody asks."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *qkv, implementation, **how: plain(*qkv, **how))
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(platform="gpu", device_kind="a GPU")])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cpu_it_is_xlas(dtype):
    assert attention_of("auto", dtype) is None and attention_of("xla", dtype) == "xla"
    with pytest.raises(ConfigError, match="^attention cudnn: it needs an NVIDIA GPU .*, not cpu: use auto$"):
        attention_of("cudnn", dtype)
    with pytest.raises(ConfigError, match="^attention 'flash': must be one of auto, xla, cudnn$"):
        attention_of("flash", dtype)


def test_a_gpu_without_cudnn_has_no_kernel(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(platform="gpu", device_kind="an old GPU")])
    assert attention_of("auto", "bfloat16") is None
    with pytest.raises(ConfigError, match="with cuDNN, not an old GPU: use auto"):
        attention_of("cudnn", "bfloat16")


def test_cudnn_where_there_is_a_kernel_for_it(with_kernel):
    for dtype in ("bfloat16", "float16"):
        assert attention_of("auto", dtype) == attention_of("cudnn", dtype) == "cudnn"
        assert attention_of("xla", dtype) == "xla"
    assert attention_of("auto", "float32") is None
    with pytest.raises(ConfigError, match="needs dtype bfloat16 or float16, not float32"):
        attention_of("cudnn", "float32")


def test_the_networks_are_told(tmp_path, with_kernel):
    tiny_checkpoint.write(tmp_path / "sd")
    networks = open_stable_diffusion(tmp_path / "sd").networks
    assert networks.unet.attention_implementation is None
    networks = open_stable_diffusion(tmp_path / "sd", dtype="bfloat16").networks
    for network in (networks.unet, networks.text_encoder, networks.autoencoder):
        assert (network.attention_implementation, network.dtype) == ("cudnn", jnp.bfloat16)
