"""From attached layers back to an `Adapter`, ready to be written."""

from collections.abc import Mapping

from torch import nn

from .adapter import Adapter
from .deltas import Delta
from .errors import AdapterStateError
from .families import Family
from .gates import changing
from .layout import adapter_layers
from .loading import adapter_names
from .tuning.config import LoraConfig


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
            f"no adapter {name!r} is loaded" if name else f"{len(present) or 'no'} adapters are loaded",
            problems=[f"loaded: {other}" for other in present],
            mend="Say which with adapter_name=….",
            state="Nothing was written.",
        )
    deltas: dict[str, dict[str, Delta]] = {}
    metadata: dict[str, str] = {}
    own_family = family.name if family else None
    for component, model in models.items():
        with changing([model]):
            found = {path: layer.delta(chosen) for path, layer in adapter_layers(model) if chosen in layer.templates}
            if not found:
                continue
            copied = {path: delta.map_tensors(lambda tensor: tensor.detach().clone()) for path, delta in found.items()}
        deltas[component] = {
            family.file_path(component, path) if family else path: delta for path, delta in copied.items()
        }
        config: LoraConfig = model.__dict__["peft_config"][chosen]
        metadata |= config.metadata
        own_family = own_family or config.family
    return Adapter(deltas, family=own_family, metadata=metadata, source=f"the loaded adapter {chosen!r}")
