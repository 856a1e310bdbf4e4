"""LoraPipelineMixin: every LoRA method of diffusers' pipelines, over whatever components a pipeline has."""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_loaders.activity as activity
import lora_loaders.fusing as fusing
from lora_loaders.adapter import Adapter
from lora_loaders.attaching import without_layers
from lora_loaders.errors import AdapterStateError
from lora_loaders.families import Family
from lora_loaders.layout import shared_of
from lora_loaders.loading import LoadReport, adapter_names, family_of, load, may_widen
from lora_loaders.locating import HubOptions
from lora_loaders.saving import capture
from lora_loaders.weights import check_components, for_component, one_each

from .class_or_instance import class_or_instance
from .component_loading import ComponentLoadingMixin
from .model import read_source
from .saving import layers_to_adapter, save, state_dict_like_diffusers

DENOISERS = ("transformer", "unet", "prior", "decoder")
BESIDE = ("transformer_2", "transformer_ref", "connectors", "text_conditioner")
HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
ACCEPTED = ("low_cpu_mem_usage", "return_lora_metadata", "return_alphas", "unet_config")
"""Arguments of diffusers that need no action here."""


class LoraPipelineMixin(ComponentLoadingMixin):
    """LoRA methods for a pipeline class: `class MyPipeline(LoraPipelineMixin, DiffusionPipeline): ...`."""

    # What there is

    @property
    def lora_components(self) -> dict[str, nn.Module]:
        """The pipeline's models that can carry an adapter, by name, denoiser first."""
        names = [*DENOISERS, *(f"text_encoder{n}" for n in ("", "_2", "_3", "_4")), *BESIDE]
        found = {name: getattr(self, name, None) for name in names}
        return {name: model for name, model in found.items() if isinstance(model, nn.Module)}

    @property
    def lora_family(self) -> Family | None:
        """The family of the pipeline's denoiser."""
        return next((f for model in self.lora_components.values() if (f := family_of(model)) is not None), None)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> names of its adapters, for components that have any."""
        return {name: names for name, model in self.lora_components.items() if (names := adapter_names(model))}

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters, of any component."""
        names = (name for model in self.lora_components.values() for name in activity.active_names(model))
        return list(dict.fromkeys(names))

    @property
    def fused_loras(self) -> set[str]:
        """Names of the adapters that are fused into any component."""
        return {name for model in self.lora_components.values() for name in fusing.fused_adapters(model)}

    @property
    def num_fused_loras(self) -> int:
        """Number of fused adapters."""
        return len(self.fused_loras)

    @property
    def lora_scale(self) -> float:
        """Always 1: a scale holds for the call it is given to, and nothing keeps it."""
        return 1.0

    # Loading

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor] | Adapter,
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        strict: bool = False,
        weight_name: str | None = None,
        use_safetensors: bool | None = None,
        **options: Any,
    ) -> LoadReport:
        """Load an adapter into all components it changes, or into none; it becomes the only active one of them.

        Args:
            pretrained_model_name_or_path_or_dict: path, folder, Hub id, state dictionary or `Adapter`.
            adapter_name: `default_0`, `default_1`, … if not given.
            hotswap: replace the adapter of this name.
            strict: whether modules without a place are an error rather than one warning.
            weight_name: file name inside a folder or repository.
            use_safetensors: False allows reading a pickle.
            options: subfolder, revision, token, cache_dir, local_files_only, force_download, proxies.

        Raises:
            AdapterFileError, AdapterMismatchError, AdapterStateError: and nothing was changed.
            TypeError: an unknown option.
        """
        contents = read_source(
            pretrained_model_name_or_path_or_dict, hub_options(weight_name, options), use_safetensors
        )
        return load(
            self.lora_components,
            contents,
            name=adapter_name,
            family=self.lora_family,
            strict=strict,
            hotswap=hotswap,
            may_widen=may_widen(type(self).__name__),
        )

    # Switching

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Make these adapters the only active ones of every component, and enable them.

        Args:
            adapter_names: one name or several.
            adapter_weights: a number for all; a list with one entry each; an entry may be a dictionary by component,
                and a component's entry a dictionary by block (see `weights.by_path`).

        Raises:
            AdapterStateError: an unknown name, component or block, or a list of another length.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        components = self.lora_components
        activity.require(names, (n for listed in self.get_list_adapters().values() for n in listed))
        weights = one_each(names, adapter_weights)
        for weight in weights:
            check_components(weight, components)
        snapshots = {name: activity.snapshot(model) for name, model in components.items()}
        try:
            for component, model in components.items():
                activity.set_active(model, names, [for_component(w, component, components) for w in weights])
        except BaseException:
            for name, model in components.items():
                activity.restore(model, snapshots[name])
            raise

    def enable_lora(self) -> None:
        """Let the active adapters of every component speak again."""
        for model in self.lora_components.values():
            activity.enable(model, True)

    def disable_lora(self) -> None:
        """Let the base models alone speak; what is fused stays in the weights."""
        for model in self.lora_components.values():
            activity.enable(model, False)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters out of every component for good; fused ones are unfused first.

        Raises:
            AdapterStateError: no such adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        activity.require(names, (n for listed in self.get_list_adapters().values() for n in listed))
        for model in self._adapted():
            activity.delete(model, names)

    def unload_lora_weights(self, *, keep_fused: bool | None = None, reset_to_overwritten_params: bool = True) -> None:
        """Take all adapters out of every component; widened input layers become narrow again.

        Args:
            keep_fused: what becomes of fused adapters: False takes them out of the weights first, True leaves them in.
            reset_to_overwritten_params: accepted for compatibility; everything is always put back.

        Raises:
            AdapterStateError: adapters are fused and `keep_fused` does not say what to do.
        """
        if keep_fused is None and self.fused_loras:
            raise AdapterStateError(
                f"{', '.join(sorted(self.fused_loras))} is fused into the weights",
                mend="Call unfuse_lora() first to get the plain weights back, "
                "or unload_lora_weights(keep_fused=True) to leave it in them.",
                state="Nothing was changed.",
            )
        for model in self._adapted():
            activity.unload(model, keep_fused=keep_fused)

    def _adapted(self) -> list[nn.Module]:
        return [model for model in self.lora_components.values() if adapter_names(model)]

    def set_lora_device(self, adapter_names: Sequence[str], device: torch.device | str | int) -> None:
        """Put these adapters' parameters on a device, to park them on the CPU or bring them back."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        activity.require(names, (n for listed in self.get_list_adapters().values() for n in listed))
        for model in self._adapted():
            activity.move(model, names, device)

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Give every adapted layer, present or coming, room for this rank, so that swapping finds the same storage."""
        for model in self.lora_components.values():
            activity.reserve(model, target_rank)

    # Fusing

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Add adapters to the base weights, exactly undone by `unfuse_lora`.

        Args:
            components: which models; all that have adapters if None.
            lora_scale: factor beside each adapter's own weight.
            safe_fusing: refuse if any fused weight would hold NaN or infinity.
            adapter_names: adapters to fuse, the active ones if None.

        Raises:
            AdapterStateError: an unknown component or name, or `safe_fusing` met NaN; nothing is fused then.
            UnsupportedBaseError: a base weight that cannot be written; nothing is fused then.
        """
        models = self._chosen(components)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if names is not None:
            activity.require(names, (n for listed in self.get_list_adapters().values() for n in listed))
        before = [fusing.fused_state(model) for model in models]
        try:
            for model in models:
                own = None if names is None else [name for name in names if name in self._names(model)]
                fusing.fuse(model, own, lora_scale=lora_scale, safe_fusing=safe_fusing)
        except BaseException:
            for state in before:
                fusing.restore_fused(state)
            raise

    @staticmethod
    def _names(model: nn.Module) -> list[str]:
        return adapter_names(model)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Give the base weights back, to the bit, in these components or in all.

        Raises:
            AdapterStateError: an unknown component, or a weight that was changed since it was fused.
        """
        for model in self._chosen(components):
            fusing.unfuse(model)

    def _chosen(self, components: Sequence[str] | None) -> list[nn.Module]:
        present = self.lora_components
        if components is None:
            return self._adapted()
        wanted = [components] if isinstance(components, str) else list(components)
        unknown = [name for name in wanted if name not in present]
        if unknown or not wanted:
            raise AdapterStateError(
                f"components={wanted!r}: {', '.join(unknown) or 'none given'}",
                problems=[f"component: {name}" for name in present],
                state="Nothing was changed.",
            )
        return [present[name] for name in wanted]

    # Saving

    @class_or_instance
    def save_lora_weights(
        owner: Any,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        format: str = "diffusers",
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **layers: Any,
    ) -> Path | None:
        """Write adapter layers that are handed over, or, on a pipeline without any, what is loaded.

        Args:
            save_directory: the folder.
            adapter_name: which loaded adapter, when there are several.
            format: see `write_adapter`.
            is_main_process: only this process writes.
            weight_name: file name; the format's usual one if None.
            save_function: called with tensors and path instead of writing safetensors.
            safe_serialization: False writes a pickle with torch.save.
            push_to_hub: whether to upload the folder, with a model card.
            repo_id: `owner/name` on the Hub; the folder's name if None.
            layers: `<component>_lora_layers` (state dictionary or module) and `<component>_lora_adapter_metadata`.

        Returns:
            Path of the file, None where another process writes.

        Raises:
            AdapterStateError: nothing is handed over and no, or no single, adapter is loaded.
            ConversionError: the format cannot say it.
        """
        adapter = layers_to_adapter(layers)
        if adapter is None:
            if isinstance(owner, type):
                components = "`transformer_lora_layers`, `unet_lora_layers`, `text_encoder_lora_layers`"
                raise ValueError(f"You must pass at least one of {components}, or call this on a pipeline.")
            adapter = capture(owner.lora_components, adapter_name, owner.lora_family)
        if not is_main_process:
            return None
        write = partial(save, adapter, save_directory, format, weight_name, save_function, safe_serialization)
        return write(repo_id=(repo_id or Path(save_directory).name) if push_to_hub else None)

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: Any,
        *,
        weight_name: str | None = None,
        use_safetensors: bool | None = None,
        return_lora_metadata: bool = False,
        **options: Any,
    ) -> Any:
        """A file's tensors in diffusers' names, and beside them what diffusers' own method returns."""
        contents = read_source(
            pretrained_model_name_or_path_or_dict, hub_options(weight_name, options), use_safetensors
        )
        return state_dict_like_diffusers(cls, contents, return_lora_metadata, bool(options.get("return_alphas")))

    # Calls

    def encode_prompt(self, *args: Any, lora_scale: float | None = None, **kwargs: Any) -> Any:
        """The pipeline's own `encode_prompt`, with `lora_scale` honoured whether peft is there or not."""
        encode: Callable[..., Any] = super().encode_prompt  # type: ignore[misc]
        with self._scaled_text_encoders(lora_scale):
            return encode(*args, **kwargs)

    @contextmanager
    def _scaled_text_encoders(self, scale: float | None) -> Generator[None]:
        encoders = (model for name, model in self.lora_components.items() if name.startswith("text_encoder"))
        states = [shared for model in encoders if (shared := shared_of(model)) is not None]
        for shared in states:
            shared.scale = 1.0 if scale is None else float(scale)
        try:
            yield
        finally:
            for shared in states:
                shared.scale = 1.0

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save the pipeline under its plain keys, what is fused included and what is not fused left out."""
        write: Callable[..., Any] = super().save_pretrained  # type: ignore[misc]
        with ExitStack() as stack:
            for model in self.lora_components.values():
                stack.enter_context(without_layers(model))
            return write(save_directory, *args, **kwargs)


def hub_options(weight_name: str | None, options: Mapping[str, Any]) -> HubOptions:
    """The options of a Hub download, everything else refused.

    Raises:
        TypeError: an option that nobody knows.
    """
    unknown = [key for key in options if key not in (*HUB_OPTIONS, *ACCEPTED)]
    if unknown:
        raise TypeError(f"unknown options {', '.join(unknown)}; there are {', '.join((*HUB_OPTIONS, *ACCEPTED))}")
    return HubOptions(weight_name=weight_name, **{key: value for key, value in options.items() if key in HUB_OPTIONS})
