"""One small example of every algebra beside its closed formula, written out independently in float64."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_loaders.deltas import Delta, build

torch.set_num_threads(1)

Slots = dict[str, Tensor]
ROWS, COLUMNS = 24, 10


@dataclass(frozen=True)
class Case:
    """Slots, the base weight they go with, and ΔW as a formula of both.

    `closed` says whether `join(split(x))` is x again, slot for slot.
    """

    slots: Slots
    formula: Callable[[Slots, Tensor], Tensor]
    alpha: float | None = None
    kernel: tuple[int, ...] = ()
    sizes: tuple[int, ...] = (8, 8, 8)
    closed: bool = True
    base: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", randn(ROWS, COLUMNS, *self.kernel))

    def build(self, **extra: Tensor) -> Delta:
        return build({**self.slots, **extra}, self.alpha)

    def expected(self) -> Tensor:
        return self.formula(self.slots, self.base)


def join(parts: list[Delta]) -> Delta:
    return type(parts[0]).join(parts)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def slots(**shapes: tuple[int, ...]) -> Slots:
    return {name: randn(*shape) for name, shape in shapes.items()}


def lora(s: Slots, base: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("or,ri...->oi...", s["up"].flatten(1), s["down"])


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Left `[rank, out]`, right `[rank, in]`: sum over both ranks of core[i, j] · left[i, out] · right[j, in]."""
    return torch.einsum("ij...,io,jn->on...", core, left, right)


def loha(s: Slots, base: Tensor, scale: float) -> Tensor:
    if "hada_t1" in s:
        first = torch.einsum("ijkl,jr,ip->prkl", s["hada_t1"], s["hada_w1_b"], s["hada_w1_a"])
        second = torch.einsum("ijkl,jr,ip->prkl", s["hada_t2"], s["hada_w2_b"], s["hada_w2_a"])
    else:
        first, second = s["hada_w1_a"] @ s["hada_w1_b"], s["hada_w2_a"] @ s["hada_w2_b"]
    return scale * (first * second).reshape(base.shape)


def lokr(s: Slots, base: Tensor, scale: float) -> Tensor:
    first = s["lokr_w1"] if "lokr_w1" in s else s["lokr_w1_a"] @ s["lokr_w1_b"]
    if "lokr_w2" in s:
        second = s["lokr_w2"]
    elif "lokr_t2" in s:
        second = tucker(s["lokr_t2"], s["lokr_w2_a"], s["lokr_w2_b"])
    else:
        second = s["lokr_w2_a"] @ s["lokr_w2_b"].flatten(1)
        second = second.view(second.shape[0], COLUMNS // first.shape[1], *base.shape[2:])
    change = torch.empty_like(base)
    for row in range(base.shape[0]):
        for column in range(base.shape[1]):
            m, n = second.shape[:2]
            change[row, column] = first[row // m, column // n] * second[row % m, column % n]
    return scale * change


def cayley(q: Tensor) -> Tensor:
    identity = torch.eye(q.shape[-1], dtype=q.dtype)
    return (identity + q) @ (identity - q).inverse()


def oft(s: Slots, base: Tensor, limit: float | None = None) -> Tensor:
    q = s["oft_blocks"] - s["oft_blocks"].transpose(-1, -2)
    if limit is not None:
        q = q * min(1.0, limit / (float(q.norm()) + 1e-8))  # LyCORIS's epsilon
    rotation = torch.block_diag(*cayley(q))
    turned = torch.einsum("no,n...->o...", rotation, base)
    return s.get("rescale", torch.ones(1, dtype=base.dtype)) * turned - base


def boft(s: Slots, base: Tensor) -> Tensor:
    """Row by row: stage i gathers b rows that lie in steps of 2ⁱ·b/2 pairs, turns them and puts them back."""
    q = s["oft_blocks"] - s["oft_blocks"].transpose(-1, -2)
    weight = base.clone()
    for stage, rotations in enumerate(cayley(q)):
        size = rotations.shape[-1]
        stride = 2**stage * size // 2
        order = [
            group * 2 * stride + half * stride + step
            for group in range(ROWS // (2 * stride))
            for step in range(stride)
            for half in range(2)
        ]
        gathered = torch.block_diag(*rotations) @ weight[order]
        weight[order] = gathered.clone()
    return s["rescale"] * weight - base


def input_oft(s: Slots, base: Tensor, factor: float = 1.0) -> Tensor:
    triangles = s["oft_R"] / factor
    size = 5
    rotations = []
    for triangle in triangles.expand(base[0].numel() // size, -1):
        q = torch.zeros(size, size, dtype=base.dtype)
        values = iter(triangle)
        for row in range(size):
            for column in range(row + 1, size):
                q[row, column] = next(values)
        q = q - q.T
        rotations.append(torch.eye(size, dtype=base.dtype) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    rotation = torch.block_diag(*rotations)
    flat = base.flatten(1)
    return (flat @ (rotation.T if base.ndim == 2 else rotation)).view(base.shape) - base


def input_boft(s: Slots, base: Tensor) -> Tensor:
    q = (s["boft_R"][0] - s["boft_R"][0].mT) / 2
    return (s["boft_s"].view(-1, 1) * (base.flatten(1) @ torch.block_diag(*cayley(-q)).T)).view(base.shape) - base


def glora(s: Slots, base: Tensor, scale: float) -> Tensor:
    a1, a2, b1, b2 = (s[name] for name in ("a1", "a2", "b1", "b2"))
    change = b1.flatten(1) @ b2.flatten(1)
    if "bm" in s:
        change = tucker(s["bm"], b1.flatten(1).T, b2.flatten(1))
    mixing = a1.flatten(1) @ a2.flatten(1)
    return scale * (change.reshape(base.shape) + torch.einsum("oi...,ij->oj...", base, mixing))


def old_glora(s: Slots, base: Tensor, scale: float) -> Tensor:
    return scale * (s["b2"] @ s["b1"] + base @ s["a2"] @ s["a1"])


def sparse(s: Slots, base: Tensor) -> Tensor:
    change = lora(s, base, 0.5).flatten(1)
    for row, column, value in zip(*s["bias_indices"].tolist(), s["bias_values"], strict=True):
        change[row, column] += value
    return change.view(base.shape)


def make_cases() -> dict[str, Case]:
    torch.manual_seed(20)
    loha_slots = {"hada_w1_a": (24, 2), "hada_w1_b": (2, 10), "hada_w2_a": (24, 2), "hada_w2_b": (2, 10)}
    flat = {**loha_slots, "hada_w1_b": (2, 90), "hada_w2_b": (2, 90)}
    core = {"hada_w1_a": (2, 24), "hada_w2_a": (2, 24), "hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)}
    half = 0.5  # alpha 1 over rank 2, throughout
    remainder = {
        "bias_indices": torch.tensor([[0, 7, 8, 23], [9, 0, 3, 9]], dtype=torch.int16),
        "bias_values": randn(4),
        "bias_size": torch.tensor([24, 10], dtype=torch.int16),
    }
    return {
        "lora": Case(slots(down=(2, 10), up=(24, 2)), lambda s, w: lora(s, w, half), 1.0),
        "lora conv": Case(slots(down=(2, 10, 3, 3), up=(24, 2, 1, 1)), lambda s, w: lora(s, w, half), 1.0, (3, 3)),
        "lora tucker": Case(
            slots(down=(2, 10, 1, 1), mid=(2, 2, 3, 3), up=(24, 2, 1, 1)),
            lambda s, w: half * tucker(s["mid"], s["up"].flatten(1).T, s["down"].flatten(1)),
            1.0,
            (3, 3),
        ),
        "full": Case(slots(diff=(24, 10)), lambda s, w: s["diff"]),
        "modulation": Case(slots(diff_m=(24, 10)), lambda s, w: s["diff_m"]),
        "set": Case(slots(set_weight=(24, 10)), lambda s, w: s["set_weight"] - w),
        "loha": Case(slots(**loha_slots), lambda s, w: loha(s, w, half), 1.0),
        "loha conv": Case(slots(**flat), lambda s, w: loha(s, w, half), 1.0, (3, 3)),
        "loha tucker": Case(slots(**{**loha_slots, **core}), lambda s, w: loha(s, w, half), 1.0, (3, 3)),
        "lokr whole": Case(slots(lokr_w1=(6, 2), lokr_w2=(4, 5)), lambda s, w: lokr(s, w, 1.0), 7.0),
        "lokr": Case(slots(lokr_w1=(6, 2), lokr_w2_a=(4, 2), lokr_w2_b=(2, 5)), lambda s, w: lokr(s, w, half), 1.0),
        "lokr both": Case(
            slots(lokr_w1_a=(12, 2), lokr_w1_b=(2, 5), lokr_w2_a=(2, 2), lokr_w2_b=(2, 2)),
            lambda s, w: lokr(s, w, half),
            1.0,
        ),
        "lokr w1 factored": Case(
            slots(lokr_w1_a=(6, 2), lokr_w1_b=(2, 5), lokr_w2=(4, 2)), lambda s, w: lokr(s, w, half), 1.0
        ),
        "lokr cut inside blocks": Case(
            slots(lokr_w1=(4, 2), lokr_w2_a=(6, 2), lokr_w2_b=(2, 5)), lambda s, w: lokr(s, w, half), 1.0
        ),
        "lokr odd": Case(slots(lokr_w1=(3, 2), lokr_w2_a=(8, 2), lokr_w2_b=(2, 5)), lambda s, w: lokr(s, w, half), 1.0),
        "lokr conv": Case(slots(lokr_w1=(6, 2), lokr_w2=(4, 5, 3, 3)), lambda s, w: lokr(s, w, 1.0), None, (3, 3)),
        "lokr conv flat": Case(
            slots(lokr_w1=(4, 2), lokr_w2_a=(6, 2), lokr_w2_b=(2, 45)), lambda s, w: lokr(s, w, half), 1.0, (3, 3)
        ),
        "lokr tucker": Case(
            slots(lokr_w1=(6, 2), lokr_w2_a=(2, 4), lokr_w2_b=(2, 5), lokr_t2=(2, 2, 3, 3)),
            lambda s, w: lokr(s, w, half),
            1.0,
            (3, 3),
        ),
        "oft": Case(slots(oft_blocks=(6, 4, 4)), oft),
        "oft conv": Case(slots(oft_blocks=(6, 4, 4), rescale=(24, 1, 1, 1)), oft, 0.0, (3, 3)),
        "oft constrained": Case(
            slots(oft_blocks=(6, 4, 4), rescale=(24, 1)), lambda s, w: oft(s, w, 0.05 * 24), 0.05, closed=False
        ),
        "oft diag": Case(
            {"oft_diag": cayley(torch.stack([q - q.T for q in randn(6, 4, 4)]))},
            lambda s, w: torch.block_diag(*s["oft_diag"]).T @ w - w,
        ),
        "boft": Case(slots(oft_blocks=(2, 6, 4, 4), rescale=(24, 1)), boft),
        "input oft": Case(slots(oft_R=(2, 10)), input_oft),
        "input oft shared": Case(slots(oft_R=(1, 10)), input_oft),
        "input oft scaled": Case(
            {**slots(oft_R=(2, 10)), "scaled_oft": torch.tensor(True)}, lambda s, w: input_oft(s, w, 4.0)
        ),
        "input oft conv": Case(slots(oft_R=(18, 10)), input_oft, None, (3, 3)),
        "input boft": Case(slots(boft_R=(1, 2, 5, 5), boft_s=(24, 1)), input_boft),
        "input boft conv": Case(slots(boft_R=(1, 18, 5, 5), boft_s=(1, 24)), input_boft, None, (3, 3)),
        "gain of inputs": Case(slots(ia3_l=(1, 10)), lambda s, w: (s["ia3_l"] - 1) * w),
        "gain of outputs": Case(slots(ia3_l=(24, 1)), lambda s, w: (s["ia3_l"] - 1) * w),
        "glora": Case(slots(a1=(10, 2), a2=(2, 10), b1=(24, 2), b2=(2, 10)), lambda s, w: glora(s, w, half), 1.0),
        "glora old": Case(
            slots(a1=(2, 10), a2=(10, 2), b1=(2, 10), b2=(24, 2)), lambda s, w: old_glora(s, w, half), 1.0
        ),
        "glora conv": Case(
            slots(a1=(10, 2, 1, 1), a2=(2, 10, 1, 1), b1=(24, 2, 1, 1), b2=(2, 10, 3, 3)),
            lambda s, w: glora(s, w, half),
            1.0,
            (3, 3),
        ),
        "glora tucker": Case(
            slots(a1=(10, 2, 1, 1), a2=(2, 10, 1, 1), b1=(24, 2, 1, 1), b2=(2, 10, 1, 1), bm=(2, 2, 3, 3)),
            lambda s, w: glora(s, w, half),
            1.0,
            (3, 3),
        ),
        "ia3 input": Case({**slots(weight=(10,)), "on_input": torch.tensor(1)}, lambda s, w: s["weight"] * w),
        "ia3 output": Case({**slots(weight=(24,)), "on_input": torch.tensor(0)}, lambda s, w: s["weight"][:, None] * w),
        "ia3 conv": Case(
            {**slots(weight=(1, 24, 1, 1)), "on_input": torch.tensor(0)},
            lambda s, w: s["weight"].transpose(0, 1) * w,
            None,
            (3, 3),
        ),
        "sparse": Case({**slots(down=(2, 10), up=(24, 2)), **remainder}, sparse, 1.0),
    }


CASES = make_cases()
