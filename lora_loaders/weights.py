"""The user's factors: a number, or numbers by component and by block, for every adapter of `set_adapters`."""

import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from .errors import AdapterStateError

UNET_PARTS = ("down", "mid", "up")


def one_each(names: Sequence[str], weights: Any) -> list[Any]:
    """One weight for each adapter; a single value holds for all, None is 1.

    Raises:
        AdapterStateError: a list of another length.
    """
    if weights is None or isinstance(weights, (Real, Mapping)):
        return [weights] * len(names)
    given = list(weights)
    if len(given) != len(names):
        raise AdapterStateError(
            f"Length of adapter names {len(names)} is not equal to the length of the weights {len(given)}",
            mend="Give one number for all, or one for each adapter.",
            state="Nothing was changed.",
        )
    return given


def for_component(weight: Any, component: str, components: Collection[str]) -> Any:
    """The part of a weight that concerns one component: all of it, unless it is a dictionary by component."""
    if isinstance(weight, Mapping) and weight and set(weight) <= set(components):
        return weight.get(component)
    return weight


def check_components(weight: Any, components: Collection[str]) -> None:
    """Raise where a dictionary by component names one that is not there, beside some that are.

    Raises:
        AdapterStateError: an unknown component.
    """
    if not isinstance(weight, Mapping):
        return
    unknown = [str(key) for key in weight if key not in components]
    if unknown and len(unknown) < len(weight):
        raise AdapterStateError(
            f"adapter_weights names {', '.join(unknown)}, which this pipeline has not",
            problems=[f"component: {component}" for component in components],
            state="Nothing was changed.",
        )


def by_path(weight: Any, paths: Sequence[str]) -> dict[str, float]:
    """The factor of every module path.

    Args:
        weight: a number; None for 1; diffusers' UNet dictionary (`down`, `mid`, `up`, `block_0`, lists by layer); or
            path beginnings, or regular expressions for them, with a number each (the longest that fits goes first,
            what none fits keeps 1).
        paths: module paths with an adapter.

    Raises:
        AdapterStateError: an entry that means no module, or is no number.
    """
    if not isinstance(weight, Mapping):
        return dict.fromkeys(paths, _number(weight))
    if set(weight) <= set(UNET_PARTS):
        _check_unet(weight, paths)
        return {path: _unet_weight(weight, path) for path in paths}
    result = dict.fromkeys(paths, 1.0)
    for key in sorted(weight, key=len):
        hits = [path for path in paths if path.startswith(f"{key}.") or re.match(rf"(?:{key})(?:\.|$)", path)]
        if not hits:
            raise AdapterStateError(
                f"adapter_weights: no adapted module is under {key!r}",
                problems=[f"for example: {path}" for path in paths[:3]],
                state="Nothing was changed.",
            )
        result |= dict.fromkeys(hits, _number(weight[key]))
    return result


def _number(weight: Any) -> float:
    if weight is None:
        return 1.0
    if isinstance(weight, Real):
        return float(weight)
    raise AdapterStateError(f"an adapter weight is a number, not {weight!r}", state="Nothing was changed.")


def _unet_weight(weight: Mapping[str, Any], path: str) -> float:
    """diffusers' grammar: `{"down": {"block_1": [0.5, 1]}}` is down_blocks.1, layers 0 and 1; absent parts are 1."""
    parts = path.split(".")
    part = parts[0].removesuffix("_blocks").removesuffix("_block")
    value = weight.get(part, 1.0)
    if isinstance(value, Mapping) and part != "mid":
        value = value.get(f"block_{parts[1]}", 1.0)
    if isinstance(value, Sequence):
        value = value[int(parts[3]) if part != "mid" else 0]
    return _number(value)


def _check_unet(weight: Mapping[str, Any], paths: Sequence[str]) -> None:
    for part in ("down", "up"):
        value = weight.get(part)
        if not isinstance(value, Mapping):
            continue
        inside = [path.split(".") for path in paths if path.startswith(f"{part}_blocks.")]
        present = {f"block_{parts[1]}" for parts in inside}
        unknown = [key for key in value if key not in present]
        if unknown:
            raise AdapterStateError(
                f"adapter_weights[{part!r}] names {', '.join(unknown)}; the adapter has {', '.join(sorted(present))}",
                state="Nothing was changed.",
            )
        for key, layers in value.items():
            count = 1 + max(int(parts[3]) for parts in inside if f"block_{parts[1]}" == key)
            if isinstance(layers, Sequence) and len(layers) < count:
                raise AdapterStateError(
                    f"Expected {count} values for {part}.{key}, got {len(layers)}.", state="Nothing was changed."
                )
