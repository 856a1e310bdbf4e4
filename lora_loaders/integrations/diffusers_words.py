"""What diffusers says where this package would raise or say it in other words, on diffusers' own loggers.

Code that was written for diffusers goes on after a warning; its tests and its users' filters know loggers and texts.
"""

import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_loaders.activity import names_of
from lora_loaders.errors import NothingFitsError, UnknownFormatError
from lora_loaders.formats import NO_SUFFIX
from lora_loaders.fusing import fused_adapters
from lora_loaders.layout import adapter_layers
from lora_loaders.loading import LoadReport
from lora_loaders.mixins.class_or_instance import class_or_instance
from lora_loaders.mixins.component_loading import ComponentLoadingMixin
from lora_loaders.mixins.model import LoraModelMixin
from lora_loaders.mixins.pipeline import LoraPipelineMixin
from lora_loaders.mixins.pipeline_saving import ACCEPTED, HUB_OPTIONS
from lora_loaders.weights import is_under

OF_MODELS = logging.getLogger("diffusers.loaders.peft")
OF_PIPELINES = logging.getLogger("diffusers.loaders.lora_pipeline")
OF_BASE = logging.getLogger("diffusers.loaders.lora_base")
OF_KEYS = logging.getLogger("diffusers.utils.peft_utils")
KNOWN = (*HUB_OPTIONS, *ACCEPTED, "strict", "weight_name", "use_safetensors")
UNSUPPORTED = "Unsupported keys found in state dict when trying to load normalization layers: %s"
ROUTES = ("load_into_transformer_2",)


def _goes_on(error: NothingFitsError | UnknownFormatError) -> bool:
    """Whether diffusers would go on: it asks of every key that it contains `lora`, or Flux's norms."""
    keys = [problem.split(":")[0] for problem in error.problems]
    return isinstance(error, NothingFitsError) or all("lora" in key or ".norm" in key for key in keys)


def _nothing(owner: str, error: NothingFitsError | UnknownFormatError, logger: logging.Logger) -> LoadReport:
    norms = [problem for problem in error.problems if ".norm" in problem]
    if norms:
        OF_PIPELINES.info(UNSUPPORTED, "; ".join(norms))
    logger.warning("No LoRA keys associated to %s found: nothing was loaded. %s", owner, error)
    return LoadReport("", None, None, {}, ignored=dict.fromkeys(error.problems, NO_SUFFIX))


def _tell(report: LoadReport) -> LoadReport:
    """diffusers' lines on what is unusual in a file."""
    if report.widened:
        names = ", ".join(report.widened)
        OF_PIPELINES.info("Expanding the nn.Linear input/output features for module=%s: a Control LoRA.", names)
    if report.padded:
        names = ", ".join(report.padded)
        OF_PIPELINES.info("The following LoRA modules were zero padded to match the state dict of the model: %s", names)
    if report.norms:
        OF_PIPELINES.info(
            "The provided state dict contains normalization layers in addition to LoRA layers; they are part of the "
            "adapter and leave with it."
        )
    unread = [key for key, reason in report.ignored.items() if reason == NO_SUFFIX]
    unexpected = [*report.unmatched, *unread]
    names = ", ".join(unexpected)
    if unexpected:
        OF_KEYS.warning("Loading adapter weights from state_dict led to unexpected keys found in the model: %s.", names)
    if any(".norm" in name for name in unexpected):
        OF_PIPELINES.info(UNSUPPORTED, names)
    return report


@functools.wraps(LoraPipelineMixin.load_lora_weights)
def load_lora_weights(
    self: Any,
    pretrained_model_name_or_path_or_dict: Any,
    adapter_name: str | None = None,
    hotswap: bool = False,
    load_into_transformer_ref: bool | None = None,
    **options: Any,
) -> LoadReport:
    """Warn of options that nobody knows, and of a file in which nothing fits."""
    unknown = [name for name in options if name not in (*KNOWN, *ROUTES)]
    if unknown:
        OF_PIPELINES.warning("load_lora_weights has no options %s; they were ignored", ", ".join(unknown))
    given = {name: value for name, value in options.items() if name not in unknown}
    # diffusers reads a pickle where nobody forbids it; so does this, with torch's weights-only reader.
    given["use_safetensors"] = bool(given.get("use_safetensors"))
    source = pretrained_model_name_or_path_or_dict
    order = (adapter_name, hotswap, load_into_transformer_ref)
    try:
        return _tell(LoraPipelineMixin.load_lora_weights(self, source, *order, **given))
    except (NothingFitsError, UnknownFormatError) as error:
        if not _goes_on(error) or given.get("strict"):
            raise
        several = "transformer_ref" in getattr(self, "_lora_loadable_modules", ())
        denoiser = next(iter(self.lora_components.values()), self)
        owner, logger = (self, OF_PIPELINES) if several else (denoiser, OF_MODELS)
        return _nothing(type(owner).__name__, error, logger)


@functools.wraps(LoraPipelineMixin.set_adapters)
def set_adapters(self: Any, adapter_names: Any, adapter_weights: Any = None) -> None:
    """Warn of entries of a weight that mean nothing here."""
    if isinstance(adapter_weights, (list, tuple)):
        adapter_weights = [_meant(self, weight) for weight in adapter_weights]
    LoraPipelineMixin.set_adapters(self, adapter_names, _meant(self, adapter_weights))


def _meant(pipeline: Any, weight: Any) -> Any:
    """One adapter's weight without the entries that mean nothing here."""
    if not isinstance(weight, Mapping):
        return weight
    meant = {key: value for key, value in weight.items() if _means(pipeline, str(key))}
    wrong = sorted(str(key) for key in weight if key not in meant)
    if wrong:
        text = "The following components in `adapter_weights` are not part of the pipeline: %s. They were ignored."
        OF_BASE.warning(text, wrong)
    return meant or None


def _means(pipeline: Any, key: str) -> bool:
    """Whether a key names a component or a part of one with an adapter."""
    components: Mapping[str, nn.Module] = pipeline.lora_components
    paths = (path for model in components.values() for path, _ in adapter_layers(model))
    return key in (*components, "down", "mid", "up") or any(is_under(path, key) for path in paths)


def _present(names: str | Sequence[str], present: Collection[str], logger: logging.Logger) -> list[str]:
    """Those of the names that there are; diffusers lets the others pass."""
    asked = names_of(names)
    unknown = [name for name in asked if name not in present]
    if unknown:
        text = "No such adapter: %s (present: %s). It was ignored."
        logger.warning(text, ", ".join(unknown), ", ".join(present) or "none")
    return [name for name in asked if name in present]


def _of_any_component(pipeline: Any) -> list[str]:
    listed: Mapping[str, list[str]] = pipeline.get_list_adapters()
    return list(dict.fromkeys(name for names in listed.values() for name in names))


@functools.wraps(LoraPipelineMixin.delete_adapters)
def delete_adapters(self: Any, adapter_names: str | Sequence[str]) -> None:
    """Warn of names that there are not, and delete the others."""
    LoraPipelineMixin.delete_adapters(self, _present(adapter_names, _of_any_component(self), OF_BASE))


@functools.wraps(LoraPipelineMixin.set_lora_device)
def set_lora_device(self: Any, adapter_names: Sequence[str], device: torch.device | str | int) -> None:
    """Warn of names that there are not, and move the others."""
    LoraPipelineMixin.set_lora_device(self, _present(adapter_names, _of_any_component(self), OF_BASE), device)


@functools.wraps(LoraModelMixin.delete_adapters)
def delete_model_adapters(self: Any, adapter_names: str | Sequence[str]) -> None:
    """Warn of names that there are not, and delete the others."""
    LoraModelMixin.delete_adapters(self, _present(adapter_names, self._adapter_names(), OF_MODELS))


def _leaves(fused: Collection[str], keep_fused: bool | None, logger: logging.Logger) -> bool | None:
    """What becomes of fused adapters: they stay in the weights where nobody says, as in diffusers, with a warning."""
    if keep_fused is None and fused:
        text = "%s is fused into the weights and stays there for good. Call unfuse_lora() first for the plain weights."
        logger.warning(text, ", ".join(sorted(fused)))
        return True
    return keep_fused


@functools.wraps(LoraPipelineMixin.unload_lora_weights)
def unload_lora_weights(self: Any, reset_to_overwritten_params: bool = True, *, keep_fused: bool | None = None) -> None:
    """Warn of what is fused, and leave it in the weights."""
    keep_fused = _leaves(self.fused_loras, keep_fused, OF_BASE)
    LoraPipelineMixin.unload_lora_weights(self, reset_to_overwritten_params, keep_fused=keep_fused)


@functools.wraps(LoraModelMixin.unload_lora)
def unload_lora(self: Any, keep_fused: bool | None = None) -> None:
    """Warn of what is fused, and leave it in the weights."""
    LoraModelMixin.unload_lora(self, _leaves(fused_adapters(self), keep_fused, OF_MODELS))


@functools.wraps(LoraModelMixin.load_lora_adapter)
def load_lora_adapter(
    self: Any,
    pretrained_model_name_or_path_or_dict: Any,
    prefix: str | None = "transformer",
    hotswap: bool = False,
    **options: Any,
) -> LoadReport:
    """Warn of a file in which nothing fits."""
    known = {name: value for name, value in options.items() if name not in ("_pipeline", "safe_serialization")}
    source = pretrained_model_name_or_path_or_dict
    try:
        return _tell(LoraModelMixin.load_lora_adapter(self, source, prefix, hotswap, **known))
    except (NothingFitsError, UnknownFormatError) as error:
        if not _goes_on(error) or options.get("strict"):
            raise
        return _nothing(type(self).__name__, error, OF_MODELS)


def _into(name: str, role: str, logger: logging.Logger) -> Any:
    """A `load_lora_into_…` that warns where nothing fits."""
    ours = vars(ComponentLoadingMixin)[name]
    method: Any = ours.__wrapped__

    @functools.wraps(method)
    def load_into(cls: type, state_dict: Any, *args: Any, **options: Any) -> LoadReport:
        try:
            return _tell(method(cls, state_dict, *args, **options))
        except (NothingFitsError, UnknownFormatError) as error:
            if not _goes_on(error):
                raise
            model = next((value for value in (options.get(role), *args) if isinstance(value, nn.Module)), cls)
            return _nothing(type(model).__name__, error, logger)

    return ours.over(load_into) if isinstance(ours, class_or_instance) else classmethod(load_into)


def _norm_layers(self: nn.Module) -> dict[str, Any] | None:
    """Norms that an adapter changes and their own weights, None if there are none."""
    found = {path: layer.weight for path, layer in adapter_layers(self) if layer.kind.name == "norm"}
    return found or None


PIPELINE_WORDS: dict[str, Any] = {
    "load_lora_weights": load_lora_weights,
    "set_adapters": set_adapters,
    "delete_adapters": delete_adapters,
    "set_lora_device": set_lora_device,
    "unload_lora_weights": unload_lora_weights,
    "load_lora_into_unet": _into("load_lora_into_unet", "unet", OF_MODELS),
    "load_lora_into_transformer": _into("load_lora_into_transformer", "transformer", OF_MODELS),
    "load_lora_into_text_encoder": _into("load_lora_into_text_encoder", "text_encoder", OF_BASE),
}
MODEL_WORDS: dict[str, Any] = {
    "load_lora_adapter": load_lora_adapter,
    "unload_lora": unload_lora,
    "delete_adapters": delete_model_adapters,
    "_transformer_norm_layers": property(_norm_layers),
}
