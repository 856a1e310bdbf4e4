"""The rows of the parity table: kinds of layers, and algebras as peers are told to make them, with their formulas."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from formulas import (
    Formula,
    butterfly,
    cayley,
    decomposed,
    full,
    gains,
    glora,
    hadamard,
    ia3,
    input_butterfly,
    input_rotation,
    kronecker,
    low_rank,
    nothing,
    onetrainer_rotation,
    rank_stabilised,
    rank_stabilised_stacked,
    replaced,
    rotation,
    stacked,
    turned,
    with_remainder,
)
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

IN, OUT = 16, 32
NORMS = ("norm", "norm without bias")


class Table(nn.Module):
    """A module that reads a parameter of its own, with rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2) * (1 + self.modulation)


class Experts(nn.Module):
    """A module with the weights of three experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Parameter(torch.randn(3, OUT, IN))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...eo", x, self.projections)


@dataclass(frozen=True)
class Layer:
    """A kind of layer, the shape of its inputs, and which of its parameters is changed."""

    kind: str
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    parameter: str = "weight"


def conv(**options: Any) -> Layer:
    return Layer("conv", lambda: nn.Conv2d(IN, OUT, 3, **{"padding": 1, **options}), (2, IN, 6, 6))


LAYERS: Mapping[str, Layer] = {
    "Linear": Layer("linear", lambda: nn.Linear(IN, OUT), (2, 3, IN)),
    "Linear, narrower": Layer("narrow", lambda: nn.Linear(IN - 4, OUT), (2, 3, IN)),
    "Embedding": Layer("embedding", lambda: nn.Embedding(OUT, IN), (2, 5)),
    "Conv1d": Layer("conv", lambda: nn.Conv1d(IN, OUT, 3, padding=1), (2, IN, 6)),
    "Conv2d": conv(),
    "Conv2d stride 2": conv(stride=2),
    "Conv2d dilation 2": conv(dilation=2, padding=2),
    "Conv2d groups 2": conv(groups=2),
    "Conv2d circular": conv(padding_mode="circular"),
    "Conv2d reflect": conv(padding_mode="reflect"),
    "Conv3d": Layer("conv", lambda: nn.Conv3d(IN, OUT, (1, 3, 3), padding=(0, 1, 1)), (2, IN, 2, 4, 4)),
    "LayerNorm": Layer("norm", lambda: nn.LayerNorm(IN), (2, 3, IN)),
    "GroupNorm": Layer("norm", lambda: nn.GroupNorm(4, IN), (2, IN, 6, 6)),
    "RMSNorm": Layer("norm without bias", lambda: nn.RMSNorm(IN), (2, 3, IN)),
    "RMSNorm of diffusers": Layer("norm", lambda: RMSNorm(IN, 1e-6), (2, 3, IN)),
    "T5LayerNorm": Layer("norm without bias", lambda: T5LayerNorm(IN), (2, 3, IN)),
    "raw parameter": Layer("parameter", Table, (2, 3, IN), "modulation"),
    "raw parameter of experts": Layer("experts", Experts, (2, 3, IN), "projections"),
}
STAND_INS: Mapping[int, Callable[[], nn.Module]] = {2: lambda: nn.Linear(IN, OUT, bias=False), 4: LAYERS["Conv2d"].make}
"""Axes of a weight -> the layer whose files fit the layers of that many axes that a peer does not know."""


Shapes = Mapping[str, Any]
"""Suffix -> the shape of a tensor of random numbers, or the tensor itself."""


@dataclass(frozen=True)
class Algebra:
    """One row: how a peer is told to make it, and its formula.

    `lycoris` and `peft` are the arguments of their trainers, or the reason why there is none; `by_hand` gives the
    tensors of a file for such a weight, where no trainer writes one for some layer, and `config` the configuration
    beside it if it is one of PEFT's. `on` are the kinds of layers that it can change: the weight of a norm is a
    vector, which has no factors to multiply, no rows to turn and no columns.
    """

    name: str
    formula: Formula
    lycoris: Mapping[str, Any] | str = "LyCORIS has none"
    peft: tuple[str, Mapping[str, Any]] | str = "PEFT has none"
    on: tuple[str, ...] = ("linear", "embedding", "conv")
    by_hand: Callable[[Tensor], Shapes] | str = "a trainer writes it"
    config: Mapping[str, Any] | None = None


def factors(w: Tensor) -> Shapes:
    ones = [1] * (w.ndim - 2)
    alpha = {".alpha": torch.tensor(2.0)}
    return {".lora_down.weight": (4, *w.shape[1:]), ".lora_up.weight": (len(w), 4, *ones), **alpha}


def remainder(w: Tensor) -> Shapes:
    places, size = torch.tensor([[0, 7, 31], [9, 0, 3]]), torch.tensor([len(w), w[0].numel()])
    return {**factors(w), ".bias_indices": places, ".bias_values": (3,), ".bias_size": size}


def padded(w: Tensor) -> Shapes:
    return {**factors(w.new_empty(OUT, IN)), ".reshape_weight": torch.tensor([OUT, IN])}


def old_glora(w: Tensor) -> Shapes:
    shapes = {"a1": (4, IN), "a2": (IN, 4), "b1": (4, IN), "b2": (OUT, 4)}
    return {f".{name}.weight": shape for name, shape in shapes.items()} | {".alpha": torch.tensor(2.0)}


def old_conv_glora(w: Tensor) -> Shapes:
    new = conv_glora(w)
    names = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    return {f".{old}.weight": new[f".{name}.weight"] for old, name in names.items()}


def rotations(w: Tensor) -> Shapes:
    skew = torch.randn(OUT // 4, 4, 4, dtype=torch.float64)
    return {".oft_diag": cayley(skew - skew.mT)}


def tucker(w: Tensor) -> Shapes:
    ones = [1] * (w.ndim - 2)
    up, down = (len(w), 4, *ones), (4, w.shape[1], *ones)
    return {".lora_up.weight": up, ".lora_mid.weight": (4, 4, *w.shape[2:]), ".lora_down.weight": down}


def loha(w: Tensor) -> Shapes:
    return {f".hada_w{n}_{side}": (len(w), 4) if side == "a" else (4, w[0].numel()) for n in "12" for side in "ab"}


def whole_lokr(w: Tensor) -> Shapes:
    return {".lokr_w1": (4, 4), ".lokr_w2": (len(w) // 4, w.shape[1] // 4, *w.shape[2:])}


def peft_factors(w: Tensor) -> Shapes:
    return {".lora_A.weight": (4, *w.shape[1:]), ".lora_B.weight": (len(w), 4, *[1] * (w.ndim - 2))}


def peft_factors_with_bias(w: Tensor) -> Shapes:
    return {**peft_factors(w), ".lora_B.bias": (len(w),)}


def around_one(shape: Sequence[int]) -> Tensor:
    """Factors of a weight: near zero, what is left of it has lost digits."""
    return 1 + 0.3 * torch.randn(tuple(shape), dtype=torch.float64)


def peft_triangles(w: Tensor) -> Shapes:
    return {".oft_R.weight": (w[0].numel() // 4, 6)}


def peft_butterfly(w: Tensor) -> Shapes:
    return {".boft_R": (1, w[0].numel() // 4, 4, 4), ".boft_s": around_one((len(w), 1) if w.ndim == 2 else (1, len(w)))}


def peft_gains(axis: int) -> Callable[[Tensor], Shapes]:
    def shapes(w: Tensor) -> Shapes:
        gains = [w.shape[axis] if place == (axis if w.ndim == 2 else 1) else 1 for place in range(w.ndim)]
        return {".ia3_l": around_one(gains)}

    return shapes


def input_triangles(w: Tensor) -> Shapes:
    return {".oft_R": (w[0].numel() // 4, 6)}


def bounded_rotations(w: Tensor) -> Shapes:
    return {".oft_blocks": (len(w) // 4, 4, 4), ".rescale": (len(w), 1), ".alpha": torch.tensor(0.01)}


def scaled_triangles(w: Tensor) -> Shapes:
    return {**input_triangles(w), ".oft_R.scaled_oft": torch.tensor(True)}


def conv_glora(w: Tensor) -> Shapes:
    ones = [1] * (w.ndim - 2)
    pairs = {"a1": (w.shape[1], 4), "a2": (4, w.shape[1]), "b1": (len(w), 4), "b2": (4, w.shape[1])}
    kernels = {"b2": w.shape[2:]}
    return {f".{name}.weight": (*shape, *kernels.get(name, ones)) for name, shape in pairs.items()}


def tucker_glora(w: Tensor) -> Shapes:
    ones = [1] * (w.ndim - 2)
    return {**conv_glora(w), ".b2.weight": (4, w.shape[1], *ones), ".bm.weight": (4, 4, *w.shape[2:])}


def under_dora(inner: Callable[[Tensor], Shapes]) -> Callable[[Tensor], Shapes]:
    return lambda w: {**inner(w), ".dora_scale": (len(w), *[1] * (w.ndim - 1))}


NO_PEFT_GLORA = "PEFT's GLoRA is another algebra (no a, b pairs)"
NO_PEFT_TUCKER = "PEFT has no Tucker core for it"
NO_DORA, NO_PEFT_DORA = "LyCORIS's DoRA wraps LoRA, LoHa and LoKr only", "PEFT's DoRA wraps LoRA only"
EXTRACTED = "an extraction writes it; no module of LyCORIS reads it"
MODULES, LORA_ALONE = "LyCORIS wraps modules, no parameters", "PEFT's `target_parameters` are for LoRA alone"
RS_LORA = {"r": 4, "lora_alpha": 2, "use_rslora": True}
Peft = tuple[str, Mapping[str, Any]] | str
OF_PARAMETERS: tuple[tuple[str, Formula, Callable[[Tensor], Shapes] | str, Peft], ...] = (
    ("LoRA", low_rank, factors, ("LoraConfig", {"r": 4, "lora_alpha": 2})),
    ("rsLoRA", rank_stabilised, "PEFT writes it", ("LoraConfig", RS_LORA)),
    ("LoHa", hadamard, loha, LORA_ALONE),
    ("LoKr, both whole", kronecker, whole_lokr, LORA_ALONE),
    ("DoRA per output", decomposed(low_rank), under_dora(factors), ("LoraConfig", {"r": 4, "use_dora": True})),
    ("OFT", rotation, lambda w: {".oft_blocks": (len(w) // 4, 4, 4)}, LORA_ALONE),
    ("OFT, constraint, rescale", rotation, bounded_rotations, LORA_ALONE),
    ("BOFT", butterfly, lambda w: {".oft_blocks": (2, len(w) // 4, 4, 4)}, LORA_ALONE),
    ("OFT, oft_diag", turned, rotations, LORA_ALONE),
    ("OFT of inputs, OneTrainer", onetrainer_rotation(scaled=False), input_triangles, LORA_ALONE),
    ("OFT of inputs, scaled_oft", onetrainer_rotation(scaled=True), scaled_triangles, LORA_ALONE),
    ("GLoRA", glora, conv_glora, LORA_ALONE),
    ("GLoRA, older names", glora, old_glora, LORA_ALONE),
    ("IA3", ia3, lambda w: {".weight": (len(w),), ".on_input": torch.tensor(0)}, LORA_ALONE),
    ("LoRA, sparse remainder", with_remainder(low_rank), remainder, LORA_ALONE),
)
OF_EXPERTS: tuple[tuple[str, Formula, Peft], ...] = (
    ("LoRA", stacked, ("LoraConfig", {"r": 4, "lora_alpha": 2})),
    ("rsLoRA", rank_stabilised_stacked, ("LoraConfig", RS_LORA)),
)
ALGEBRAS: tuple[Algebra, ...] = (
    Algebra("LoRA", low_rank, {"algo": "lora"}, ("LoraConfig", {"r": 4, "lora_alpha": 2})),
    Algebra("LoCon, Tucker", low_rank, {"algo": "lora", "use_tucker": True}, NO_PEFT_TUCKER, on=("conv",)),
    Algebra("rsLoRA", rank_stabilised, "LyCORIS folds it into alpha: the row LoRA", (
        "LoraConfig", {"r": 4, "lora_alpha": 2, "use_rslora": True}), by_hand=peft_factors,
            config={"peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_rslora": True}),
    Algebra("LoRA with bias", low_rank, "LyCORIS has none", (
        "LoraConfig", {"r": 4, "lora_alpha": 2, "lora_bias": True}), by_hand=peft_factors_with_bias,
            config={"peft_type": "LORA", "r": 4, "lora_alpha": 2, "lora_bias": True}),
    Algebra("DoRA per output", decomposed(low_rank), {"algo": "lora", "dora_wd": True}, (
        "LoraConfig", {"r": 4, "lora_alpha": 2, "use_dora": True})),
    Algebra("DoRA per input", decomposed(low_rank), {"algo": "lora", "dora_wd": True, "wd_on_output": False},
            "PEFT's magnitudes are per output"),
    Algebra("LoHa", hadamard, {"algo": "loha"}, ("LoHaConfig", {"r": 4, "alpha": 2})),
    Algebra("LoHa, Tucker", hadamard, {"algo": "loha", "use_tucker": True}, (
        "LoHaConfig", {"r": 4, "alpha": 2, "use_effective_conv2d": True}), on=("conv",)),
    Algebra("DoRA over LoHa", decomposed(hadamard), {"algo": "loha", "dora_wd": True}, NO_PEFT_DORA),
    Algebra("LoKr", kronecker, {"algo": "lokr", "factor": 4, "linear_dim": 1, "linear_alpha": 0.5}, (
        "LoKrConfig", {"r": 1, "alpha": 0.5, "decompose_factor": 4})),
    Algebra("LoKr, both factored", kronecker,
            {"algo": "lokr", "factor": 4, "linear_dim": 1, "linear_alpha": 0.5, "decompose_both": True}, (
        "LoKrConfig", {"r": 1, "alpha": 0.5, "decompose_factor": 4, "decompose_both": True})),
    Algebra("LoKr, both whole", kronecker, {"algo": "lokr", "factor": 4, "full_matrix": True}, (
        "LoKrConfig", {"r": 8, "alpha": 8, "decompose_factor": 4})),
    Algebra("LoKr, Tucker", kronecker,
            {"algo": "lokr", "factor": 4, "linear_dim": 1, "linear_alpha": 0.5, "use_tucker": True}, (
        "LoKrConfig", {"r": 1, "alpha": 0.5, "decompose_factor": 4, "use_effective_conv2d": True}), on=("conv",)),
    Algebra("DoRA over LoKr", decomposed(kronecker), {"algo": "lokr", "factor": 4, "dora_wd": True},
            NO_PEFT_DORA),
    Algebra("OFT", rotation, {"algo": "diag-oft"}, "PEFT turns inputs: the next rows"),
    Algebra("OFT, constraint, rescale", rotation, {"algo": "diag-oft", "constraint": 1e-3, "rescaled": True},
            "PEFT turns inputs: the next rows"),
    Algebra("BOFT", butterfly, {"algo": "boft", "rescaled": True}, "PEFT turns inputs: the next rows"),
    Algebra("OFT of inputs", input_rotation(exact=False), "LyCORIS turns outputs: the rows above", (
        "OFTConfig", {"r": 0, "oft_block_size": 4}), by_hand=peft_triangles, config={"peft_type": "OFT"}),
    Algebra("OFT of inputs, exact", input_rotation(exact=True), "LyCORIS turns outputs: the rows above", (
        "OFTConfig", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}), by_hand=peft_triangles,
            config={"peft_type": "OFT", "use_cayley_neumann": False}),
    Algebra("OFT of inputs, shared", input_rotation(exact=False), "LyCORIS turns outputs: the rows above", (
        "OFTConfig", {"r": 0, "oft_block_size": 4, "block_share": True}),
            by_hand=lambda w: {".oft_R.weight": (1, 6)}, config={"peft_type": "OFT", "block_share": True}),
    Algebra("OFT of inputs, constraint", input_rotation(exact=False, eps=1e-2), "LyCORIS turns outputs: the rows above",
            ("OFTConfig", {"r": 0, "oft_block_size": 4, "coft": True, "eps": 1e-2}), by_hand=peft_triangles,
            config={"peft_type": "OFT", "coft": True, "eps": 1e-2}),
    Algebra("BOFT of inputs", input_butterfly, "LyCORIS turns outputs: the rows above", (
        "BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 1}), by_hand=peft_butterfly,
            config={"peft_type": "BOFT"}),
    Algebra("BOFT of inputs, two factors", input_butterfly, "LyCORIS turns outputs: the rows above", (
        "BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}), on=("linear",)),
    Algebra("OFT of inputs, OneTrainer", onetrainer_rotation(scaled=False), "LyCORIS turns outputs: the rows above",
            "PEFT turns a convolution's patches the other way: the rows above", ("linear", "conv"), input_triangles),
    Algebra("OFT of inputs, scaled_oft", onetrainer_rotation(scaled=True), "LyCORIS turns outputs: the rows above",
            "OneTrainer alone divides so", ("linear", "conv"), scaled_triangles),
    Algebra("OFT, oft_diag", turned, "LyCORIS has it no more", "PEFT turns inputs: the rows above", by_hand=rotations),
    Algebra("GLoRA", glora, {"algo": "glora"}, NO_PEFT_GLORA, ("linear", "embedding")),
    Algebra("GLoRA", glora, {"algo": "glora"}, NO_PEFT_GLORA, ("conv",), conv_glora),
    Algebra("GLoRA, Tucker", glora, {"algo": "glora", "use_tucker": True}, NO_PEFT_GLORA, ("conv",), tucker_glora),
    Algebra("GLoRA, older names", glora, "LyCORIS has it no more", on=("linear", "embedding"), by_hand=old_glora),
    Algebra("GLoRA, older names", glora, "LyCORIS has it no more", on=("conv",), by_hand=old_conv_glora),
    Algebra("IA3", ia3, {"algo": "ia3"}, "PEFT's gains take the bias along: the next rows"),
    Algebra("IA3 of outputs with bias", gains(on_input=False), "LyCORIS leaves the bias: the row above", (
        "IA3Config", {"feedforward_modules": []}), by_hand=peft_gains(0),
            config={"peft_type": "IA3", "feedforward_modules": []}),
    Algebra("IA3 of inputs", gains(on_input=True), "LyCORIS adds to 1 what PEFT multiplies: the row above", (
        "IA3Config", {"feedforward_modules": ["it"]}), by_hand=peft_gains(1),
            config={"peft_type": "IA3", "feedforward_modules": ["it"]}),
    Algebra("full difference", full, {"algo": "full"}, "PEFT has none (`modules_to_save` replaces modules)",
            ("linear", "embedding", "conv", *NORMS, "parameter", "experts"), lambda w: {".diff": w.shape}),
    Algebra("norm difference", full, {"algo": "lora", "train_norm": True}, on=NORMS,
            by_hand=lambda w: {".w_norm": w.shape}),
    Algebra("difference of a modulation", full, on=("parameter",), by_hand=lambda w: {".diff_m": w.shape}),
    Algebra("difference of a bias", nothing, "LyCORIS writes it beside a full difference: the row above",
            on=("linear", "embedding", "conv", *NORMS, "parameter"), by_hand=lambda w: {".diff_b": w.shape[:1]}),
    Algebra("difference of a norm's bias", nothing, "LyCORIS writes it beside that of the weight: the rows above",
            on=NORMS, by_hand=lambda w: {".b_norm": w.shape}),
    Algebra("replaced weight", replaced, on=("linear", "embedding", "conv", *NORMS, "parameter", "experts"),
            by_hand=lambda w: {".set_weight": w.shape}),
    Algebra("LoRA, sparse remainder", with_remainder(low_rank), EXTRACTED, by_hand=remainder),
    Algebra("LoRA, reshape_weight", low_rank, "ComfyUI writes it", on=("narrow",), by_hand=padded),
    Algebra("DoRA, reshape_weight", decomposed(low_rank), "ComfyUI writes it", on=("narrow",),
            by_hand=under_dora(padded)),
    Algebra("DoRA over OFT", decomposed(turned), NO_DORA, NO_PEFT_DORA, by_hand=under_dora(rotations)),
    Algebra("DoRA over BOFT", decomposed(butterfly), NO_DORA, NO_PEFT_DORA,
            by_hand=under_dora(lambda w: {".oft_blocks": (2, OUT // 4, 4, 4)})),
    Algebra("DoRA over OFT of inputs", decomposed(input_rotation(exact=False)), NO_DORA, NO_PEFT_DORA,
            ("linear", "embedding"), under_dora(input_triangles)),
    Algebra("DoRA over OFT of inputs, OneTrainer", decomposed(onetrainer_rotation(scaled=False)), NO_DORA,
            NO_PEFT_DORA, ("conv",), under_dora(input_triangles)),
    Algebra("DoRA over GLoRA", decomposed(glora), NO_DORA, NO_PEFT_DORA, ("linear", "embedding"),
            under_dora(old_glora)),
    Algebra("DoRA over GLoRA", decomposed(glora), NO_DORA, NO_PEFT_DORA, ("conv",), under_dora(conv_glora)),
    Algebra("DoRA over LoCon, Tucker", decomposed(low_rank), "LyCORIS has DoRA of it without a core only", NO_PEFT_DORA,
            ("conv",), under_dora(tucker)),
    Algebra("DoRA over IA3", decomposed(ia3), NO_DORA, NO_PEFT_DORA,
            by_hand=under_dora(lambda w: {".weight": (OUT,), ".on_input": torch.tensor(0)})),
    Algebra("DoRA over a full difference", decomposed(full), NO_DORA, NO_PEFT_DORA,
            by_hand=under_dora(lambda w: {".diff": w.shape})),
    Algebra("DoRA over a sparse remainder", decomposed(with_remainder(low_rank)), NO_DORA, NO_PEFT_DORA,
            by_hand=under_dora(remainder)),
    *(Algebra(name, formula, MODULES, peft, ("parameter",), make) for name, formula, make, peft in OF_PARAMETERS),
    *(Algebra(name, formula, MODULES, peft, ("experts",)) for name, formula, peft in OF_EXPERTS),
)  # fmt: skip
