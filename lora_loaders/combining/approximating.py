"""One change said in another algebra, and what is lost by it: as a LoRA, as a LoKr, or in full."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_loaders.adapter import Adapter
from lora_loaders.deltas import Delta, ExpertsDelta, FullDelta, InputOftDelta, LokrDelta, LoraDelta
from lora_loaders.deltas.base import computing
from lora_loaders.errors import ConversionError

from .goals import Goal
from .provenance import with_history
from .truncating import Pair, energy_of, of_matrix, of_product, split_size

NEEDS_WEIGHTS = "Give the base model's weights: model=… (a pipeline's or model's folder, a checkpoint, or a module)."


class Fit(NamedTuple):
    """How well one module's change is said: the new rank, ‖ΔW‖, and ‖ΔW − ΔW'‖ / ‖ΔW‖ of what is stored."""

    rank: int | None
    norm: float
    error: float


class Fitted(NamedTuple):
    """A delta, and how well it says what it stands for."""

    delta: Delta
    fit: Fit


@dataclass(frozen=True, eq=False)
class Approximation:
    """An adapter that stands for others, or for a difference of weights.

    Attributes:
        adapter: ready to be written; its metadata tell of its making.
        fits: `component.path` -> how well that module's change is said.
        left_out: `component.path` -> why it is not in the adapter.
    """

    adapter: Adapter
    fits: Mapping[str, Fit]
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def error(self) -> float:
        """‖ΔW − ΔW'‖ / ‖ΔW‖ over all modules together."""
        return total_error(self.fits)


def total_error(fits: Mapping[str, Fit]) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ over all modules together."""
    norm = math.hypot(*(fit.norm for fit in fits.values()))
    return math.hypot(*(fit.norm * fit.error for fit in fits.values())) / norm if norm else 0.0


def with_record(
    adapter: Adapter, fits: Mapping[str, Fit], action: str, sources: list[str], settings: Mapping[str, Any]
) -> Adapter:
    """The adapter with metadata that tell what was done, with what, and how much was lost."""
    facts = {**settings, "modules": len(fits), "relative_error": total_error(fits)}
    worst = max(fits, key=lambda place: fits[place].error, default=None)
    if worst is not None and fits[worst].error > 0:
        facts["worst_module"] = [worst, fits[worst].error]
    return replace(adapter, metadata=with_history(adapter.metadata, action, sources, facts))


def as_lora(
    delta: Delta,
    goal: Goal,
    base_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
    base_bias: Tensor | None = None,
) -> Fitted:
    """The nearest LoRA.

    Low-rank deltas go through their factors, so that ΔW is not built. A LoRA keeps its scaling, others get one of 1; a
    change of a bias or of a norm stays what it is, and so does a LoRA that is no larger than it may be. A Tucker core
    is multiplied into `down`: few readers know one. Experts stay apart: each has the rank that serves all of them.

    Args:
        delta: any algebra.
        goal: the rank; a goal that keeps all gives the algebra's own rank.
        base_weight: needed where ΔW depends on it; it also tells the kernel that some files flatten.
        dtype: of the result; the delta's own if None.
        base_bias: needed where gains of the outputs change it.

    Raises:
        ConversionError: ΔW depends on a base weight that was not given, or has no rank and the goal names none.
    """
    shape, dtype = shape_of(delta, base_weight), dtype or _dtype_of(delta)
    if shape is None or len(shape) < 2:
        return _unchanged(delta, dtype)
    if isinstance(delta, ExpertsDelta):
        return _of_experts(delta, goal, dtype)
    goal = goal.at(shape[2:])
    product = product_of(delta)
    if isinstance(delta, LoraDelta) and product is not None and goal.takes(delta.rank):
        plain = delta if delta.mid is None else replace(delta, down=delta.factors().down, mid=None)
        return in_dtype(plain, product, dtype)
    if product is not None:
        made = lora_of(of_product(*product, goal), delta, shape, dtype, base_bias)
        return Fitted(made, fit_of_product(product, made))
    if goal.is_empty:
        raise ConversionError(f"{delta.kind} has no rank of its own", mend="Give rank=…, energy=… or error=….")
    change = delta.delta_weight(base_weight).reshape(shape)
    made = lora_of(of_matrix(change.flatten(1), goal), delta, shape, dtype, base_bias)
    return Fitted(made, fit_of(change, made))


def _of_experts(delta: ExpertsDelta, goal: Goal, dtype: torch.dtype) -> Fitted:
    """The nearest change of one rank for all experts: over all of them the goal is reached."""

    def product(of: ExpertsDelta) -> Pair:
        up = computing(of.up).view(-1, of.rank, of.experts).permute(2, 0, 1)
        return Pair(up * of.scaling, computing(of.down).view(of.experts, of.rank, -1))

    own, made = product(delta), delta
    if not goal.takes(delta.rank):
        up, down = of_product(*own, goal)
        rank, root = down.shape[1], math.sqrt(abs(delta.scaling))
        up = (up * (math.copysign(1, delta.scaling) / root)).permute(1, 2, 0).flatten(1)
        alpha = _alpha_at(delta, rank)
        made = replace(delta, up=up.contiguous(), down=(down / root).flatten(0, 1), alpha=alpha)
    made = made.map_tensors(lambda tensor: tensor.to(dtype))
    return Fitted(made, _fit(own, product(made), made.rank))


def in_dtype(delta: LoraDelta, product: Pair, dtype: torch.dtype) -> Fitted:
    """A LoRA that only its dtype may change.

    Args:
        delta: the LoRA.
        product: the change that it says.
        dtype: of the result.
    """
    made = delta.map_tensors(lambda tensor: tensor.to(dtype))
    is_same = all(tensor.dtype == dtype for tensor in delta.tensors().values())
    return Fitted(made, Fit(delta.rank, _norm(product), 0.0) if is_same else fit_of_product(product, made))


def as_full(
    delta: Delta,
    base_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
    base_bias: Tensor | None = None,
) -> Fitted:
    """The change itself, ΔW, in this dtype (the delta's own if None).

    Raises:
        ConversionError: ΔW depends on a base weight that was not given.
    """
    shape, dtype = shape_of(delta, base_weight), dtype or _dtype_of(delta)
    if shape is None or len(shape) < 2:
        return _unchanged(delta, dtype)
    change = delta.delta_weight(base_weight).reshape(shape)
    bias = delta.delta_bias(base_bias)
    bias = None if bias is None else bias.to(dtype)
    made = FullDelta(diff=change.to(dtype), bias=bias, of_parameter=delta.of_parameter)
    return Fitted(made, fit_of(change, made))


def as_lokr(delta: FullDelta, goal: Goal, factor: int = -1, dtype: torch.dtype | None = None) -> Fitted:
    """The nearest Kronecker product w1 ⊗ w2.

    Blocks of ΔW as rows make w1 ⊗ w2 the outer product of both, so the best pair is one of singular vectors (Van Loan
    and Pitsianis 1993, "Approximation with Kronecker products"). For this w1, cutting w2 by its singular values is the
    best cut, since what w1 ⊗ w2 misses is orthogonal to every w1 ⊗ x. So the squares of both losses add up, and a bound
    leaves w2 what the product has not lost already.

    Args:
        delta: the change in full.
        goal: the rank of w2; a goal that keeps all stores w2 whole.
        factor: largest size of w1; -1 for sizes next to the square root, as LyCORIS has it.
        dtype: of the result; the delta's own if None.

    Raises:
        ConversionError: the nearest product with a whole w2 already loses more than the goal allows.
    """
    shape, dtype = shape_of(delta, None), dtype or _dtype_of(delta)
    if shape is None or len(shape) < 2:
        return _unchanged(delta, dtype)
    change = delta.delta_weight()
    (p, m), (q, n) = split_size(shape[0], factor), split_size(shape[1], factor)
    blocks = change.reshape(p, m, q, -1).transpose(1, 2).reshape(p * q, -1)
    first, second = of_matrix(blocks, Goal(rank=1))
    w1, w2 = first.reshape(p, q), second.reshape(m, n, *shape[2:])
    goal = goal.at(shape[2:])
    slots = {"lokr_w1": w1, "lokr_w2": w2}
    if goal.loss is not None:
        goal = _goal_of_w2(goal, energy_of(blocks.addmm(first, second, alpha=-1)), energy_of(blocks))
    if not goal.keeps_all:
        a, b = of_matrix(w2.flatten(1), goal)
        slots = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
    if delta.bias is not None:
        slots["bias"] = delta.bias
    made = LokrDelta.from_slots({name: tensor.to(dtype).contiguous() for name, tensor in slots.items()}, None)
    made = replace(made, alpha=float(made.rank) if made.rank else None, of_parameter=delta.of_parameter)
    return Fitted(made, fit_of(change, made))


def _goal_of_w2(goal: Goal, lost: float, whole: float) -> Goal:
    rest = goal.beside(lost, whole)
    if rest is None:
        raise ConversionError(
            f"its nearest Kronecker product has a relative error of {math.sqrt(lost / whole):.3g} at any rank of w2",
            mend="Say it as a LoRA (--as lora), which reaches any bound; or give a rank alone, or another factor.",
        )
    return rest


def fit_of(change: Tensor, made: Delta) -> Fit:
    """How well a delta says a change that is there in full."""
    norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    lost = made.delta_weight().reshape(change.shape).to(change.dtype) - change
    error = float(torch.linalg.vector_norm(lost, dtype=torch.float64))
    return Fit(made.rank, norm, error / norm if norm else 0.0)


def _unchanged(delta: Delta, dtype: torch.dtype) -> Fitted:
    """A change of a bias or a norm; it has no rank to cut and counts for no error."""
    cast = delta.map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return Fitted(cast, Fit(None, 0.0, 0.0))


def shape_of(delta: Delta, base_weight: Tensor | None) -> tuple[int, ...] | None:
    """Shape of the weight, None where only the bias changes."""
    if delta.shape is None:
        return None
    if base_weight is not None:
        return tuple(base_weight.shape)
    if delta.needs_base and len(delta.shape) > 1:
        raise ConversionError(f"{delta.kind}: ΔW depends on the weight it is added to", mend=NEEDS_WEIGHTS)
    return delta.shape


def _dtype_of(delta: Delta) -> torch.dtype:
    return next((t.dtype for t in delta.tensors().values() if t.is_floating_point()), torch.float32)


def product_of(delta: Delta) -> Pair | None:
    """ΔW as up `[out, k]` and down `[k, in·kernel]`, the scaling in `up`; None where the algebra has no such form."""
    factors = None if delta.needs_base else delta.factors()
    if factors is None or factors.in_gain is not None or factors.out_gain is not None:
        return None
    return Pair(computing(factors.up).flatten(1) * factors.scaling, computing(factors.down).flatten(1))


def _norm(product: Pair) -> float:
    """‖up @ down‖, of one or more products, from the small Gram matrices, in float64: Σ (upᵀup) ∘ (down downᵀ)."""
    up, down = product.up.double(), product.down.double()
    return math.sqrt(max(0.0, float(((up.mT @ up) * (down @ down.mT)).sum())))


def fit_of_product(product: Pair, made: LoraDelta) -> Fit:
    """How well a LoRA says a change that is there as a product."""
    new = product_of(made)
    assert new is not None
    return _fit(product, new, made.rank)


def _fit(product: Pair, new: Pair, rank: int) -> Fit:
    ups, downs = (product.up.double(), -new.up.double()), (product.down.double(), new.down.double())
    norm, lost = _norm(product), _norm(Pair(torch.cat(ups, -1), torch.cat(downs, -2)))
    return Fit(rank, norm, lost / norm if norm else 0.0)


def _alpha_at(delta: LoraDelta | ExpertsDelta, rank: int) -> float | None:
    """The alpha that keeps the scaling at another rank."""
    return None if not delta.alpha else delta.scaling * (math.sqrt(rank) if delta.rslora else rank)


def lora_of(
    pair: Pair, like: Delta, shape: tuple[int, ...], dtype: torch.dtype, base_bias: Tensor | None = None
) -> LoraDelta:
    """A LoRA of these factors with the scaling, the biases and the spelling of `like`."""
    rank, kernel = pair.up.shape[1], shape[2:]
    own = like if isinstance(like, LoraDelta) else None
    scaling = own.scaling if own else 1.0
    up = pair.up * (math.copysign(1, scaling) / math.sqrt(abs(scaling)))
    down = pair.down / math.sqrt(abs(scaling))
    # A flattened kernel stays flat where no base weight tells its sizes.
    tensors: dict[str, Any] = {
        "up": up.reshape(shape[0], rank, *[1] * len(kernel)).to(dtype).contiguous(),
        "down": down.reshape(rank, *shape[1:]).to(dtype).contiguous(),
    }
    if own is not None:
        alpha = _alpha_at(own, rank)
        return replace(own.map_tensors(lambda tensor: tensor.to(dtype)), **tensors, mid=None, alpha=alpha)
    bias = like.delta_bias(base_bias)
    tensors["bias"] = None if bias is None else bias.to(dtype)
    is_embedding = like.embedding if isinstance(like, InputOftDelta) else like.is_embedding
    return LoraDelta(**tensors, alpha=float(rank), of_parameter=like.of_parameter, embedding=is_embedding)
