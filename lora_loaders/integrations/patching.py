"""patch_diffusers(): every pipeline and model class of diffusers in this process gains the LoRA methods.

The classes stay themselves, because pipelines ask `isinstance(self, FluxLoraLoaderMixin)` in a hundred files; only
their attributes change, and each change is noted and can be taken back. Nothing of it needs peft, and models that carry
peft's own layers go on with peft's own functions.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from lora_loaders.mixins.component_loading import ComponentLoadingMixin
from lora_loaders.mixins.model import LoraModelMixin
from lora_loaders.mixins.pipeline import LoraPipelineMixin, components_of, models_of, text_encoders
from lora_loaders.mixins.pipeline_saving import SavingMixin
from lora_loaders.saving import as_plain

from .changes import Changes
from .denoising import following
from .diffusers_functions import FUNCTIONS
from .diffusers_words import MODEL_WORDS, PIPELINE_WORDS
from .scale import encode_scaled
from .text_encoder_methods import METHODS

_changes = Changes()

# These call the class's own method through `super()` and wrap it instead, once for each class that defines one.
WRAPPED = ("encode_prompt", "save_pretrained")


def _methods(*classes: type) -> dict[str, Any]:
    """What these classes define themselves, first one first, without what Python puts into every class."""
    found: dict[str, Any] = {}
    for cls in classes:
        for name, value in vars(cls).items():
            if not name.startswith(("__", "_abc_")) and name not in WRAPPED:
                found.setdefault(name, value)
    return found


PIPELINE = _methods(LoraPipelineMixin, ComponentLoadingMixin, SavingMixin) | PIPELINE_WORDS
MODEL = _methods(LoraModelMixin) | MODEL_WORDS


def patch_diffusers() -> None:
    """Let every pipeline and model class of diffusers, loaded or still to come, use this package's LoRA methods.

    Working code needs no other change: names, signatures and return values are diffusers', `scale` in the attention
    arguments and `lora_scale` are honoured, and peft may be installed or not. What diffusers only warns of (a file in
    which nothing fits, unknown components in `set_adapters`) is a warning here too, on diffusers' own loggers, while
    `attach` raises. Does nothing where it is done. `unpatch_diffusers` takes all of it back.
    """
    if _changes.done:
        return
    try:
        _patch()
    except BaseException:
        _changes.undo()
        raise


def unpatch_diffusers() -> None:
    """Take `patch_diffusers` back: every class and function of diffusers is what it was.

    Models keep the adapters they carry; take them out before, with `unload_lora_weights`.
    """
    _changes.undo()
    for module in _diffusers_modules():  # those that were imported since then took the new functions over
        for name, (ours, original) in _replaced.items():
            if vars(module).get(name, original) is ours:
                setattr(module, name, original)
    _replaced.clear()


_replaced: dict[str, tuple[Any, Any]] = {}
"""Name of a function, or of a flag, in diffusers' modules -> (ours, the original)."""


def _patch() -> None:
    from diffusers.loaders import lora_base, lora_pipeline
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    _put_all(lora_base.LoraBaseMixin, PIPELINE)
    for mixin in _subclasses(lora_base.LoraBaseMixin):
        if mixin.__module__ == lora_pipeline.__name__:
            for name in PIPELINE.keys() & vars(mixin).keys():
                if not isinstance(vars(mixin)[name], str):  # `unet_name` and its like are the mixin's own
                    _changes.take(mixin, name)
    _put_all(PeftAdapterMixin, MODEL)
    equip_pipeline = functools.partial(_equip_pipeline, lora_base.LoraBaseMixin)
    _equip_all(DiffusionPipeline, equip_pipeline)
    _equip_all(ModularPipeline, equip_pipeline)
    _equip_all(ModularPipelineBlocks, _equip_blocks)
    _equip_all(ModelMixin, functools.partial(_equip_model, PeftAdapterMixin))
    _patch_text_encoders()
    _patch_functions()


def _put_all(cls: type, methods: dict[str, Any]) -> None:
    for name, value in methods.items():
        _changes.put(cls, name, value)


def _subclasses(cls: type) -> Iterator[type]:
    """All classes below a class, parents first."""
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _equip_all(base: type, equip: Callable[[type, type], None]) -> None:
    """Equip a base class and every class below it, those included that are defined or imported later."""
    equip(base, base)
    for cls in dict.fromkeys(_subclasses(base)):
        equip(base, cls)

    def __init_subclass__(cls: type, **options: Any) -> None:
        super(base, cls).__init_subclass__(**options)
        equip(base, cls)

    _changes.put(base, "__init_subclass__", classmethod(__init_subclass__))


def _equip_pipeline(lora_mixin: type, base: type, cls: type) -> None:
    """Wrap a pipeline's `__call__`, `encode_prompt` and `save_pretrained`; give it methods if diffusers gives none."""
    own = vars(cls)
    if "__call__" in own:
        _changes.put(cls, "__call__", following(own["__call__"], models_of))
    encode = own.get("encode_prompt")
    if callable(encode):
        _changes.put(cls, "encode_prompt", _scaling(encode))
    if "save_pretrained" in own:
        _changes.put(cls, "save_pretrained", _saving(own["save_pretrained"]))
    if cls is not base and not issubclass(cls, lora_mixin):
        _put_all(cls, {name: value for name, value in PIPELINE.items() if not hasattr(cls, name)})


def _equip_blocks(base: type, cls: type) -> None:
    """Wrap a modular block's static `encode_prompt(components, …)`."""
    encode = vars(cls).get("encode_prompt")
    if isinstance(encode, staticmethod):
        _changes.put(cls, "encode_prompt", staticmethod(_scaling(encode.__func__)))


def _equip_model(lora_mixin: type, base: type, cls: type) -> None:
    """Wrap a model's `save_pretrained`; give it the methods if diffusers gives it none."""
    save = vars(cls).get("save_pretrained")
    if save is not None:

        @functools.wraps(save)
        def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
            with as_plain(self):
                return save(self, *args, **options)

        _changes.put(cls, "save_pretrained", save_pretrained)
    if cls is not base and not issubclass(cls, lora_mixin):
        _put_all(cls, {name: value for name, value in MODEL.items() if not hasattr(cls, name)})


def _scaling(encode: Callable[..., Any]) -> Callable[..., Any]:
    """`encode_prompt` of a pipeline, or of a block over a pipeline, with `lora_scale` honoured."""

    @functools.wraps(encode)
    def encode_prompt(pipeline: Any, *args: Any, **options: Any) -> Any:
        return encode_scaled(text_encoders(pipeline), functools.partial(encode, pipeline), *args, **options)

    return encode_prompt


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            for model in components_of(self).values():
                stack.enter_context(as_plain(model))
            return save(self, *args, **options)

    return save_pretrained


def _patch_text_encoders() -> None:
    """Text encoders are transformers' models, and its methods for adapters want peft."""
    try:
        from transformers.integrations.peft import PeftAdapterMixin
    except ImportError:
        return
    for name, replacement in METHODS.items():
        original = vars(PeftAdapterMixin).get(name)
        if original is not None:
            _changes.put(PeftAdapterMixin, name, functools.wraps(original)(replacement(original)))
    # Only what those methods lean on: public names would make plain models look like peft's.
    _put_all(PeftAdapterMixin, {name: value for name, value in MODEL.items() if name.startswith("_")})


def _patch_functions() -> None:
    """Replace functions that a hundred modules hold by name, and the flag that says whether adapters can be used."""
    from diffusers.utils import constants, peft_utils

    for name, replacement in FUNCTIONS.items():
        original = getattr(peft_utils, name)
        _replaced[name] = (functools.wraps(original)(replacement(original)), original)
    if not constants.USE_PEFT_BACKEND:
        _replaced["USE_PEFT_BACKEND"] = (True, constants.USE_PEFT_BACKEND)
    for module in _diffusers_modules():
        for name, (ours, original) in _replaced.items():
            if name in vars(module) and vars(module)[name] is original:
                _changes.put(module, name, ours)


def _diffusers_modules() -> list[Any]:
    return [module for name, module in sys.modules.copy().items() if name.split(".")[0] == "diffusers" and module]
