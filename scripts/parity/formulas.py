"""ΔW of every algebra as its closed formula, written out plainly in float64 and knowing nothing of lora_loaders.

Each takes the file's tensors of one module by suffix, the base weight and alpha, and gives ΔW in the base's shape.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Slots = dict[str, Tensor]
Formula = Callable[[Slots, Tensor, float | None], Tensor]


def scale(alpha: float | None, rank: int) -> float:
    return alpha / rank if alpha else 1.0


def pair(s: Slots) -> tuple[Tensor, Tensor]:
    """up and down; PEFT keeps those of an embedding the other way round and transposed."""
    return (s["up"], s["down"]) if "up" in s else (s["embedding_down"].t(), s["embedding_up"].t())


def low_rank(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    up, down = pair(s)
    if "mid" in s:
        return scale(alpha, len(down)) * torch.einsum("ab...,oa,bi->oi...", s["mid"], up.flatten(1), down.flatten(1))
    return scale(alpha, len(down)) * (up.flatten(1) @ down.flatten(1)).view(w.shape)


def rank_stabilised(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    return low_rank(s, w, alpha) * math.sqrt(len(pair(s)[1]))


def rank_stabilised_stacked(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    return stacked(s, w, alpha) * math.sqrt(len(s["down"]) // len(w))


def stacked(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    """A product for each expert: rows of down one expert after another, columns of up all experts in turn."""
    experts, rank = len(w), len(s["down"]) // len(w)
    products = [s["up"][:, e::experts] @ s["down"][e * rank : (e + 1) * rank] for e in range(experts)]
    return scale(alpha, rank) * torch.stack(products)


def hadamard(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    halves = []
    for n in "12":
        a, b = s[f"hada_w{n}_a"], s[f"hada_w{n}_b"]
        core = s.get(f"hada_t{n}")
        halves.append(a @ b.flatten(1) if core is None else torch.einsum("ij...,jr,ip->pr...", core, b, a).flatten(1))
    return scale(alpha, len(s["hada_w1_b"])) * (halves[0] * halves[1]).view(w.shape)


def kronecker(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    first = s["lokr_w1"] if "lokr_w1" in s else s["lokr_w1_a"] @ s["lokr_w1_b"]
    rank = None if "lokr_w1" in s else len(s["lokr_w1_b"])
    if "lokr_w2" in s:
        second = s["lokr_w2"]
    else:
        rank = len(s["lokr_w2_b"])
        a, b = s["lokr_w2_a"], s["lokr_w2_b"]
        core = s.get("lokr_t2")
        second = a @ b.flatten(1) if core is None else torch.einsum("ij...,jr,ip->pr...", core, b, a)
    second = second.reshape(second.shape[0], w.shape[1] // first.shape[1], -1)
    change = torch.stack([torch.kron(first, second[:, :, k].contiguous()) for k in range(second.shape[2])], 2)
    return (1.0 if rank is None else scale(alpha, rank)) * change.view(w.shape)


def kronecker_of_peft(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    """PEFT's product of a Conv1d's whole factors pairs the axes of w1 with the last two of w2."""
    if w.ndim != 3 or "lokr_w2" not in s:
        return kronecker(s, w, alpha)
    first = s["lokr_w1"] if "lokr_w1" in s else scale(alpha, len(s["lokr_w1_b"])) * s["lokr_w1_a"] @ s["lokr_w1_b"]
    return torch.kron(first[None], s["lokr_w2"].contiguous()).reshape(w.shape)


def decomposed(inner: Formula) -> Formula:
    def formula(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
        direction = w + inner(s, w, alpha)
        if s["magnitude"].shape[0] == 1 and s["magnitude"].ndim > 1 and w.shape[0] != 1:
            norm = direction.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (w.ndim - 2))
        else:
            norm = direction.flatten(1).norm(dim=1).view(-1, *[1] * (w.ndim - 1))
        return s["magnitude"].reshape(norm.shape) / norm * direction - w

    return formula


def cayley(q: Tensor) -> Tensor:
    identity = torch.eye(q.shape[-1], dtype=q.dtype)
    return (identity + q) @ torch.linalg.inv(identity - q)


def rotation(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    q = s["oft_blocks"] - s["oft_blocks"].mT
    q = q * min(1.0, alpha * len(w) / (float(q.norm()) + 1e-8)) if alpha else q  # LyCORIS's epsilon
    turned = torch.einsum("no,n...->o...", torch.block_diag(*cayley(q)), w)
    return s.get("rescale", torch.ones(1, dtype=w.dtype)).view(-1, *[1] * (w.ndim - 1)) * turned - w


def turned(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    """The rotation itself, as LyCORIS wrote it once."""
    return torch.einsum("no,n...->o...", torch.block_diag(*s["oft_diag"]), w) - w


def butterfly(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    q = s["oft_blocks"] - s["oft_blocks"].mT
    q = q * min(1.0, alpha * len(w) / (float(q.norm()) + 1e-8)) if alpha else q  # LyCORIS's epsilon
    turned = w.clone()
    for stage, blocks in enumerate(cayley(q)):
        stride = (blocks.shape[-1] // 2) << stage
        order = torch.arange(len(w)).view(-1, 2, stride).transpose(1, 2).flatten()
        turned[order] = torch.einsum("on,n...->o...", torch.block_diag(*blocks), turned[order])
    return s.get("rescale", torch.ones(1, dtype=w.dtype)).view(-1, *[1] * (w.ndim - 1)) * turned - w


def skew(triangles: Tensor) -> Tensor:
    size = (1 + math.isqrt(1 + 8 * triangles.shape[1])) // 2
    q = triangles.new_zeros(len(triangles), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    q[:, rows, columns] = triangles
    return q - q.mT


def input_rotation(exact: bool, eps: float | None = None) -> Formula:
    """PEFT's OFT: x is turned by R before W, R = (I − Q)(I + Q)⁻¹ or the series of its inverse to the 4th power.

    An embedding has no x: what it gives is turned.
    """

    def formula(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
        q = skew(s["oft_R"] if "oft_R" in s else s["oft_embedding_R"])
        if eps is not None:
            bound = float(eps / torch.sqrt(torch.tensor(len(q))))  # in float32, as PEFT has it
            norms = q.norm(dim=(1, 2), keepdim=True)
            q = torch.where(norms <= bound, q, q * (bound / norms))
        identity = torch.eye(q.shape[-1], dtype=q.dtype)
        turns = cayley(-q) if exact else identity + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        turns = turns.mT if "oft_embedding_R" in s else turns
        count = w[0].numel() // q.shape[-1]
        # As many blocks as a grouped convolution has inputs in all: each group of outputs meets its own share.
        shares = turns.split(count) if len(turns) > 1 else [turns.expand(count, -1, -1)]
        parts = zip(w.flatten(1).chunk(len(shares)), shares, strict=True)
        return torch.cat([rows @ torch.block_diag(*own).T for rows, own in parts]).view(w.shape) - w

    return formula


def onetrainer_rotation(scaled: bool) -> Formula:
    """The same series over Q, or Q / (2·√(b − 1)); a convolution's unfolded patches meet R, not its transpose."""

    def formula(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
        size = skew(s["oft_R"]).shape[-1]
        triangles = s["oft_R"] / (2 * math.sqrt(size - 1)) if scaled else s["oft_R"]
        # The series' transpose is that of −Q.
        return input_rotation(exact=False)({"oft_R": triangles if w.ndim == 2 else -triangles}, w, alpha)

    return formula


def input_butterfly(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    blocks = s["boft_R"]
    columns = w[0].numel()
    # As many blocks as a grouped convolution has inputs in all: each group's rows have zeros for those of the others.
    groups = blocks.shape[1] * blocks.shape[2] // columns
    turned = torch.block_diag(*w.flatten(1).chunk(groups))
    for stage in range(len(blocks)):
        size = blocks.shape[-1]
        permutation = torch.eye(turned.shape[1], dtype=w.dtype)
        if len(blocks) > 1:
            group, half = size << stage, size // 2
            order = [
                start + part * half + step
                for start in range(0, turned.shape[1], group)
                for parity in (0, 1)
                for part in range(parity, group // half, 2)
                for step in range(half)
            ]
            permutation = permutation[order]
        whole = torch.block_diag(*cayley(-(blocks[stage] - blocks[stage].mT) / 2))
        turned = turned @ (permutation @ whole @ permutation.T).T
    own = [rows[:, g * columns : (g + 1) * columns] for g, rows in enumerate(turned.chunk(groups))]
    return (s["boft_s"].view(-1, 1) * torch.cat(own)).view(w.shape) - w


def glora(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    """W a1 a2 + b1 b2; the older generation names them the other way round."""
    if s["a1"].shape[0] < s["a1"].shape[1]:
        s = {"a1": s["a2"], "a2": s["a1"], "b1": s["b2"], "b2": s["b1"]}
    mixing = s["a1"].flatten(1) @ s["a2"].flatten(1)
    if "bm" in s:
        added = torch.einsum("ab...,oa,bi->oi...", s["bm"], s["b1"].flatten(1), s["b2"].flatten(1))
    else:
        added = (s["b1"].flatten(1) @ s["b2"].flatten(1)).view(w.shape)
    return scale(alpha, len(s["a2"])) * (torch.einsum("oi...,ij->oj...", w, mixing) + added)


def ia3(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    side = 1 if bool(s["on_input"]) else 0
    return s["weight"].view(*[-1 if axis == side else 1 for axis in range(w.ndim)]) * w


def gains(on_input: bool) -> Formula:
    def formula(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
        shape: Any = [-1 if axis == (1 if on_input else 0) else 1 for axis in range(w.ndim)]
        if not on_input:
            return (s["ia3_l"].view(shape) - 1) * w
        # Each group of a convolution's outputs meets its own share of the inputs.
        shares = s["ia3_l"].flatten().split(w.shape[1])
        return torch.cat([(own.view(shape) - 1) * rows for own, rows in zip(shares, w.chunk(len(shares)), strict=True)])

    return formula


def full(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    return next(s[name] for name in ("diff", "w_norm", "diff_m") if name in s).view(w.shape)


def replaced(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    return s["set_weight"].view(w.shape) - w


def nothing(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
    return torch.zeros_like(w)


def with_remainder(inner: Formula) -> Formula:
    def formula(s: Slots, w: Tensor, alpha: float | None) -> Tensor:
        rows, columns = s["bias_indices"].long()
        remainder = torch.zeros_like(w.flatten(1))
        remainder[rows, columns] = s["bias_values"]
        return inner(s, w, alpha) + remainder.view(w.shape)

    return formula


def bias_change(s: Slots, b: Tensor, alpha: float | None) -> Tensor:
    """What is added to a bias: a difference as it is, a bias of the up factor scaled, and the share of PEFT's gains."""
    change = s.get("bias", s.get("b_norm", torch.zeros_like(b)))
    if "up_bias" in s:
        change = change + scale(alpha, len(s["down"])) * s["up_bias"]
    if "ia3_l" in s and s["ia3_l"].numel() == len(b):
        change = change + (s["ia3_l"].flatten() - 1) * b
    return change
