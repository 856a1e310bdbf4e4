"""Every family in every spelling that can say it: written, read again, the same change of every module."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import swap_scale_shift
from diffusers.models.transformers.transformer_helios import HeliosTransformerBlock
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2TransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformerBlock
from torch import Tensor

from lora_loaders.adapter import Adapter
from lora_loaders.conversion import parse
from lora_loaders.deltas import LoraDelta
from lora_loaders.deltas.full import FullDelta
from lora_loaders.detection import family_named
from lora_loaders.errors import ConversionError
from lora_loaders.families import FAMILIES, Family, Names
from lora_loaders.families.rules import HOLE
from lora_loaders.files import Contents
from lora_loaders.formats import FORMATS
from lora_loaders.writing import to_tensors

UNIT, RANK = 4, 2
SPELLINGS = ("diffusers", "kohya", "kohya-original", "kohya-diffusers", "original", "omi", "onetrainer")
# Each of these has a norm3 in diffusers; the original calls by that name what diffusers calls norm2.
NORM3 = {
    ("wan", "blocks.{i}.norm3"): WanTransformerBlock,
    ("wan", "vace_blocks.{i}.norm3"): WanVACETransformerBlock,
    ("skyreels2", "blocks.{i}.norm3"): SkyReelsV2TransformerBlock,
    ("helios", "blocks.{i}.norm3"): HeliosTransformerBlock,
}


def nameless(names: Names) -> set[str]:
    """Modules that the original has no name for, and whose own name is another module's there: Wan's `norm3`."""
    rows = [rule for rule in names.rules if rule.dialect == "original"]
    return set(names.modules) & {rule.source for rule in rows} - {path for rule in rows for path in rule.targets}


def loras_on(names: Names) -> dict[str, LoraDelta]:
    """A LoRA on each module of the first blocks, rows in the proportions of the family's fused modules."""
    raw = {path for rule in names.rules if rule.parameter or rule.last_only for path in rule.targets}
    shares = {path: n for rule in names.rules for path, n in zip(rule.targets, rule.shares, strict=True) if n > 1}
    generator = torch.Generator().manual_seed(0)
    deltas: dict[str, LoraDelta] = {}
    for template in names.modules:
        if template not in raw | nameless(names):
            rows = 2 * UNIT * shares.get(template, 1)
            up, down = (torch.randn(size, generator=generator) for size in ((rows, RANK), (RANK, UNIT)))
            deltas[HOLE.sub("0", template)] = LoraDelta(up=up, down=down, alpha=3.0)
    return deltas


def denoiser_of(family: Family) -> Adapter:
    return Adapter({family.denoiser: loras_on(family.components[family.denoiser])}, family=family.name)


def assert_reads_as(
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
) -> None:
    """The file binds the adapter's modules, no others, and gives each the same ΔW."""
    again = parse(Contents(tensors, metadata, config), adapter.family)
    assert not again.unresolved
    assert again.deltas.keys() == adapter.deltas.keys()
    for component, deltas in adapter.deltas.items():
        found = again.deltas[component]
        assert found.keys() == deltas.keys()
        changes = ((path, found[path].delta_weight(), delta.delta_weight()) for path, delta in deltas.items())
        assert not [path for path, ours, written in changes if not torch.allclose(ours, written, rtol=0, atol=1e-6)]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_is_written_is_read_as_the_same_change(family: Family, spelling: str) -> None:
    adapter = denoiser_of(family)
    if spelling == "omi" and "omi" not in {rule.dialect for rule in family.components[family.denoiser].rules}:
        pytest.skip("none of its modules is fused, so OMI has no names of its own for it")
    tensors, metadata, _ = to_tensors(adapter, spelling)
    assert_reads_as(adapter, tensors, metadata)


@pytest.mark.parametrize("spelling", ["kohya", "original"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_full_differences_are_read_as_they_were_written(family: Family, spelling: str) -> None:
    loras = loras_on(family.components[family.denoiser])
    full = {path: FullDelta(diff=lora.delta_weight()) for path, lora in loras.items()}
    adapter = Adapter({family.denoiser: full}, family=family.name)
    assert_reads_as(adapter, *to_tensors(adapter, spelling)[:2])


@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "original", "onetrainer"])
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.text_encoders], ids=lambda family: family.name
)
def test_text_encoders_are_read_as_what_was_written(family: Family, spelling: str) -> None:
    """ComfyUI's names hold the encoder's: an encoder that it has no name for is refused, not written without one."""
    unnamed = {component for component in family.text_encoders if component not in family.encoders}
    encoders = {component: loras_on(family.components[component]) for component in family.text_encoders}
    if spelling == "original" and unnamed:
        with pytest.raises(ConversionError) as caught:
            to_tensors(Adapter(encoders, family=family.name), spelling)
        assert {problem.partition(":")[0] for problem in caught.value.problems} == unnamed
        encoders = {component: loras for component, loras in encoders.items() if component not in unnamed}
    if encoders:
        adapter = Adapter(encoders, family=family.name)
        assert_reads_as(adapter, *to_tensors(adapter, spelling)[:2])


# All but those whose words one family's denoiser alone has.
ALL_SPELLINGS = [form.name for form in FORMATS if form.name not in ("xlabs", "indexed")]
# What a format has a word for beside a family's denoiser and its text encoders.
BESIDE = {
    ("wan", "transformer_2"): {"diffusers", "diffusers-old", "omi"},
    ("minimax-h3", "transformer_ref"): {"diffusers", "diffusers-old", "omi"},
    ("ideogram4", "unconditional_transformer"): {"diffusers", "diffusers-old", "omi"},
    ("cascade", "decoder"): {"diffusers", "diffusers-old", "omi"},
    ("wuerstchen", "decoder"): {"diffusers", "diffusers-old", "omi", "peft"},
    # The original has these two among the denoiser's modules, under names of their own.
    ("anima", "text_conditioner"): {"diffusers", "diffusers-old", "omi", "kohya", "kohya-original", "original", "bfl"},
    ("ltx2", "connectors"): {
        *("diffusers", "diffusers-old", "omi", "kohya", "kohya-original", "original", "bfl", "peft"),
    },
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_component_is_read_as_itself_in_every_spelling_that_can_say_it(family: Family) -> None:
    """Alone, and beside the denoiser: whatever is written of one component is never read as another's change."""
    said: dict[str, set[str]] = {component: set() for component in family.components}
    for spelling in ALL_SPELLINGS:
        for component, names in family.components.items():
            loras = loras_on(names)
            own = {family.denoiser: denoiser_of(family).deltas[family.denoiser]}
            for deltas in ({component: loras}, own | {component: loras}):
                adapter = Adapter(deltas, family=family.name)
                try:
                    tensors, metadata, config = to_tensors(adapter, spelling)
                except ConversionError:
                    continue
                if deltas.keys() & {*family.apart} and spelling not in BESIDE[family.name, component]:
                    adapter = Adapter({family.denoiser: loras}, family=family.name)  # in a file of its own
                else:
                    said[component].add(spelling)
                assert_reads_as(adapter, tensors, metadata, config if spelling == "peft" else None)
    beside = {component for component in said if component != family.denoiser and component not in family.text_encoders}
    assert {(family.name, component): said[component] for component in beside} == {
        place: words for place, words in BESIDE.items() if place[0] == family.name
    }


def test_a_component_that_a_format_has_no_word_for_is_refused_with_those_that_have_one() -> None:
    lora = LoraDelta(up=torch.ones(UNIT, RANK), down=torch.ones(RANK, UNIT))
    conditioner = {"text_conditioner": {"blocks.0.self_attn.q_proj": lora}}
    for spelling in ("kohya-diffusers", "lycoris", "onetrainer", "peft"):
        with pytest.raises(ConversionError) as caught:
            to_tensors(Adapter(conditioner, family="anima"), spelling)
        assert len(caught.value.problems) == 1
        assert "text_conditioner" in caught.value.problems[0]
        assert "kohya, kohya-original, original, bfl" in str(caught.value.mend)
    assert set(to_tensors(Adapter(conditioner, family="anima"), "kohya")[0]) == {
        f"lora_unet_llm_adapter_blocks_0_self_attn_q_proj.lora_{end}.weight" for end in ("up", "down")
    }
    decoder = {"decoder": {"down_blocks.2.2.attention.to_q": lora}}  # the prior has a module of this name
    with pytest.raises(ConversionError, match="prior"):
        to_tensors(Adapter(decoder, family="cascade"), "peft")


@pytest.mark.parametrize("names", ["kohya", "kohya-original", "kohya-diffusers"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_tour_of_the_spellings_brings_the_same_tensors_home(family: Family, names: str) -> None:
    home, metadata, _ = to_tensors(denoiser_of(family), names)
    contents = Contents(home, metadata)
    for spelling in ("original", "peft", "diffusers", "kohya"):
        tensors, metadata, config = to_tensors(parse(contents, family.name), spelling)
        contents = Contents(tensors, metadata, config if spelling == "peft" else None)
    assert contents.tensors.keys() == home.keys()
    changed = [key for key, tensor in home.items() if not torch.equal(tensor, contents.tensors[key])]
    assert not changed


@pytest.mark.parametrize("spelling", [*SPELLINGS, "peft", "lycoris", "bfl"])
@pytest.mark.parametrize(("blocks", "last"), [((22, 23), 23), ((36, 37), 37), ((22, 23), None), ((0,), 0)])
def test_the_last_blocks_context_of_sd3_changes_its_halves_and_no_others(
    blocks: tuple[int, ...], last: int | None, spelling: str
) -> None:
    """Of 3.5 medium, large, large's first 24 and a pruned one: two parts are its last block's, six any other's."""
    generator = torch.Generator().manual_seed(0)
    deltas: dict[str, LoraDelta] = {}
    for block in blocks:
        rows = (2 if block == last else 6) * UNIT
        up, down = (torch.randn(size, generator=generator) for size in ((rows, RANK), (RANK, UNIT)))
        deltas[f"transformer_blocks.{block}.norm1_context.linear"] = LoraDelta(up=up, down=down)
    adapter = Adapter({"transformer": deltas}, family="sd3")
    tensors, metadata, config = to_tensors(adapter, spelling)
    again = parse(Contents(tensors, metadata, config if spelling == "peft" else None), "sd3")
    for path, delta in deltas.items():
        assert torch.equal(again.deltas["transformer"][path].delta_weight(), delta.delta_weight())
        number = path.split(".")[1]
        ups = [t for key, t in tensors.items() if number in key and key.endswith((".lora_B.weight", ".lora_up.weight"))]
        theirs = spelling in ("kohya", "kohya-original", "original", "omi", "bfl") and path.split(".")[1] == str(last)
        assert torch.equal(ups[0], swap_scale_shift(delta.up, dim=None) if theirs else delta.up)


def test_a_module_that_the_original_has_no_name_for_has_no_weights() -> None:
    found = {(family.name, path) for family in FAMILIES for path in nameless(family.components[family.denoiser])}
    assert found == NORM3.keys()
    for block in (cls(dim=8, ffn_dim=16, num_heads=2, cross_attn_norm=True) for cls in NORM3.values()):
        assert not [*block.norm3.parameters(), *block.norm3.buffers()]
        assert [*block.norm2.parameters()]


@pytest.mark.parametrize(("family", "template"), NORM3)
@pytest.mark.parametrize("beside", [True, False], ids=["beside norm2", "without norm2"])
def test_a_change_that_would_be_read_as_another_modules_is_refused(family: str, template: str, beside: bool) -> None:
    path = HOLE.sub("0", template)
    sister = path.replace("norm3", "norm2")
    adapter = denoiser_of(family_named(family))
    deltas = dict(adapter.deltas["transformer"])
    deltas[path] = deltas[sister]
    if not beside:
        del deltas[sister]
    for spelling in ("kohya", "original"):
        with pytest.raises(ConversionError) as caught:
            to_tensors(Adapter({"transformer": deltas}, family=family), spelling)
        assert len(caught.value.problems) == 1
        assert path in caught.value.problems[0]
        assert sister in caught.value.problems[0]
    tensors, metadata, _ = to_tensors(Adapter({"transformer": deltas}, family=family), "diffusers")
    assert parse(Contents(tensors, metadata), family).deltas["transformer"].keys() == deltas.keys()
