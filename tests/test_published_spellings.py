"""Keys of files that people published or that trainers are known to write: where must each of them go?

Names are facts that public trackers, trainers and converters show; beside each group stands where it was seen.
"""

import pytest
import torch
from torch import nn

import lora_loaders as ll
from lora_loaders.conversion import parse
from lora_loaders.files import Contents

LORA, PEFT, SLOT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"), "lora_{}.default.weight"
DEFAULT = tuple(SLOT.format(end) for end in "AB")
LOKR = ("alpha", "lokr_w1", "lokr_w2")
QKV, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def parts(parent: str, names: tuple[str, ...] = QKV) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


BLOCK, SINGLE = "transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks"
# Label -> family, endings, name in the file -> the modules it must reach.
GROUPS: dict[str, tuple[str, tuple[str, ...], dict[str, tuple[str, ...] | str]]] = {
    "hidream lycoris (ComfyUI 7792)": (
        "hidream",
        LOKR,
        {
            "lycoris_single_stream_blocks_4_block_attn1_to_v": "transformer.single_stream_blocks.4.block.attn1.to_v",
            "lycoris_double_stream_blocks_4_block_ff_i_experts_0_w1": (
                "transformer.double_stream_blocks.4.block.ff_i.experts.0.w1"
            ),
            "lycoris_caption_projection_0_linear": "transformer.caption_projection.0.linear",
        },
    ),
    "wan fun, a doubled underscore": (
        "wan",
        LORA,
        {
            "lora_unet__blocks_0_cross_attn_k": "transformer.blocks.0.attn2.to_k",
            "lora_unet__blocks_0_ffn_0": "transformer.blocks.0.ffn.net.0.proj",
        },
    ),
    "wan of DiffSynth, prefix and slot": (
        "wan",
        DEFAULT,
        {"pipe.dit.blocks.0.self_attn.q": "transformer.blocks.0.attn1.to_q"},
    ),
    "wan vace": (
        "wan",
        PEFT,
        {
            "diffusion_model.vace_blocks.0.before_proj": "transformer.vace_blocks.0.proj_in",
            "diffusion_model.blocks.0.self_attn.q": "transformer.blocks.0.attn1.to_q",
        },
    ),
    "qwen-image, wrapped twice (DiffSynth 886)": (
        "qwen-image",
        ("lora_A.default_0.default.weight", "lora_B.default_0.default.weight"),
        {"transformer_blocks.0.img_mod.1": "transformer.transformer_blocks.0.img_mod.1"},
    ),
    "ace-step lokr (ComfyUI 12638)": (
        "ace-step",
        ("alpha", "dora_scale", "lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        {
            "lycoris_condition_embedder": "transformer.condition_embedder",
            "lycoris_layers_0_cross_attn_o_proj": "transformer.layers.0.cross_attn.to_out.0",
        },
    ),
    "ace-step under its checkpoint's decoder": (
        "ace-step",
        PEFT,
        {"diffusion_model.decoder.layers.0.self_attn.q_proj": "transformer.layers.0.self_attn.to_q"},
    ),
    "krea 2 of SimpleTuner, fused": (
        "krea2",
        ("alpha", "dora_scale", "lokr_w1", "lokr_w2"),
        {
            "lycoris_transformer_blocks_0_attn_to_qkv": parts(BLOCK),
            "lycoris_text_fusion_layerwise_blocks_0_attn_to_qkv": parts(
                "transformer.text_fusion.layerwise_blocks.0.attn"
            ),
        },
    ),
    "flux of SimpleTuner, fused": (
        "flux1",
        LOKR,
        {
            "lycoris_transformer_blocks_0_attn_to_added_qkv": parts(BLOCK, ADDED),
            "lycoris_single_transformer_blocks_7_attn_to_qkv": parts(f"{SINGLE}.7.attn"),
            "lycoris_single_transformer_blocks_7_proj_mlp": f"{SINGLE}.7.proj_mlp",
        },
    ),
    "flux inside OneTrainer": (
        "flux1",
        LORA,
        {
            "transformer.transformer_blocks.0.attn.added_qkv": parts(BLOCK, ADDED),
            "transformer.single_transformer_blocks.0.qkv_mlp": (*parts(f"{SINGLE}.0.attn"), f"{SINGLE}.0.proj_mlp"),
            "transformer.transformer_blocks.2.norm1_context.linear": (
                "transformer.transformer_blocks.2.norm1_context.linear"
            ),
        },
    ),
    "flux with trailing underscores (ComfyUI 4347)": (
        "flux1",
        LORA,
        {
            "lora_unet_norm_out_linear_": "transformer.norm_out.linear",
            "lora_unet_single_transformer_blocks_0_attn_to_k_": f"{SINGLE}.0.attn.to_k",
        },
    ),
    "flux of a compiled and of a wrapped model": (
        "flux1",
        PEFT,
        {
            "transformer._orig_mod.transformer_blocks.0.attn.to_q": f"{BLOCK}.to_q",
            "module.single_transformer_blocks.0.proj_mlp": f"{SINGLE}.0.proj_mlp",
        },
    ),
    "uso": (
        "flux1",
        ("down.weight", "up.weight"),
        {
            "single_blocks.37.processor.qkv_lora": parts(f"{SINGLE}.37.attn"),
            "single_blocks.3.processor.proj_lora": f"{SINGLE}.3.proj_out",
        },
    ),
    "sd3 kohya": (
        "sd3",
        LORA,
        {
            "lora_unet_joint_blocks_0_context_block_attn_qkv": parts(BLOCK, ADDED),
            "lora_unet_joint_blocks_0_x_block_attn2_qkv": parts("transformer.transformer_blocks.0.attn2"),
            "lora_te3_encoder_block_0_layer_0_layer_norm": "text_encoder_3.encoder.block.0.layer.0.layer_norm",
        },
    ),
    "hunyuan-dit's own trainer": (
        "hunyuan-dit",
        PEFT,
        {
            "base_model.model.blocks.0.attn1.Wqkv": parts("transformer.blocks.0.attn1"),
            "base_model.model.blocks.0.attn2.kv_proj": parts("transformer.blocks.0.attn2", ("to_k", "to_v")),
            "base_model.model.pooler.q_proj": "transformer.time_extra_emb.pooler.q_proj",
            "base_model.model.blocks.0.norm2": "transformer.blocks.0.norm3",
        },
    ),
    "hunyuan-video's own trainer for pictures": (
        "hunyuan-video",
        LORA,
        {
            "Hunyuan_video_I2V_lora_double_blocks_0_img_attn_qkv": parts(BLOCK),
            "Hunyuan_video_I2V_lora_double_blocks_0_img_mod_linear": "transformer.transformer_blocks.0.norm1.linear",
        },
    ),
    "hunyuan-video omi, parts by number": (
        "hunyuan-video",
        LORA,
        {
            "transformer.double_blocks.0.img_attn.qkv.1": f"{BLOCK}.to_k",
            "transformer.single_blocks.0.linear1.3": f"{SINGLE}.0.proj_mlp",
            "transformer.double_blocks.0.img_mod.linear": "transformer.transformer_blocks.0.norm1.linear",
        },
    ),
    "hunyuan-video omi, OneTrainer's own names": (
        "hunyuan-video",
        LORA,
        {
            "transformer.double_blocks.0.img_mlp.fc0": "transformer.transformer_blocks.0.ff.net.0.proj",
            "transformer.double_blocks.0.txt_attn_qkv.2": f"{BLOCK}.add_v_proj",
            "transformer.txt_in.t_embedder.linear_1": (
                "transformer.context_embedder.time_text_embed.timestep_embedder.linear_1"
            ),
            "llama.language_model.model.layers.0.self_attn.q_proj": (
                "text_encoder.model.language_model.layers.0.self_attn.q_proj"
            ),
            "clip_l.text_model.encoder.layers.0.mlp.fc1": "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        },
    ),
    "cascade omi": (
        "cascade",
        LORA,
        {
            "unet.down_blocks.0.2.attention.attn.in_proj.1": "prior.down_blocks.0.2.attention.to_k",
            "clip_g.text_projection": "text_encoder.text_projection",
        },
    ),
    "hidream omi": (
        "hidream",
        LORA,
        {
            "transformer.double_stream_blocks.0.block.attn1.to_k_t": (
                "transformer.double_stream_blocks.0.block.attn1.to_k_t"
            ),
            "t5.encoder.block.0.layer.0.SelfAttention.q": "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
            "llama.model.layers.0.mlp.up_proj": "text_encoder_4.model.layers.0.mlp.up_proj",
        },
    ),
    "anima's text conditioner under its own name": (
        "anima",
        PEFT,
        {
            "text_conditioner.blocks.0.self_attn.q_proj": "text_conditioner.blocks.0.self_attn.q_proj",
            "transformer.transformer_blocks.0.attn1.to_q": "transformer.transformer_blocks.0.attn1.to_q",
        },
    ),
    "pixart of OneTrainer, whose only encoder has no number": (
        "pixart",
        LORA,
        {
            "lora_te_encoder_block_0_layer_0_SelfAttention_q": "text_encoder.encoder.block.0.layer.0.SelfAttention.q",
            "lora_transformer_pos_embed_proj": "transformer.pos_embed.proj",
            "lora_transformer_adaln_single_linear": "transformer.adaln_single.linear",
            "lora_transformer_transformer_blocks_0_attn2_to_k": "transformer.transformer_blocks.0.attn2.to_k",
        },
    ),
    "sdxl under its checkpoint's names, OpenCLIP's among them": (
        "sdxl",
        LORA,
        {
            "model.diffusion_model.input_blocks.7.1.transformer_blocks.9.attn2.to_k": (
                "unet.down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k"
            ),
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1": (
                "text_encoder.text_model.encoder.layers.0.mlp.fc1"
            ),
            "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_proj": (
                "text_encoder_2.text_model.encoder.layers.3.mlp.fc2"
            ),
            "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj": parts(
                "text_encoder_2.text_model.encoder.layers.3.self_attn", ("q_proj", "k_proj", "v_proj")
            ),
        },
    ),
    "chroma kohya": (
        "chroma",
        LORA,
        {
            "lora_unet_distilled_guidance_layer_layers_0_in_layer": (
                "transformer.distilled_guidance_layer.layers.0.linear_1"
            ),
            "lora_te1_encoder_block_0_layer_0_SelfAttention_q": "text_encoder.encoder.block.0.layer.0.SelfAttention.q",
        },
    ),
    "mochi without .weight": (
        "mochi",
        ("lora_A", "lora_B"),
        {"blocks.0.attn.qkv_y": parts("transformer.transformer_blocks.0.attn1", ADDED)},
    ),
    "mochi's last block": (
        "mochi",
        PEFT,
        {
            "blocks.0.mod_y": "transformer.transformer_blocks.0.norm1_context.linear",
            "blocks.47.mod_y": "transformer.transformer_blocks.47.norm1_context.linear_1",
        },
    ),
    "cascade of OneTrainer": (
        "cascade",
        LORA,
        {
            "lora_prior_unet_down_blocks_0_2_attention_attn_out_proj": "prior.down_blocks.0.2.attention.to_out.0",
            "lora_prior_te_text_projection": "text_encoder.text_projection",
        },
    ),
    "cosmos 1": (
        "cosmos1",
        PEFT,
        {
            "net.blocks.block27.blocks.0.block.attn.to_q.0": "transformer.transformer_blocks.27.attn1.to_q",
            "net.blocks.block0.blocks.1.block.attn.to_out.0": "transformer.transformer_blocks.0.attn2.to_out.0",
            "net.blocks.block0.blocks.2.block.layer1": "transformer.transformer_blocks.0.ff.net.0.proj",
            "net.blocks.block0.blocks.2.adaLN_modulation.1": "transformer.transformer_blocks.0.norm3.linear_1",
        },
    ),
    "cosmos 1, flattened": (
        "cosmos1",
        LORA,
        {"lora_unet_blocks_block3_blocks_1_block_attn_to_k_0": "transformer.transformer_blocks.3.attn2.to_k"},
    ),
    "cosmos 2": (
        "cosmos",
        PEFT,
        {"net.blocks.35.cross_attn.output_proj": "transformer.transformer_blocks.35.attn2.to_out.0"},
    ),
    "anima kohya, another component by name": (
        "anima",
        LORA,
        {
            "lora_unet_llm_adapter_blocks_0_self_attn_q_proj": "text_conditioner.blocks.0.self_attn.q_proj",
            "lora_unet_blocks_0_adaln_modulation_self_attn_1": "transformer.transformer_blocks.0.norm1.linear_1",
        },
    ),
    "ltx-2 connectors": (
        "ltx2",
        PEFT,
        {
            "text_embedding_projection.video_aggregate_embed": "connectors.video_text_proj_in",
            "diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q": (
                "connectors.video_connector.transformer_blocks.0.attn1.to_q"
            ),
        },
    ),
    "flux.2 turbo, two dialects (diffusers 13484)": (
        "flux2",
        PEFT,
        {
            "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": f"{SINGLE}.0.attn.to_qkv_mlp_proj",
            "double_stream_modulation_img.lin": "transformer.double_stream_modulation_img.linear",
        },
    ),
    "animatediff's own motion files": (
        "animatediff",
        ("to_q_lora.down.weight", "to_q_lora.up.weight"),
        {
            "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor": (
                "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"
            )
        },
    ),
    "the refiner's fourth level": (
        "sdxl-refiner",
        LORA,
        {
            "lora_unet_output_blocks_11_0_in_layers_2": "unet.up_blocks.3.resnets.2.conv1",
            "lora_unet_input_blocks_4_1_transformer_blocks_3_attn1_to_q": (
                "unet.down_blocks.1.attentions.0.transformer_blocks.3.attn1.to_q"
            ),
        },
    ),
    "old diffusers' layers": (
        "sd15",
        ("lora_layer.down.weight", "lora_layer.up.weight"),
        {
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
            )
        },
    ),
}


@pytest.mark.parametrize("label", GROUPS)
def test_every_key_reaches_its_modules_and_the_family_is_told(label: str) -> None:
    family, endings, names = GROUPS[label]
    placeholder = torch.empty(0, device="meta")
    keys = {f"{name}.{ending}": name for name in names for ending in endings}
    adapter = parse(Contents(dict.fromkeys(keys, placeholder), names_only=True))
    wanted = {key: (names[name],) if isinstance(names[name], str) else names[name] for key, name in keys.items()}
    assert dict(adapter.bound) == wanted
    assert adapter.family == family
    assert not adapter.ignored


LIGHTX2V = {
    "blocks.0.diff_m": "blocks.0.scale_shift_table",
    "blocks.0.norm3.diff": "blocks.0.norm2",
    "blocks.0.norm3.diff_b": "blocks.0.norm2",
    "blocks.0.cross_attn.norm_k_img.diff": "blocks.0.attn2.norm_added_k",
    "head.diff_m": "scale_shift_table",
    "head.head.diff_b": "proj_out",
    "patch_embedding.diff_b": "patch_embedding",
    "img_emb.proj.0.diff": "condition_embedder.image_embedder.norm1",
    "time_projection.1.diff_b": "condition_embedder.time_proj",
}


def test_lightx2v_files_reach_modulation_and_the_third_norm_beside_a_name_of_both_sides() -> None:
    """Wan's `norm3` is another norm in diffusers; `patch_embedding`, which both have, must not vote."""
    placeholder = torch.empty(0, device="meta")
    keys = {f"diffusion_model.{key}": f"transformer.{path}" for key, path in LIGHTX2V.items()}
    adapter = parse(Contents(dict.fromkeys(keys, placeholder), names_only=True))
    assert dict(adapter.bound) == {key: (path,) for key, path in keys.items()}


def test_one_module_in_two_spellings_is_one_module() -> None:
    """diffusers 13203: `to_k.alpha` beside `to.k.lora.down.weight`."""
    tensors = {
        "context.refiner.0.attention.to_k.alpha": torch.tensor(2.0),
        "context.refiner.0.attention.to.k.lora.down.weight": torch.ones(4, 8),
        "context.refiner.0.attention.to.k.lora.up.weight": torch.ones(8, 4),
    }
    adapter = parse(Contents(tensors), "z-image")
    delta = adapter.deltas["transformer"]["context_refiner.0.attention.to_k"]
    torch.testing.assert_close(delta.delta_weight(), torch.full((8, 8), 4 * 2.0 / 4))


def test_untrained_split_modules_give_way_to_the_fused_one_that_was_trained() -> None:
    """SimpleTuner writes both; the split ones are zero as they were made (ComfyUI's converter says so)."""
    tensors: dict[str, torch.Tensor] = {}
    for name, rows, up in (("to_qkv", 24, torch.ones), ("to_q", 8, torch.zeros)):
        stem = f"lycoris_transformer_blocks_0_attn_{name}"
        tensors |= {f"{stem}.lora_down.weight": torch.ones(4, 8), f"{stem}.lora_up.weight": up(rows, 4)}
    adapter = parse(Contents(tensors), "flux1")
    changes = {path: delta.delta_weight() for path, delta in adapter.deltas["transformer"].items()}
    assert all(change.eq(4).all() for change in changes.values())
    assert len(changes) == 3
    assert all("fused" in reason for reason in adapter.ignored.values())
    assert len(adapter.ignored) == 2


@pytest.mark.parametrize("wrapper", ["model.", "generator.model.", "pipe.dit2.", "lora.", "model.transformer."])
@pytest.mark.parametrize("family", [None, "flux1"])
def test_levels_that_all_names_share_and_no_family_knows_are_left_out(wrapper: str, family: str | None) -> None:
    paths = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.3.proj_mlp", "norm_out.linear"]
    keys = {f"{wrapper}{path}.lora_{end}.weight": path for path in paths for end in "AB"}
    placeholder = torch.empty(0, device="meta")
    adapter = parse(Contents(dict.fromkeys(keys, placeholder), names_only=True), family)
    assert dict(adapter.bound) == {key: (f"transformer.{path}",) for key, path in keys.items()}
    assert adapter.family == "flux1"


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "lora_transformer_"])
@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_orig_mod.module", "module", "base_model.model"]
)
def test_flattened_names_of_a_wrapped_model_are_those_of_the_model(prefix: str, wrapper: str) -> None:
    paths = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.3.proj_mlp", "norm_out.linear"]
    stems = {prefix + f"{wrapper}.{path}".replace(".", "_"): path for path in paths}
    keys = {f"{stem}.lora_{end}.weight": path for stem, path in stems.items() for end in ("down", "up")}
    placeholder = torch.empty(0, device="meta")
    adapter = parse(Contents(dict.fromkeys(keys, placeholder), names_only=True))
    assert dict(adapter.bound) == {key: (f"transformer.{path}",) for key, path in keys.items()}
    assert adapter.family == "flux1"


def test_a_live_module_list_keeps_its_name() -> None:
    model = nn.ModuleDict({"module_list": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
    stems = [f"lora_unet_module_list_{index}" for index in range(2)]
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 8) for stem in stems}
    plan = ll.plan(model, tensors | {f"{stem}.lora_up.weight": torch.ones(8, 2) for stem in stems})
    assert not plan.unmatched
    assert len(plan.matched) == 2


def test_a_live_wrapper_keeps_the_level_that_it_has() -> None:
    wrapper = nn.ModuleDict({"model": nn.ModuleDict({"img_in": nn.Linear(8, 8), "txt_in": nn.Linear(8, 8)})})
    tensors = {f"model.{name}.lora_{end}.weight": torch.ones(2, 8) for name in ("img_in", "txt_in") for end in "A"}
    tensors |= {f"model.{name}.lora_B.weight": torch.ones(8, 2) for name in ("img_in", "txt_in")}
    plan = ll.plan(wrapper, tensors)
    assert not plan.unmatched
    assert len(plan.matched) == 2
