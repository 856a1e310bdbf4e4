from itertools import product

import pytest
import torch
from delta_cases import CASES, cayley, join, randn

from lora_loaders.deltas import InputOftDelta, OftDelta, build, parts_of
from lora_loaders.errors import ConversionError, MalformedAdapterError
from lora_loaders.siblings import on_weights


def test_rotations_keep_the_norm_of_the_weight() -> None:
    for name in ("oft", "oft conv", "boft", "oft diag"):
        case = CASES[name]
        slots = {slot: tensor for slot, tensor in case.slots.items() if slot != "rescale"}
        turned = case.base + build(slots, None).delta_weight(case.base)
        torch.testing.assert_close(turned.norm(), case.base.norm())


def test_alpha_bounds_the_rotation_and_does_not_scale_it() -> None:
    case = CASES["oft"]
    free = case.build().delta_weight(case.base)
    torch.testing.assert_close(build(case.slots, 1000.0).delta_weight(case.base), free)
    torch.testing.assert_close(build(case.slots, 0.0).delta_weight(case.base), free)
    assert build(case.slots, 1e-3).delta_weight(case.base).norm() < free.norm() / 10


def test_a_constraint_is_taken_along_by_the_parts_of_a_split() -> None:
    case = CASES["oft constrained"]
    parts = case.build().split([4, 20])
    assert [part.alpha_value for part in parts] == [0.0, 0.0]
    changes = [part.delta_weight(base) for part, base in zip(parts, case.base.split([4, 20]), strict=True)]
    torch.testing.assert_close(torch.cat(changes), case.expected())


@pytest.mark.parametrize("name", ["oft", "oft constrained", "boft", "oft diag"])
def test_parts_cut_within_rows_that_are_rotated_together_are_exact(name: str) -> None:
    case = CASES[name]
    parts = parts_of(case.build(), {"q": 3, "k": 14, "v": 7})
    weights = dict(zip(parts, case.base.split([3, 14, 7]), strict=True))
    changes = [on_weights(part, weights.get).delta_weight(weights[path]) for path, part in parts.items()]
    torch.testing.assert_close(torch.cat(changes), case.expected())
    assert isinstance(join(list(parts.values())), OftDelta)


def test_boft_halves_are_swapped_through_a_group() -> None:
    case = CASES["boft"]
    swapped = case.build().swap_halves()
    torch.testing.assert_close(swapped.delta_weight(case.base.roll(12, 0)), case.expected().roll(12, 0))


def test_boft_halves_are_swapped_between_groups() -> None:
    torch.manual_seed(1)
    base, delta = randn(32, 5), build({"oft_blocks": randn(2, 8, 4, 4)}, None)
    swapped = delta.swap_halves().delta_weight(base.roll(16, 0))
    torch.testing.assert_close(swapped, delta.delta_weight(base).roll(16, 0))


def test_parts_trained_apart_join_where_their_blocks_are_of_one_size() -> None:
    torch.manual_seed(1)
    base = randn(24, 5)
    one = build({"oft_blocks": randn(4, 4, 4)}, 0.01)
    other = build({"oft_blocks": randn(2, 4, 4), "rescale": randn(8, 1)}, None)
    apart = torch.cat([one.delta_weight(base[:16]), other.delta_weight(base[16:])])
    torch.testing.assert_close(join([one, other]).delta_weight(base), apart)
    wider = build({"oft_blocks": randn(1, 8, 8)}, None)
    with pytest.raises(ConversionError, match="different sizes"):
        join([one, wider])


def test_input_rotations_fit_by_the_number_of_inputs_alone() -> None:
    delta, shared = CASES["input oft"].build(), CASES["input oft shared"].build()
    assert delta.fits((7, 10))
    assert not delta.fits((7, 15))
    assert shared.fits((7, 15))
    assert not shared.fits((7, 12))


def test_the_exact_transform_is_the_inverse_of_the_series() -> None:
    torch.manual_seed(1)
    base, triangles = randn(6, 10), randn(2, 10) * 0.01
    series = InputOftDelta(oft_R=triangles, neumann_terms=30)
    exact = InputOftDelta(oft_R=-triangles, neumann_terms=None)
    torch.testing.assert_close(series.delta_weight(base), exact.delta_weight(base))


def test_shapes_that_hold_no_rotation_are_malformed() -> None:
    for slots in ({"oft_blocks": randn(6, 4, 3)}, {"oft_R": randn(2, 9)}, {"oft_R": randn(2, 5, 5)}):
        with pytest.raises(MalformedAdapterError):
            build(slots, None)
    with pytest.raises(MalformedAdapterError, match="rescale"):
        build({"oft_blocks": randn(6, 4, 4), "rescale": randn(23, 1)}, None)


@pytest.mark.parametrize("name", ["oft_blocks", "boft_R"])
def test_blocks_that_cannot_be_paired_in_every_stage_are_malformed(name: str) -> None:
    """Stage i takes half blocks in pairs that lie 2ⁱ half blocks apart, and has to meet every row just once."""
    for stages, count, size in product(range(5), (1, 2, 3, 4, 6, 8), (2, 3, 4)):
        rows, half = count * size, size // 2
        orders = [
            sorted(
                group + side * step + place
                for group in range(0, rows, 2 * step)
                for side in (0, 1)
                for place in range(step)
            )
            for step in (half * 2**stage for stage in range(stages))
        ]
        pairs = stages > 0 and not size % 2 and all(order == list(range(rows)) for order in orders)
        pairs |= name == "boft_R" and stages == 1  # PEFT leaves the blocks of a lone stage where they are
        slots = {name: torch.zeros(stages, count, size, size), "boft_s": torch.ones(rows, 1)}
        slots = slots if name == "boft_R" else {name: slots[name]}
        if pairs:
            assert not build(slots, None).delta_weight(torch.ones(rows, rows)).any(), (stages, count, size)
        else:
            with pytest.raises(MalformedAdapterError, match="paired"):
                build(slots, None)


def test_an_old_rescale_in_blocks_is_one_factor_a_row() -> None:
    case = CASES["oft diag"]
    rescale = randn(6, 4, 1)
    delta = build({**case.slots, "rescale": rescale}, None)
    turned = torch.block_diag(*case.slots["oft_diag"]).T @ case.base
    torch.testing.assert_close(delta.delta_weight(case.base), rescale.view(24, 1) * turned - case.base)


@pytest.mark.parity
@pytest.mark.parametrize("constraint", [0, 0.01])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("module", ["diag_oft.DiagOFTModule", "boft.ButterflyOFTModule"])
def test_equals_lycoris(module: str, kind: str, constraint: float) -> None:
    file, name = module.split(".")
    modules = pytest.importorskip(f"lycoris.modules.{file}")
    base = torch.nn.Linear(16, 32) if kind == "linear" else torch.nn.Conv2d(16, 32, 3)
    theirs = getattr(modules, name)("m", base, lora_dim=4, constraint=constraint, rescaled=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
        slots = {"oft_blocks": theirs.oft_blocks.detach(), "rescale": theirs.rescale.detach()}
        ours = build(slots, float(theirs.alpha)).delta_weight(base.weight)
        torch.testing.assert_close(ours, theirs.get_diff_weight()[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("settings", [{}, {"use_cayley_neumann": False}, {"block_share": True}], ids=str)
def test_input_rotation_equals_peft(settings: dict[str, bool]) -> None:
    peft = pytest.importorskip("peft")
    base = torch.nn.Linear(20, 32)
    before = base.weight.detach().clone()
    config = peft.OFTConfig(r=0, oft_block_size=5, target_modules=["0"], init_weights=False, **settings)
    layer = peft.get_peft_model(torch.nn.Sequential(base), config).base_model.model[0]
    with torch.no_grad():
        layer.oft_R["default"].weight.normal_(std=0.1)
    triangles = layer.oft_R["default"].weight.detach().clone()
    layer.merge()
    ours = InputOftDelta(oft_R=triangles, neumann_terms=5 if settings.get("use_cayley_neumann", True) else None)
    torch.testing.assert_close(ours.delta_weight(before), layer.base_layer.weight.detach() - before)


@pytest.mark.parity
def test_input_rotation_of_a_convolution_can_follow_peft() -> None:
    peft = pytest.importorskip("peft")
    base = torch.nn.Conv2d(10, 8, 3)
    before = base.weight.detach().clone()
    config = peft.OFTConfig(r=0, oft_block_size=5, target_modules=["0"], init_weights=False)
    layer = peft.get_peft_model(torch.nn.Sequential(base), config).base_model.model[0]
    triangles = layer.oft_R["default"].weight.detach().clone()
    layer.merge()
    ours = InputOftDelta(oft_R=triangles, turns_patches=True)
    torch.testing.assert_close(ours.delta_weight(before), layer.base_layer.weight.detach() - before)


def test_the_cases_rotations_are_orthogonal() -> None:
    rotation = cayley(torch.stack([q - q.T for q in randn(3, 4, 4)]))
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(4, dtype=rotation.dtype).expand(3, 4, 4))
