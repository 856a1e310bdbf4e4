"""LoraModelMixin: every LoRA method of diffusers' models, over any `nn.Module`."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

import lora_loaders.activity as activity
import lora_loaders.fusing as fusing
from lora_loaders.adapter import Adapter
from lora_loaders.combining.weighted import weighted_adapter
from lora_loaders.errors import AdapterStateError, ConversionError, NothingFitsError
from lora_loaders.families import FAMILIES, Family
from lora_loaders.files import Contents, read
from lora_loaders.fuse_report import FuseReport
from lora_loaders.gates import changing
from lora_loaders.hotswap import Check, Targets, reserve
from lora_loaders.joining import follow_parts
from lora_loaders.layout import shared_of
from lora_loaders.loading import LoadReport, adapter_names, family_of, load, register
from lora_loaders.locating import HubOptions
from lora_loaders.saving import as_plain, capture
from lora_loaders.scaling import of_one_model
from lora_loaders.schedules import refuse_schedules
from lora_loaders.tuning.adding import add_adapter
from lora_loaders.weights import number
from lora_loaders.writing import write_adapter

from .around import around_own
from .saving import save, save_bare

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
_NAMED = re.compile(r"(?:unet|transformer(?:_2|_ref)?|text_encoder(?:_\d)?|connectors|text_conditioner)\.")
"""How the keys of a component begin in diffusers' files."""


class LoraModelMixin(nn.Module):
    """LoRA methods for a model class: `class MyModel(LoraModelMixin, ModelMixin): ...`."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor] | Adapter,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        *,
        adapter_name: str | None = None,
        network_alphas: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        strict: bool = False,
        use_safetensors: bool | None = None,
        weight_name: str | None = None,
        low_cpu_mem_usage: bool = True,
        families: Sequence[Family] = FAMILIES,
        **hub: Any,
    ) -> LoadReport:
        """Load an adapter from a path, folder, Hub id, state dictionary or `Adapter` into this model.

        Args:
            pretrained_model_name_or_path_or_dict: what to load.
            prefix: the model's component name in the keys; None if keys carry none.
            hotswap: replace the adapter of this name.
            adapter_name: `default_0`, `default_1`, … if not given.
            network_alphas: alphas by key, for state dictionaries without them.
            metadata: fields of a LoraConfig, for state dictionaries without a header.
            strict: whether modules without a place are an error.
            use_safetensors: False allows reading a pickle.
            weight_name: file name inside a folder or repository.
            low_cpu_mem_usage: accepted for compatibility; loading always is.
            families: where the model's family is looked up; pass your own beside `FAMILIES` to add one.
            hub: subfolder, revision, token, cache_dir, local_files_only, force_download, proxies.

        Raises:
            AdapterFileError, AdapterMismatchError, AdapterStateError: and the model was not changed.
        """
        if adapter_name is not None:
            activity.check_string(adapter_name)
        if network_alphas is not None and metadata is not None:
            raise ValueError("Both `network_alphas` and `metadata` cannot be specified.")
        contents = read_source(
            pretrained_model_name_or_path_or_dict, HubOptions(weight_name=weight_name, **hub), use_safetensors
        )
        if isinstance(contents, Contents):
            contents = with_alphas(contents, network_alphas, metadata, prefix)
        component, family = self._lora_component(prefix, families)
        if isinstance(contents, Contents) and prefix is not None:
            # The default is what diffusers calls most denoisers; a UNet's file has another name for it.
            is_default = prefix == "transformer" and not any(key.startswith("transformer.") for key in contents.tensors)
            default = component if is_default else prefix
            contents = replace(contents, tensors=of_component(contents.tensors, default, rename=False))
            if family is None or default != component:  # a name that no table has
                contents = _without(default, contents)
            if not contents.tensors:
                raise NothingFitsError(
                    f"No LoRA keys associated to {type(self).__name__} found with the {prefix=}",
                    mend="Pass the component's name in the file, or prefix=None where keys carry none.",
                    state="Nothing was loaded or changed.",
                )
        return load({component: self}, contents, name=adapter_name, family=family, strict=strict, hotswap=hotswap)

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
        format: str = "diffusers",
    ) -> Path:
        """Write an adapter of this model to a folder, as diffusers does without the component's name in the keys.

        The live model is never cast.

        Raises:
            AdapterStateError: no such adapter.
            ConversionError: the format cannot say it.
        """
        if adapter_name is not None and adapter_name not in adapter_names(self):
            raise AdapterStateError(
                f"Adapter name {adapter_name} not found in the model.",
                problems=[f"loaded: {name}" for name in adapter_names(self)],
                state="Nothing was written.",
            )
        component, family = self._lora_component(None)
        adapter = capture({component: self}, adapter_name, family)
        if upcast_before_saving:
            adapter = adapter.to(dtype=torch.float32)
        if not safe_serialization:
            return save(adapter, save_directory, format, weight_name, None, safe_serialization, repo_id=None)
        target = Path(save_directory) / (weight_name or "pytorch_lora_weights.safetensors")
        return save_bare(adapter, target) if format == "diffusers" else write_adapter(adapter, target, format)

    def _lora_component(self, prefix: str | None, families: Sequence[Family] = FAMILIES) -> tuple[str, Family | None]:
        """What files call this model, and its family."""
        family = family_of(self, families)
        if family is not None and (prefix is None or prefix not in family.components):
            return family.denoiser, family
        return prefix or "transformer", family

    # New adapters

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Attach a new adapter for training; `adapter_config` is a LoraConfig of ours or of PEFT.

        Raises:
            AdapterStateError: the name is taken.
            AdapterMismatchError: the configuration means no module.
        """
        activity.check_string(adapter_name)
        self._require_free(adapter_name)
        component, _ = self._lora_component(None)
        config = add_adapter(self, adapter_config, adapter_name, component)
        register(self, adapter_name, config)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Attach a new adapter made of several, with PEFT's arguments; which are active stays as it was.

        `svd_full_matrices` and `svd_driver` change nothing of the result and are not needed; see
        `combining.weighted.weighted_adapter` for the ways.

        Raises:
            AdapterStateError: the name is taken, or an adapter is not there.
            ConversionError: adapters that this way cannot combine.
        """
        self._require_free(adapter_name)
        if svd_clamp is not None:
            raise ConversionError("svd_clamp is not supported: clamped factors are no best approximation")
        names = activity.names_of(adapters)
        activity.require(names, adapter_names(self))
        component, family = self._lora_component(None)
        settings: dict[str, Any] = {"rank": svd_rank, "density": density, "majority": majority_sign_method}
        made = weighted_adapter({component: self}, names, weights, combination_type, family, **settings)
        active, shared = activity.active_names(self), shared_of(self)
        enabled = shared is None or shared.enabled
        load({component: self}, made, name=adapter_name, family=family)
        activity.choose(self, active)
        activity.enable(self, enabled)

    # Switching

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make these adapters the only active ones, with the weights that `set_adapters` last gave them, 1 at first."""
        names = activity.names_of(adapter_name)
        activity.require(names, adapter_names(self))
        activity.choose(self, names)

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        """Make these adapters the only active ones, with these weights; see `weights.by_path`."""
        names = activity.names_of(adapter_names)
        activity.require(names, self._adapter_names())
        refuse_schedules(names, weights)
        activity.set_active(self, names, weights)

    def _adapter_names(self) -> list[str]:
        return adapter_names(self)

    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        self._require_adapters()
        return activity.active_names(self)

    def disable_adapters(self) -> None:
        """Let the base model alone speak."""
        self._require_adapters()
        activity.enable(self, False)

    def enable_adapters(self) -> None:
        """Let the active adapters speak again."""
        self._require_adapters()
        activity.enable(self, True)

    def disable_lora(self) -> None:
        """As `disable_adapters`."""
        activity.enable(self, False)

    def enable_lora(self) -> None:
        """As `enable_adapters`."""
        activity.enable(self, True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters out for good; fused ones are unfused first.

        Raises:
            AdapterStateError: no such adapter.
        """
        names = activity.names_of(adapter_names)
        activity.require(names, self._adapter_names())
        activity.delete(self, names)

    def unload_lora(self, keep_fused: bool | None = None) -> None:
        """Take all adapters out; room for hot-swapping stays if the model is compiled. See `activity.unload`."""
        activity.unload(self, keep_fused=keep_fused, keep_room=True)

    def enable_lora_hotswap(
        self, target_rank: int = 128, check_compiled: Check = "error", *, targets: Targets | None = None
    ) -> None:
        """Give every adapted layer, and every one that `targets` means, room for this rank; see `hotswap.reserve`."""
        reserve({type(self).__name__: self}, target_rank, targets, check_compiled)

    def _require_adapters(self) -> None:
        if not adapter_names(self):
            raise AdapterStateError(
                f"{type(self).__name__}: No adapter loaded. Please load an adapter first.",
                mend="load_lora_adapter loads a file, add_adapter begins a new adapter.",
                state="Nothing was changed.",
            )

    def _require_free(self, adapter_name: str) -> None:
        if adapter_name in adapter_names(self):
            raise AdapterStateError(
                f"Adapter with name {adapter_name} already exists. Please use a different name.",
                problems=[f"present: {name}" for name in adapter_names(self)],
                mend="Or delete it first with delete_adapters.",
                state="Nothing was changed.",
            )

    # Fusing

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> FuseReport:
        """Add adapters to the base weights; see `fusing.fuse`."""
        return fusing.fuse(self, _names(adapter_names), lora_scale=number(lora_scale), safe_fusing=safe_fusing)

    def unfuse_lora(self) -> None:
        """Give the base weights back, to the bit."""
        fusing.unfuse(self)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's name for `fuse_lora`."""
        fusing.fuse(self, _names(adapter_names), safe_fusing=safe_merge)

    def unmerge_adapter(self) -> None:
        """PEFT's name for `unfuse_lora`."""
        fusing.unfuse(self)

    def merge_and_unload(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> "LoraModelMixin":
        """Fuse for good and take the adapters out."""
        fusing.fuse(self, _names(adapter_names), safe_fusing=safe_merge)
        activity.unload(self, keep_fused=True)
        return self

    def unload(self) -> "LoraModelMixin":
        """Take the adapters out, fused ones too, and return the plain model."""
        activity.unload(self, keep_fused=False)
        return self

    # Joined projections

    @around_own
    def fuse_qkv_projections(self, own: Callable[[], None]) -> None:
        """diffusers' own; the joined projections heed the adapters on their parts, and those that come."""
        with changing([self], reads_bases=True):
            own()
            follow_parts(self)

    # Plain files

    @around_own
    def save_pretrained(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Save the base model under its plain keys, what is fused included and what is not fused left out."""
        with as_plain(self):
            return own(*args, **kwargs)


def read_source(source: Any, hub: HubOptions, use_safetensors: bool | None) -> Contents | Adapter:
    """What a load starts from: an `Adapter` as it is, anything else read."""
    if isinstance(source, Adapter):
        return source
    return read(source, hub, allow_pickle=use_safetensors is False)


def _names(given: Any) -> list[str] | None:
    return None if given is None else activity.names_of(given)


def with_alphas(
    contents: Contents, alphas: Mapping[str, float] | None, config: Mapping[str, Any] | None, component: str | None
) -> Contents:
    """The contents with alphas and configuration that were handed over beside a state dictionary.

    The configuration's fields may carry the component's name, as diffusers gives them (`transformer.lora_alpha`).
    """
    if alphas:
        extra = {key: torch.tensor(float(value)) for key, value in alphas.items()}
        contents = replace(contents, tensors={**contents.tensors, **extra})
    own = {k.removeprefix(f"{component}."): v for k, v in (config or {}).items() if k.startswith(f"{component}.")}
    return replace(contents, config=own or config) if config else contents


def _without(prefix: str, contents: Contents) -> Contents:
    """The contents without this prefix, as those of one model; a key that has it goes before the same without."""
    cut = {key.removeprefix(f"{prefix}."): tensor for key, tensor in contents.tensors.items() if _has(prefix, key)}
    bare = {key: tensor for key, tensor in contents.tensors.items() if not _has(prefix, key) and key not in cut}
    if twice := len(contents.tensors) - len(cut) - len(bare):
        logger.warning("%s: %d keys stand there without %s. too; those are left out", contents.label, twice, prefix)
    return replace(contents, tensors={**cut, **bare}, metadata=of_one_model(contents.metadata, prefix, contents.label))


def _has(prefix: str, key: str) -> bool:
    return key.startswith(f"{prefix}.")


def of_component(values: Mapping[str, Value], component: str, *, rename: bool = True) -> dict[str, Value]:
    """A component's own entries: those under its name and those under no component's.

    Args:
        values: by key.
        component: the component's name.
        rename: whether entries under no component's name are put under this one.
    """
    own = {key: value for key, value in values.items() if key.startswith(f"{component}.")}
    bare = {key: value for key, value in values.items() if key not in own and not _NAMED.match(key)}
    return {**own, **({f"{component}.{key}": value for key, value in bare.items()} if rename else bare)}
