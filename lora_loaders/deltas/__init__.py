"""Algebras: what is the change of one weight? One file an algebra; `ALGEBRAS` says which slots announce it."""

from collections.abc import Mapping

from torch import Tensor

from lora_loaders.errors import MalformedAdapterError

from .base import Delta as Delta
from .base import Factors as Factors
from .base import Kron as Kron
from .boft import InputBoftDelta as InputBoftDelta
from .dora import DoraDelta as DoraDelta
from .experts import ExpertsDelta as ExpertsDelta
from .full import FullDelta as FullDelta
from .full import SetDelta as SetDelta
from .glora import GloraDelta as GloraDelta
from .ia3 import GainDelta as GainDelta
from .ia3 import Ia3Delta as Ia3Delta
from .loha import LohaDelta as LohaDelta
from .lokr import LokrDelta as LokrDelta
from .lora import LoraDelta as LoraDelta
from .oft import InputOftDelta as InputOftDelta
from .oft import OftDelta as OftDelta
from .rows import RowsDelta as RowsDelta
from .rows import parts_of as parts_of
from .sparse import SparseDelta as SparseDelta

# Needed slots -> algebra. The first line whose slots are all there is taken; every slot it may use stands beside it.
ALGEBRAS: tuple[tuple[frozenset[str], frozenset[str], type[Delta]], ...] = (
    (frozenset({"down", "up"}), frozenset({"mid", "up_bias", "bias"}), LoraDelta),
    (frozenset({"embedding_down", "embedding_up"}), frozenset({"bias"}), LoraDelta),
    (
        frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
        frozenset({"bias"}),
        LohaDelta,
    ),
    (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}), frozenset({"bias"}), LohaDelta),
    (frozenset({"lokr_w1", "lokr_w2"}), frozenset({"bias"}), LokrDelta),
    (frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}), frozenset({"lokr_t2", "bias"}), LokrDelta),
    (frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}), frozenset({"bias"}), LokrDelta),
    (frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}), frozenset({"lokr_t2", "bias"}), LokrDelta),
    (frozenset({"oft_blocks"}), frozenset({"rescale", "bias"}), OftDelta),
    (frozenset({"oft_diag"}), frozenset({"rescale", "bias"}), OftDelta),
    (frozenset({"oft_R"}), frozenset({"scaled_oft", "bias"}), InputOftDelta),
    (frozenset({"oft_embedding_R"}), frozenset({"bias"}), InputOftDelta),
    (frozenset({"boft_R", "boft_s"}), frozenset({"bias"}), InputBoftDelta),
    (frozenset({"ia3_l"}), frozenset({"bias"}), GainDelta),
    (frozenset({"a1", "a2", "b1", "b2"}), frozenset({"bm", "bias"}), GloraDelta),
    (frozenset({"weight", "on_input"}), frozenset({"bias"}), Ia3Delta),
    (frozenset({"set_weight"}), frozenset({"bias"}), SetDelta),
    (frozenset({"diff"}), frozenset({"bias"}), FullDelta),
    (frozenset({"diff_m"}), frozenset(), FullDelta),
    (frozenset({"w_norm"}), frozenset({"b_norm"}), FullDelta),
    (frozenset({"b_norm"}), frozenset(), FullDelta),
    (frozenset({"bias"}), frozenset(), FullDelta),
)
MATRICES = frozenset(
    name
    for needed, optional, algebra in ALGEBRAS
    for name in needed | optional - {"bias", "up_bias"}
    if algebra in (LoraDelta, LohaDelta, LokrDelta, GloraDelta)
)
"""Slots that hold factors and cores, with rows and columns at least."""
SPARSE = frozenset({"bias_indices", "bias_values", "bias_size"})
BESIDE = SPARSE | {"magnitude", "reshape_weight"}
"""Slots that go with any algebra: a sparse remainder, DoRA's norms, the shape to pad the weight to (ComfyUI)."""


def build(slots: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """Build the delta that these tensors say.

    Raises:
        MalformedAdapterError: half a pair, slots that do not belong together, or shapes that do not multiply.
    """
    plain = {name: tensor for name, tensor in slots.items() if name not in BESIDE}
    if slots and not plain:
        raise MalformedAdapterError(f"{', '.join(sorted(slots))} beside no change of a weight")
    delta = _build_plain(plain, alpha)
    if "reshape_weight" in slots:
        _check_reshape(delta, slots["reshape_weight"])
    if SPARSE & slots.keys():
        delta = SparseDelta.wrap(delta, slots)
    if "magnitude" not in slots:
        return delta
    if len(delta.shape or ()) < 2:
        raise MalformedAdapterError(f"a magnitude beside no change of rows and columns: {', '.join(sorted(plain))}")
    magnitude = slots["magnitude"]
    if delta.is_embedding:
        magnitude = magnitude.reshape(1, -1)  # PEFT sees an embedding's weight transposed: one of each feature
    return DoraDelta(inner=delta, magnitude=magnitude)


def _check_reshape(delta: Delta, shape: Tensor) -> None:
    """The padded shape is that of ΔW, so it needs no keeping."""
    if shape.ndim != 1 or (not shape.is_meta and not delta.fits(shape.tolist())):
        said = shape.tolist() if shape.ndim else "one number"
        raise MalformedAdapterError(f"reshape_weight says {said}, the delta is for {list(delta.shape or ())}")


def _build_plain(slots: Mapping[str, Tensor], alpha: float | None) -> Delta:
    given = frozenset(slots)
    flat = [f"{name} {list(slots[name].shape)}" for name in sorted(given & MATRICES) if slots[name].ndim < 2]
    if flat:
        raise MalformedAdapterError(f"factors have rows and columns: {', '.join(flat)}")
    for needed, optional, algebra in ALGEBRAS:
        if needed <= given <= needed | optional:
            return algebra.from_slots(slots, alpha)
    nearest = max(ALGEBRAS, key=lambda line: len(line[0] & given))
    if nearest[0] & given:
        missing, foreign = nearest[0] - given, given - nearest[0] - nearest[1]
        detail = [f"{', '.join(sorted(missing))} missing"] if missing else []
        detail += [f"{', '.join(sorted(foreign))} does not belong to it"] if foreign else []
        raise MalformedAdapterError(f"{nearest[2].kind}: {'; '.join(detail)} (found {', '.join(sorted(given))})")
    raise MalformedAdapterError(f"no algebra is made of {', '.join(sorted(slots)) or 'alpha alone'}")
