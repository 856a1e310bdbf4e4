import pytest
import torch
from delta_cases import CASES, randn

from lora_loaders.deltas import build
from lora_loaders.errors import MalformedAdapterError


def test_a_flattened_kernel_fits_every_kernel_of_that_size_and_takes_the_shape_of_the_base() -> None:
    case = CASES["loha conv"]
    delta = case.build()
    assert delta.shape == (24, 90)
    assert delta.fits((24, 10, 3, 3))
    assert delta.fits((24, 10, 9, 1))
    assert not delta.fits((24, 10, 3, 4))
    assert delta.delta_weight().shape == (24, 90)
    assert delta.delta_weight(case.base).shape == case.base.shape


def test_factors_that_do_not_multiply_are_malformed() -> None:
    slots = CASES["loha"].slots
    for slot, shape in (("hada_w1_a", (24, 3)), ("hada_w2_b", (2, 11)), ("hada_w2_a", (23, 2))):
        with pytest.raises(MalformedAdapterError, match=slot):
            build({**slots, slot: randn(*shape)}, None)


def test_one_core_without_the_other_is_malformed() -> None:
    slots = {name: tensor for name, tensor in CASES["loha tucker"].slots.items() if name != "hada_t2"}
    with pytest.raises(MalformedAdapterError, match="loha"):
        build(slots, None)


def test_factors_are_withheld_where_they_cost_more_than_the_weight() -> None:
    def of_rank(rank: int) -> object:
        shapes = {"hada_w1_a": (64, rank), "hada_w1_b": (rank, 64), "hada_w2_a": (64, rank), "hada_w2_b": (rank, 64)}
        return build({name: randn(*shape) for name, shape in shapes.items()}, None).factors()

    assert of_rank(5) is not None
    assert of_rank(6) is None


@pytest.mark.parity
@pytest.mark.parametrize("tucker", [False, True])
def test_equals_lycoris(tucker: bool) -> None:
    modules = pytest.importorskip("lycoris.modules.loha")
    base = torch.nn.Conv2d(10, 24, 3)
    theirs = modules.LohaModule("m", base, lora_dim=4, alpha=2.0, use_tucker=tucker)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        ours = build({n: t for n, t in theirs.custom_state_dict().items() if n != "alpha"}, float(theirs.alpha))
        torch.testing.assert_close(ours.delta_weight(base.weight), theirs.get_weight(base.weight.shape))


@pytest.mark.parity
@pytest.mark.parametrize("effective", [False, True])
def test_equals_peft(effective: bool) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(10, 24), torch.nn.Conv2d(10, 24, 3))
    config = peft.LoHaConfig(
        r=4, alpha=2, target_modules=["0", "1"], init_weights=False, use_effective_conv2d=effective
    )
    wrapped = peft.get_peft_model(model, config).base_model.model
    for layer in wrapped:
        names = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"]
        slots = {n: getattr(layer, n)["default"].detach() for n in names if "default" in getattr(layer, n)}
        theirs = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(build(slots, 2.0).delta_weight(layer.base_layer.weight.detach()), theirs)
