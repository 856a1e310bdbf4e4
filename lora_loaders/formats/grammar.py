"""The one grammar that reads every spelling: a key is a prefix, a module's name and a suffix.

Only strings are looked at here. What a name means is the families' business, what tensors mean the deltas'.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

Style = Literal["kohya", "peft", "diffusers-old"]

# Suffixes that only one style writes, by canonical slot. Styles differ in the two factors and little else.
STYLES: Mapping[Style, Mapping[str, str]] = {
    "kohya": {
        "down": ".lora_down.weight",
        "up": ".lora_up.weight",
        "mid": ".lora_mid.weight",
        "up_bias": ".lora_up.bias",
        "magnitude": ".dora_scale",
    },
    "peft": {
        "down": ".lora_A.weight",
        "up": ".lora_B.weight",
        "mid": ".lora_mid.weight",
        "up_bias": ".lora_B.bias",
        "magnitude_out": ".lora_magnitude_vector",
        "embedding_down": ".lora_embedding_A",
        "embedding_up": ".lora_embedding_B",
    },
    "diffusers-old": {
        "down": ".lora.down.weight",
        "up": ".lora.up.weight",
        "mid": ".lora.mid.weight",
        "up_bias": ".lora.up.bias",
        "magnitude": ".dora_scale",
    },
}
# Suffixes that all styles share: the slot's own name, or the field's usual word for it.
COMMON: Mapping[str, str] = {
    "alpha": ".alpha",
    "bias": ".diff_b",
    **{slot: f".{slot}" for slot in ("diff", "diff_m", "set_weight", "w_norm", "b_norm", "on_input", "reshape_weight")},
    **{
        slot: f".{slot}"
        for slot in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            *("oft_blocks", "oft_diag", "oft_R", "rescale", "boft_R", "boft_s", "ia3_l"),
            *("bias_indices", "bias_values", "bias_size"),
        )
    },
    **{slot: f".{slot}.weight" for slot in ("a1", "a2", "b1", "b2", "bm")},
    "scaled_oft": ".oft_R.scaled_oft",
    "oft_embedding_R": ".oft_embedding_R.weight",
    "weight": ".weight",
}
# Further spellings that are read and never written.
READ_ONLY: Mapping[str, str] = {
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_layer.down.weight": "down",
    ".lora_layer.up.weight": "up",
    ".lora_down": "down",
    ".lora_up": "up",
    ".matrix_A": "down",
    ".matrix_B": "up",
    ".lora.down": "down",
    ".lora.up": "up",
    ".down.weight": "down",
    ".up.weight": "up",
    ".lora_magnitude_vector.weight": "magnitude_out",
    ".magnitude": "magnitude_out",
    ".scale": "set_weight",
    # Flux' and Krea2's norms call their one parameter `scale`, and ComfyUI writes a parameter's whole name.
    ".scale.diff": "diff",
    ".scale.set_weight": "set_weight",
    ".oft_R.weight": "oft_R",
}
SUFFIXES: Mapping[str, str] = {
    **READ_ONLY,
    **{suffix: slot for slot, suffix in COMMON.items()},
    **{suffix: slot for style in STYLES.values() for slot, suffix in style.items()},
}
STYLE_OF: Mapping[str, Style] = {
    **dict.fromkeys((".lora_A", ".lora_B"), "peft"),
    **{suffix: "diffusers-old" for suffix in READ_ONLY if suffix.endswith((".down.weight", ".up.weight"))},
    **{suffix: style for style, table in STYLES.items() for suffix in table.values()},
}

# Names with the adapter's own name inside, as PEFT has them: `.lora_A.default.weight`; wrapped twice, with two of them.
SLOTTED = re.compile(
    r"\.(lora_(?:A|B|down|up|mid|embedding_A|embedding_B|magnitude_vector)|lora\.(?:down|up|mid)"
    r"|hada_\w+|lokr_\w+|oft_R|oft_embedding_R|boft_[Rs]|ia3_l)"
    r"\.(?!weight\.|bias\.|scaled_oft$)([^.]+)(?:\.[^.]+)??(\.weight|\.bias|)$"
)
SLOTTED_ALONE = ("alpha", "magnitude", "diff", "bias")
"""Slots whose suffix may be a module's name too: an adapter's own name is looked for behind it if nothing else fits."""
# kohya's networks may train the parts of a fused layer apart (`split_qkv`), and number their tensors. A number that
# stands alone is an adapter's own name or that of an only part, which come to the same. SAT, with which CogVideoX was
# trained, numbers the parts of every layer.
NUMBERED = re.compile(r"\.(lora_down|lora_up|oft_blocks|matrix_A|matrix_B)\.(\d+)(\.weight|)$")
# Levels that wrappers put into a path, dotted or flattened: of torch.compile, FSDP, checkpointed activations, and PEFT.
# A weight below PEFT's is the model's own.
WRAPPERS = re.compile(
    r"(?<![^._])_?(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]"
    r"|(?<![^.])base_layer(?!\.weight$)\."
)
# XLabs' factors are `….qkv_lora1.down`; a module may be called `down` or `up` itself (Krea2's `mlp.up`).
NAMED_FACTOR = re.compile(r"_lora[12]?\.(?:down|up)\.weight$")
# Whole norm weights beside the pairs, of a BFL control file and as diffusers writes those. A checkpoint has them too:
# beside plain weights they are an adapter's only where there are changes as well.
REPLACED = re.compile(r"\.scale$|\.norm_(?:added_)?[qk]\.weight$")

# Prefix -> the component that it names; "" names none, and "denoiser" and "te1" wait for the family.
PREFIXES: Mapping[str, str] = {
    "base_model.model.": "",
    # Wrappers of data-parallel training and of DiffSynth's trainer.
    "module.": "",
    "pipe.": "",
    "dit.": "denoiser",
    "Hunyuan_video_I2V_lora_": "denoiser",  # `lora_unet_` by another name, which a trainer of a single model chose
    "lora_unet_": "denoiser",
    "lora_transformer_": "denoiser",
    "lora_prior_unet_": "denoiser",
    "lora_prior_": "denoiser",
    "oft_unet_": "denoiser",
    "lycoris_": "denoiser",
    "model.diffusion_model.": "denoiser",
    "diffusion_model.": "denoiser",
    "conditional_transformer.": "denoiser",
    "unconditional_transformer.": "unconditional_transformer",
    "net.": "denoiser",
    "transformer_2.": "transformer_2",
    "transformer_ref.": "transformer_ref",
    "transformer.": "denoiser",
    "unet.": "denoiser",
    "prior.": "denoiser",
    "decoder.": "decoder",
    "lora_prior_te_": "te1",
    "connectors.": "connectors",
    "text_conditioner.": "text_conditioner",
    "lora_te_": "te1",
    **{f"lora_te{n}_": f"te{n}" for n in (1, 2, 3, 4)},
    "text_encoder.": "text_encoder",
    **{f"text_encoder_{n}.": f"text_encoder_{n}" for n in (2, 3, 4)},
    "lora_text_encoder_": "te1",
    **{f"lora_text_encoder_{n}_": f"te{n}" for n in (2, 3, 4)},
    # Where checkpoints of Stable Diffusion keep their encoders, transformers' ones and OpenCLIP's.
    "conditioner.embedders.0.transformer.": "te1",
    "conditioner.embedders.1.model.": "te2",
    "cond_stage_model.transformer.": "te1",
    "cond_stage_model.model.": "te1",
    "clip_l.": "encoder:clip_l",
    "clip_g.": "encoder:clip_g",
    "t5.": "encoder:t5xxl",
    "llama.": "encoder:llama",
}
# ComfyUI's, of any encoder.
ENCODER_PREFIX = re.compile(r"text_encoders\.(\w+)\.transformer\.")
_BY_LENGTH = sorted(PREFIXES, key=len, reverse=True)
_FIRST = frozenset(prefix[0] for prefix in PREFIXES)

MODULATION = "modulation"
"""The parameter that LightX2V's `.diff_m` is the difference of; the suffix stands in the place of its name."""
NO_SUFFIX = "no known suffix"
DROPPED: tuple[tuple[str, str], ...] = (
    ("_aux.", "helper data of a slider tool, no weight"),
    ("lora_controlnet", "adapter of a ControlNet, which is another model"),
)
# PEFT's VeLoRA and MonteCLoRA save these beside the factors of an ordinary LoRA.
OF_TRAINING = re.compile(r"\.lora_(?:velora_embed|monteclora_sampler)(?:\.|$)")
EMBEDDING = re.compile(r"^(?:<[^>]+>|bundle_emb\..+|emb_params)$")


class Key(NamedTuple):
    """A key taken apart."""

    prefix: str
    component: str
    name: str
    slot: str
    style: Style | None
    adapter: str


@dataclass
class RawModule:
    """All keys of one module, under its name in the file."""

    prefix: str
    component: str
    name: str
    keys: dict[str, str]
    """Slot -> key in the file; `down.1` is that of the second part of a fused module."""
    adapter: str = ""
    """The adapter's own name inside the keys, as PEFT's training checkpoints have it."""
    repeated: dict[str, str] = field(default_factory=dict[str, str])
    """Slot -> a second key that holds it."""


@lru_cache(maxsize=1 << 16)
def split_prefix(name: str) -> tuple[str, str, str]:
    """Strip known prefixes again and again; the first that names a component decides.

    Returns:
        The first prefix, the component it names ("" if none does), and the rest of the name.
    """
    first = component = ""
    while name and name[0] in _FIRST:
        encoder = ENCODER_PREFIX.match(name)
        prefix = encoder[0] if encoder else next((prefix for prefix in _BY_LENGTH if name.startswith(prefix)), None)
        if prefix is None:
            break
        first, component = first or prefix, component or (f"encoder:{encoder[1]}" if encoder else PREFIXES[prefix])
        name = name[len(prefix) :]
    return first, component, name


@lru_cache(maxsize=1 << 16)
def split_key(key: str) -> Key | None:
    """Take a key apart, or None where no known suffix ends it."""
    key = WRAPPERS.sub("", key)
    slot, dot = None, key.find(".")
    while dot >= 0 and (slot := SUFFIXES.get(key[dot:])) is None:
        dot = key.find(".", dot + 1)
    numbered = NUMBERED.search(key)
    if numbered is not None:
        slot = SUFFIXES[f".{numbered[1]}"]
        style = STYLE_OF.get(f".{numbered[1]}.weight")
        return Key(*split_prefix(key[: numbered.start()]), f"{slot}.{int(numbered[2])}", style, "")
    slotted = SLOTTED.search(key)
    if slotted is not None and (slot is None or slotted.start() < dot):  # `.weight` alone ends `.lora_A.default.weight`
        slot = SUFFIXES.get(f".{slotted[1]}{slotted[3]}", SUFFIXES.get(f".{slotted[1]}", ""))
        style = STYLE_OF.get(f".{slotted[1]}.weight", "peft")
        return Key(*split_prefix(key[: slotted.start()]), slot, style, slotted[2])
    if slot in ("down", "up") and key[dot:] in (".down.weight", ".up.weight") and not NAMED_FACTOR.search(key):
        slot, dot = "weight", len(key) - len(".weight")
    if slot == "weight" and REPLACED.search(key):
        slot = "set_weight"
    if slot is None:
        inner, _, adapter = key.rpartition(".")
        split = split_key(inner) if inner else None
        return split._replace(adapter=adapter) if split is not None and split.slot in SLOTTED_ALONE else None
    return Key(*split_prefix(key[:dot]), slot, STYLE_OF.get(key[dot:]), "")


def drop_reason(key: str) -> str | None:
    """Why a key is left out on purpose, or None."""
    if OF_TRAINING.search(key) is not None:
        return "state of its training, no part of the change"
    return next((reason for start, reason in DROPPED if key.startswith(start)), None)


def is_embedding(key: str) -> bool:
    """Whether a key holds a learned token embedding."""
    return EMBEDDING.match(key) is not None


def read_keys(keys: Iterable[str]) -> tuple[list[RawModule], dict[str, str], list[Key]]:
    """Group keys by module.

    Returns:
        The modules; the keys that belong to none, with the reason; and every key taken apart, for telling the format.
    """
    modules: dict[tuple[str, str], RawModule] = {}
    left: dict[str, str] = {}
    parsed: list[Key] = []
    for key in keys:
        reason = drop_reason(key)
        split = None if reason else split_key(key)
        if split is None:
            left[key] = reason or NO_SUFFIX
            continue
        parsed.append(split)
        if split.slot == "diff_m" and not split.name.endswith(MODULATION):
            split = split._replace(name=f"{split.name}.{MODULATION}")
        module = modules.setdefault(
            (split.component, split.name), RawModule(split.prefix, split.component, split.name, {}, split.adapter)
        )
        if split.slot in module.keys:
            left[key] = f"the same slot as {module.keys[split.slot]}"
            module.repeated[split.slot] = key
        else:
            module.keys[split.slot] = key
    kept, plain = _without_plain_weights(list(modules.values()), left)
    return kept, left | dict.fromkeys(plain, NO_SUFFIX), parsed


def _without_plain_weights(modules: list[RawModule], left: Mapping[str, str]) -> tuple[list[RawModule], list[str]]:
    """Apart from the changes: what any checkpoint has, weights of its own.

    A norm's scale is a replaced one beside changes, or in a file of such scales alone.
    """
    kept = [module for module in modules if module.keys.keys() != {"weight"}]
    plain = [module.keys["weight"] for module in modules if module.keys.keys() == {"weight"}]
    is_changed = any(slot != "alpha" and not _may_be_own(slot, key) for m in kept for slot, key in m.keys.items())
    if kept and not is_changed and (plain or NO_SUFFIX in left.values()):
        plain += [key for module in kept for key in module.keys.values()]
        kept = []
    return kept, plain


def _may_be_own(slot: str, key: str) -> bool:
    """Whether a model's own checkpoint may hold such a key."""
    return slot == "weight" or (slot == "set_weight" and REPLACED.search(key) is not None)
