"""PEFT's LoRA of raw parameters: keys name the module, and `target_parameters` in the configuration the parameter."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from .adapter import Adapter
from .deltas import Delta
from .errors import UNTOUCHED, ConversionError
from .formats import RawModule, read_modules
from .formats.grammar import split_prefix

# PEFT wraps the module once for each of its parameters, so that the one registered last is outermost.
KEY = re.compile(r"(?P<path>.+?)(?P<levels>(?:\.base_layer)*)(?P<rest>\.lora_[AB]\..+)$")


class Owners(Protocol):
    """What a live model tells of the modules that own parameters."""

    def parameters(self, component: str, path: str) -> Sequence[str]:
        """Names of a module's own parameters, as they were registered."""
        ...


def is_target(path: str, names: Iterable[str]) -> bool:
    """PEFT's rule: the whole path, or the end of it."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def read_with_parameters(
    keys: Sequence[str], configs: Mapping[str, Mapping[str, Any]], owners: Owners | None
) -> tuple[list[RawModule], dict[str, str], str]:
    """As `formats.read_modules`, with parameters as if they were modules: `it.table`, where the keys say `it`.

    Raises:
        ConversionError: several parameters of one module, of which only the model knows the order.
    """
    if not any(config.get("target_parameters") for config in configs.values()):
        return read_modules(keys)
    written = {spelled_as_module(key, configs, owners): key for key in keys}
    modules, left, spelling = read_modules(list(written))
    for module in modules:
        module.keys = {slot: written[key] for slot, key in module.keys.items()}
        module.repeated = {slot: written[key] for slot, key in module.repeated.items()}
    return modules, {written[key]: reason for key, reason in left.items()}, spelling


def spelled_as_module(key: str, configs: Mapping[str, Mapping[str, Any]], owners: Owners | None) -> str:
    """`it.table.lora_A.weight` for the key `it.lora_A.weight` of a parameter; other keys as they are."""
    match = KEY.match(key)
    if match is None:
        return key
    _, component, path = split_prefix(match["path"].replace(".base_layer", ""))
    # A file of one model names no component; its header does.
    alone = next(iter(configs.values())) if len(configs) == 1 and not component else {}
    config = configs.get(key.partition(".")[0], configs.get("", alone))
    targets = [target.rpartition(".") for target in config.get("target_parameters") or ()]
    names = list(dict.fromkeys(name for owner, _, name in targets if not owner or is_target(path, [owner])))
    if not names or _is_module(path, config.get("target_modules") or ()):
        return key
    if len(names) > 1 and owners is None:
        raise ConversionError(
            f"{path}: which of the parameters {', '.join(names)} is meant stands in no key, only in the model's order",
            mend="Load the file onto the model.",
            state=UNTOUCHED,
        )
    if len(names) > 1 and owners is not None:
        names = [name for name in owners.parameters(component, path) if name in names]
    level = match["levels"].count(".")
    return f"{match['path']}.{names[-1 - level]}{match['rest']}" if level < len(names) else key


def registered(deltas: Mapping[str, Mapping[str, Delta]], owners: Owners) -> dict[str, tuple[str, ...]]:
    """`component.path` of every module whose parameters are changed -> its parameters, as the model registered them."""
    places = [(c, path.rpartition(".")[0]) for c, own in deltas.items() for path, d in own.items() if d.of_parameter]
    return {f"{c}.{owner}": tuple(owners.parameters(c, owner)) for c, owner in dict.fromkeys(places)}


def parameters_of(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """Path of every raw parameter that is changed -> all of its owner's, in the model's order; none if not known."""
    places = [(c, path, path.rpartition(".")[0]) for c, path, delta in adapter.modules() if delta.of_parameter]
    return {path: adapter.registered.get(f"{component}.{owner}", ()) for component, path, owner in places}


def wrapped(path: str, parameters: Mapping[str, Sequence[str]]) -> str:
    """The path under which PEFT keeps the factors of a module or parameter, where it has wrapped owners of parameters.

    Args:
        path: of the module or parameter.
        parameters: see `parameters_of`.

    Raises:
        ConversionError: PEFT does not reach this parameter, or tells it from another by a model's order not known here.
    """
    changed: dict[str, list[str]] = {}
    for parameter in parameters:
        owner, _, name = parameter.rpartition(".")
        changed.setdefault(owner, []).append(name)
    own, _, name = path.rpartition(".") if path in parameters else (path, "", "")
    if not own:
        raise ConversionError("PEFT reaches no parameter of the model itself, only those of its modules")
    parts = own.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    outer = next((owner for owner in above if owner in changed), None)
    if path in parameters and outer is not None:
        raise ConversionError(f"PEFT reaches no parameter of {own}: it is inside {outer}, whose own are changed too")
    later: Sequence[str] = ()
    if path in parameters and len(changed[own]) > 1:
        order = parameters[path]
        if not set(changed[own]) <= set(order):
            raise ConversionError(
                f"PEFT tells the parameters of {own} from one another by the model's order alone, not known here",
                mend='Load the adapter onto the model, and save it from there with format="peft".',
            )
        later = [other for other in order[order.index(name) + 1 :] if other in changed[own]]
    levels = [*(len(changed.get(owner, ())) for owner in above), len(later)]
    return ".".join(part + ".base_layer" * level for part, level in zip(parts, levels, strict=True))


def _is_module(path: str, modules: str | Sequence[str]) -> bool:
    """Whether the module itself is adapted."""
    return re.fullmatch(modules, path) is not None if isinstance(modules, str) else is_target(path, modules)
