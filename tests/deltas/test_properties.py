"""What every algebra promises, by itself and under a DoRA magnitude."""

import pytest
import torch
from delta_cases import CASES, COLUMNS, ROWS, Case, join, randn
from torch import Tensor

from lora_loaders.deltas import Delta, RowsDelta, build, parts_of
from lora_loaders.errors import ConversionError, MalformedAdapterError
from lora_loaders.siblings import on_weights

MAGNITUDES = {"plain": None, "dora per output": (ROWS, 1), "dora per input": (1, COLUMNS)}
BIASED = [name for name in CASES if name != "modulation"]


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]


def equal(one: Tensor | None, other: Tensor) -> None:
    assert one is not None
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def with_magnitude(case: Case, kind: str) -> Delta:
    shape = MAGNITUDES[kind]
    if shape is None:
        return case.build()
    torch.manual_seed(7)
    return case.build(magnitude=randn(*shape, *[1] * len(case.kernel)).abs())


def expected(case: Case, kind: str) -> Tensor:
    change = case.expected()
    shape = MAGNITUDES[kind]
    if shape is None:
        return change
    torch.manual_seed(7)
    magnitude = randn(*shape, *[1] * len(case.kernel)).abs()
    direction = case.base + change
    axes = [axis for axis in range(direction.ndim) if axis != (0 if shape[0] != 1 else 1)]
    return magnitude * direction / direction.square().sum(axes, keepdim=True).sqrt() - case.base


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_delta_weight_equals_the_closed_formula(case: Case, kind: str) -> None:
    equal(with_magnitude(case, kind).delta_weight(case.base), expected(case, kind))


@pytest.mark.parametrize("kind", ["plain", "dora per output"])
def test_split_parts_concatenate_to_the_whole(case: Case, kind: str) -> None:
    parts = with_magnitude(case, kind).split(case.sizes)
    bases = case.base.split(case.sizes)
    changes = [part.delta_weight(base) for part, base in zip(parts, bases, strict=True)]
    assert [len(change) for change in changes] == list(case.sizes)
    equal(torch.cat(changes), expected(case, kind))


@pytest.mark.parametrize("kind", ["plain", "dora per output"])
def test_rows_are_the_rows_of_delta_weight(case: Case, kind: str) -> None:
    part = with_magnitude(case, kind).rows(8, 16)
    equal(part.delta_weight(case.base[8:16]), expected(case, kind)[8:16])


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_swapped_halves_go_with_a_swapped_base(case: Case, kind: str) -> None:
    swapped = with_magnitude(case, kind).swap_halves()
    equal(swapped.delta_weight(case.base.roll(ROWS // 2, 0)), expected(case, kind).roll(ROWS // 2, 0))


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_swapping_halves_twice_changes_nothing(case: Case, kind: str) -> None:
    twice = with_magnitude(case, kind).swap_halves().swap_halves()
    equal(twice.delta_weight(case.base), expected(case, kind))


@pytest.mark.parametrize("kind", ["plain", "dora per output"])
def test_joining_the_parts_of_a_split_gives_the_whole_back(case: Case, kind: str) -> None:
    delta = with_magnitude(case, kind)
    parts = delta.split(case.sizes)
    joined = join(parts)
    assert type(joined) is type(delta)
    equal(joined.delta_weight(case.base), delta.delta_weight(case.base))
    if case.closed:
        before, after = delta.slots(), joined.slots()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[slot], after[slot]) for slot in before)
        assert joined.alpha_value == delta.alpha_value


@pytest.mark.parametrize("name", BIASED)
def test_biases_are_split_swapped_and_joined_with_the_rows(name: str) -> None:
    case = CASES[name]
    bias = randn(ROWS)
    delta = case.build(bias=bias)
    parts = delta.split(case.sizes)
    biases = [part.delta_bias() for part in parts]
    assert all(part is not None for part in biases)
    equal(torch.cat([part for part in biases if part is not None]), bias)
    if name != "boft":
        equal(delta.swap_halves().delta_bias(), bias.roll(ROWS // 2))
    equal(join(parts).delta_bias(), bias)


def test_an_embeddings_slots_hold_its_bias_too() -> None:
    """No embedding has one, but what a file says is not dropped on the way to another."""
    slots = {"embedding_down": randn(2, 20), "embedding_up": randn(8, 2), "bias": randn(8)}
    again = build(slots, 1.0).slots()
    assert again.keys() == slots.keys()
    assert all(torch.equal(again[name], slots[name]) for name in slots)


@pytest.mark.parametrize("kind", ["plain", "dora per output"])
def test_tensors_round_trip(case: Case, kind: str) -> None:
    delta = with_magnitude(case, kind)
    for part, base in ((delta, case.base), (delta.rows(8, 16), case.base[8:16])):
        again = part.with_tensors({name: tensor.clone() for name, tensor in part.tensors().items()})
        equal(again.delta_weight(base), part.delta_weight(base))
        halved = part.map_tensors(lambda tensor: tensor.to(torch.float32))
        assert all(tensor.dtype == torch.float32 for tensor in halved.tensors().values())
        torch.testing.assert_close(
            halved.delta_weight(base.float()), part.delta_weight(base).float(), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("kind", ["plain", "dora per output"])
def test_slots_build_the_same_delta_again(case: Case, kind: str) -> None:
    delta = with_magnitude(case, kind)
    again = build(delta.slots(), delta.alpha_value)
    assert type(again) is type(delta)
    assert again.slots().keys() == delta.slots().keys()
    equal(again.delta_weight(case.base), delta.delta_weight(case.base))


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_factors_make_the_same_weight(case: Case, kind: str) -> None:
    delta = with_magnitude(case, kind)
    factors = delta.factors(case.base)
    if factors is None:
        pytest.skip("no cheaper form at this size")
    base = case.base.clone()
    if factors.out_gain is not None:
        base = base * (1 + factors.out_gain).view(-1, *[1] * (base.ndim - 1))
    if factors.in_gain is not None:
        base = base * (1 + factors.in_gain).view(1, -1, *[1] * (base.ndim - 2))
    assert factors.down.shape[1:] == base.shape[1:]
    assert factors.up.shape == (ROWS, factors.down.shape[0])
    product = factors.scaling * torch.einsum("or,ri...->oi...", factors.up, factors.down)
    equal(base + product - case.base, expected(case, kind))


def test_data_in_half_precision_is_computed_in_float32(case: Case) -> None:
    delta = case.build().map_tensors(lambda tensor: tensor.to(torch.bfloat16))
    assert delta.delta_weight(case.base.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_fits_its_own_base_and_no_other(case: Case, kind: str) -> None:
    delta = with_magnitude(case, kind)
    assert delta.fits(case.base.shape)
    if not case.kernel:
        assert delta.fits((*case.base.shape, 1, 1))
    assert not delta.fits((ROWS + 1, COLUMNS + 1, *case.kernel))


def test_shapes_parts_and_fit_are_known_without_data(case: Case) -> None:
    delta = build({name: tensor.to("meta") for name, tensor in case.slots.items()}, case.alpha)
    if "on_input" in case.slots:
        return  # which side it is stands in the data
    assert delta.out_features in (-1, ROWS)
    assert delta.fits(case.base.shape)
    if "bias_indices" not in case.slots:
        assert len(delta.split(case.sizes)) == 3


def test_needs_base_is_said_and_enforced(case: Case) -> None:
    delta = case.build()
    if delta.needs_base:
        with pytest.raises(ConversionError, match="base_weight"):
            delta.delta_weight()
    else:
        equal(delta.delta_weight().view(case.base.shape), case.expected())


def test_parts_that_do_not_add_up_are_refused(case: Case) -> None:
    delta = case.build()
    if delta.out_features != -1:
        with pytest.raises(ConversionError, match="do not add up"):
            delta.split([8, 8])


def test_parts_under_column_norms_read_the_other_parts_weights(case: Case) -> None:
    delta = with_magnitude(case, "dora per input")
    weights = dict(zip("qkv", case.base.split(case.sizes), strict=False))
    parts = parts_of(delta, {path: len(weight) for path, weight in weights.items()})
    changes = [on_weights(part, weights.get).delta_weight(weights[path]) for path, part in parts.items()]
    equal(torch.cat(changes), expected(case, "dora per input"))
    joined = join(list(parts.values()))
    assert type(joined) is type(delta)
    equal(joined.delta_weight(case.base), expected(case, "dora per input"))


@pytest.mark.parametrize(
    "name", ["loha", "loha tucker", "lokr", "glora", "input oft", "ia3 input", "lokr cut inside blocks", "lora tucker"]
)
def test_parts_trained_apart_are_not_stacked_where_the_algebra_cannot_say_it(name: str) -> None:
    case = CASES[name]
    part = case.build()
    other = part.map_tensors(torch.randn_like)
    pieces = part.split(case.sizes)
    if isinstance(pieces[0], RowsDelta):
        part, other = pieces[0], other.split(case.sizes)[1]
    with pytest.raises(ConversionError, match=r"stacked|fused"):
        join([part, other])


R = torch.ones
LOHA = {"hada_w1_a": R(8, 2), "hada_w1_b": R(2, 6), "hada_w2_a": R(8, 2), "hada_w2_b": R(2, 6)}
MALFORMED = {
    "loha vector": LOHA | {"hada_w1_a": R(8)},
    "loha number": LOHA | {"hada_w1_b": R(())},
    "loha flat core": LOHA | {"hada_t1": R(2, 2, 3), "hada_t2": R(2)},
    "lokr vector": {"lokr_w1": R(4), "lokr_w2": R(2, 3)},
    "lokr flat core": {"lokr_w1": R(4, 2), "lokr_w2_a": R(2, 2), "lokr_w2_b": R(2, 3), "lokr_t2": R(2)},
    "glora vector": {"a1": R(6), "a2": R(2, 6), "b1": R(8, 2), "b2": R(2, 6)},
    "embedding vector": {"embedding_down": R(6), "embedding_up": R(2, 6)},
    "oft rescale": {"oft_blocks": R(2, 4, 4), "rescale": R(())},
    "ia3 flag": {"weight": R(8), "on_input": R(3)},
    "reshape": {"down": R(2, 6), "up": R(8, 2), "reshape_weight": torch.tensor(8)},
}

SPARSE = {"down": R(2, 6), "up": R(8, 2), "bias_values": R(1), "bias_size": torch.tensor([8, 6])}


@pytest.mark.parametrize("place", [(8, 0), (0, 6), (-1, 0)])
def test_a_sparse_value_outside_of_the_weight_is_malformed(place: tuple[int, int]) -> None:
    with pytest.raises(MalformedAdapterError, match="outside"):
        build({**SPARSE, "bias_indices": torch.tensor(place)[:, None]}, 2.0)


@pytest.mark.parametrize("name", MALFORMED)
def test_tensors_of_too_few_axes_are_malformed(name: str) -> None:
    with pytest.raises(MalformedAdapterError):
        build(MALFORMED[name], 2.0)
