"""Where alpha stands when no tensor holds it: the header's metadata, or PEFT's `adapter_config.json`."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .deltas import Delta, DoraDelta, ExpertsDelta, LoraDelta
from .errors import UNTOUCHED, MalformedAdapterError
from .peft_kinds import refuse_kinds
from .peft_parameters import is_target
from .peft_types import by_path, configured, unscaled

METADATA_KEY = "lora_adapter_metadata"
OPTIONAL_LEVEL = "text_model."
"""transformers 5 took this level out of CLIP: PEFT finds a target without it in both, as the ending of a path."""
KOHYA_SCALING = ("ss_network_dim", "ss_network_alpha")


@dataclass(frozen=True)
class Scalings:
    """Configurations by component ("" for a file of one model), as PEFT and diffusers write them."""

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    kohya: tuple[float, float] | None = None
    """Rank and alpha of the header's `ss_network_dim` and `ss_network_alpha`."""

    @classmethod
    def of(
        cls, metadata: Mapping[str, str], config: Mapping[str, Any] | None, label: str, keys: Iterable[str] = ()
    ) -> "Scalings":
        """Gather what the header's metadata and the configuration file say of these keys; `label` names the file.

        Raises:
            MalformedAdapterError: what is said has no meaning.
            UnknownFormatError: the tensors are of a kind of PEFT's that is not read.
        """
        configs: dict[str, Mapping[str, Any]] = {}
        if config is not None:
            configs[""] = config
        if METADATA_KEY in metadata:
            configs |= _by_component(_parsed(metadata[METADATA_KEY], label))
        refuse_kinds(configs, keys, label)
        for config in configs.values():
            _check(config, label)
        return cls(configs, _kohya(metadata))

    def apply(self, delta: Delta, component: str, path: str | None, *, given: bool) -> Delta:
        """The delta with the alpha of its configuration, unless the file gave one (`given`)."""
        config = self.configs.get(component, self.configs.get(""))
        tuner = None if config is None else config.get("peft_type")
        if isinstance(delta, LoraDelta | ExpertsDelta) and tuner not in (None, "LORA"):
            raise MalformedAdapterError(f"PEFT's configuration says {tuner}, the keys are those of a LoRA")
        if given or path is None:
            return delta
        if isinstance(delta, DoraDelta):
            return replace(delta, inner=self.apply(delta.inner, component, path, given=given))
        if not isinstance(delta, LoraDelta):
            return delta if config is None else configured(delta, config, path)
        if config is not None and config.get("lora_alpha") is not None:
            alpha = by_path(config, "alpha_pattern", path, "lora_alpha")
            own = replace(delta, alpha=alpha, rslora=bool(config.get("use_rslora"))) if alpha else unscaled(delta)
            return _of_parameter(own, config, path)
        if self.kohya is not None and self.kohya[0] == delta.rank:
            return replace(delta, alpha=self.kohya[1])
        return delta


def alpha_of(tensor: Tensor | None) -> float | None:
    """The number in a file's alpha; None where there is none.

    Raises:
        MalformedAdapterError: it is no finite number.
    """
    if tensor is None:
        return None
    if tensor.numel() != 1:
        raise MalformedAdapterError(f"alpha has {tensor.numel()} values, one was expected")
    if tensor.is_meta:
        return 1.0
    alpha = float(tensor)
    if alpha != alpha or abs(alpha) == float("inf"):
        raise MalformedAdapterError(f"alpha is {alpha}")
    return alpha


def _of_parameter(delta: LoraDelta, config: Mapping[str, Any], path: str) -> Delta:
    """The delta of what may be a raw parameter, whose rank in the configuration is that of each expert."""
    if not is_target(path, config.get("target_parameters") or ()):
        return delta
    rank = int(by_path(config, "rank_pattern", path, "r"))
    own = delta if delta.rank == rank else ExpertsDelta.of(delta, rank)
    return replace(own, of_parameter=True)


def of_one_model(metadata: Mapping[str, str], component: str, label: str) -> Mapping[str, str]:
    """The header's metadata with a component's configuration as that of a file of one model; `label` names the file."""
    if METADATA_KEY not in metadata:
        return metadata
    fields = _parsed(metadata[METADATA_KEY], label)
    bare = {name.removeprefix(f"{component}."): value for name, value in fields.items()}
    return {**metadata, METADATA_KEY: json.dumps(bare, indent=2, sort_keys=True)}


def _parsed(text: str, label: str) -> Mapping[str, Any]:
    try:
        flat = json.loads(text)
    except ValueError as error:
        raise _bad_entry(label, f"no JSON ({error})") from error
    if not isinstance(flat, dict):
        raise _bad_entry(label, "no dictionary")
    return flat


def _bad_entry(label: str, fault: str) -> MalformedAdapterError:
    return MalformedAdapterError(
        f"{label}: the header's {METADATA_KEY} is {fault}",
        mend="Take the entry out of the header: alpha is the rank then.",
        state=UNTOUCHED,
    )


def _check(config: Mapping[str, Any], label: str) -> None:
    """Raise unless what is read of a configuration means something; a field that is not there or null says nothing."""
    given = {name: config[name] for name in FIELDS.keys() & config.keys() if config[name] is not None}
    faults = [f"{name} is {value!r}" for name, value in sorted(given.items()) if not FIELDS[name](value)]
    if faults:
        raise MalformedAdapterError(
            f"{label}: PEFT's configuration says what it cannot mean",
            problems=faults,
            mend="Mend the header or the adapter_config.json.",
            state=UNTOUCHED,
        )


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_pattern(value: Any) -> bool:
    """Whether it gives expressions numbers."""
    entries = dict[Any, Any](value) if isinstance(value, Mapping) else {None: None}
    return all(_is_expression(key) and _is_number(entry) for key, entry in entries.items())


def _is_expression(value: Any) -> bool:
    try:
        re.compile(value)
    except (TypeError, re.error):
        return False
    return True


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in list[Any](value))


FIELDS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("lora_alpha", "alpha", "r", "eps"), _is_number),
    **dict.fromkeys(("alpha_pattern", "rank_pattern"), _is_pattern),
    **dict.fromkeys(
        ("target_modules", "feedforward_modules"), lambda value: _is_expression(value) or _are_names(value)
    ),
    "target_parameters": _are_names,
    "num_cayley_neumann_terms": _is_count,
}
"""The fields that are read, and what each may hold."""


def _by_component(flat: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """`{"transformer.r": 4}` to `{"transformer": {"r": 4}}`."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, name = key.rpartition(".")
        configs.setdefault(component, {})[name] = value
    return dict(configs)


def _kohya(metadata: Mapping[str, str]) -> tuple[float, float] | None:
    try:
        rank, alpha = (float(metadata[key]) for key in KOHYA_SCALING)
        return rank, alpha
    except (KeyError, ValueError):
        return None  # "Dynamic" and "None" are written by resizing tools


def lora_config(loras: Mapping[str, LoraDelta | ExpertsDelta], doras: Collection[str]) -> dict[str, Any]:
    """PEFT's LoraConfig fields that say these ranks and alphas, and that some are under DoRA."""
    parameters = sorted(name for name, delta in loras.items() if delta.of_parameter)
    rslora = all(delta.rslora and delta.alpha for delta in loras.values())
    alphas = {name: (d.alpha or 0.0) if rslora else plain_alpha(d) or float(d.rank) for name, d in loras.items()}
    rank, _ = Counter(delta.rank for delta in loras.values()).most_common(1)[0]
    alpha, _ = Counter(alphas.values()).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {_pattern(name): d.rank for name, d in loras.items() if d.rank != rank},
        "alpha_pattern": {_pattern(name): _whole(own) for name, own in alphas.items() if own != alpha},
        "target_modules": sorted(name.removeprefix(OPTIONAL_LEVEL) for name in loras.keys() - {*parameters}),
        **({"target_parameters": parameters} if parameters else {}),
        "use_rslora": rslora,
        "use_dora": bool(doras),
        "lora_bias": any(isinstance(delta, LoraDelta) and delta.up_bias is not None for delta in loras.values()),
    }


def _pattern(name: str) -> str:
    """A key that means this module alone; without the level that some lack it is an ending, which fits both."""
    return name.removeprefix(OPTIONAL_LEVEL) if name.startswith(OPTIONAL_LEVEL) else f"^{name}"


def plain_alpha(delta: LoraDelta | ExpertsDelta) -> float | None:
    """The alpha that says the same scaling when it is divided by the rank."""
    return delta.scaling * delta.rank if delta.rslora and delta.alpha else delta.alpha


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def kohya_header(deltas: Collection[Delta], plain: str, network: str | None = None) -> dict[str, str]:
    """Kind of network, most frequent rank and alpha, as kohya's trainers state them.

    Args:
        deltas: as they are written.
        plain: the kind of network that trains LoRAs of this family.
        network: the kind that the source names, which may be more exact.
    """
    kinds = {delta.kind for delta in deltas}
    header = {"ss_network_module": network or (plain if kinds <= {"lora"} else "lycoris.kohya")}
    pairs = Counter((delta.rank, delta.alpha_value) for delta in deltas if delta.rank is not None)
    if not pairs:
        return header
    rank, alpha = pairs.most_common(1)[0][0]
    if alpha is None or (rank, None) in pairs:
        alpha = rank  # a reader gives the header's alpha to the modules of this rank that have none
    return header | {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
