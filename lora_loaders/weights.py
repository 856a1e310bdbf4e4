"""The user's factors: a number, or numbers by component and by block, for every adapter of `set_adapters`."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any, TypeGuard

from .errors import AdapterStateError

UNET_PARTS = ("down", "mid", "up")
UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
_LAYER = re.compile(r"(?P<part>down|up)_blocks\.(?P<block>\d+)\.(?!\w*sampler)\w+\.(?P<layer>\d+)\.")


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
            mend="Give one number for all, or one for each adapter; one for each step is ll.PerStep([…]).",
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
        what = f"an adapter weight is a finite number, not {value}"
        raise AdapterStateError(what, mend="0 switches an adapter off.", state="Nothing was changed.")
    return float(value)


def _is_single(weight: Any) -> bool:
    return isinstance(weight, (Real, str, bytes)) or not isinstance(weight, Iterable) or _has_no_dimension(weight)


def _has_no_dimension(weight: Any) -> bool:
    """Whether this is a tensor or an array that holds a single value."""
    return getattr(weight, "ndim", None) == 0 and hasattr(weight, "item")


def _nonumber(weight: Any) -> AdapterStateError:
    shown = repr(weight) if isinstance(weight, str) else f"a {type(weight).__name__}"
    mend = "Give a number, a dictionary of numbers by component or block, or a list with one of these an adapter; "
    mend += "one for each step is ll.PerStep([…])."
    return AdapterStateError(f"an adapter weight is a number, not {shown}", mend=mend, state="Nothing was changed.")


def for_component(weight: Any, component: str, components: Collection[str]) -> Any:
    """The part of a weight that concerns one component: all of it, unless it is a dictionary by component."""
    if isinstance(weight, Mapping) and weight and set(weight) <= set(components):
        return weight.get(component)
    return weight


def nested(weight: Any, paths: Mapping[str, Sequence[str]]) -> Any:
    """A weight by blocks without a component, under the one component that has those blocks; any other as it is.

    Args:
        weight: one adapter's weight.
        paths: component -> its modules with that adapter.

    Raises:
        AdapterStateError: an unknown component beside known ones, or blocks that no component or several have.
    """
    if not isinstance(weight, Mapping) or not weight or set(weight) <= set(paths):
        return weight
    unknown = [str(key) for key in weight if key not in paths]
    if len(unknown) < len(weight):
        raise AdapterStateError(
            f"adapter_weights names {', '.join(unknown)}, which this pipeline has not",
            problems=[f"component: {component}" for component in paths],
            mend="Give weights by component, or by block of one component, and not both at one level.",
            state="Nothing was changed.",
        )
    if set(weight) <= set(UNET_PARTS):
        having = [component for component, own in paths.items() if any(path.startswith(UNET_BLOCKS) for path in own)]
    else:
        having = [c for c, own in paths.items() if all(any(is_under(path, key) for path in own) for key in unknown)]
    if len(having) == 1:
        return {having[0]: weight}
    adapted = {component: own for component, own in paths.items() if own}
    where = f"several components: {', '.join(having)}" if having else f"no adapted module of {', '.join(adapted)}"
    raise AdapterStateError(
        f"adapter_weights: {', '.join(unknown)} means {where}",
        problems=[f"for example: {component}: {own[0]}" for component, own in adapted.items()],
        mend=f'Put them under their component: {{"{next(iter(adapted), "transformer")}": {{…}}}}.',
        state="Nothing was changed.",
    )


def by_path(weight: Any, paths: Sequence[str], model_paths: Iterable[str] | None = None) -> dict[str, float]:
    """The factor of every module path.

    Args:
        weight: a number; None for 1; diffusers' UNet dictionary (`down`, `mid`, `up`, `block_0`, lists by layer); or
            path beginnings, or regular expressions for them, with a number each (the longest that fits goes first,
            what none fits keeps 1).
        paths: module paths with an adapter.
        model_paths: paths of all the model's modules, where there are more.

    Raises:
        AdapterStateError: an entry that means no module, or is no number.
    """
    if not isinstance(weight, Mapping):
        return dict.fromkeys(paths, number(weight))
    if weight and set(weight) <= set(UNET_PARTS):
        _check_unet(weight, paths, paths if model_paths is None else model_paths)
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
    if _is_list(value):
        value = value[int(parts[3]) if part != "mid" and len(value) > 1 else 0]
    return number(value)


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _check_unet(weight: Mapping[str, Any], paths: Sequence[str], model_paths: Iterable[str]) -> None:
    """Raise where an entry means no block, or says another number of values than there are layers.

    Raises:
        AdapterStateError: it does.
    """
    if not any(path.startswith(UNET_BLOCKS) for path in paths):
        raise _misplaced(f"{', '.join(weight)} are blocks of a UNet, and no such block has an adapter", paths)
    mid = weight.get("mid", 1.0)
    if isinstance(mid, Mapping):
        raise _misplaced("'mid' is one block, whose weight is a number", paths)
    if _is_list(mid):
        _check_count("mid", mid, 1)
    layers = _layers_by_block(model_paths)
    for part in ("down", "up"):
        value: Any = weight.get(part)
        present = sorted({f"block_{path.split('.')[1]}" for path in paths if path.startswith(f"{part}_blocks.")})
        unknown = [str(key) for key in value if key not in present] if isinstance(value, Mapping) else []
        if unknown:
            known = ", ".join(present)
            raise _misplaced(f"{part!r} names {', '.join(unknown)}; the adapter has {known}", paths)
        by_block: Mapping[str, Any] = value if isinstance(value, Mapping) else dict.fromkeys(present, value)
        for block, given in by_block.items():
            if _is_list(given) and len(given) != 1:
                _check_count(f"{part}.{block}", given, layers[part, block])


def _layers_by_block(model_paths: Iterable[str]) -> dict[tuple[str, str], int]:
    """("down", "block_1") -> how many layers that block has."""
    found: dict[tuple[str, str], int] = {}
    for path in model_paths:
        match = _LAYER.match(path)
        if match is not None:
            place = match["part"], f"block_{match['block']}"
            found[place] = max(found.get(place, 0), int(match["layer"]) + 1)
    return found


def _check_count(place: str, layers: Sequence[Any], count: int) -> None:
    if len(layers) != count:
        raise AdapterStateError(
            f"adapter_weights: Expected {count} scales for {place}, got {len(layers)}.",
            mend="Give one number for the whole block, or one for each of its layers.",
            state="Nothing was changed.",
        )


def _misplaced(what: str, paths: Sequence[str]) -> AdapterStateError:
    return AdapterStateError(
        f"adapter_weights: {what}",
        problems=[f"adapted, for example: {path}" for path in paths[:3]],
        mend="Name blocks of this model, or beginnings of its paths.",
        state="Nothing was changed.",
    )
