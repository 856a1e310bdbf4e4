import pytest
import torch
from delta_cases import CASES, join, randn

from lora_loaders.deltas import DoraDelta, LokrDelta, RowsDelta, build
from lora_loaders.errors import ConversionError, MalformedAdapterError


def test_alpha_is_ignored_where_both_factors_are_whole() -> None:
    slots = CASES["lokr whole"].slots
    torch.testing.assert_close(build(slots, 7.0).delta_weight(), build(slots, None).delta_weight())


def test_rank_comes_from_w2_before_w1() -> None:
    slots = {
        "lokr_w1_a": randn(6, 3),
        "lokr_w1_b": randn(3, 2),
        "lokr_w2_a": randn(4, 2),
        "lokr_w2_b": randn(2, 5),
    }
    delta = build(slots, 1.0)
    assert isinstance(delta, LokrDelta)
    assert delta.rank == 2
    assert delta.scaling == 0.5


def test_a_split_on_blocks_stays_lokr_and_shares_w2() -> None:
    delta = CASES["lokr"].build()
    parts = delta.split([8, 4, 12])
    assert all(isinstance(part, LokrDelta) for part in parts)
    assert all(part.tensors()["lokr_w2_a"] is delta.tensors()["lokr_w2_a"] for part in parts)
    assert [part.tensors()["lokr_w1"].shape[0] for part in parts] == [2, 1, 3]


def test_a_split_inside_blocks_copies_nothing_and_cannot_be_written() -> None:
    delta = CASES["lokr cut inside blocks"].build()
    for part in delta.split([8, 8, 8]):
        assert isinstance(part, RowsDelta)
        assert all(tensor is delta.tensors()[name] for name, tensor in part.tensors().items())
        with pytest.raises(ConversionError, match="no format can say"):
            part.slots()


def test_rows_inside_blocks_compute_only_the_blocks_they_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = CASES["lokr cut inside blocks"].build()
    computed: list[int] = []
    whole = LokrDelta.delta_weight

    def counted(self: LokrDelta, base_weight: torch.Tensor | None = None) -> torch.Tensor:
        computed.append(self.out_features)
        return whole(self, base_weight)

    monkeypatch.setattr(LokrDelta, "delta_weight", counted)
    part = delta.rows(8, 16)
    assert part.delta_weight().shape == (8, 10)
    assert computed == [12]


def test_every_possible_span_of_rows_is_exact() -> None:
    case = CASES["lokr cut inside blocks"]
    delta, whole = case.build(), case.expected()
    for start in range(25):
        for stop in range(start, 25):
            torch.testing.assert_close(delta.rows(start, stop).delta_weight(), whole[start:stop])


def test_parts_of_parts_and_swapped_parts_join_to_the_whole() -> None:
    case = CASES["lokr cut inside blocks"]
    first, last = case.build().split([9, 15])
    middle, tail = last.split([7, 8])
    joined = join([first, middle, tail])
    assert isinstance(joined, LokrDelta)
    torch.testing.assert_close(joined.delta_weight(), case.expected())
    swapped = CASES["lokr odd"].build().swap_halves()
    assert isinstance(swapped, RowsDelta)
    assert isinstance(join([swapped.map_rows(lambda tensor: tensor.roll(12))]), LokrDelta)


def test_some_of_the_parts_join_to_their_rows() -> None:
    case = CASES["lokr cut inside blocks"]
    first, middle, last = case.build().split([9, 7, 8])
    joined = join([last, first])
    torch.testing.assert_close(joined.delta_weight(), torch.cat([case.expected()[16:], case.expected()[:9]]))
    torch.testing.assert_close(join([first, middle]).delta_weight(), case.expected()[:16])


def test_rows_that_need_the_other_parts_weights_ask_for_them() -> None:
    case = CASES["oft"]
    part = RowsDelta.of(case.build(), [(0, 9)])
    with pytest.raises(ConversionError, match="other parts"):
        part.delta_weight(case.base[:9])


def test_a_selection_of_rows_inside_blocks_is_refused() -> None:
    with pytest.raises(ConversionError, match="blocks of 6"):
        CASES["lokr cut inside blocks"].build().map_rows(lambda tensor: tensor[:8])


def test_dora_over_a_cut_lokr_is_the_cut_of_the_dora() -> None:
    case = CASES["lokr cut inside blocks"]
    delta = case.build(magnitude=randn(24, 1).abs())
    part = delta.rows(8, 16)
    assert isinstance(part, DoraDelta)
    assert isinstance(part.inner, RowsDelta)
    torch.testing.assert_close(part.delta_weight(case.base[8:16]), delta.delta_weight(case.base)[8:16])


def test_factors_are_kept_small_by_an_identity_on_the_whole_side() -> None:
    delta = build({"lokr_w1": randn(4, 4), "lokr_w2_a": randn(64, 2), "lokr_w2_b": randn(2, 64)}, None)
    factors = delta.factors()
    assert factors is not None
    assert factors.down.shape == (8, 256)


def test_factors_that_do_not_multiply_are_malformed() -> None:
    with pytest.raises(MalformedAdapterError, match="do not multiply"):
        build({"lokr_w1": randn(4, 2), "lokr_w2_a": randn(6, 2), "lokr_w2_b": randn(3, 5)}, None)


def test_half_a_pair_is_malformed() -> None:
    with pytest.raises(MalformedAdapterError, match="lokr"):
        build({"lokr_w1": randn(4, 2), "lokr_w2_a": randn(6, 2)}, None)


SETTINGS = [
    {"factor": 4},
    {"factor": 4, "full_matrix": True},
    {"factor": 4, "decompose_both": True, "lora_dim": 1},
    {"factor": -1},
    {"factor": 4, "use_tucker": True},
    {"factor": 2, "unbalanced_factorization": True},
]


@pytest.mark.parity
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_equals_lycoris(settings: dict[str, int], kind: str) -> None:
    modules = pytest.importorskip("lycoris.modules.lokr")
    base = torch.nn.Linear(32, 48) if kind == "linear" else torch.nn.Conv2d(32, 48, 3)
    theirs = modules.LokrModule("m", base, **{"lora_dim": 2, "alpha": 1.0, **settings})
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        ours = build({n: t for n, t in theirs.custom_state_dict().items() if n != "alpha"}, float(theirs.alpha))
        weight = theirs.get_weight(base.weight.shape)
        torch.testing.assert_close(ours.delta_weight(base.weight), weight)
        parts = ours.split([16, 20, 12])
        cut = [part.delta_weight(rows) for part, rows in zip(parts, base.weight.split([16, 20, 12]), strict=True)]
        torch.testing.assert_close(torch.cat(cut), weight)


@pytest.mark.parity
@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_equals_peft(effective: bool, both: bool) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Conv2d(32, 48, 3))
    config = peft.LoKrConfig(
        r=2,
        alpha=1,
        target_modules=["0", "1"],
        init_weights=False,
        use_effective_conv2d=effective,
        decompose_both=both,
        decompose_factor=4,
    )
    wrapped = peft.get_peft_model(model, config).base_model.model
    names = ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"]
    for layer in wrapped:
        slots = {n: getattr(layer, n)["default"].detach() for n in names if "default" in getattr(layer, n)}
        theirs = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(build(slots, 1.0).delta_weight(layer.base_layer.weight.detach()), theirs)
