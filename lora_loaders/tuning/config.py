"""LoraConfig: PEFT's field names, what a new or a loaded adapter is made with."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lora_loaders.adapter import Adapter
from lora_loaders.atomic import atomic
from lora_loaders.deltas import DoraDelta, LoraDelta
from lora_loaders.errors import MalformedAdapterError
from lora_loaders.integrations.peft_helpers import make_layers_known
from lora_loaders.locating import CONFIG_NAME, HubOptions, locate
from lora_loaders.scaling import METADATA_KEY

# Fields of PEFT's configuration that say nothing about a diffusion model's adapter, with values that change nothing.
INERT: Mapping[str, Any] = {
    **dict.fromkeys(("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")),
    "inference_mode": False,
    "megatron_core": "megatron.core",
    "loftq_config": {},
    "qalora_group_size": 16,
}


@dataclass
class LoraConfig:
    """How to make a LoRA adapter, with PEFT's names and defaults.

    Attributes:
        r: rank.
        lora_alpha: numerator of the scaling lora_alpha / r.
        target_modules: names or path endings (a list), a regular expression for whole paths (a string), or
            "all-linear".
        exclude_modules: the same, for modules to leave out.
        lora_dropout: dropout on the adapter's input while training.
        bias: only "none".
        use_rslora: scaling lora_alpha / sqrt(r) (https://arxiv.org/abs/2312.03732).
        init_lora_weights: True (A uniform, B zero), "gaussian" (A normal with deviation 1/r, B zero), or False (both
            random, for tests).
        rank_pattern: path or regular expression -> rank.
        alpha_pattern: path or regular expression -> alpha.
        layers_to_transform: block numbers to adapt, all if None.
        layers_pattern: name of the block list that `layers_to_transform` counts.
        use_dora: learn a magnitude for each output (https://arxiv.org/abs/2402.09353).
        lora_bias: give the up factor a bias.
        modules_to_save: not supported; train those modules yourself.
        metadata: the file's own metadata, when the adapter was loaded.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: list[str] | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    family: str | None = field(default=None, repr=False)

    # What PEFT's helpers read beside the fields. Its enumeration equals the plain string.
    peft_type: ClassVar[str] = "LORA"
    task_type: ClassVar[None] = None
    trainable_token_indices: ClassVar[None] = None
    base_model_name_or_path: ClassVar[None] = None
    inference_mode: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    @property
    def is_prompt_learning(self) -> bool:
        """False. PEFT's helpers ask this before they look for layers, so this is when it gets to know ours."""
        make_layers_known()
        return False

    def to_dict(self) -> dict[str, Any]:
        """Fields and values, as PEFT's own configuration gives them; sets become sorted lists."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("metadata", "family")}
        plain = {name: sorted(value) if isinstance(value, set) else value for name, value in own.items()}
        return {"peft_type": "LORA", "task_type": None, **plain}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write `adapter_config.json` into a folder, whole or not at all, as PEFT does."""
        path = Path(save_directory) / CONFIG_NAME
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True), "utf-8")
        return path

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub: Any) -> "LoraConfig":
        """Read the `adapter_config.json` of a folder or of a repository on the Hub, PEFT's own included.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            hub: subfolder, revision, token, cache_dir, local_files_only, force_download, proxies.

        Raises:
            AdapterFileError: there is none, or it is no JSON.
            TypeError: it sets fields that have no meaning here.
        """
        path = locate(pretrained_model_name_or_path, HubOptions(weight_name=CONFIG_NAME, **hub))
        try:
            fields = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise MalformedAdapterError(f"{path} is no JSON ({error})", state="Nothing was changed.") from error
        return accept(fields)


def accept(config: Any) -> LoraConfig:
    """A configuration of ours from ours, from PEFT's, or from a dictionary.

    Raises:
        TypeError: fields that have no meaning here are set.
        ValueError: it is no configuration, as diffusers has it.
    """
    if isinstance(config, LoraConfig):
        return config
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ValueError(f"adapter_config is a LoraConfig or a dictionary of its fields, not a {type(config).__name__}")
    given: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    own = {f.name for f in dataclasses.fields(LoraConfig)}
    foreign = {key: value for key, value in given.items() if key not in own and not _is_inert(key, value)}
    if foreign:
        raise TypeError(f"LoraConfig fields that are not supported here: {foreign}")
    return LoraConfig(**{key: value for key, value in given.items() if key in own})


def _is_inert(key: str, value: Any) -> bool:
    return (
        value is None
        or value is False
        or value == {}
        or key == "runtime_config"
        or INERT.get(key, ...) == value
        or key
        in (
            *(
                "peft_type",
                "task_type",
                "auto_mapping",
                "peft_version",
                "base_model_name_or_path",
                "revision",
                "inference_mode",
            ),
        )
    )


def config_of(adapter: Adapter, component: str) -> LoraConfig:
    """The configuration that describes one component of a loaded adapter."""
    deltas = adapter.deltas.get(component, {})
    inner = {path: d.inner if isinstance(d, DoraDelta) else d for path, d in deltas.items()}
    loras = {path: delta for path, delta in inner.items() if isinstance(delta, LoraDelta)}
    if not loras:
        return LoraConfig(target_modules=sorted(deltas), metadata=dict(adapter.metadata), family=adapter.family)
    rank = Counter(delta.rank for delta in loras.values()).most_common(1)[0][0]
    alphas = {path: delta.alpha or float(delta.rank) for path, delta in loras.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    stated = json.loads(adapter.metadata.get(METADATA_KEY, "{}"))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(deltas),
        rank_pattern={path: delta.rank for path, delta in loras.items() if delta.rank != rank},
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
        use_rslora=any(delta.rslora for delta in loras.values()),
        use_dora=any(isinstance(delta, DoraDelta) for delta in deltas.values()),
        lora_bias=any(delta.up_bias is not None for delta in loras.values()),
        lora_dropout=float(stated.get(f"{component}.lora_dropout", 0.0)),
        metadata=dict(adapter.metadata),
        family=adapter.family,
    )
