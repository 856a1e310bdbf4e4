"""patch_diffusers(): every pipeline and model class of diffusers in this process gains the LoRA methods.

The classes stay themselves, because pipelines ask `isinstance(self, FluxLoraLoaderMixin)` in a hundred files; only
their attributes change, and each change is noted and can be taken back. Nothing of it needs peft, and models that carry
peft's own layers go on with peft's own functions.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lora_loaders.mixins.around import around_own
from lora_loaders.mixins.component_loading import ComponentLoadingMixin
from lora_loaders.mixins.model import LoraModelMixin
from lora_loaders.mixins.pipeline import LoraBlocksMixin, LoraPipelineMixin
from lora_loaders.mixins.pipeline_saving import SavingMixin

from .changes import Changes
from .diffusers_functions import FUNCTIONS
from .diffusers_words import MODEL_WORDS, PIPELINE_WORDS
from .foreign import heeding
from .text_encoder_methods import METHODS

_changes = Changes()


def _methods(*classes: type) -> dict[str, Any]:
    """What these classes define themselves, first one first, without what Python puts into every class."""
    found: dict[str, Any] = {}
    for cls in classes:
        for name, value in vars(cls).items():
            if isinstance(value, around_own) or not name.startswith(("__", "_abc_")):
                found.setdefault(name, value)
    return found


def _copied(methods: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in methods.items() if not isinstance(value, around_own)}


def _around(methods: dict[str, Any]) -> dict[str, around_own]:
    """Those that wrap the class's own method, once for each class that defines one."""
    return {name: value for name, value in methods.items() if isinstance(value, around_own)}


_OF_PIPELINES, _OF_MODELS = _methods(LoraPipelineMixin, ComponentLoadingMixin, SavingMixin), _methods(LoraModelMixin)
PIPELINE = _copied(_OF_PIPELINES) | PIPELINE_WORDS
MODEL = _copied(_OF_MODELS) | MODEL_WORDS
AROUND_PIPELINE, AROUND_MODEL = _around(_OF_PIPELINES), _around(_OF_MODELS)
AROUND_BLOCKS = _around(_methods(LoraBlocksMixin))


def patch_diffusers() -> None:
    """Let every pipeline and model class of diffusers, loaded or still to come, use this package's LoRA methods.

    Working code needs no other change: names, signatures and return values are diffusers', `scale` in the attention
    arguments and `lora_scale` are honoured, and peft may be installed or not. What diffusers only warns of or lets pass
    (a file in which nothing fits, unknown components in `set_adapters`, unknown names in `delete_adapters` and
    `set_lora_device`) is a warning here, on diffusers' own loggers, while `attach` raises; and what is fused stays in
    the weights when it is unloaded. Does nothing where it is done. `unpatch_diffusers` takes all of it back.
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

    for mixin in (lora_base.LoraBaseMixin, *_subclasses(lora_base.LoraBaseMixin)):
        if mixin.__module__ in (lora_base.__name__, lora_pipeline.__name__):
            _put_over(mixin, PIPELINE, everything=mixin is lora_base.LoraBaseMixin)
    _put_over(PeftAdapterMixin, MODEL, everything=True)
    of_pipeline = functools.partial(_equip, lora_base.LoraBaseMixin, PIPELINE, AROUND_PIPELINE)
    _equip_all(DiffusionPipeline, of_pipeline)
    _equip_all(ModularPipeline, of_pipeline)
    _equip_all(ModularPipelineBlocks, functools.partial(_equip, object, {}, AROUND_BLOCKS))
    _equip_all(ModelMixin, functools.partial(_equip, PeftAdapterMixin, MODEL, AROUND_MODEL))
    _patch_text_encoders()
    _patch_functions()


def _put_over(cls: type, methods: dict[str, Any], *, everything: bool) -> None:
    """Put methods where a class of diffusers has its own, which go on for peft's layers; or all of them."""
    for name, value in methods.items():
        own = vars(cls).get(name)
        if everything or (own is not None and not isinstance(own, str)):  # `unet_name` and its like are the mixin's own
            _changes.put(cls, name, heeding(name, value, own))


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


def _equip(mixin: type, methods: dict[str, Any], around: dict[str, around_own], base: type, cls: type) -> None:
    """Wrap what a class and its parents define; give it the methods if diffusers gives it none."""
    for owner in cls.__mro__:
        if issubclass(owner, base) or owner.__module__.split(".")[0] == "diffusers":
            for name in around.keys() & vars(owner).keys():
                if not _changes.has(owner, name):
                    _changes.put(owner, name, around[name].over(vars(owner)[name]))
    if cls is not base and not issubclass(cls, mixin):
        for name, value in methods.items():
            if not hasattr(cls, name):
                _changes.put(cls, name, heeding(name, value, None))


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
    for name, value in MODEL.items():
        if name.startswith("_"):
            _changes.put(PeftAdapterMixin, name, value)


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
