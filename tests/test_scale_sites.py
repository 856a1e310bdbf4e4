"""Wherever the installed diffusers scales adapters through peft, they are scaled without it, attached or patched.

The places are read from diffusers' source, so that a new release shows those that nobody has seen yet.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from tiny_models import patching
from torch import nn

import lora_loaders as ll
from lora_loaders.files import Contents
from lora_loaders.integrations.scale import SPELLINGS, scale_argument
from lora_loaders.layout import shared_of
from lora_loaders.loading import load

ROOT = Path(diffusers.__file__).parent
SCALES, DECORATES = "scale_lora_layers", "apply_lora_scale"
SCALE = 0.25
OWN = {  # stands aside: patched functions and methods, and the decorator behind our hook
    ("loaders.lora_base", None, "_load_lora_into_text_encoder"),
    ("utils.peft_utils", None, DECORATES),
}


class Site(NamedTuple):
    """A function of diffusers that scales adapters, and the class that it is of."""

    module: str
    owner: str | None
    function: str
    argument: str | None
    """Where a model's forward finds the scale."""

    def load(self) -> Any:
        return getattr(import_module(f"diffusers.{self.module}"), self.owner or self.function)


def sites() -> Iterator[Site]:
    for path in sorted(ROOT.rglob("*.py")):
        source = path.read_text("utf-8")
        if SCALES in source or DECORATES in source:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield from _in_body(module, None, ast.parse(source).body)


def _in_body(module: str, owner: str | None, body: list[ast.stmt]) -> Iterator[Site]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _in_body(module, node.name, node.body)
        elif isinstance(node, ast.FunctionDef):
            decorators = [d for d in node.decorator_list if isinstance(d, ast.Call) and _name(d) == DECORATES]
            if decorators or any(isinstance(n, ast.Call) and _name(n) == SCALES for n in ast.walk(node)):
                said = [ast.literal_eval(d.args[0]) for d in decorators if d.args]
                named = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg.endswith("attention_kwargs")]
                yield Site(module, owner, node.name, next(iter([*said, *named]), None))


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


ALL = list(sites())
FORWARDS = [site for site in ALL if site.function == "forward"]
MODULAR = [site for site in ALL if site.module.startswith("modular_pipelines.")]
ENCODING = [site for site in ALL if site.function == "encode_prompt" and site not in MODULAR]
WAYS: dict[str, Callable[[], Any]] = {"attach": nullcontext, "patch_diffusers": patching}
each_way = pytest.mark.parametrize("way", WAYS)


def name_of(site: Site) -> str:
    return f"{site.module.rpartition('.')[2]}.{site.owner}"


def test_every_place_that_scales_is_of_a_kind_that_is_tested_here() -> None:
    assert len(FORWARDS) > 40
    assert len(ENCODING) > 90
    rest = {site[:3] for site in ALL if site not in (*FORWARDS, *MODULAR, *ENCODING)}
    assert rest == OWN
    assert {site.argument for site in FORWARDS} == set(SPELLINGS)


class Part(nn.Module):
    """Stands where a text encoder or a denoiser would."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)


def load_into(model: Any, way: str) -> None:
    if way == "attach":
        ll.attach(model)
    load({"model": model}, Contents({"to_q.lora_A.weight": torch.ones(2, 4), "to_q.lora_B.weight": torch.ones(4, 2)}))


def scale_of(model: nn.Module) -> float:
    shared = shared_of(model)
    assert shared is not None
    return shared.scale


class Reached(Exception):
    """The code that is to be scaled was come to."""


class Probe:
    """A tokenizer that says how the encoders are scaled when their prompt is read."""

    model_max_length = 8

    def __init__(self, *models: nn.Module) -> None:
        self.models = models

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise Reached([scale_of(model) for model in self.models])

    tokenize = __call__
    apply_chat_template = __call__


@contextmanager
def scaled_then_not(models: list[nn.Module]) -> Iterator[None]:
    """In the block the probe finds the scale; after its error nothing is left of it."""
    with pytest.raises(Reached) as reached, torch.no_grad():
        yield
    assert reached.value.args == ([SCALE] * len(models),)
    assert [scale_of(model) for model in models] == [1.0] * len(models)


@each_way
@pytest.mark.parametrize("site", ENCODING, ids=name_of)
def test_every_pipelines_encode_prompt_is_scaled(site: Site, way: str) -> None:
    with WAYS[way]():
        cls = site.load()
        pipe, encoders = object.__new__(cls), [Part(), Part()]
        vars(pipe).update(dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=True)))
        tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3", "clip_tokenizer")
        vars(pipe).update(dict.fromkeys(tokenizers, Probe(*encoders)))
        vars(pipe).update(_internal_dict=FrozenDict(force_zeros_for_empty_prompt=False))
        vars(pipe).update(text_encoder_3=None, tokenizer_max_length=8, batch_size=1)
        if way == "attach":
            ll.attach(pipe)
        for encoder in encoders:
            load_into(encoder, way)
        asked = inspect.signature(pipe.encode_prompt).parameters
        given: dict[str, Any] = {name: "a cat" if "prompt" in name else 1 for name in asked if _is_needed(asked[name])}
        given |= {name: value for name, value in {"device": "cpu", "lora_scale": SCALE}.items() if name in asked}
        with scaled_then_not(encoders):
            pipe.encode_prompt(**given)


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty or parameter.name == "prompt"


@each_way
@pytest.mark.parametrize("site", MODULAR, ids=name_of)
def test_every_modular_block_that_encodes_prompts_is_scaled(site: Site, way: str) -> None:
    with WAYS[way]():
        module = import_module(f"diffusers.{site.module}")
        blocks = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
        blocks = [cls for cls in blocks if issubclass(cls, ModularPipelineBlocks) and scale_argument(cls())]
        assert blocks
        for cls in blocks:
            block = cls()
            pipe: Any = block.init_pipeline()
            names = [str(part.name) for part in block.expected_components]
            encoders = [Part() for name in names if name in ("text_encoder", "text_encoder_2")]
            pipe.text_encoder, pipe.text_encoder_2 = encoders
            for name in names:
                if name.startswith("tokenizer"):
                    setattr(pipe, name, Probe(*encoders))
            if way == "attach":
                ll.attach(pipe)
            for encoder in encoders:
                load_into(encoder, way)
            with scaled_then_not(encoders):
                pipe(prompt="a cat", **{str(scale_argument(block)): {"scale": SCALE}})


@each_way
@pytest.mark.parametrize("site", FORWARDS, ids=name_of)
def test_every_models_forward_is_scaled(site: Site, way: str) -> None:
    with WAYS[way]():
        cls, spelling = site.load(), str(site.argument)
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.to_q = nn.Linear(4, 4)
        load_into(model, way)
        seen: list[Any] = []

        def look(model: nn.Module, args: Any, given: dict[str, Any]) -> None:
            seen.append((scale_of(model), given[spelling]))

        model.register_forward_pre_hook(look, with_kwargs=True)
        assert spelling in inspect.signature(cls.forward).parameters
        with pytest.raises(TypeError, match="missing"):  # all other arguments
            model(**{spelling: {"scale": SCALE, "more": 1}})
        assert seen == [(SCALE, {"more": 1})]
        assert scale_of(model) == 1.0
