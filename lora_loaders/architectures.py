"""Models without weights, from configuration files: names and shapes of full-size models in milliseconds."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import LoraLoadersError
from .families import FAMILIES, Family

INDEX = "model_index.json"
CONFIG = "config.json"
NOTHING = "Nothing was changed."


@dataclass(frozen=True)
class Blueprint:
    """A model's configuration file and what is in it."""

    path: Path
    config: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Name of the folder, which in a pipeline is the component's."""
        return self.path.absolute().parent.name


def find_blueprints(path: Path, families: Sequence[Family] = FAMILIES) -> tuple[dict[str, Blueprint], str | None]:
    """Configurations of the components that an adapter may change, and the pipeline's class.

    Args:
        path: a pipeline's folder, a model's folder, or a configuration file.
        families: those whose components they are.

    Returns:
        Component -> configuration, under "" for a single model; and the class, None for a single model.

    Raises:
        LoraLoadersError: no configuration there, or one that cannot be read.
    """
    if path.is_dir():
        found = next((path / name for name in (INDEX, CONFIG) if (path / name).is_file()), None)
        if found is None:
            mend = "Give a pipeline's folder, a model's folder, or the path of a config.json."
            raise LoraLoadersError(f"{path} holds neither {INDEX} nor {CONFIG}", mend=mend, state=NOTHING)
        path = found
    config = _read_json(path)
    if path.name != INDEX:
        return {"": Blueprint(path, config)}, None
    known = {component for family in families for component in family.components}
    present = [name for name, entry in config.items() if name in known and _is_present(entry)]
    files = {name: path.parent / name / CONFIG for name in present}
    return {name: Blueprint(file, _read_json(file)) for name, file in files.items()}, str(config.get("_class_name"))


def _is_present(entry: Any) -> bool:
    """Whether a line of the index, `[library, class]`, names a component; `[null, null]` says there is none."""
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None  # pyright: ignore[reportUnknownArgumentType]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise LoraLoadersError(
            f"no file {path}",
            mend="Give a pipeline's folder, a model's folder, or the path of a config.json.",
            state=NOTHING,
        ) from None
    except ValueError as error:
        raise LoraLoadersError(f"{path} is no JSON: {error}", mend="Fetch the file again.", state=NOTHING) from error
    if not isinstance(content, dict):
        raise LoraLoadersError(f"{path} is no configuration: it holds a {type(content).__name__}", state=NOTHING)
    return content


def build(blueprint: Blueprint) -> nn.Module:
    """The model of a configuration on the meta device: names and shapes, no weights.

    Raises:
        LoraLoadersError: a class that the installed libraries do not have, or settings that it does not take.
    """
    config = blueprint.config
    names = [config["_class_name"]] if "_class_name" in config else config.get("architectures") or []
    if not names:
        raise LoraLoadersError(
            f"{blueprint.path} names no class",
            problems=[f"it has {', '.join(list(config)[:8]) or 'no entries'}"],
            mend='A diffusers configuration has "_class_name", a transformers one "architectures".',
            state=NOTHING,
        )
    try:
        with torch.device("meta"):
            return (
                _from_diffusers(names[0], config) if "_class_name" in config else _from_transformers(names[0], config)
            )
    except LoraLoadersError:
        raise
    except Exception as error:  # third-party constructors raise anything
        raise LoraLoadersError(
            f"{blueprint.path}: {names[0]} cannot be built from it",
            problems=[f"{type(error).__name__}: {line}" for line in str(error).splitlines()[:1]],
            mend="Is it the configuration of another version of the library?",
            state=NOTHING,
        ) from error


def _class_in(library: Any, name: str) -> Any:
    found = getattr(library, name, None)
    if found is None:
        what = f"{library.__name__} {library.__version__} has no class {name}"
        raise LoraLoadersError(what, mend=f"Install a version of {library.__name__} that has it.", state=NOTHING)
    return found


def _from_diffusers(name: str, config: Mapping[str, Any]) -> nn.Module:
    import diffusers

    return _class_in(diffusers, name).from_config(dict(config))


def _from_transformers(name: str, config: Mapping[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        mend = "Install it: pip install 'lora-loaders[transformers]'."
        raise LoraLoadersError(f"{name} is a class of transformers", mend=mend, state=NOTHING) from error

    cls = _class_in(transformers, name)
    return cls(cls.config_class.from_dict(dict(config)))


def is_text_encoder(component: str) -> bool:
    """Whether a component of this name encodes text."""
    return component.startswith("text_encoder")


def build_all(blueprints: Mapping[str, Blueprint], components: Collection[str]) -> dict[str, nn.Module]:
    """The models of some components on the meta device."""
    return {name: build(blueprint) for name, blueprint in blueprints.items() if name in components}


__all__ = ["Blueprint", "build", "build_all", "find_blueprints", "is_text_encoder"]
