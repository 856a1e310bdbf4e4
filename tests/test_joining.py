"""Joined q, k, v: adapters act on fused and on separate projections alike, whichever came first."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from tiny_models import flux, unet
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.joining import PARTS, JoinedHook

WIDTH = 32
Make = Callable[[], Any]


def wan(image: bool = False) -> Any:
    extra = {"image_dim": WIDTH, "added_kv_proj_dim": WIDTH} if image else {}
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=16, **extra,
    )  # fmt: skip


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=WIDTH, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=WIDTH, sample_size=4, patch_size=2, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip


def auraflow() -> Any:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip


def cogvideox() -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=WIDTH, num_layers=1, sample_width=4, sample_height=4, sample_frames=5, patch_size=2,
        max_text_seq_length=4,
    )  # fmt: skip


def hunyuan_dit() -> Any:
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=4, hidden_size=WIDTH,
        num_layers=2, mlp_ratio=1.0, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=8, text_len=4, text_len_t5=4, activation_fn="gelu-approximate",
    )  # fmt: skip


def ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=WIDTH,
        num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip


MAKERS: dict[str, Make] = {
    "sd": unet, "sdxl": lambda: unet(sdxl=True), "flux": flux, "sd3": sd3, "pixart": pixart, "auraflow": auraflow,
    "cogvideox": cogvideox, "hunyuan-dit": hunyuan_dit, "ltx": ltx, "wan": wan, "wan-i2v": lambda: wan(image=True),
}  # fmt: skip


def made(name: str) -> Any:
    torch.manual_seed(0)
    return ll.attach(MAKERS[name]().eval().requires_grad_(False))


def owners(model: nn.Module) -> list[tuple[str, Any, str]]:
    """Every joined projection: its owner's path, the owner, the projection's name."""
    joined = [(p, m, name) for p, m in model.named_modules() for name in PARTS if name in m._modules]
    return [(path, owner, name) for path, owner, name in joined if getattr(owner, "fused_projections", False)]


def file_for(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    ends = tuple({part for parts in PARTS.values() for part in parts})
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.endswith(ends):
            tensors[f"{path}.lora_A.weight"] = torch.randn(3, module.in_features) * 0.3
            tensors[f"{path}.lora_B.weight"] = torch.randn(module.out_features, 3) * 0.3
    return tensors


def check_joined(model: nn.Module) -> int:
    """Each joined projection computes what its parts compute, adapters included."""
    found = owners(model)
    for path, owner, name in found:
        parts = [getattr(owner, part) for part in PARTS[name]]
        x = torch.randn(2, 5, parts[0].in_features)
        with torch.no_grad():
            apart = torch.cat([part(x) for part in parts], -1)
            whole = getattr(owner, name)(x)
            torch.testing.assert_close(whole, apart, rtol=1e-4, atol=1e-5, msg=lambda m, p=path: p + m)
    return len(found)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("first", ["join", "load"])
def test_joined_projections_compute_what_their_parts_and_adapters_do(name: str, first: str) -> None:
    model = made(name)
    file = file_for(model)
    steps = [model.fuse_qkv_projections, lambda: model.load_lora_adapter(file, adapter_name="a", prefix=None)]
    for step in steps if first == "join" else reversed(steps):
        step()

    assert check_joined(model) > 0
    for change in (
        lambda: model.set_adapters("a", -0.5),
        lambda: model.load_lora_adapter(file_for(made(name), 2), adapter_name="b", prefix=None),
        lambda: model.set_adapters(["a", "b"], [1.0, 2.0]),
        model.disable_lora,
        model.enable_lora,
        lambda: model.fuse_lora(adapter_names=["a"]),
        model.unfuse_lora,
        lambda: model.delete_adapters("b"),
    ):
        change()
        assert check_joined(model) > 0
    model.unload_lora()
    assert check_joined(model) > 0
    assert not [h for m in model.modules() for h in m._forward_hooks.values() if isinstance(h, JoinedHook)]


def output(model: Any) -> Tensor:
    torch.manual_seed(1)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, WIDTH)
    with torch.no_grad():
        return model(x, 1, text).sample


def test_whole_outputs_are_the_same_joined_and_apart_and_joined_weights_come_back() -> None:
    apart, joined = made("sd"), made("sd")
    joined.fuse_qkv_projections()
    plain = {key: value.clone() for key, value in joined.state_dict().items()}
    file = file_for(made("sd"))
    for model in (apart, joined):
        model.load_lora_adapter(file, adapter_name="a", prefix=None)
    torch.testing.assert_close(output(joined), output(apart), rtol=1e-4, atol=1e-5)

    for model in (apart, joined):
        model.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(output(joined), output(apart), rtol=1e-4, atol=1e-5)
    for model in (apart, joined):
        model.unfuse_lora()
        model.set_adapters("a", 2.0)
    joined.unfuse_qkv_projections()
    torch.testing.assert_close(output(joined), output(apart), rtol=1e-4, atol=1e-5)
    joined.unload_lora()
    assert all(torch.equal(value, plain[key]) for key, value in joined.state_dict().items())


@pytest.mark.parametrize("is_joined", [False, True])
def test_a_file_for_joined_projections_goes_to_their_parts(is_joined: bool) -> None:
    model = made("flux")
    path = "single_transformer_blocks.0.attn"
    torch.manual_seed(0)
    down, up = torch.randn(4, 32), torch.randn(96, 4)
    attention = model.get_submodule(path)
    weight = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
    bias = torch.cat([attention.to_q.bias, attention.to_k.bias, attention.to_v.bias])
    if is_joined:
        model.fuse_qkv_projections()

    model.load_lora_adapter({
        f"transformer.{path}.to_qkv.lora_A.weight": down,
        f"transformer.{path}.to_qkv.lora_B.weight": up,
    })  # fmt: skip

    x = torch.randn(3, 32)
    right = x @ (weight + up @ down).t() + bias
    apart = torch.cat([attention.to_q(x), attention.to_k(x), attention.to_v(x)], -1)
    torch.testing.assert_close(apart, right, rtol=1e-4, atol=1e-4)
    if is_joined:
        torch.testing.assert_close(attention.to_qkv(x), right, rtol=1e-4, atol=1e-4)
