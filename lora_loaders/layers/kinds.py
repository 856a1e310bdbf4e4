"""What each kind of base layer can do with another weight: the seam between algebras and modules.

An algebra gives a weight, or two factors; a kind knows how the layer would apply them. So algebras times kinds costs
their sum, and nothing here knows an algebra.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .raw import RawParameter


class Op(Protocol):
    """The layer's map, linear in `weight`, without bias."""

    def __call__(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Output of the base layer, had it this weight and no bias."""
        ...


class LowRank(Protocol):
    """The layer's map for the weight `up @ down`, which is never built."""

    def __call__(self, base: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Output of the base layer, had it the weight `up @ down` and no bias."""
        ...


class Kronecker(Protocol):
    """The layer's map for the weight `Σ kron(firstᵢ, secondᵢ)`, which is never built."""

    def __call__(self, base: Any, x: Tensor, first: Tensor, second: Tensor, start: int) -> Tensor:
        """Output of the base layer, had it that weight from row `start` on and no bias.

        Shapes: first `[t, p, q]`, second `[t, m, n, *kernel]`.
        """
        ...


@dataclass(frozen=True)
class Kind:
    """One kind of base layer.

    Attributes:
        op: see `Op`.
        low_rank: see `LowRank`; None where a product of factors brings nothing.
        kronecker: see `Kronecker`; None where there is no such way.
        channel: dimension of inputs and outputs that runs over the weight's columns and rows; None where there is none,
            so that gains cannot be applied to activations.
    """

    name: str
    op: Op
    low_rank: LowRank | None = None
    channel: int | None = None
    kronecker: Kronecker | None = None


def _linear(base: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _linear_low_rank(base: nn.Linear, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(F.linear(x, down), up)


def _linear_kronecker(base: nn.Linear, x: Tensor, first: Tensor, second: Tensor, start: int) -> Tensor:
    # kron(w1, w2) x = w1 X w2ᵀ, with x's q·n inputs as the rows and columns of X.
    narrow = F.linear(x.to(first.dtype).unflatten(-1, (first.shape[2], -1)), second.flatten(0, 1))
    mixed = torch.einsum("tpq,...qtm->...pm", first, narrow.unflatten(-1, (len(first), -1)))
    return mixed.flatten(-2).narrow(-1, start, base.out_features)


def _conv(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    # The module's own method knows its padding modes, circular and reflect included.
    return base._conv_forward(x, weight, None)


def _conv_low_rank(base: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    # With groups every group of inputs meets the same `down`: rank channels a group, then `up` group by group.
    groups = base.groups
    narrow = base._conv_forward(x, down if groups == 1 else down.repeat(groups, *[1] * (down.ndim - 1)), None)
    pointwise = (F.conv1d, F.conv2d, F.conv3d)[down.ndim - 3]
    return pointwise(narrow, up.reshape(*up.shape[:2], *[1] * (down.ndim - 2)), groups=groups)


def _conv_kronecker(base: Any, x: Tensor, first: Tensor, second: Tensor, start: int) -> Tensor:
    # Each of the q blocks of n channels goes through w2 as an image of its own; w1 mixes the blocks.
    spatial = second.ndim - 3
    blocks = x.to(first.dtype).unflatten(-1 - spatial, (first.shape[2], -1))
    narrow = base._conv_forward(blocks.flatten(0, -2 - spatial), second.flatten(0, 1), None)
    narrow = narrow.unflatten(1, (len(first), -1)).unflatten(0, blocks.shape[: -1 - spatial])
    channel = narrow.ndim - spatial - 3
    mixed = torch.einsum("tpq,...qtms->...pms", first, narrow.flatten(channel + 3)).flatten(channel, channel + 1)
    return mixed.narrow(channel, start, base.out_channels).unflatten(-1, narrow.shape[channel + 3 :])


def _embedding(base: nn.Embedding, x: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(x, weight)


def _embedding_low_rank(base: nn.Embedding, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.embedding(x, up) @ down


def _embedding_kronecker(base: nn.Embedding, x: Tensor, first: Tensor, second: Tensor, start: int) -> Tensor:
    # Row i of kron(w1, w2) is the outer product of row i // m of w1 and row i % m of w2.
    row, unit = x + start, second.shape[1]
    return torch.einsum("t...q,t...n->...qn", first[:, row // unit], second[:, row % unit]).flatten(-2)


def _layer_norm(base: nn.LayerNorm, x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, base.normalized_shape, weight.to(x.dtype), None, base.eps)


def _group_norm(base: nn.GroupNorm, x: Tensor, weight: Tensor) -> Tensor:
    return F.group_norm(x, base.num_groups, weight.to(x.dtype), None, base.eps)


def _rms_norm(base: nn.RMSNorm, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, base.normalized_shape, weight.to(x.dtype), base.eps)


def _other_rms_norm(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    # Classes of diffusers and transformers take the mean square in float32, of float64 too.
    given = (getattr(base, name, None) for name in ("eps", "variance_epsilon"))
    epsilon = next((e for e in given if e is not None), torch.finfo(x.dtype).eps)
    root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (x * root).to(x.dtype) * weight.to(x.dtype)


def _no_forward(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    raise TypeError("a raw parameter is read by its owner and has no forward of its own")


LINEAR = Kind("linear", _linear, _linear_low_rank, channel=-1, kronecker=_linear_kronecker)
CONV = Kind("convolution", _conv, _conv_low_rank, channel=1, kronecker=_conv_kronecker)
EMBEDDING = Kind("embedding", _embedding, _embedding_low_rank, kronecker=_embedding_kronecker)
LAYER_NORM = Kind("norm", _layer_norm, channel=-1)
GROUP_NORM = Kind("norm", _group_norm, channel=1)
RMS_NORM = Kind("norm", _rms_norm, channel=-1)
OTHER_RMS_NORM = Kind("norm", _other_rms_norm, channel=-1)
PARAMETER = Kind("parameter", _no_forward)

KINDS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Kind], ...] = (
    (nn.Linear, LINEAR),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONV),
    (nn.Embedding, EMBEDDING),
    (nn.LayerNorm, LAYER_NORM),
    (nn.GroupNorm, GROUP_NORM),
    (nn.RMSNorm, RMS_NORM),
    (RawParameter, PARAMETER),
)

OTHER_RMS_NORMS = ("RMSNorm", "T5LayerNorm")
"""How the names of such classes end; T5's and UMT5's are no layer norms."""


def kind_of(base: nn.Module) -> Kind | None:
    """The kind of this base layer, or None where it can carry no adapter."""
    if getattr(base, "weight", None) is None:
        return None  # a norm may have none
    for types, kind in KINDS:
        if isinstance(base, types):
            return kind
    return OTHER_RMS_NORM if type(base).__name__.endswith(OTHER_RMS_NORMS) else None
