"""A base model's weights under diffusers' names, left in their files and read when they are asked for.

A checkpoint is read as the adapter that would make it out of zeros: every weight is the `diff` of a full difference.
So the names axis that adapters go through names weights too, and fused projections are cut by views.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .adapter import Adapter
from .architectures import CONFIG, INDEX, Blueprint, find_blueprints, is_text_encoder
from .conversion import parse
from .deltas import Delta, FullDelta
from .detection import family_named
from .errors import UNTOUCHED, AdapterFileError, AdapterMismatchError, UnsupportedBaseError
from .families import FAMILIES, Family
from .files import Contents, open_safetensors
from .formats import read_modules
from .layers.base_weight import read_weight
from .layers.kinds import EMBEDDING, kind_of
from .layers.parameter import base_value
from .layout import named_bases
from .loading import family_of

# Where all-in-one checkpoints keep their parts -> the prefix by which adapter files call that part.
PARTS: Mapping[str, str] = {
    "model.diffusion_model.": "diffusion_model.",
    "diffusion_model.": "diffusion_model.",
    "cond_stage_model.transformer.": "text_encoder.",
    "cond_stage_model.model.": "text_encoder.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
    "conditioner.embedders.1.model.": "text_encoder_2.",
    "text_encoders.": "text_encoders.",
    "text_encoder.": "text_encoder.",
}
ASIDE = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "model_ema.", "alphas_", "betas", "sqrt_")
"""Beginnings of keys that no adapter changes."""
TURNED = ("conditioner.embedders.1.model.text_projection", "cond_stage_model.model.text_projection")
"""OpenCLIP's projection lies the other way round, which no rule of names says."""
FUSED_PARAMETER = re.compile(r"(?<=\battn\.)in_proj_(weight|bias)$")
"""torch's attention has one parameter for its three projections, and no module."""
WEIGHT_ENDINGS = (".weight", ".scale")
EMBEDDINGS = re.compile(
    r"^embed$|(?:^|\.)(?:(?:token|position|prior_token)_embedding|(?:word|position|token_type)_embeddings|embedding_table"
    r"|embed_tokens|shared|relative_attention_bias|cond_type_embed|embed_image_indicator|style_embedder"
    r"|addition_t_embedding|embed\.embeddings|visual\.pos_embed)$"
)
"""Names of the embeddings in text encoders and denoisers: a file's tensors do not tell them from linear layers."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights by component and diffusers' path.

    Attributes:
        weights: each weight as the `diff`, each bias as the `bias` of a `FullDelta`.
        label: for messages.
        files: what was read, for the record.
        embeddings: the embeddings among the modules, as (component, path).
    """

    weights: Adapter
    label: str
    files: tuple[Path, ...] = ()
    embeddings: frozenset[tuple[str, str]] = frozenset()

    def parts(self, component: str, path: str) -> FullDelta | None:
        """Weight and bias of a module, None where there is none."""
        found = self.weights.deltas.get(component, {}).get(path)
        return found if isinstance(found, FullDelta) else None


Weights = str | os.PathLike[str] | nn.Module | Mapping[str, nn.Module] | Checkpoint


def open_checkpoint(
    source: Weights,
    *,
    family: str | None = None,
    component: str | None = None,
    families: Sequence[Family] = FAMILIES,
) -> Checkpoint:
    """Weights of a pipeline's folder, a model's folder, a file (diffusers' or original names), or of live models.

    Args:
        source: a path; a model, or component -> model, whose fused adapters count as weights; or an open checkpoint.
        family: the family, where names alone do not tell it.
        component: what adapters call a lone model, if its class does not tell.
        families: the families to tell apart; pass your own beside `FAMILIES` to add one.

    Raises:
        AdapterFileError: nothing there that holds weights.
        UnsupportedBaseError: a live model stores weights in no known way.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        found = family_of(source, families)
        source = {component or (found.denoiser if found else "transformer"): source}
    if isinstance(source, Mapping):
        return _of_modules(source, family, families)
    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in (INDEX, CONFIG)):
        return _of_files(_files_in(path), path, family, families)
    if path.is_dir():
        return _of_folder(path, family, component, families)
    return _of_files([path], path, family, families)


def _of_modules(models: Mapping[str, nn.Module], family: str | None, families: Sequence[Family]) -> Checkpoint:
    told = (found for model in models.values() if (found := family_of(model, families)) is not None)
    known = family_named(family, families) if family else next(told, None)
    deltas: dict[str, dict[str, Delta]] = {}
    embeddings: set[tuple[str, str]] = set()
    unreadable: list[str] = []
    for component, model in models.items():
        own = deltas.setdefault(component, {})
        for path, base in (("", model), *named_bases(model)):
            try:
                parts = _parts_of(path, base)
            except UnsupportedBaseError as error:
                unreadable.append(f"{component}.{path}: {error.what}")
                continue
            named = {_file_path(part, component, known): delta for part, delta in parts.items()}
            own |= named
            if kind_of(base) is EMBEDDING:
                embeddings |= {(component, name) for name in named}
    label = ", ".join(type(model).__name__ for model in models.values())
    if unreadable:
        raise UnsupportedBaseError(
            f"{label}: {len(unreadable)} weights cannot be read",
            problems=unreadable,
            mend="Give the folder or file that the model was loaded from, or the model before it was quantised.",
            state=UNTOUCHED,
        )
    deltas = {component: own for component, own in deltas.items() if own}
    adapter = Adapter(deltas, family=known.name if known else None, source=label)
    return Checkpoint(adapter, label, embeddings=frozenset(embeddings))


def _parts_of(path: str, base: nn.Module) -> dict[str, FullDelta]:
    """Weight and bias of a module, or the raw parameters of one that is no layer, by the paths that adapters have."""
    if isinstance(getattr(base, "weight", None), Tensor):
        bias = getattr(base, "bias", None)
        held = bias.detach() if isinstance(bias, Tensor) else None
        return {path: FullDelta(diff=read_weight(base), bias=held)} if path else {}
    return {
        f"{path}.{name}".lstrip("."): FullDelta(diff=base_value(base, name), of_parameter=True)
        for name, parameter in base.named_parameters(recurse=False)
        if parameter.is_floating_point()
    }


def _of_folder(folder: Path, family: str | None, component: str | None, families: Sequence[Family]) -> Checkpoint:
    """A pipeline or a model as diffusers saves it: module paths are those of the keys."""
    blueprints, pipeline = find_blueprints(folder, families)
    known = family_named(family, families) if family else _family_by_class(blueprints, families)
    if pipeline is None:
        blueprints = {component or _component_of(blueprints[""], known): blueprints[""]}
    deltas: dict[str, dict[str, Delta]] = {}
    files: list[Path] = []
    for name, blueprint in blueprints.items():
        own_files = _files_in(blueprint.path.parent)
        parts = _modules_of(_tensors_in(own_files))
        deltas[name] = {_file_path(path, name, known): delta for path, delta in parts.items()}
        files += own_files
    adapter = Adapter(deltas, family=known.name if known else None, source=str(folder))
    return Checkpoint(adapter, str(folder), tuple(files), _named_embeddings(adapter))


def _modules_of(tensors: Mapping[str, Tensor]) -> dict[str, FullDelta]:
    fields: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, slot = key, "diff"
        if key.endswith((".weight", ".bias")):
            path, _, name = key.rpartition(".")
            slot = "diff" if name == "weight" else "bias"
        fields.setdefault(path, {})[slot] = tensor
    return {path: FullDelta(diff=slots.get("diff"), bias=slots.get("bias")) for path, slots in fields.items()}


def _family_by_class(blueprints: Mapping[str, Blueprint], families: Sequence[Family]) -> Family | None:
    def agreement(family: Family, blueprint: Blueprint) -> int:
        facts = family.config_facts.items()
        return sum(1 if blueprint.config.get(key) == value else -1 for key, value in facts)

    fitting = [
        (agreement(family, blueprint), family)
        for blueprint in blueprints.values()
        for family in families
        if blueprint.config.get("_class_name") in family.model_classes
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def _component_of(blueprint: Blueprint, family: Family | None) -> str:
    if family is not None:
        return family.denoiser
    return blueprint.folder if is_text_encoder(blueprint.folder) else "transformer"


def _of_files(files: list[Path], path: Path, family: str | None, families: Sequence[Family]) -> Checkpoint:
    """A checkpoint under its publisher's names, or one model's under diffusers': the family's table reads them."""
    tensors = _tensors_in(files)
    changes = sum(len(module.keys) for module in read_modules(list(tensors))[0])
    if changes * 2 > len(tensors):
        raise AdapterMismatchError(
            f"{path} is an adapter, no model: {changes} of its {len(tensors)} keys are changes of weights",
            mend="Give a checkpoint; what is to be done to adapters, resize and merge do.",
            state=UNTOUCHED,
        )
    contents = Contents(_as_differences(tensors), label=str(path))
    adapter = parse(contents, family, families=families)
    return Checkpoint(adapter, str(path), tuple(files), _named_embeddings(adapter))


def _named_embeddings(adapter: Adapter) -> frozenset[tuple[str, str]]:
    return frozenset((component, path) for component, path, _ in adapter.modules() if EMBEDDINGS.search(path))


def _as_differences(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys that an adapter of full differences would have."""
    parted = any(key.startswith(tuple(PARTS)) for key in tensors)
    spelled: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        part = next((part for part in PARTS if key.startswith(part)), None)
        if (part is None and parted) or (part is None and key.startswith(ASIDE)) or tensor.ndim == 0 or key in TURNED:
            continue
        name = (PARTS[part] if part else "diffusion_model.") + key.removeprefix(part or "")
        name = FUSED_PARAMETER.sub(r"in_proj.\1", name)
        ending = next((ending for ending in WEIGHT_ENDINGS if name.endswith(ending)), None)
        if name.endswith(".bias"):
            spelled[name.removesuffix(".bias") + ".diff_b"] = tensor
        else:
            spelled[name.removesuffix(ending or "") + ".diff"] = tensor
    return spelled


def _files_in(folder: Path) -> list[Path]:
    """The safetensors files of one model: the shards that its index lists, or the one file.

    Raises:
        AdapterFileError: none, or several without an index.
    """
    indices = sorted(folder.glob("*.safetensors.index*.json"), key=lambda path: len(path.name))
    if indices:
        shards = json.loads(indices[0].read_text("utf-8"))["weight_map"].values()
        return [folder / name for name in dict.fromkeys(shards)]
    files = sorted(folder.glob("*.safetensors"), key=lambda path: len(path.name))
    # `model.fp16.safetensors` beside `model.safetensors` is the same in another precision.
    plain = [file for file in files if "." not in file.stem] or files
    if len(plain) != 1:
        raise AdapterFileError(
            f"{folder} holds {len(plain) or 'no'} safetensors files and no index",
            problems=[file.name for file in plain],
            mend="Give the folder of a model that diffusers or transformers saved, or one file.",
            state=UNTOUCHED,
        )
    return plain


def _tensors_in(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise AdapterFileError(f"no file {file}", mend="Give a checkpoint's file or folder.", state=UNTOUCHED)
        tensors |= open_safetensors(file)[0]
    return tensors


def _file_path(path: str, component: str, family: Family | None) -> str:
    return family.file_path(component, path) if family else path
