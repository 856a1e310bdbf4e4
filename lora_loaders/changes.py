"""What fusing adds to base weights: products of stacked factors, made for many layers at once, or dense differences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .deltas import Delta, Factors
from .layers.banks import Bank, Likeness, columns_of
from .layers.layer import AdapterLayer

LOW_PRECISION = (torch.bfloat16, torch.float16)

Terms = Sequence[tuple[Delta, float]]
"""The deltas that are fused into one layer, each with its coefficient."""


@dataclass(frozen=True)
class Change:
    """What is added to one weight: a product of stacked factors, or a dense difference in float32."""

    down: Tensor | None = None
    up: Tensor | None = None
    dense: Tensor | None = None

    def add_to(self, weight: Tensor, sign: float, out: Tensor | None = None) -> Tensor:
        """`round(weight + sign · change)` in a new tensor or in `out`; the same inputs give the same bits."""
        out = torch.empty_like(weight) if out is None else out
        if self.dense is not None:
            return torch.add(weight, self.dense, alpha=sign, out=out)
        assert self.down is not None
        assert self.up is not None
        if weight.is_cuda and weight.dtype in LOW_PRECISION:
            # The tensor cores accumulate in float32 and round once.
            flat, target = (weight, out) if weight.ndim == 2 else (weight.flatten(1), out.flatten(1))
            factors = (self.up, self.down)
            if self.up.dtype != weight.dtype:
                factors = (self.up.to(weight.dtype), self.down.to(weight.dtype))
            if out.is_contiguous():
                torch.addmm(flat, *factors, alpha=sign, out=target)
                return out
            return out.copy_(torch.addmm(flat, *factors, alpha=sign).view(weight.shape))
        return torch.add(weight, (self.up @ self.down).view(weight.shape), alpha=sign, out=out)

    def memory(self) -> int:
        """Bytes that it takes."""
        return sum(tensor.nbytes for tensor in (self.down, self.up, self.dense) if tensor is not None)

    def apart(self) -> "Change":
        """The same in memory of its own."""
        return Change(*[None if tensor is None else tensor.clone() for tensor in (self.down, self.up, self.dense)])


@torch.no_grad()
def products(batch: Iterable[tuple[AdapterLayer, Tensor, Terms]]) -> dict[AdapterLayer, Change]:
    """The changes of those layers, given with their weights, to which every delta adds a plain product.

    The factors are copies: parameters may be trained or replaced while they are fused.
    """
    groups: dict[Likeness, list[tuple[AdapterLayer, list[tuple[Factors, float]]]]] = {}
    for layer, weight, terms in batch:
        terms = [(delta, coefficient) for delta, coefficient in terms if delta.shape is not None]
        # In the layer's shapes, since files that flatten a kernel stand beside files that do not.
        stack = [(f, c) for delta, c in terms if not delta.needs_base and (f := layer.factors(delta)) is not None]
        if stack and len(stack) == len(terms):
            like = _likeness(weight, stack)
            groups.setdefault(like, []).append((layer, stack))
    changes: dict[AdapterLayer, Change] = {}
    for like, members in groups.items():
        bank = Bank.empty(len(members), like)
        bank.write(range(len(members)), columns_of([stack for _, stack in members]), like.ranks)
        for (layer, _), (down, up) in zip(members, bank.parts(), strict=True):
            changes[layer] = Change(down=down if down.ndim == 2 else down.flatten(1), up=up)
    return changes


def _likeness(weight: Tensor, stack: Sequence[tuple[Factors, float]]) -> Likeness:
    # Factors are kept in the precision their product is computed in.
    low = weight.is_cuda and weight.dtype in LOW_PRECISION
    wide = torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32
    ranks = tuple([factors.size[0] for factors, _ in stack])
    sources = tuple([factors.down.device for factors, _ in stack])
    _, rows, columns = stack[0][0].size
    return Likeness(weight.device, weight.dtype if low else wide, sum(ranks), columns, rows, ranks, sources)


def difference(terms: Terms, weight: Tensor) -> Change | None:
    """The sum of all changes as one dense difference; None where none concerns the weight."""
    deltas = [(delta, coefficient) for delta, coefficient in terms if delta.shape is not None]
    if not deltas:
        return None
    wide = torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32
    total = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    for delta, coefficient in deltas:
        total += delta.delta_weight(weight).detach().view(weight.shape) * coefficient
    return Change(dense=total if weight.dtype == torch.float64 else total.float())
