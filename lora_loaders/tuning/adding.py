"""New adapters for training: which modules a configuration means, and what their factors start as."""

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lora_loaders.adapter import Adapter
from lora_loaders.attaching import apply
from lora_loaders.deltas import Delta, DoraDelta, LoraDelta
from lora_loaders.errors import AdapterMismatchError
from lora_loaders.layers.base_weight import logical_shape, read_weight
from lora_loaders.layers.kinds import kind_of
from lora_loaders.layout import adapter_layers, named_bases, shared_of
from lora_loaders.plans import plan_adapter

from .config import LoraConfig, accept

UNTOUCHED = "The model was not changed."


def add_adapter(model: nn.Module, config: Any, name: str = "default", component: str = "transformer") -> LoraConfig:
    """Attach a new adapter, ready to be trained: its parameters want gradients and the model's own do not.

    Args:
        model: the model.
        config: a `LoraConfig`, PEFT's `LoraConfig`, or a dictionary of its fields.
        name: the adapter's name.
        component: what to call the model in messages.

    Raises:
        AdapterMismatchError: the configuration means no module of the model.
        TypeError: a field that is not supported.
    """
    own = accept(config)
    _check(own)
    targets = target_modules(model, own)
    if not targets:
        raise AdapterMismatchError(
            f"target_modules={own.target_modules!r} means no module of {type(model).__name__}",
            mend='Give names or endings of paths of Linear, Conv or Embedding modules, or "all-linear".',
            state=UNTOUCHED,
        )
    deltas = {path: fresh_delta(module, path, own) for path, module in targets.items()}
    plan = plan_adapter({component: model}, Adapter({component: deltas}, source="a new adapter"))
    layers = [layer for _, layer in adapter_layers(model)]
    of_adapters = {id(p) for layer in layers for other in layer.templates for p in layer.parameters_of(other)}
    present = list(model.parameters())
    thawed = [p for p in present if p.requires_grad and id(p) not in of_adapters]
    apply(plan, name, requires_grad=True, dropout=own.lora_dropout)
    shared = shared_of(model)
    assert shared is not None
    shared.frozen = shared.frozen or thawed
    for parameter in present:
        parameter.requires_grad_(False)
    return own


def _check(config: LoraConfig) -> None:
    if config.bias != "none" or config.modules_to_save or config.fan_in_fan_out:
        raise TypeError("bias other than 'none', modules_to_save and fan_in_fan_out are not supported")
    ranks = [config.r, *config.rank_pattern.values()]
    fractions = [rank for rank in ranks if rank != int(rank)]
    if fractions:
        raise ValueError(f"a rank is a whole number, not {fractions[0]}")
    if config.r <= 0:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {config.r}")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise TypeError(f"init_lora_weights={config.init_lora_weights!r}: True, False and 'gaussian' are supported")
    if config.use_dora and config.lora_bias:
        raise ValueError("use_dora and lora_bias cannot be combined")


def target_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Path -> base module, for all modules that a configuration means (PEFT's rules)."""
    bases = {path: module for path, module in named_bases(model) if (kind := kind_of(module)) and kind.low_rank}
    wanted = config.target_modules
    if wanted is None:
        raise ValueError("Please specify `target_modules` in `peft_config`")
    if wanted == "all-linear":
        found = {path: module for path, module in bases.items() if isinstance(module, nn.Linear)}
    else:
        found = {path: module for path, module in bases.items() if _means(wanted, path)}
    excluded = config.exclude_modules
    if excluded is not None:
        found = {path: module for path, module in found.items() if not _means(excluded, path)}
    return {path: module for path, module in found.items() if _in_layers(path, config)}


def _means(wanted: Collection[str] | str, path: str) -> bool:
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, path) is not None
        except re.error as error:
            raise ValueError(f"{wanted!r} is no regular expression: {error}") from error
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def _in_layers(path: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    layers = config.layers_to_transform
    numbers = [layers] if isinstance(layers, int) else layers
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    lists = "|".join(patterns) if patterns else r"[^.]+"
    match = re.search(rf"(?:^|\.)(?:{lists})\.(\d+)\.", path)
    return match is not None and int(match[1]) in numbers


def _pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the path, its ending, or a regular expression for one."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def fresh_delta(module: Any, path: str, config: LoraConfig) -> Delta:
    """A new adapter's factors for one module; a no-op unless `init_lora_weights=False`."""
    rank = int(_pattern_value(config.rank_pattern, path, config.r))
    alpha = float(_pattern_value(config.alpha_pattern, path, config.lora_alpha))
    shape = logical_shape(module)
    # On the CPU, wherever the model is: as with PEFT, a seed gives the same start on any device.
    device = torch.device("meta" if module.weight.is_meta else "cpu")
    down = torch.empty(rank, *shape[1:], device=device)
    up = torch.empty(shape[0], rank, *[1] * (len(shape) - 2), device=device)
    embedding = isinstance(module, nn.Embedding)
    _initialise(down, up, config, embedding)
    delta: Delta = LoraDelta(
        down=down,
        up=up,
        alpha=alpha,
        rslora=config.use_rslora,
        embedding=embedding,
        up_bias=_fresh_bias(shape[0], rank, config, device) if config.lora_bias and not embedding else None,
    )
    if config.use_dora:
        weight = read_weight(module).float()
        whole = weight + delta.delta_weight().to(weight.device)
        # PEFT has a magnitude for each output, and for each feature of an embedding.
        norms = whole.norm(dim=0, keepdim=True) if embedding else whole.flatten(1).norm(dim=1)
        delta = DoraDelta(inner=delta, magnitude=norms)
    return delta


def _fresh_bias(rows: int, rank: int, config: LoraConfig, device: torch.device) -> Tensor:
    """Zero, or with `init_lora_weights=False` a Linear's own start: uniform within 1 / sqrt(rank)."""
    bias = torch.zeros(rows, device=device)
    return bias if config.init_lora_weights else bias.uniform_(-(rank**-0.5), rank**-0.5)


def _initialise(down: Tensor, up: Tensor, config: LoraConfig, embedding: bool) -> None:
    """PEFT's starting values: A uniform as a Linear's (or normal), B zero; for embeddings A zero and B normal."""
    if embedding:
        nn.init.zeros_(up)
        nn.init.normal_(down)
        return
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(down, std=1 / down.shape[0])
        nn.init.zeros_(up)
        return
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    if config.init_lora_weights:
        nn.init.zeros_(up)
    else:
        nn.init.kaiming_uniform_(up, a=math.sqrt(5))
