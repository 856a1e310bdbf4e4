"""The user's factors: numbers, lists, dictionaries by component and by block."""

import pytest

from lora_loaders.errors import AdapterStateError
from lora_loaders.weights import by_path, for_component, nested, one_each

PATHS = [
    "conv_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q",
]


def test_one_number_holds_for_every_adapter() -> None:
    assert one_each(["a", "b"], 0.5) == [0.5, 0.5]
    assert one_each(["a", "b"], None) == [None, None]
    assert one_each(["a", "b"], {"unet": 0.5}) == [{"unet": 0.5}] * 2


@pytest.mark.parametrize("sequence", [list, tuple])
def test_a_sequence_gives_each_adapter_its_own(sequence: type) -> None:
    assert one_each(["a", "b"], sequence([0.5, 2])) == [0.5, 2]


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 1.0, 1.0]])
def test_another_length_is_refused(weights: list[float]) -> None:
    with pytest.raises(AdapterStateError, match="Length of adapter names 2 is not equal to the length of the weights"):
        one_each(["a", "b"], weights)


def test_a_dictionary_by_component_gives_each_component_its_part() -> None:
    weight = {"unet": {"down": 0.5}, "text_encoder": 0.25}
    components = ["unet", "text_encoder", "text_encoder_2"]
    assert for_component(weight, "unet", components) == {"down": 0.5}
    assert for_component(weight, "text_encoder", components) == 0.25
    assert for_component(weight, "text_encoder_2", components) is None
    assert for_component({"down": 0.5}, "unet", components) == {"down": 0.5}
    assert for_component(0.5, "unet", components) == 0.5


def test_an_unknown_component_is_an_error_and_no_silence() -> None:
    paths = {"unet": PATHS, "text_encoder": []}
    with pytest.raises(AdapterStateError, match="transformer"):
        nested({"unet": 1.0, "transformer": 0.5}, paths)
    assert nested({"unet": 1.0}, paths) == {"unet": 1.0}
    assert nested(0.5, paths) == 0.5


def test_blocks_without_a_component_go_to_the_one_that_has_them() -> None:
    paths = {"transformer": FLUX, "text_encoder": ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]}
    assert nested({"transformer_blocks.1": 0.5}, paths) == {"transformer": {"transformer_blocks.1": 0.5}}
    assert nested({r"layers\.\d": 0.5}, paths) == {"text_encoder": {r"layers\.\d": 0.5}}
    for weight in ({r".*to_q|.*q_proj": 0.5}, {"nowhere": 0.5}, {"down": 0.5}):
        with pytest.raises(AdapterStateError, match="under their component"):
            nested(weight, paths)
    assert nested({"down": 0.5}, {"unet": PATHS, "text_encoder": FLUX}) == {"unet": {"down": 0.5}}


def test_unet_parts_blocks_and_layers_are_told_apart() -> None:
    weights = {"down": {"block_0": [0.1, 0.2], "block_1": 0.3}, "mid": 0.4, "up": {"block_1": [0.5, 0.6]}}
    assert list(by_path(weights, PATHS).values()) == [1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def test_absent_parts_keep_one() -> None:
    assert list(by_path({"down": 0.5}, PATHS).values()) == [1.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0]
    assert list(by_path({"up": {"block_1": 0.5}}, PATHS).values()) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("weights", [
    {"down": {"block_7": 0.5}},
    {"down": {"block_0": [0.5, 0.6, 0.7]}},
    {"down": {"block_0": []}},
    {"down": [0.5, 0.6, 0.7]},
    {"mid": []},
    {"mid": [0.5, 0.5]},
    {"up": {"blocks": 0.5}},
    {"mid": "much"},
    {"mid": {"block_0": 0.5}},
])  # fmt: skip
def test_a_unet_entry_that_means_nothing_is_an_error(weights: dict[str, object]) -> None:
    with pytest.raises(AdapterStateError):
        by_path(weights, PATHS)


def test_a_list_with_one_number_holds_for_all_layers_as_diffusers_has_it() -> None:
    assert by_path({"down": [0.5], "mid": [0.2], "up": {"block_1": [0.3]}}, PATHS) == by_path(
        {"down": 0.5, "mid": 0.2, "up": {"block_1": 0.3}}, PATHS
    )


def test_a_list_has_as_many_numbers_as_the_model_has_layers_adapted_or_not() -> None:
    assert by_path({"down": {"block_0": [0.1, 0.2]}}, PATHS[:2], PATHS) == {PATHS[0]: 1.0, PATHS[1]: 0.1}


def test_blocks_of_a_unet_mean_nothing_elsewhere() -> None:
    with pytest.raises(AdapterStateError, match="blocks of a UNet"):
        by_path({"down": 0.0}, FLUX)


FLUX = [f"transformer_blocks.{i}.attn.{name}" for i in range(12) for name in ("to_q", "to_k")]


def test_path_beginnings_end_at_dots() -> None:
    got = by_path({"transformer_blocks.1": 0.5}, FLUX)
    assert {path for path, weight in got.items() if weight == 0.5} == {FLUX[2], FLUX[3]}


def test_the_longer_key_goes_before_the_shorter() -> None:
    for keys in (
        ["transformer_blocks", "transformer_blocks.1.attn.to_k"],
        ["transformer_blocks.1.attn.to_k", "transformer_blocks"],
    ):
        got = by_path({key: 0.25 if key.endswith("to_k") else 0.5 for key in keys}, FLUX)
        assert got[FLUX[3]] == 0.25
        assert got[FLUX[2]] == 0.5


def test_regular_expressions_mean_whole_path_beginnings() -> None:
    got = by_path({r".*\.to_k": 0.0}, FLUX)
    assert {weight for path, weight in got.items() if path.endswith("to_k")} == {0.0}
    assert {weight for path, weight in got.items() if path.endswith("to_q")} == {1.0}


def test_a_key_that_means_no_module_is_an_error() -> None:
    with pytest.raises(AdapterStateError, match=r"blocks\.99"):
        by_path({"transformer_blocks.99": 0.5}, FLUX)


@pytest.mark.parametrize("weight", ["1", [0.5], object()])
def test_a_weight_that_is_no_number_is_an_error(weight: object) -> None:
    with pytest.raises(AdapterStateError, match="number"):
        by_path(weight, FLUX)


def test_numbers_of_other_libraries_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert by_path(numpy.float32(0.5), FLUX[:1]) == {FLUX[0]: 0.5}
    assert one_each(["a", "b"], numpy.float32(0.5)) == [0.5, 0.5]
    assert one_each(["a", "b"], numpy.array([0.5, 2.0])) == [0.5, 2.0]
