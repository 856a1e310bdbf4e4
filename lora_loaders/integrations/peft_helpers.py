"""PEFT's own helpers on our layers, where somebody calls them (`get_peft_model_state_dict`); PEFT is not imported here.

Those helpers look for instances of PEFT's `BaseTunerLayer` and read the tensors beside `base_layer`, which ours name as
PEFT does.
"""

import sys
from typing import Any

from lora_loaders.layers.layer import AdapterLayer


def make_layers_known() -> None:
    """Count adapter layers among PEFT's; does nothing where PEFT is not loaded."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None:
        tuners.BaseTunerLayer.register(AdapterLayer)
