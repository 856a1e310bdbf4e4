"""pytest plug-in: diffusers' own LoRA tests over this package, in a process that cannot import peft.

`pytest -p without_peft tests/lora` patches diffusers first. Only then are stand-ins put in for the few names of peft
that the *tests* import; this package never sees them. Each is a public class or function of ours under peft's name:

- `LoraConfig`: `lora_loaders.LoraConfig`
- `tuners.tuners_utils.BaseTunerLayer`: `lora_loaders.AdapterLayer`
- `utils.get_peft_model_state_dict`: `lora_loaders.adapter_state_dict`
- `LoraLayer`, `LoHaLayer`, `LoKrLayer` with `adapter_layer_names`: names of our layers' containers; diffusers leaves
  those out of layerwise casting once the tests say that peft is there
- `PeftModel`: a class without instances; diffusers looks for one in new pipelines once the tests say that peft is there
- `helpers.disable_input_dtype_casting`: does nothing, because our layers never cast their input in place
- the version that `importlib.metadata` gives: 0.21.2, because tests ask for a newer one than 0.14
"""

import contextlib
import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import diffusers.utils.import_utils as availability

import lora_loaders as ll

VERSION = "0.21.2"
"""Of the peft that the baseline was made with."""


if importlib.util.find_spec("peft") is not None:
    raise RuntimeError("peft is installed here; run this in an environment without it")
ll.patch_diffusers()
importlib.import_module("diffusers.training_utils")  # it asks for peft when it is imported, and must find none


def _stand_in(name: str, **names: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []  # a package, so that what stands below it is found
    vars(module).update(names)
    sys.modules[name] = module


_stand_in("peft", LoraConfig=ll.LoraConfig, PeftModel=type("PeftModel", (), {}), __version__=VERSION)
_stand_in("peft.tuners")
_stand_in("peft.tuners.tuners_utils", BaseTunerLayer=ll.AdapterLayer)
_stand_in("peft.utils", get_peft_model_state_dict=ll.adapter_state_dict)
for kind, layer in (("lora", "LoraLayer"), ("loha", "LoHaLayer"), ("lokr", "LoKrLayer")):
    containers = {"adapter_layer_names": ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")}
    _stand_in(f"peft.tuners.{kind}")
    _stand_in(f"peft.tuners.{kind}.layer", **{layer: type(layer, (), containers)})
_stand_in("peft.helpers", disable_input_dtype_casting=lambda model, active=True: contextlib.nullcontext())
_version = importlib.metadata.version
importlib.metadata.version = lambda name: VERSION if name == "peft" else _version(name)
availability._peft_available = True  # what the tests' decorators ask
