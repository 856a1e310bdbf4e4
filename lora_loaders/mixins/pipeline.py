"""LoraPipelineMixin: every LoRA method of diffusers' pipelines, over whatever components a pipeline has."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

import lora_loaders.activity as activity
import lora_loaders.fusing as fusing
from lora_loaders.adapter import Adapter
from lora_loaders.errors import AdapterStateError
from lora_loaders.families import FAMILIES, Family
from lora_loaders.fuse_report import FuseReport, fuse_report
from lora_loaders.gates import changing
from lora_loaders.hotswap import Check, Targets, reserve
from lora_loaders.integrations.denoising import follow_call
from lora_loaders.integrations.equipping import equip
from lora_loaders.integrations.scale import encode_scaled, scale_argument, scaled
from lora_loaders.layout import adapter_layers
from lora_loaders.loading import LoadReport, adapter_names, family_of, load, may_widen
from lora_loaders.saving import as_plain
from lora_loaders.schedules import per_step
from lora_loaders.weights import for_component, nested, number, one_each

from .around import around_own
from .component_loading import ComponentLoadingMixin
from .components import components_of, possible_components, text_encoders
from .model import LoraModelMixin, read_source
from .pipeline_saving import SavingMixin, hub_options
from .routing import names_of_file, routed, said_of, second_transformer
from .saving import family_of_class

Method = TypeVar("Method", bound=Callable[..., Any])


def _at_once(method: Method) -> Method:
    """A method that changes several components: other threads see it done in all of them, or in none."""

    @wraps(method)
    def run(self: "LoraPipelineMixin", *args: Any, **kwargs: Any) -> Any:
        with changing(self.lora_components.values()):
            return method(self, *args, **kwargs)

    return cast(Method, run)


def warn_deprecated(method: str, prefix: str, options: Mapping[str, Any]) -> None:
    """Say of `fuse_unet` and its like what diffusers says.

    Raises:
        TypeError: an option of another name.
    """
    known = [f"{prefix}{name}" for name in ("unet", "transformer", "text_encoder")]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"{method} has no options {', '.join(unknown)}")
    for name in options:
        text = f"Passing `{name}` to `{method}()` is deprecated and ignored. Please use the `components` argument."
        warnings.warn(text, FutureWarning, stacklevel=4)


class LoraPipelineMixin(ComponentLoadingMixin, SavingMixin):
    """LoRA methods for a pipeline class: `class MyPipeline(LoraPipelineMixin, DiffusionPipeline): ...`."""

    # What there is

    _lora_family: str | None = None
    """The family that a mixin is for, where the pipeline's models do not tell."""
    unet_name = "unet"
    transformer_name = "transformer"
    transformer_ref_name = "transformer_ref"
    connectors_name = "connectors"
    text_encoder_name = "text_encoder"
    text_conditioner_name = "text_conditioner"

    @property
    def lora_components(self) -> dict[str, nn.Module]:
        """The pipeline's models that can carry an adapter, by name, denoiser first."""
        return components_of(self)

    @property
    def lora_family(self) -> Family | None:
        """The family of the pipeline's denoiser."""
        return self._family_among(FAMILIES)

    def _family_among(self, families: Sequence[Family]) -> Family | None:
        found = (f for model in self.lora_components.values() if (f := family_of(model, families)) is not None)
        return next(found, None) or family_of_class(type(self), families)

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
        load_into_transformer_ref: bool | None = None,
        *,
        strict: bool = False,
        weight_name: str | None = None,
        use_safetensors: bool | None = None,
        load_into_transformer_2: bool | None = None,
        families: Sequence[Family] = FAMILIES,
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
            load_into_transformer_2: whether the file is for `transformer_2`, Wan 2.2's low-noise expert; if nobody
                says, the file's name does (`…_high_noise…`, `…_low_noise…`), and else it is not.
            load_into_transformer_ref: whether it is for MiniMax-H3's reference partition.
            families: where the pipeline's family is looked up; pass your own beside `FAMILIES` to add one.
            options: subfolder, revision, token, cache_dir, local_files_only, force_download, proxies.

        Raises:
            AdapterFileError, AdapterMismatchError, AdapterStateError: and nothing was changed.
            TypeError: an unknown option.
        """
        if adapter_name is not None:
            activity.check_string(adapter_name)
        source = pretrained_model_name_or_path_or_dict
        contents = read_source(source, hub_options(weight_name, options), use_safetensors)
        models = self.lora_components
        second = second_transformer(
            models,
            {"transformer_2": load_into_transformer_2, "transformer_ref": load_into_transformer_ref},
            names_of_file(source, weight_name, contents),
        )
        report = load(
            routed(models, second, contents),
            contents,
            name=adapter_name,
            family=self._family_among(families),
            strict=strict,
            hotswap=hotswap,
            may_widen=may_widen(type(self).__name__),
        )
        # A class of diffusers that was patched has these methods and is no subclass.
        if isinstance(self, LoraPipelineMixin):  # pyright: ignore[reportUnnecessaryIsInstance]
            for model in models.values():
                equip(model, LoraModelMixin)  # one that was put in after `attach` has no methods yet
        return report if second is None else said_of(report, second)

    # Switching

    @_at_once
    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Make these adapters the only active ones of every component, and enable them.

        Args:
            adapter_names: one name or several.
            adapter_weights: a number for all; a list with one entry each; an entry may be a dictionary by component,
                and a component's entry a dictionary by block (see `weights.by_path`). In a number's place may stand a
                function of the denoising progress, which is 0 in the first step and 1 in the last, or a `PerStep`
                (an adapter's own list is one: `[[0, 0.5, 1]]`); outside the pipeline's calls its first value holds.

        Raises:
            AdapterStateError: an unknown name, component or block, or a list of another length, or a function that
                gives no number.
        """
        names = self._present(adapter_names)
        components = self.lora_components
        layers = {component: adapter_layers(model) for component, model in components.items()}
        weights = [
            nested(weight, {c: [path for path, layer in own if name in layer.templates] for c, own in layers.items()})
            if isinstance(weight, Mapping)
            else weight
            for name, weight in zip(names, one_each(names, adapter_weights), strict=True)
        ]
        snapshots = {name: activity.snapshot(model) for name, model in components.items()}
        try:
            for component, model in components.items():
                own = [per_step(for_component(weight, component, components)) for weight in weights]
                activity.set_active(model, names, own)
        except BaseException:
            for name, model in components.items():
                activity.restore(model, snapshots[name])
            raise

    @_at_once
    def enable_lora(self) -> None:
        """Let the active adapters of every component speak again."""
        for model in self.lora_components.values():
            activity.enable(model, True)

    @_at_once
    def disable_lora(self) -> None:
        """Let the base models alone speak; what is fused stays in the weights."""
        for model in self.lora_components.values():
            activity.enable(model, False)

    @_at_once
    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters out of every component for good; fused ones are unfused first.

        Raises:
            AdapterStateError: no such adapter, or a fused weight was changed since; nothing is deleted then.
        """
        names = self._present(adapter_names)
        fusing.unfuse_all(self._adapted(), names)
        for model in self._adapted():
            activity.delete(model, names)

    @_at_once
    def unload_lora_weights(self, reset_to_overwritten_params: bool = True, *, keep_fused: bool | None = None) -> None:
        """Take all adapters out of every component; widened input layers become narrow again.

        Room that `enable_lora_hotswap` made stays in compiled components, which would compile again without it.

        Args:
            reset_to_overwritten_params: False leaves input layers wide that a Control file widened, as diffusers' Flux
                does unless it is told; True is the default here, because a plain pipeline fails with a wide one.
            keep_fused: what becomes of fused adapters: False takes them out of the weights first, True leaves them in.

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
        if not keep_fused:
            fusing.unfuse_all(self.lora_components.values())
        for model in self.lora_components.values():
            keep_wide = not reset_to_overwritten_params
            activity.unload(model, keep_fused=keep_fused, keep_wide=keep_wide, keep_room=True)

    def _present(self, adapter_names: Any) -> list[str]:
        """The names that are asked for, each of which some component has."""
        names = activity.names_of(adapter_names)
        activity.require(names, (name for listed in self.get_list_adapters().values() for name in listed))
        return names

    def _adapted(self) -> list[nn.Module]:
        return [model for model in self.lora_components.values() if adapter_names(model)]

    @_at_once
    def set_lora_device(self, adapter_names: Sequence[str], device: torch.device | str | int) -> None:
        """Put these adapters' parameters on a device, to park them on the CPU or bring them back.

        Raises:
            AdapterStateError: an unknown name, or a device that torch has not or that has no room; nothing is moved.
        """
        activity.move(self._adapted(), self._present(adapter_names), device)

    @_at_once
    def enable_lora_hotswap(
        self,
        target_rank: int = 128,
        check_compiled: Check = "error",
        *,
        targets: Targets | Mapping[str, Targets] | None = None,
    ) -> None:
        """Give every adapted layer, and every one that `targets` means, room for this rank; see `hotswap.reserve`."""
        reserve(self.lora_components, target_rank, targets, check_compiled)

    # Fusing

    @_at_once
    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **deprecated: Any,
    ) -> FuseReport:
        """Add adapters to the base weights, exactly undone by `unfuse_lora`.

        Args:
            components: which models; all that have adapters if None.
            lora_scale: factor beside each adapter's own weight.
            safe_fusing: refuse if any fused weight would hold NaN or infinity.
            adapter_names: adapters to fuse; the active ones if None, also while they are disabled.
            deprecated: `fuse_unet` and its like, of which diffusers warns, and which change nothing.

        Raises:
            AdapterStateError: an unknown component or name, or `safe_fusing` met NaN; nothing is fused then.
            UnsupportedBaseError: a base weight that cannot be written, or is another module's too; nothing is fused.
        """
        warn_deprecated("fuse_lora", "fuse_", deprecated)
        models = self._chosen(components)
        names = None if adapter_names is None else self._present(adapter_names)
        scale = number(lora_scale)
        with fusing.all_or_none(models):
            for model in models:
                own = None if names is None else [name for name in names if name in self._names(model)]
                fusing.fuse(model, own, lora_scale=scale, safe_fusing=safe_fusing)
        return fuse_report(layer for model in models for _, layer in adapter_layers(model))

    @staticmethod
    def _names(model: nn.Module) -> list[str]:
        return adapter_names(model)

    @_at_once
    def unfuse_lora(self, components: Sequence[str] | None = None, **deprecated: Any) -> None:
        """Give the base weights back, to the bit, in all of these components or in none.

        Raises:
            AdapterStateError: an unknown component, or a weight that was changed since it was fused.
        """
        warn_deprecated("unfuse_lora", "unfuse_", deprecated)
        fusing.unfuse_all(self._chosen(components))

    def _chosen(self, components: Sequence[str] | None) -> list[nn.Module]:
        present = self.lora_components
        if components is None:
            return self._adapted()
        wanted = [components] if isinstance(components, str) else list(components)
        # A part that this pipeline could have and has not, as Wan 2.1 has no second transformer, means no model.
        possible = {*present, *(name for name in possible_components(self) if hasattr(self, name))}
        unknown = [name for name in wanted if name not in possible]
        if unknown or not wanted:
            raise AdapterStateError(
                f"components={wanted!r}: "
                + (f"{type(self).__name__} has no {', '.join(unknown)}" if unknown else "none given"),
                problems=[f"component: {name}" for name in present],
                mend="Name some of these, or leave the argument out for all that have adapters.",
                state="Nothing was changed.",
            )
        return [present[name] for name in wanted if name in present]

    # Calls

    @around_own
    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call, in which weights that follow the denoising do so."""
        return follow_call(self, own, list(components_of(self).values()), args, kwargs)

    @around_own
    def encode_prompt(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own `encode_prompt`, with `lora_scale` honoured whether peft is there or not."""
        return encode_scaled(text_encoders(self), own, *args, **kwargs)

    @around_own
    def save_pretrained(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Save the pipeline under its plain keys, what is fused included and what is not fused left out."""
        with ExitStack() as stack:
            for model in components_of(self).values():
                stack.enter_context(as_plain(model))
            return own(*args, **kwargs)


class LoraBlocksMixin:
    """What a block of a modular pipeline gains."""

    @around_own
    def __call__(self, own: Callable[..., Any], components: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        """The block's own call; the scale that it hands to the functions of its module holds for its text encoders."""
        argument = scale_argument(self)
        if argument is None:
            return own(components, state, *args, **kwargs)
        scale = (state.get(argument) or {}).get("scale")
        with scaled(text_encoders(components), number(scale)):
            return own(components, state, *args, **kwargs)

    @around_own
    def encode_prompt(self, own: Callable[..., Any], components: Any, *args: Any, **kwargs: Any) -> Any:
        """The block's own static `encode_prompt(components, …)`, with `lora_scale` honoured as a pipeline does."""
        return encode_scaled(text_encoders(components), own, components, *args, **kwargs)
