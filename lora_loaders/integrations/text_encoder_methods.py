"""transformers' methods for adapters, for its models that carry our layers or are given our configuration.

Every other model, and every configuration of peft's, takes transformers' own way.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lora_loaders.layout import shared_of
from lora_loaders.mixins.model import LoraModelMixin
from lora_loaders.saving import adapter_state_dict
from lora_loaders.tuning.config import LoraConfig

Method = Callable[..., Any]


def _add(original: Method) -> Method:
    def add_adapter(self: Any, adapter_config: Any, adapter_name: str | None = None) -> Any:
        if isinstance(adapter_config, LoraConfig):
            return LoraModelMixin.add_adapter(self, adapter_config, adapter_name or "default")
        return original(self, adapter_config, adapter_name)

    return add_adapter


def _load(original: Method) -> Method:
    def load_adapter(self: Any, *args: Any, **options: Any) -> Any:
        config, tensors = options.get("peft_config"), options.get("adapter_state_dict")
        if not isinstance(config, LoraConfig) or tensors is None:
            return original(self, *args, **options)
        name = options.get("adapter_name") or (args[1] if len(args) > 1 else None) or "default"
        metadata = config.to_dict()
        return LoraModelMixin.load_lora_adapter(self, tensors, prefix=None, adapter_name=name, metadata=metadata)

    return load_adapter


def _for_ours(ours: Method) -> Callable[[Method], Method]:
    def replace(original: Method) -> Method:
        def method(self: Any, *args: Any, **options: Any) -> Any:
            return (original if shared_of(self) is None else ours)(self, *args, **options)

        return method

    return replace


def _state_dict(
    self: Any, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    return adapter_state_dict(self, adapter_name or LoraModelMixin.active_adapters(self)[0])


# Name in transformers' PeftAdapterMixin -> from the original, what stands in its place.
METHODS: dict[str, Callable[[Method], Method]] = {
    "add_adapter": _add,
    "load_adapter": _load,
    "set_adapter": _for_ours(LoraModelMixin.set_adapter),
    "disable_adapters": _for_ours(LoraModelMixin.disable_adapters),
    "enable_adapters": _for_ours(LoraModelMixin.enable_adapters),
    "active_adapters": _for_ours(LoraModelMixin.active_adapters),
    "delete_adapter": _for_ours(LoraModelMixin.delete_adapters),
    "get_adapter_state_dict": _for_ours(_state_dict),
}
