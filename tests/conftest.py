"""What all tests share: one thread, no network, diffusers patched on request, each real architecture built once."""

from collections.abc import Callable, Iterator

import diffusers
import pytest
import torch
from shared_files import architectures
from tiny_models import patching
from torch import nn

torch.set_num_threads(1)


@pytest.fixture
def patched() -> Iterator[None]:
    """diffusers' classes are patched in the test."""
    with patching():
        yield


@pytest.fixture(scope="session")
def denoiser() -> Callable[[str], nn.Module]:
    """Builds a family's denoiser at its real size on the meta device, once a session."""
    built: dict[str, nn.Module] = {}

    def build(size: str) -> nn.Module:
        if size not in built:
            spec = architectures()[size]
            with torch.device("meta"):
                built[size] = getattr(diffusers, spec["class"])(**spec["config"])
        return built[size]

    return build


@pytest.fixture(scope="session")
def text_encoder() -> Callable[[str], nn.Module]:
    """Builds a text encoder at its real size on the meta device, once a session; skips without transformers."""
    transformers = pytest.importorskip("transformers", reason="text encoders are transformers' models")
    built: dict[str, nn.Module] = {}

    def clip_l() -> nn.Module:
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072))

    def clip_g() -> nn.Module:
        config = transformers.CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
        )
        return transformers.CLIPTextModelWithProjection(config)

    def t5() -> nn.Module:
        config = transformers.T5Config(
            d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu"
        )
        return transformers.T5EncoderModel(config)

    def qwen() -> nn.Module:
        sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
        config = transformers.Qwen2_5_VLConfig(text_config={**sizes, **heads})
        return transformers.Qwen2_5_VLForConditionalGeneration(config)

    makers = {"clip_l": clip_l, "clip_g": clip_g, "t5": t5, "qwen": qwen}

    def build(name: str) -> nn.Module:
        if name not in built:
            with torch.device("meta"):
                built[name] = makers[name]()
        return built[name]

    return build
