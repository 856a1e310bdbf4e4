"""plan(pipe_or_model, adapter): what would happen, asked before anything does."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .families import FAMILIES, Family
from .files import Contents, read
from .gates import uncompiled
from .loading import family_of, may_widen, plan_contents
from .locating import HubOptions
from .mixins.components import components_of
from .plans import AttachPlan


def plan(
    target: Any,
    adapter: Adapter | str | os.PathLike[str] | Mapping[str, Tensor] | Sequence[str],
    *,
    component: str | None = None,
    weight_name: str | None = None,
    families: Sequence[Family] = FAMILIES,
) -> AttachPlan:
    """What attaching an adapter to a pipeline or model would do; nothing is touched, and the meta device will do.

    Args:
        target: a pipeline, or one model.
        adapter: an `Adapter`, a path, folder, Hub id, state dictionary, or just a list of keys.
        component: what files call the model, if `target` is one and its class does not tell.
        weight_name: file name inside a folder or repository.
        families: where the target's family is looked up; pass your own beside `FAMILIES` to add one.

    Returns:
        A plan with `.matched`, `.unmatched`, `.problems`, `.ignored` and `.keys` (key -> what becomes of it).

    Raises:
        AdapterFileError: the file cannot be read.
    """
    if isinstance(target, nn.Module):
        target = uncompiled(target)
        family = family_of(target, families)
        models: Mapping[str, nn.Module] = {component or (family.denoiser if family else "transformer"): target}
    else:
        models = components_of(target)
        family = next((f for model in models.values() if (f := family_of(model, families)) is not None), None)
    if isinstance(adapter, Adapter):
        contents: Contents | Adapter = adapter
    elif isinstance(adapter, (str, os.PathLike, Mapping)):
        contents = read(adapter, HubOptions(weight_name=weight_name))
    else:
        placeholder = torch.empty(0, device="meta")
        contents = Contents(dict.fromkeys(adapter, placeholder), label="a list of keys", names_only=True)
    return plan_contents(models, contents, family, may_widen=may_widen(type(target).__name__))
