"""The user's factors: a number, or numbers by component and by block, for every adapter of `set_adapters`."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any

from .errors import AdapterStateError

UNET_PARTS = ("down", "mid", "up")


def one_each(names: Sequence[str], weights: Any) -> list[Any]:
    """One weight for each adapter; a single value holds for all, None is 1.

    Raises:
        AdapterStateError: a list of another length.
    """
    if weights is None or isinstance(weights, Mapping) or _is_single(weights):
        return [weights] * len(names)
    given = list(weights)
    if len(given) != len(names):
        raise AdapterStateError(
            f"Length of adapter names {len(names)} is not equal to the length of the weights {len(given)}",
            mend="Give one number for all, or one for each adapter.",
            state="Nothing was changed.",
        )
    return given


def number(weight: Any) -> float:
    """A factor as a float: any finite real number, a tensor or an array with one element included; None is 1.

    Raises:
        AdapterStateError: something else.
    """
    if weight is None:
        return 1.0
    value = weight.item() if _has_no_dimension(weight) else weight
    if not isinstance(value, Real):
        raise _nonumber(weight)
    if not math.isfinite(value):
        raise AdapterStateError(f"an adapter weight is a finite number, not {value}", state="Nothing was changed.")
    return float(value)


def _is_single(weight: Any) -> bool:
    return isinstance(weight, (Real, str, bytes)) or not isinstance(weight, Iterable) or _has_no_dimension(weight)


def _has_no_dimension(weight: Any) -> bool:
    """Whether this is a tensor or an array that holds a single value."""
    return getattr(weight, "ndim", None) == 0 and hasattr(weight, "item")


def _nonumber(weight: Any) -> AdapterStateError:
    shown = repr(weight) if isinstance(weight, str) else f"a {type(weight).__name__}"
    return AdapterStateError(f"an adapter weight is a number, not {shown}", state="Nothing was changed.")


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
        return dict.fromkeys(paths, number(weight))
    if set(weight) <= set(UNET_PARTS):
        _check_unet(weight, paths)
        return {path: _unet_weight(weight, path) for path in paths}
    result = dict.fromkeys(paths, 1.0)
    for key, value in sorted(((str(key), value) for key, value in weight.items()), key=lambda item: len(item[0])):
        hits = [path for path in paths if is_under(path, key)]
        if not hits:
            raise AdapterStateError(
                f"adapter_weights: no adapted module is under {key!r}",
                problems=[f"for example: {path}" for path in paths[:3]],
                state="Nothing was changed.",
            )
        result |= dict.fromkeys(hits, number(value))
    return result


def is_under(path: str, key: str) -> bool:
    """Whether a path begins with these whole parts, or with what this regular expression means.

    Raises:
        AdapterStateError: the key is neither.
    """
    return path.startswith(f"{key}.") or _beginning(key).match(path) is not None


@cache
def _beginning(key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:{key})(?:\.|$)")
    except re.error as error:
        raise AdapterStateError(
            f"adapter_weights: {key!r} is no beginning of a path and no regular expression: {error}",
            state="Nothing was changed.",
        ) from error


def _unet_weight(weight: Mapping[str, Any], path: str) -> float:
    """diffusers' grammar: `{"down": {"block_1": [0.5, 1]}}` is down_blocks.1, layers 0 and 1; absent parts are 1."""
    parts = path.split(".")
    part = parts[0].removesuffix("_blocks").removesuffix("_block")
    value = weight.get(part, 1.0)
    if isinstance(value, Mapping) and part != "mid":
        value = value.get(f"block_{parts[1]}", 1.0)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[int(parts[3]) if part != "mid" else 0]
    return number(value)


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
            if isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers) < count:
                raise AdapterStateError(
                    f"Expected {count} values for {part}.{key}, got {len(layers)}.", state="Nothing was changed."
                )
