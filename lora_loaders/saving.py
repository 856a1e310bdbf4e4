"""From attached layers back to an `Adapter`, ready to be written."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .attaching import without_layers
from .deltas import Delta
from .errors import AdapterMismatchError, AdapterStateError
from .families import Family
from .fusing import fused_adapters
from .gates import changing
from .layers.layer import AdapterLayer
from .layers.parameter import ParameterLayer
from .layers.slots import refresh
from .layout import ModelLayout, adapter_layers
from .loading import CONFIGS, LOADED, adapter_names
from .peft_parameters import registered
from .tuning.config import LoraConfig

logger = logging.getLogger(__name__)


@contextmanager
def as_plain(model: nn.Module) -> Generator[None]:
    """The model without adapters and their traces for as long as the block lasts: it saves under its plain keys."""
    fused = fused_adapters(model)
    left_out = [name for name in adapter_names(model) if name not in fused]
    if left_out:
        logger.warning(
            "%s is saved without its adapters %s: save_lora_weights writes them, fuse_lora puts them into the weights",
            type(model).__name__,
            ", ".join(left_out),
        )
    traces = {key: model.__dict__.pop(key) for key in (CONFIGS, LOADED) if key in model.__dict__}
    try:
        with without_layers(model):
            yield
    finally:
        model.__dict__.update(traces)


def capture(models: Mapping[str, nn.Module], name: str | None, family: Family | None) -> Adapter:
    """The attached adapter as data, over copies of its parameters.

    Args:
        models: component -> model.
        name: which adapter; the only one if None.
        family: the models' family, whose names the adapter takes.

    Raises:
        AdapterStateError: no such adapter, or several and no name.
    """
    present = list(dict.fromkeys(n for model in models.values() for n in adapter_names(model)))
    chosen = name if name is not None else present[0] if len(present) == 1 else None
    if chosen is None or chosen not in present:
        raise AdapterStateError(
            (f"no adapter {name!r} is loaded" if name else f"{len(present) or 'no'} adapters are loaded")
            + f" in {', '.join(models)}",
            problems=[f"loaded: {other}" for other in present],
            mend="Say which with adapter_name=…." if present else "Load one first, or give <component>_lora_layers=….",
            state="Nothing was written.",
        )
    deltas: dict[str, dict[str, Delta]] = {}
    metadata: dict[str, str] = {}
    own_family = family.name if family else None
    for component, model in models.items():
        with changing([model]):
            found = {path: _held(layer, chosen) for path, layer in adapter_layers(model) if chosen in layer.templates}
            if not found:
                continue
            copied = {path: delta.map_tensors(lambda tensor: tensor.detach().clone()) for path, delta in found.items()}
        deltas[component] = {
            family.file_path(component, path) if family else path: delta for path, delta in copied.items()
        }
        config: LoraConfig = model.__dict__["peft_config"][chosen]
        metadata |= config.metadata
        own_family = own_family or config.family
    order, source = registered(deltas, ModelLayout(models)), f"the loaded adapter {chosen!r}"
    return Adapter(deltas, family=own_family, metadata=metadata, source=source, registered=order)


def _held(layer: AdapterLayer, name: str) -> Delta:
    delta = layer.delta(name)
    return replace(delta, of_parameter=True) if isinstance(layer, ParameterLayer) else delta


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's names (`to_q.lora_A.weight`), sharing memory with the live ones.

    `save_lora_weights(transformer_lora_layers=…)` takes this, and PEFT's `get_peft_model_state_dict` gives the same.

    Raises:
        AdapterStateError: no such adapter.
    """
    return {key: parameter.detach() for key, parameter in _parameters(model, adapter_name).items()}


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Copy tensors under the names of `adapter_state_dict` into a live adapter: training goes on from a checkpoint.

    It stands for PEFT's `set_peft_model_state_dict`. The parameters stay what they are, so that an optimiser which
    holds them goes on, and which of them have gradients stays as it was.

    Raises:
        AdapterStateError: no such adapter.
        AdapterMismatchError: names that are too many or missing, or another shape.
    """
    with changing([model]):
        own = _parameters(model, adapter_name)
        problems = [f"{key}: no such tensor in the adapter" for key in state_dict if key not in own]
        problems += [f"{key}: missing in the state dictionary" for key in own if key not in state_dict]
        shapes = [(key, tuple(own[key].shape), tuple(state_dict[key].shape)) for key in own if key in state_dict]
        problems += [f"{key}: shape {given}, the adapter has {shape}" for key, shape, given in shapes if given != shape]
        if problems:
            raise AdapterMismatchError(
                f"the state dictionary is not that of adapter {adapter_name!r} of {type(model).__name__}",
                problems=problems,
                mend="Make the adapter with the same configuration, and give names as adapter_state_dict has them.",
                state="The model was not changed.",
            )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state_dict[key])
        refresh(layer for _, layer in adapter_layers(model) if adapter_name in layer.templates)


def _parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters under PEFT's names."""
    layers = [(path, layer) for path, layer in adapter_layers(model) if adapter_name in layer.templates]
    if not layers:
        raise AdapterStateError(
            f"no adapter {adapter_name!r} is loaded",
            problems=[f"loaded: {other}" for other in adapter_names(model)],
            state="Nothing was changed.",
        )
    found: dict[str, nn.Parameter] = {}
    for path, layer in layers:
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            container, _, rest = name.partition(".")
            if container != "base_layer" and (rest == adapter_name or rest.startswith(f"{adapter_name}.")):
                leaf = rest.removeprefix(adapter_name)
                found[f"{path}.{container}" + ("" if container == MAGNITUDE else leaf)] = parameter
    return found


MAGNITUDE = "lora_magnitude_vector"
"""PEFT writes this one without `.weight`."""
