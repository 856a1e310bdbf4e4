"""PEFT's kinds of adapters and of LoRA: those whose tensors make no change that is read here are refused by name."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import UNTOUCHED, UnknownFormatError

READ = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
"""The values of `peft_type` whose tensors are read as PEFT means them (peft 0.21.2, `utils/peft_types.py`)."""
PROMPT = "it learns what comes before the input, and changes no weight"
ROUTED = "what it adds is worked out anew from each input, which no one change of a weight says"
SHARED = "its changes are made of numbers that modules share, or that stand in no file"
WHOLE = "it trains parameters of the model themselves"
OWN = "its tensors make a change by an algebra of its own"
UNREAD: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"),
            *("ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
        ),
        PROMPT,
    ),
    **dict.fromkeys(("XLORA", "POLY", "LILY", "SHADOW"), ROUTED),
    **dict.fromkeys(("VERA", "PVERA", "RANDLORA", "FROD", "VBLORA", "UNILORA", "TINYLORA"), SHARED),
    **dict.fromkeys(("LN_TUNING", "TRAINABLE_TOKENS", "BEFT"), WHOLE),
    **dict.fromkeys(
        (
            *("ADAMSS", "FOURIERFT", "GLORA", "HIRA", "HRA", "MISS", "BONE", "ROAD", "SHIRA", "C3A", "WAVEFT"),
            *("OSF", "DELORA", "GRALORA", "PSOFT", "PEANUT", "SUPERTUNING", "DEFT"),
        ),
        OWN,
    ),
    "ADALORA": "its lora_E scales each rank, by a number of ranks that stands in no file",
}
"""The other values, and why their tensors are none of ours, though some may be called `lora_A` and `lora_B`."""
VARIANTS: Mapping[str, str] = {
    "alora_invocation_tokens": "the change counts from certain tokens on, which no change of a weight does",
    "arrow_config": ROUTED,
    "kasa_config": "the base weight loses its smallest singular values, and lora_diag stands between the factors",
    "layer_replication": "blocks of the model are repeated, so that names mean other blocks",
    "use_bdlora": "one of the factors holds the blocks of a block-diagonal matrix",
    "use_qalora": "the columns of lora_A are for means of several inputs",
}
"""Fields of `LoraConfig` that give `lora_A` and `lora_B` another meaning where they are set."""
MUTATING = re.compile(r"pissa(_niter_\d+)?|corda|olora|loftq|lora_ga", re.IGNORECASE)
"""Values of `init_lora_weights` with which PEFT takes the first factors out of the base weight."""
VARIANT_KEYS: Mapping[str, str] = {"lora_E": "ADALORA", "lora_diag": "LORA with kasa_config"}
"""Parts of keys -> the kind whose factors they scale, where no configuration tells it."""
VARIANT_KEY = re.compile(rf"\.({'|'.join(VARIANT_KEYS)})(\.[^.]+)?$")
EXTRACT = (
    "If one change of each weight says it, merge it in PEFT (merge_and_unload) and write the difference with "
    "`lora-loaders extract`."
)
CONVERT = (
    "Save it again in PEFT, with save_pretrained(…, path_initial_model_for_weight_conversion=…), which makes a plain "
    "LoRA of it (not of loftq); or merge it there and write the difference with `lora-loaders extract`."
)


def refuse_kinds(configs: Mapping[str, Mapping[str, Any]], keys: Iterable[str], label: str) -> None:
    """Raise where a file's tensors are not what their names say.

    Args:
        configs: component -> PEFT's configuration.
        keys: those of the file.
        label: the file, for the message.

    Raises:
        UnknownFormatError: they are of another kind; a kind that is not known is one too.
    """
    problems: dict[str, str] = {}
    for component, config in configs.items():
        problems |= {f"{component}: {said}" if component else said: mend for said, mend in _reasons(config).items()}
    if not problems:
        found = {match[1]: key for key in keys if (match := VARIANT_KEY.search(key))}
        problems = {f"{key}: of PEFT's {VARIANT_KEYS[name]}": EXTRACT for name, key in found.items()}
    if problems:
        raise UnknownFormatError(
            f"{label}: PEFT means something else by these tensors than a change that is read here",
            problems=list(problems),
            mend=" ".join(dict.fromkeys(problems.values())),
            state=UNTOUCHED,
        )


def _reasons(config: Mapping[str, Any]) -> dict[str, str]:
    """What of a configuration is not read -> the way out."""
    tuner = config.get("peft_type")
    if tuner is not None and tuner not in READ:
        known = UNREAD.get(tuner if isinstance(tuner, str) else "", "no kind of this name is known")
        return {f"peft_type is {tuner}: {known}": EXTRACT}
    if tuner not in (None, "LORA"):
        return {}
    found = {f"{name} is set: {reason}": EXTRACT for name, reason in VARIANTS.items() if config.get(name)}
    start = config.get("init_lora_weights")
    if isinstance(start, str) and MUTATING.fullmatch(start):
        reason = "the factors that training began with were taken out of the base weight, and are not in this file"
        found[f"init_lora_weights is {start}: {reason}"] = CONVERT
    return found
