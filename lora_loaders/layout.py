"""A live model seen as names: where a module stands, how large it is, and which layers carry adapters."""

import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from torch import nn

from .families.rules import NUMBER, flatten
from .layers.base_weight import logical_shape
from .layers.kinds import kind_of
from .layers.layer import AdapterLayer
from .layers.parameter import ParameterLayer
from .layers.raw import raw_parameter
from .layers.shared import Shared
from .layers.walks import walk

CONFIGS = "peft_config"
"""Attribute of a model by which diffusers, transformers and PEFT know its adapters."""
LOADED = "_hf_peft_config_loaded"
"""Attribute by which diffusers and transformers know that it has any."""


class ModelLayout:
    """Names and sizes of a pipeline's live components, for the names layer; see `conversion.Layout`.

    Args:
        components: component name -> model.
        optional_prefixes: component -> leading path parts that some versions of its class lack.
    """

    def __init__(
        self, components: Mapping[str, nn.Module], optional_prefixes: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        self.components = components
        self._prefixes = optional_prefixes or {}
        self._flat: dict[str, dict[str, str]] = {}

    def module(self, component: str, path: str) -> tuple[str, nn.Module] | None:
        """The live module at a path and its true path; optional prefixes may be missing, containers mean their `.0`."""
        model = self.components.get(component)
        if model is None:
            return None
        for candidate in self._spellings(component, path):
            module = submodule_at(model, candidate)
            if module is None:
                parameter = parameter_at(model, candidate)
                if parameter is not None:
                    return candidate, parameter
                continue
            if isinstance(module, AdapterLayer) or kind_of(module) is not None or not len(list(module.children())):
                return candidate, module
            first = submodule_at(module, "0")
            if isinstance(first, AdapterLayer) or (first is not None and kind_of(first) is not None):
                return f"{candidate}.0", first
        return None

    def _spellings(self, component: str, path: str) -> Iterator[str]:
        spellings = {path: None}
        for prefix in self._prefixes.get(component, ()):
            spellings |= {p.replace(prefix, "", 1) if prefix in p else prefix + p: None for p in list(spellings)}
        yield from spellings

    def rows(self, component: str, path: str) -> int | None:
        """Output rows of the module at this path."""
        found = self.module(component, path)
        base = found and base_of(found[1])
        return logical_shape(base)[0] if base is not None and getattr(base, "weight", None) is not None else None

    def blocks(self, component: str, path: str) -> int | None:
        """Length of the module list that the path's first number indexes."""
        model = self.components.get(component)
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        blocks = None if model is None or at is None else submodule_at(model, ".".join(parts[:at]))
        return len(blocks) if isinstance(blocks, nn.ModuleList) else None

    def parameters(self, component: str, path: str) -> list[str]:
        """Names of a module's own parameters, as they were registered."""
        model = self.components.get(self.denoiser() or "" if component in ("", "denoiser") else component)
        module = None if model is None else submodule_at(model, path)
        return [] if module is None else [name for name, _ in base_of(module).named_parameters(recurse=False)]

    def denoiser(self) -> str | None:
        """The component that names without one are for: the first."""
        return next(iter(self.components), None)

    def find(self, component: str, name: str) -> str | None:
        """The path of the module that a name, dotted or flattened, means."""
        model = self.components.get(component)
        if model is None:
            return None
        if component not in self._flat:
            self._flat[component] = {flatten(path): path for path in adaptable_paths(model)}
        flat = flatten(name)
        return self._flat[component].get(flat, self._flat[component].get(f"{flat}_0"))

    def nearest(self, component: str, path: str) -> str | None:
        """The most similar path that exists, for messages."""
        model = self.components.get(component)
        if model is None:
            return None
        patterns: dict[str, list[str]] = {}
        for name in adaptable_paths(model):
            patterns.setdefault(NUMBER.sub("#", name), []).append(name)
        # A model has thousands of paths and some dozens of patterns; similarity is slow to compute.
        close = get_close_matches(NUMBER.sub("#", path), patterns, n=1, cutoff=0.7)
        numbers = [int(number) for number in NUMBER.findall(path)]

        def distance(name: str) -> int:
            own = (int(number) for number in NUMBER.findall(name))
            return sum(abs(one - other) for one, other in zip(own, numbers, strict=False))

        return min(patterns[close[0]], key=distance) if close else None


def submodule_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or None where there is none."""
    module: nn.Module | None = model
    for part in path.split("."):
        # Past attribute access, which costs as much as the rest of planning; it is asked where this finds nothing.
        child: object = None if module is None else children(module).get(part)
        if child is None:
            child = getattr(module, part, None)
        module = child if isinstance(child, nn.Module) else None
    return module


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds what stands at a path, and its name there."""
    parent_path, _, name = path.rpartition(".")
    parent = submodule_at(model, parent_path) if parent_path else model
    assert parent is not None
    return unwrapped(parent), name


def unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper of `torch.compile` runs; any other module itself."""
    own = children(module).get("_orig_mod")
    return module if own is None else own


@walk
def every_module(model: nn.Module, *, adapters: bool = True) -> list[nn.Module]:
    """`modules()` at a tenth of its cost: each switch asks them all; one that stands in two places comes twice.

    Args:
        model: the model.
        adapters: whether the modules that hold adapters' parameters are wanted, several for each adapter of a layer.
    """
    found: list[nn.Module] = []
    level = [model]
    while level:
        found += level
        bases: list[nn.Module] = []
        if not adapters:
            layers = [module for module in level if isinstance(module, AdapterLayer)]
            # Past attribute access, which falls through to the base layer's; a raw parameter's layer has none there.
            bases = [children(layer).get("base_layer") or layer.base_layer for layer in layers]
            level = [module for module in level if not isinstance(module, AdapterLayer)] if layers else level
        level = [child for module in level for child in children(module).values() if child is not None] + bases
    return found


def children(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """A module's children by name; `named_children` takes ten times as long."""
    return module._modules  # pyright: ignore[reportPrivateUsage]


def parameter_at(model: nn.Module, path: str) -> nn.Module | None:
    """The raw parameter at a path, as a layer or as the adapter layer beside it; None where there is none."""
    owner_path, _, name = path.rpartition(".")
    owner = submodule_at(model, owner_path) if owner_path else model
    if owner is None or kind_of(base_of(owner)) is not None:
        return None
    return vars(owner)["_modules"].get(name) or raw_parameter(owner, name)


def adaptable_paths(model: nn.Module) -> Iterator[str]:
    """Paths of everything that can carry adapters: modules of a known kind, and the raw parameters of others."""
    for path, module in (("", model), *named_bases(model)):
        if kind_of(module) is not None:
            yield path
        else:
            yield from (f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False))


def base_of(module: nn.Module) -> nn.Module:
    """The base layer of an adapter layer, or the module itself."""
    return module.base_layer if isinstance(module, AdapterLayer) else module


@walk
def adapter_layers(model: nn.Module) -> list[tuple[str, AdapterLayer]]:
    """Every adapter layer of a model with its path."""
    found: list[tuple[str, AdapterLayer]] = []
    _gather(model, "", found)
    return found


def _gather(module: nn.Module, prefix: str, found: list[tuple[str, AdapterLayer]], limit: float = math.inf) -> None:
    # Not as a generator: through its levels each layer would be handed up one by one.
    for name, child in module._modules.items():  # pyright: ignore[reportPrivateUsage]
        if isinstance(child, AdapterLayer):
            found.append((prefix + name, child))
        elif child is not None and child._modules:  # pyright: ignore[reportPrivateUsage]
            # What `torch.compile` wraps has the path of its wrapper.
            _gather(child, prefix if name == "_orig_mod" else f"{prefix}{name}.", found, limit)
        if len(found) >= limit:
            return


def named_bases(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` as if no adapter were there."""
    for name, child in model.named_children():
        if isinstance(child, ParameterLayer):
            continue
        base = unwrapped(base_of(child))
        yield prefix + name, base
        yield from named_bases(base, f"{prefix}{name}.")


def shared_of(model: nn.Module) -> Shared | None:
    """The common state of a model's adapter layers, None if it has none."""
    first: list[tuple[str, AdapterLayer]] = []
    _gather(model, "", first, limit=1)
    return first[0][1].shared if first else None


def is_foreign(model: nn.Module) -> bool:
    """Whether peft has put layers of its own into a model."""
    if shared_of(model) is not None:
        return False
    # When its last adapter is deleted, peft leaves its wrappers, no table and a flag.
    left = LOADED in vars(model) and any(type(module).__module__.startswith("peft.") for module in model.modules())
    return CONFIGS in vars(model) or left
