"""What trainers state of a model in their files' headers, by which Automatic1111, SwarmUI and InvokeAI sort files.

The words are the trainers' own: sd-scripts' and musubi-tuner's (`library/sai_model_spec.py`, `networks/`, each
trainer's base model version), OneTrainer's (`resources/sd_model_spec`). Where a family's published sizes have words of
their own, and nothing in a file tells them apart, none is stated.
"""

from collections.abc import Mapping

Header = Mapping[str, str]
DIFFUSERS = "https://github.com/huggingface/diffusers"


def kohya(network: str, version: str = "", architecture: str = "", implementation: str = "diffusers") -> Header:
    """The header of kohya's trainers.

    Args:
        network: module of the trainer that made the LoRA, without `networks.`.
        version: its word for the base model; "" if there are several.
        architecture: ModelSpec's word for it; "" if there are several.
        implementation: the code that ModelSpec names.
    """
    stated = {"ss_network_module": f"networks.{network}"}
    if version:
        stated["ss_base_model_version"] = version
    return {**stated, **model_spec(architecture, implementation)} if architecture else stated


def model_spec(architecture: str, implementation: str = DIFFUSERS) -> Header:
    """ModelSpec's entries for a LoRA of this architecture; OneTrainer's header has little else."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
    }
