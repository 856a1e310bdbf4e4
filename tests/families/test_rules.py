"""The row language."""

import pytest
import torch

from lora_loaders.conversion import parse
from lora_loaders.families import FAMILIES, Names
from lora_loaders.families.minimax_h3 import TRANSFORMER as MINIMAX_H3
from lora_loaders.families.mochi import TRANSFORMER as MOCHI
from lora_loaders.families.rules import parse_rows
from lora_loaders.families.sd import SDXL_UNET
from lora_loaders.families.text_encoders import CLIP, QWEN2_5_VL
from lora_loaders.families.wan import TRANSFORMER as WAN
from lora_loaders.files import Contents

from .published import BY_LABEL, needs_list


def test_prefixes_on_several_lines_all_hold_for_the_rows_below() -> None:
    rules = list(parse_rows("[a -> x ; b]\n[c -> z]\n  q -> to_q\nd -> w"))
    assert [(rule.source, rule.targets) for rule in rules] == [
        ("a.q", ("x.to_q",)),
        ("b.q", ("b.to_q",)),
        ("c.q", ("z.to_q",)),
        ("d", ("w",)),
    ]


def test_a_read_only_row_is_resolved_but_never_written() -> None:
    names = Names("[{i}]\n  q -> to_q ; k -> to_k\n  qk -> to_q | to_k (r)".replace("{i}", "blocks.{i}"))
    assert names.resolve("blocks_7_qk")[0].paths == ("blocks.7.to_q", "blocks.7.to_k")
    assert names.writing("original").source("blocks.7.to_k")[0] == "blocks.7.k"


def test_flags_of_one_row_may_stand_together() -> None:
    (rule,) = parse_rows("qkv -> q:3 | k | v /128 ~ (r) (p)")
    assert (rule.shares, rule.head, rule.swap, rule.written, rule.parameter) == ((3, 1, 1), 128, "all", False, True)


@pytest.mark.parametrize("row", ["-> a", "a ->", "a, -> b"])
def test_a_row_without_a_name_is_refused(row: str) -> None:
    with pytest.raises(ValueError, match="not a row"):
        list(parse_rows(row))


def test_a_parameter_stays_one_under_its_diffusers_name() -> None:
    (reading,) = WAN.resolve("blocks.3.scale_shift_table")
    assert reading.rule.parameter
    assert reading.is_diffusers


def test_wan_norm3_has_a_diffusers_and_an_original_reading() -> None:
    readings = WAN.resolve("blocks_3_norm3")
    assert [(reading.paths[0], reading.is_diffusers) for reading in readings] == [
        ("blocks.3.norm3", True),
        ("blocks.3.norm2", False),
    ]


@pytest.mark.parametrize("name", ["attn1.processor.to_out", "attn1.to_out_lora", "attn1.to_out", "attn1_to_out"])
def test_a_container_without_a_weight_stands_for_its_child(name: str) -> None:
    (reading,) = SDXL_UNET.resolve(f"down_blocks.2.attentions.0.transformer_blocks.2.{name}")
    assert reading.paths == ("down_blocks.2.attentions.0.transformer_blocks.2.attn1.to_out.0",)


def test_mochi_mod_y_has_a_reading_for_the_last_block_and_one_for_the_others() -> None:
    paths = [reading.paths[0] for reading in MOCHI.resolve("blocks.47.mod_y")]
    assert paths == ["transformer_blocks.47.norm1_context.linear", "transformer_blocks.47.norm1_context.linear_1"]


def test_minimax_h3_says_how_wide_an_interleaved_head_is() -> None:
    (reading,) = MINIMAX_H3.resolve("blocks.3.attn.qkv_proj")
    assert reading.rule.head == 128


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "language_model.", ""])
def test_older_layouts_of_a_text_encoder_are_read(prefix: str) -> None:
    (reading,) = QWEN2_5_VL.resolve(f"{prefix}layers.3.self_attn.q_proj")
    assert reading.paths == ("model.language_model.layers.3.self_attn.q_proj",)


def test_text_encoders_are_written_with_their_own_names() -> None:
    path = "text_model.encoder.layers.3.self_attn.q_proj"
    assert CLIP.writing("original").source(path)[0] == path


def test_anima_routes_its_adapter_to_the_text_conditioner_and_back() -> None:
    anima = next(family for family in FAMILIES if family.name == "anima")
    (reading,) = anima.components["transformer"].resolve("llm_adapter.blocks.0.self_attn.q_proj")
    assert (reading.rule.component, reading.paths) == ("text_conditioner", ("blocks.0.self_attn.q_proj",))
    written = anima.components["text_conditioner"].writing("original").source("blocks.0.self_attn.q_proj")
    assert written[0] == "llm_adapter.blocks.0.self_attn.q_proj"


# LTX-2's own names, level by level: LTX_2_0_CONNECTORS_KEYS_RENAME_DICT in diffusers' scripts/convert_ltx2_to_diffusers.
LTX2_LEVELS = {
    "video_connector": "video_embeddings_connector",
    "audio_connector": "audio_embeddings_connector",
    "transformer_blocks": "transformer_1d_blocks",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "text_proj_in": "text_embedding_projection.aggregate_embed",
    "video_text_proj_in": "text_embedding_projection.video_aggregate_embed",
    "audio_text_proj_in": "text_embedding_projection.audio_aggregate_embed",
}


@needs_list
@pytest.mark.parametrize("spelling", ["diffusion_model.{}", "{}", "lora_unet_{}"])
@pytest.mark.parametrize("label", ["ltx2-connectors", "ltx2.3-connectors"])
def test_every_module_of_ltx2s_connectors_is_found_by_its_original_name(label: str, spelling: str) -> None:
    stems: dict[str, str] = {}
    for path in BY_LABEL[label].addresses:
        name = ".".join(LTX2_LEVELS.get(level, level) for level in path.split("."))
        stems[spelling.format(name.replace(".", "_") if spelling.startswith("lora_unet") else name)] = path
    adapter = parse(Contents({f"{stem}.diff": torch.ones(8) for stem in stems}), "ltx2")
    assert dict(adapter.bound) == {f"{stem}.diff": (f"connectors.{path}",) for stem, path in stems.items()}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("ltx2", "video_embeddings_connector.transformer_1d_blocks.0.attn1.nothing"),
        ("ltx2", "video_embeddings_connector_transformer_1d_blocks_0_attn1_nothing"),
        ("anima", "llm_adapter.blocks.0.nothing"),
    ],
)
def test_a_name_that_the_other_component_does_not_have_is_unresolved(family: str, name: str) -> None:
    adapter = parse(Contents({f"diffusion_model.{name}.diff": torch.ones(8)}), family)
    assert [module.name for module in adapter.unresolved] == [name]
    assert not adapter.deltas
