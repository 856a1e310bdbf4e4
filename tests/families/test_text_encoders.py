"""The text encoders' tables against transformers' own classes, tiny and on the meta device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_loaders.checkpoints import EMBEDDINGS
from lora_loaders.families import Names
from lora_loaders.families.rules import flatten
from lora_loaders.families.text_encoders import (
    BERT,
    CLIP,
    GEMMA3,
    LANGUAGE_MODEL,
    LLAVA,
    MISTRAL3,
    QWEN2_5_VL,
    QWEN3_VL,
    T5,
)

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0}
TOWER = {**SMALL, "image_size": 28, "patch_size": 14}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
T5_TEXT = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
PIXTRAL = {"text_config": {**TEXT, "model_type": "mistral"}, "vision_config": {**TOWER, "model_type": "pixtral"}}
LLAVA_CONFIG = {
    "text_config": {**TEXT, "model_type": "llama"},
    "vision_config": {**TOWER, "model_type": "clip_vision_model", "projection_dim": 32},
}
QWEN3_VL_CONFIG = {"text_config": TEXT, "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]}}

CASES: tuple[tuple[str, str, dict[str, Any], Names], ...] = (
    ("CLIPTextModel", "CLIPTextConfig", {**SMALL, "vocab_size": 64}, CLIP),
    ("CLIPTextModelWithProjection", "CLIPTextConfig", {**SMALL, "vocab_size": 64}, CLIP),
    ("T5EncoderModel", "T5Config", T5_TEXT, T5),
    ("T5EncoderModel", "T5Config", {**T5_TEXT, "feed_forward_proj": "gated-gelu"}, T5),
    ("UMT5EncoderModel", "UMT5Config", T5_TEXT, T5),
    ("BertModel", "BertConfig", {**SMALL, "vocab_size": 64}, BERT),
    ("LlamaModel", "LlamaConfig", TEXT, LANGUAGE_MODEL),
    ("LlamaForCausalLM", "LlamaConfig", TEXT, LANGUAGE_MODEL),
    ("Qwen3Model", "Qwen3Config", TEXT, LANGUAGE_MODEL),
    ("Qwen3ForCausalLM", "Qwen3Config", TEXT, LANGUAGE_MODEL),
    ("GemmaModel", "GemmaConfig", TEXT, LANGUAGE_MODEL),
    ("Gemma2Model", "Gemma2Config", TEXT, LANGUAGE_MODEL),
    ("GlmModel", "GlmConfig", TEXT, LANGUAGE_MODEL),
    ("Glm4Model", "Glm4Config", TEXT, LANGUAGE_MODEL),
    ("SmolLM3ForCausalLM", "SmolLM3Config", TEXT, LANGUAGE_MODEL),
    ("Gemma3ForConditionalGeneration", "Gemma3Config", {"text_config": TEXT, "vision_config": TOWER}, GEMMA3),
    ("LlavaForConditionalGeneration", "LlavaConfig", LLAVA_CONFIG, LLAVA),
    ("LlamaModel", "LlamaConfig", TEXT, LLAVA),
    ("Mistral3Model", "Mistral3Config", PIXTRAL, MISTRAL3),
    ("Mistral3ForConditionalGeneration", "Mistral3Config", PIXTRAL, MISTRAL3),
    ("Qwen3ForCausalLM", "Qwen3Config", TEXT, MISTRAL3),
    (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": TEXT, "vision_config": QWEN_TOWER},
        QWEN2_5_VL,
    ),
    ("Qwen3VLModel", "Qwen3VLConfig", QWEN3_VL_CONFIG, QWEN3_VL),
    ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", QWEN3_VL_CONFIG, QWEN3_VL),
)


@pytest.mark.parametrize(("model", "config", "options", "names"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_every_module_of_an_encoder_is_known(model: str, config: str, options: dict[str, Any], names: Names) -> None:
    build: Callable[..., torch.nn.Module] | None = getattr(transformers, model, None)
    if build is None:
        pytest.skip(f"this transformers has no {model}")
    with torch.device("meta"):
        encoder = build(getattr(transformers, config)(**options))
    for path, module in encoder.named_modules():
        own = dict(module.named_parameters(recurse=False))
        plain = own.keys() <= {"weight", "bias"}
        for known in [path] * bool(own) if plain else [f"{path}.{name}" for name in own]:
            for spelling in (known, flatten(known)):
                readings = names.resolve(spelling)
                assert len(readings) == 1, spelling
                assert _without(readings[0].paths[0], names) == _without(known, names)


@pytest.mark.parametrize(("model", "config", "options", "names"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_embeddings_are_known_by_their_names(model: str, config: str, options: dict[str, Any], names: Names) -> None:
    build: Callable[..., torch.nn.Module] | None = getattr(transformers, model, None)
    if build is None:
        pytest.skip(f"this transformers has no {model}")
    with torch.device("meta"):
        encoder = build(getattr(transformers, config)(**options))
    layers = dict(encoder.named_modules())
    found = {path for path in layers if EMBEDDINGS.search(path)}
    assert found == {path for path, module in layers.items() if isinstance(module, torch.nn.Embedding)}


def _without(path: str, names: Names) -> str:
    for prefix in names.optional_prefixes:
        path = path.removeprefix(prefix)
    return path
