"""Algebras: what is the change of one weight? One file an algebra; `ALGEBRAS` says which slots announce it."""

from collections.abc import Mapping

from torch import Tensor

from ..errors import MalformedAdapterError
from .base import Delta as Delta
from .base import Factors as Factors
from .dora import DoraDelta as DoraDelta
from .full import FullDelta as FullDelta
from .full import SetDelta as SetDelta
from .lora import LoraDelta as LoraDelta

# Needed slots -> algebra. The first line whose slots are all there is taken; every slot it may use stands beside it.
ALGEBRAS: tuple[tuple[frozenset[str], frozenset[str], type[Delta]], ...] = (
    (frozenset({"down", "up"}), frozenset({"mid", "up_bias", "bias"}), LoraDelta),
    (frozenset({"set_weight"}), frozenset({"bias"}), SetDelta),
    (frozenset({"diff"}), frozenset({"bias"}), FullDelta),
    (frozenset({"w_norm"}), frozenset({"b_norm"}), FullDelta),
    (frozenset({"b_norm"}), frozenset(), FullDelta),
    (frozenset({"bias"}), frozenset(), FullDelta),
)
WRAPPERS = frozenset({"magnitude"})


def build(slots: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """Build the delta that these tensors say.

    Raises:
        MalformedAdapterError: half a pair, slots that do not belong together, or shapes that do not multiply.
    """
    given = frozenset(slots) - WRAPPERS
    for needed, optional, algebra in ALGEBRAS:
        if needed <= given <= needed | optional:
            delta = algebra.from_slots(slots, alpha)
            return DoraDelta(inner=delta, magnitude=slots["magnitude"]) if "magnitude" in slots else delta
    nearest = max(ALGEBRAS, key=lambda line: len(line[0] & given))
    if nearest[0] & given:
        missing, foreign = nearest[0] - given, given - nearest[0] - nearest[1]
        detail = [f"{', '.join(sorted(missing))} missing"] if missing else []
        detail += [f"{', '.join(sorted(foreign))} does not belong to it"] if foreign else []
        raise MalformedAdapterError(f"{nearest[2].kind}: {'; '.join(detail)} (found {', '.join(sorted(given))})")
    raise MalformedAdapterError(f"no algebra is made of {', '.join(sorted(slots)) or 'alpha alone'}")
