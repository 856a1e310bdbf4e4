"""What we write, read by ComfyUI's own loader and by sd-scripts': are all keys consumed, and is ΔW equal?

    python scripts/parity/peer_loaders.py [--comfyui PATH] [--sd-scripts PATH] [--output table.md] [--only FAMILY …]

The paths are checkouts of the two programs; one that is not given is left out, and said so. Their models are built
small, on the meta device. For each family and algebra an adapter of random tensors over the program's own modules is
written in every spelling that the program claims to read, and its loader and its arithmetic are run over the file in
float64. Exits with 1 where a key is left over or ΔW differs, unless EXPLAINED says why.
"""

import argparse
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from peer_models import COMFYUI, ENCODER_SIZES, ENCODERS, LLAMA_SIZES, SD_SCRIPTS, Encoders
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.adapter import Adapter
from lora_loaders.deltas import DoraDelta
from lora_loaders.detection import family_named
from lora_loaders.errors import ConversionError
from lora_loaders.writing import to_tensors

RANK, ALPHA = 2, 3.0
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
Tensors = dict[str, Tensor]
Maker = Callable[[tuple[int, ...]], Tensors | None]
"""Weight shape -> tensors by suffix; None where the algebra has no form for it."""
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64) * 0.3


def lora(shape: tuple[int, ...], rank: int = RANK) -> Tensors:
    out, inputs, *kernel = shape
    ones = [1] * len(kernel)
    return {".lora_down.weight": randn(rank, inputs, *kernel), ".lora_up.weight": randn(out, rank, *ones)}


def tucker(shape: tuple[int, ...]) -> Tensors | None:
    out, inputs, *kernel = shape
    if len(kernel) != 2 or max(kernel) == 1:  # ComfyUI's has two dimensions
        return None
    down, up = randn(RANK, inputs, 1, 1), randn(out, RANK, 1, 1)
    return {".lora_down.weight": down, ".lora_mid.weight": randn(RANK, RANK, *kernel), ".lora_up.weight": up}


def loha(shape: tuple[int, ...]) -> Tensors:
    out, columns = shape[0], torch.Size(shape[1:]).numel()
    return {
        f".hada_{name}": randn(*size) for name in ("w1", "w2") for name, size in
        ((f"{name}_a", (out, RANK)), (f"{name}_b", (RANK, columns)))
    }  # fmt: skip


def loha_tucker(shape: tuple[int, ...]) -> Tensors | None:
    out, inputs, *kernel = shape
    if len(kernel) != 2 or max(kernel) == 1:
        return None
    slots = {"w1_a": (RANK, out), "w1_b": (RANK, inputs), "w2_a": (RANK, out), "w2_b": (RANK, inputs)}
    cores = {"t1": (RANK, RANK, *kernel), "t2": (RANK, RANK, *kernel)}
    return {f".hada_{name}": randn(*size) for name, size in {**slots, **cores}.items()}


def lokr(shape: tuple[int, ...]) -> Tensors | None:
    out, inputs, *kernel = shape
    if out % 4 or inputs % 4:
        return None
    columns = inputs // 4 * torch.Size(kernel).numel()
    sizes = {"w1": (4, 4), "w2_a": (out // 4, RANK), "w2_b": (RANK, columns)}
    return {f".lokr_{name}": randn(*size) for name, size in sizes.items()}


def lokr_whole(shape: tuple[int, ...]) -> Tensors | None:
    out, inputs, *kernel = shape
    return (
        None if out % 4 or inputs % 4 else {".lokr_w1": randn(4, 4), ".lokr_w2": randn(out // 4, inputs // 4, *kernel)}
    )


def glora(shape: tuple[int, ...]) -> Tensors:
    out, inputs, *kernel = shape
    ones = [1] * len(kernel)
    slots = {"a1": (inputs, RANK, *ones), "a2": (RANK, inputs, *ones), "b1": (out, RANK, *ones)}
    return {f".{name}.weight": randn(*size) for name, size in {**slots, "b2": (RANK, inputs, *kernel)}.items()}


def oft(shape: tuple[int, ...]) -> Tensors | None:
    return None if shape[0] % 4 else {".oft_blocks": randn(shape[0] // 4, 4, 4)}


def boft(shape: tuple[int, ...]) -> Tensors | None:
    return None if shape[0] % 16 else {".oft_blocks": randn(2, shape[0] // 4, 4, 4)}


def dora(shape: tuple[int, ...]) -> Tensors:
    return {**lora(shape), ".dora_scale": randn(shape[0], *[1] * (len(shape) - 1)).abs() + 1}


def dora_per_input(shape: tuple[int, ...]) -> Tensors | None:
    if shape[0] == shape[1]:  # the shape does not tell which
        return None
    return {**lora(shape), ".dora_scale": randn(1, shape[1], *[1] * (len(shape) - 2)).abs() + 1}


def widened(shape: tuple[int, ...]) -> Tensors | None:
    out, inputs, *kernel = shape
    if kernel:
        return None
    wider = (out, inputs + 4)
    return {**lora(wider), ".reshape_weight": torch.tensor(wider)}


def norm(shape: tuple[int, ...]) -> Tensors | None:
    return {".w_norm": randn(*shape), ".b_norm": randn(*shape)} if len(shape) == 1 else None


@dataclass(frozen=True)
class Algebra:
    """One column of the question: tensors for a weight, and alpha."""

    name: str
    make: Maker
    alpha: float | None = ALPHA
    dtype: torch.dtype = torch.float64
    vectors: bool = False
    """Whether it changes vectors (a norm's weight), not matrices."""
    widens: bool = False
    """Whether it is for the modules whose input a file may widen."""


PLAIN = Algebra("LoRA, scaling 1", lora, float(RANK))
ALGEBRAS = (
    Algebra("LoRA", lora),
    PLAIN,
    Algebra("LoCon, Tucker", tucker),
    Algebra("LoRA, widened inputs", widened, widens=True),
    Algebra("LoRA with bias", lambda shape: {**lora(shape), ".diff_b": randn(shape[0])}),
    Algebra("DoRA per output", dora),
    Algebra("DoRA per input", dora_per_input),
    Algebra("LoHa", loha),
    Algebra("LoHa, Tucker", loha_tucker),
    Algebra("LoKr", lokr),
    Algebra("LoKr, whole", lokr_whole, None),
    Algebra("GLoRA", glora),
    Algebra("OFT", oft, None, torch.float32),  # ComfyUI inverts in float32
    Algebra("BOFT", boft, 0.0, torch.float32),  # LyCORIS always writes an alpha
    Algebra("full difference", lambda shape: {".diff": randn(*shape), ".diff_b": randn(shape[0])}, None),
    Algebra("replaced weight", lambda shape: {".set_weight": randn(*shape)}, None),
    Algebra("norm difference", norm, None, vectors=True),
)


@dataclass(frozen=True)
class Cell:
    """What became of one file."""

    left: tuple[str, ...] = ()
    keys: int = 0
    error: float = 0.0
    missing: tuple[str, ...] = ()
    """Modules that the file changes and the loader does not."""
    reason: str = ""
    """Why nothing was written."""
    note: str = ""
    """What the peer does in another way, the oracle following it."""
    tolerance: float = 0.0

    @property
    def is_right(self) -> bool:
        return not self.left and not self.missing and self.error <= self.tolerance


@dataclass(frozen=True)
class Module:
    """A module of the peer's model: its weight's key there without `.weight`, and its name in an original file."""

    key: str
    stem: str
    shape: tuple[int, ...]
    has_bias: bool


@dataclass(frozen=True)
class Part:
    """Where one module of diffusers lies: rows of which module of the peer's."""

    module: Module
    rows: Tensor


@dataclass(frozen=True)
class Subject:
    """One model under test: its modules, and which rows of them diffusers' modules are."""

    label: str
    family: str
    spellings: tuple[str, ...]
    modules: tuple[Module, ...]
    parts: Mapping[tuple[str, str], Part]
    unknown: tuple[str, ...]
    load: Callable[[Tensors, Callable[[str], Tensor], torch.dtype], tuple[dict[str, Tensor], list[str]]]
    """The peer's own: a file and base weights by key -> changed weights by key, and the keys left over."""
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def weight(self, key: str) -> Tensor:
        """A random base weight or bias, of values that float32 holds."""
        if key not in self.weights:
            module = next(m for m in self.modules if m.key == key.rpartition(".")[0])
            size = module.shape[:1] if key.endswith(".bias") else module.shape
            self.weights[key] = (randn(*size) + 1).float().double()
        return self.weights[key]


def sampled(modules: Sequence[Module]) -> list[Module]:
    """The first and the last of each kind, those that differ by numbers alone."""
    kinds: dict[str, list[Module]] = {}
    for module in modules:
        kinds.setdefault(re.sub(r"\d+", "#", module.key), []).append(module)
    return [module for kind in kinds.values() for module in dict.fromkeys((kind[0], kind[-1]))]


def subject(label: str, family: str, spellings: tuple[str, ...], modules: Sequence[Module], load: Any) -> Subject:
    """Ask the tables, through a difference that holds row numbers, where diffusers' modules lie.

    It is as wide as the weight: rows an input tell the last block of Stable Diffusion 3, whose halves are swapped.
    """
    modules = sampled(modules)
    numbers = {
        f"{m.stem}.diff": torch.arange(m.shape[0], dtype=torch.float64)
        .view(-1, *[1] * (max(len(m.shape), 2) - 1))
        .add(index << 20)
        .expand(m.shape if len(m.shape) > 1 else (-1, 1))
        for index, m in enumerate(modules)
    }
    adapter = ll.read_adapter(numbers, family=family)
    unknown = tuple(module.name for module in adapter.unresolved)
    parts: dict[tuple[str, str], Part] = {}
    for component, path, delta in adapter.modules():
        ids = delta.delta_weight().flatten(1)[:, 0].long()
        parts[component, path] = Part(modules[int(ids[0]) >> 20], ids & ((1 << 20) - 1))
    known = {part.module for part in parts.values()}
    return Subject(label, family, spellings, tuple(m for m in modules if m in known), parts, unknown, load)


@dataclass(frozen=True)
class Made:
    """A random adapter, and what it changes by the peer's key."""

    adapter: Adapter
    changes: Mapping[str, Tensor]


def made(subject: Subject, algebra: Algebra) -> Made | None:
    """A random adapter over the subject's modules; those that cannot be cut are left out. None if none is left."""
    counts = Counter(part.module for part in subject.parts.values())
    wide = {subject.parts[at].module for at in subject.parts if at[1] in family_named(subject.family).widens}
    fitting = [m for m in (wide if algebra.widens else subject.modules) if algebra.vectors == (len(m.shape) == 1)]
    for modules in (fitting, [m for m in fitting if counts[m] == 1]):
        made = [(m, slots) for m in modules if (slots := algebra.make(m.shape))]
        tensors = joined(named(m.stem, slots, algebra, m.has_bias) for m, slots in made)
        if not tensors:
            return None
        try:
            adapter = ll.read_adapter(tensors, family=subject.family)
            return Made(adapter, ours(subject, adapter))
        except ConversionError:  # also of a part that needs the whole module's weight
            continue
    return None


def made_split(subject: Subject, algebra: Algebra) -> Made:
    """The same, as if trained on diffusers' modules: the parts of a fused module have nothing in common."""
    made = [
        (f"{component}.{path}", slots, part.module.has_bias)
        for (component, path), part in subject.parts.items()
        if len(part.module.shape) > 1 and (slots := algebra.make((len(part.rows), *part.module.shape[1:])))
    ]
    tensors = joined(named(stem, slots, algebra, has_bias) for stem, slots, has_bias in made)
    adapter = ll.read_adapter(tensors, family=subject.family)
    return Made(adapter, ours(subject, adapter))


def joined(dictionaries: Iterable[Tensors]) -> Tensors:
    return {key: tensor for tensors in dictionaries for key, tensor in tensors.items()}


def named(stem: str, slots: Tensors, algebra: Algebra, has_bias: bool) -> Tensors:
    kept = {name: tensor for name, tensor in slots.items() if has_bias or name not in (".diff_b", ".b_norm")}
    alpha = {} if algebra.alpha is None else {".alpha": torch.tensor(algebra.alpha, dtype=torch.float64)}
    return {stem + name: t.to(algebra.dtype) if t.is_floating_point() else t for name, t in {**kept, **alpha}.items()}


def ours(subject: Subject, adapter: Adapter, dora_by_base: bool = False) -> dict[str, Tensor]:
    """ΔW and changes of biases by the peer's key.

    `dora_by_base`: with magnitudes over ‖W‖, as ComfyUI has them, not over ‖W + ΔW‖.
    """
    changes: dict[str, Tensor] = {}
    for component, path, delta in adapter.modules():
        module, rows = (part := subject.parts[component, path]).module, part.rows
        base = subject.weight(f"{module.key}.weight")[rows]
        if dora_by_base and isinstance(delta, DoraDelta) and not delta.per_input:
            norms = base.flatten(1).norm(dim=1).view(-1, *[1] * (base.ndim - 1))
            changed = base + delta.inner.delta_weight(base).view(base.shape)
            change = changed * delta.magnitude.double().view(norms.shape) / norms - base
        else:
            change = delta.delta_weight(base).double()
        size = base.shape[1:] if change.ndim != base.ndim or change.numel() == base.numel() else change.shape[1:]
        whole = changes.setdefault(f"{module.key}.weight", torch.zeros(module.shape[0], *size, dtype=torch.float64))
        whole[rows] = change.view(-1, *size)
        bias = delta.delta_bias()
        if bias is not None:
            changes.setdefault(f"{module.key}.bias", torch.zeros(module.shape[0], dtype=torch.float64))[rows] = bias
    return changes


def ask(subject: Subject, made: Made, spelling: str, dtype: torch.dtype) -> Cell:
    """Write, let the peer load, compare."""
    try:
        tensors, _, _ = to_tensors(made.adapter, spelling)
    except ConversionError as error:
        return Cell(reason=f"not written: {(error.problems or [error.what])[0].rpartition(': ')[2]}")
    changed, left = subject.load(tensors, subject.weight, dtype)
    wanted = made.changes
    missing = tuple(key for key, change in wanted.items() if key not in changed and change.any())
    cell = Cell(tuple(left), len(tensors), difference(subject, wanted, changed), missing, tolerance=TOLERANCE[dtype])
    if cell.is_right or left or missing or not any(isinstance(m.delta, DoraDelta) for m in made.adapter.modules()):
        return cell
    error = difference(subject, ours(subject, made.adapter, dora_by_base=True), changed)
    return replace(cell, error=error, note=OVER_BASE) if error <= cell.tolerance else cell


def difference(subject: Subject, wanted: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> float:
    """The largest difference of a module's change, relative to the largest change of the module."""
    worst = 0.0
    for key, change in wanted.items():
        if key in changed:
            base = subject.weight(key)
            if change.shape != base.shape:
                base = nn.functional.pad(base, (0, change.shape[1] - base.shape[1]))
            if changed[key].shape != base.shape:
                return float("inf")
            error = (changed[key].double() - base - change).abs().max() / change.abs().max().clamp(min=1e-30)
            worst = max(worst, float(error))
    return worst


class Stubs(MetaPathFinder, Loader):
    """Stands in for packages that a peer imports and its loader does not use, where they are not installed."""

    def __init__(self, *names: str) -> None:
        self.names = [name for name in names if find_spec(name) is None]
        sys.meta_path.append(self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module: Any = MagicMock(__spec__=spec, __path__=[])
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class Complaints(logging.Handler):
    """What a peer logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


LEFT_OVER = "lora key not loaded: "


class ComfyUI:
    """ComfyUI's key maps, `load_lora` and `calculate_weight`."""

    name = "ComfyUI"
    algebras = ALGEBRAS
    stubbed = (
        "torchvision",
        "torchaudio",
        "torchsde",
        "av",
        "comfy_aimdo",
        "comfy_kitchen",
        "spandrel",
        "kornia",
        "cv2",
    )

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        self.stubs = Stubs(*self.stubbed).names
        arguments: Any = import_module("comfy.cli_args").args
        arguments.cpu = True
        self.lora: Any = import_module("comfy.lora")
        self.convert: Any = import_module("comfy.lora_convert")
        self.supported: Any = import_module("comfy.supported_models")
        self.operations: Any = import_module("comfy.ops").disable_weight_init

    def subjects(self, only: Sequence[str]) -> Iterator[Subject]:
        for model in COMFYUI:
            if not only or {model.family, model.label} & {*only}:
                built = getattr(self.supported, model.name)({**model.config, "dtype": None})
                state = {name: torch.empty(shape) for name, shape in model.state.items()}
                denoiser = built.get_model(state, "", device="meta")
                keys: dict[str, Any] = self.lora.model_lora_keys_unet(denoiser, {})
                modules = [m for m in modules_of(denoiser) if re.search(model.only, m.key)]
                yield subject(model.label, model.family, model.spellings, modules, self.loading(denoiser, keys))
        for encoders in ENCODERS:
            label = f"{encoders.family}: {', '.join(encoders.encoders)}"
            if not only or {encoders.family, label} & {*only}:
                model = self.encoders(encoders)
                keys = self.lora.model_lora_keys_clip(model, {})
                modules = [m for m in modules_of(model, "text_encoders.") if not re.search(encoders.without, m.key)]
                yield subject(label, encoders.family, encoders.spellings, modules, self.loading(model, keys))

    def encoders(self, encoders: Encoders) -> nn.Module:
        """Text encoders under the names that ComfyUI keeps them by."""
        model = nn.Module()
        for name, address in encoders.encoders.items():
            sizes = ENCODER_SIZES.get(address, LLAMA_SIZES)
            holder = nn.Module()
            with torch.device("meta"):
                holder.transformer = found(address)(sizes, None, "meta", self.operations)
            setattr(model, name, holder)
        return model

    def loading(self, model: nn.Module, keys: Mapping[str, Any]) -> Callable[..., Any]:
        state = model.state_dict().keys()

        def load(tensors: Tensors, weight: Callable[[str], Tensor], dtype: torch.dtype) -> Any:
            complaints = Complaints()
            root = logging.getLogger()
            root.addHandler(complaints)
            try:
                patches: dict[str, list[Any]] = {}
                for target, patch in self.lora.load_lora(self.convert.convert_lora(dict(tensors)), keys).items():
                    parts: Any = [*target, None] if isinstance(target, tuple) else [target, None, None]
                    key, offset, function, *_ = parts
                    patches.setdefault(key, []).append((1.0, patch, 1.0, offset, function))
                changed: dict[str, Tensor] = {}
                for key, list_ in patches.items():
                    if key in state:
                        changed[key] = self.lora.calculate_weight(list_, weight(key).to(dtype, copy=True), key, dtype)
                    else:
                        logging.warning(f"no such weight: {key}")
            finally:
                root.removeHandler(complaints)
            return changed, [line.removeprefix(LEFT_OVER) for line in complaints.lines]

        return load


class SdScripts:
    """sd-scripts' networks, made from a file and merged into a model."""

    name = "sd-scripts"
    algebras = tuple(replace(algebra, dtype=torch.float32) for algebra in ALGEBRAS[:2])  # it merges in float32
    stubbed = ("torchvision", "cv2", "toml", "voluptuous", "imagesize", "rich", "bitsandbytes")

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        for address in ("diffusers:AutoencoderKL", "transformers:CLIPTextModel", "transformers:T5EncoderModel"):
            found(address)  # these look at what is installed, which the stubs are not
        self.stubs = Stubs(*self.stubbed).names

    def subjects(self, only: Sequence[str]) -> Iterator[Subject]:
        for model, params, network in SD_SCRIPTS:
            if not only or {model.family, model.label} & {*only}:
                with torch.device("meta"):
                    config = found(params)(**model.config) if params else None
                    denoiser = found(model.name)(config) if params else found(model.name)(**model.config)
                make: Any = import_module(network).create_network_from_weights
                modules = modules_of(denoiser, "diffusion_model.")
                probe = {
                    f"{flat(m)}.{name}": torch.ones(1, 1) for m in modules for name in ("lora_down.weight", "alpha")
                }
                adapted = names_in(make(1.0, None, None, [], denoiser, weights_sd=probe, for_inference=True)[0])
                modules = [m for m in modules if flat(m) in adapted]
                yield subject(model.label, model.family, model.spellings, modules, self.loading(denoiser, make))

    def loading(self, model: nn.Module, make: Callable[..., Any]) -> Callable[..., Any]:
        def load(tensors: Tensors, weight: Callable[[str], Tensor], dtype: torch.dtype) -> Any:
            network, file = make(1.0, None, None, [], model, weights_sd=dict(tensors), for_inference=True)
            names = names_in(network)
            left = [key for key in tensors if key.partition(".")[0] not in names]
            adapted = [path for path, _ in model.named_modules() if "lora_unet_" + path.replace(".", "_") in names]
            for path in adapted:
                module: Any = model.get_submodule(path)
                module.weight = nn.Parameter(weight(f"{path}.weight").to(dtype), requires_grad=False)
                if getattr(module, "bias", None) is not None:
                    module.bias = nn.Parameter(torch.zeros(len(module.weight), dtype=dtype), requires_grad=False)
            network.merge_to([], model, file, dtype, "cpu")
            return {f"{path}.weight": model.get_parameter(f"{path}.weight").detach() for path in adapted}, left

        return load


def flat(module: Module) -> str:
    return "lora_unet_" + module.key.replace(".", "_")


def names_in(network: Any) -> set[str]:
    return {lora.lora_name for lora in network.unet_loras}


def found(address: str) -> Any:
    """`module:name`, imported."""
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)


def modules_of(model: nn.Module, prefix: str = "") -> list[Module]:
    """Every module that has a weight."""
    state = model.state_dict()
    keys = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    return [Module(k, prefix + k, tuple(state[f"{k}.weight"].shape), f"{k}.bias" in state) for k in keys]


NO_METADATA = "diffusers keeps alpha in the metadata, which ComfyUI does not read; a scaling of 1 is read"
NO_MAGNITUDE = "ComfyUI reads `dora_scale`, not PEFT's `lora_magnitude_vector`"
NO_SPLIT_BIAS = "ComfyUI takes the bias of a part of a fused module for `().bias`"
NO_SWAP = "ComfyUI swaps the halves of what it adds, not those of the weight that it computes it from"
NO_SHAPE = "ComfyUI wants `reshape_weight`, which diffusers' own loader does not know"
NO_MAP = "ComfyUI's map from diffusers' names lacks Flux.2's guidance and its modulations"
NO_CONV1D = "ComfyUI lines up w1 and w2 for two kernel axes alone"
MUSUBI = "musubi-tuner's names, of which ComfyUI knows a part (musubi converts them); it reads `original` whole"
CLIP_LINEARS = "ComfyUI's map of CLIP has the projections of its layers alone under these names"
SPLIT_NAMES = "diffusers|peft|onetrainer|lycoris"
EXPLAINED: tuple[tuple[str, str, str, str, str], ...] = (
    ("ComfyUI", "(Hunyuan(Video|Image)|Z-Image).*", "kohya", ".*", MUSUBI),
    ("ComfyUI", r"[\w-]+: .*clip.*", "kohya|diffusers|onetrainer", "norm difference", CLIP_LINEARS),
    ("ComfyUI", "sdxl: .*", "diffusers", ".*", CLIP_LINEARS),
    ("ComfyUI", "Flux.2", "diffusers", ".*", NO_MAP),
    ("ComfyUI", ".*", "diffusers", ".*widened.*", NO_SHAPE),
    ("ComfyUI", "Stable Audio|Wan.*|ACE-Step|Hunyuan.*", ".*", "LoKr, whole", NO_CONV1D),
    ("ComfyUI", ".*", "diffusers|peft", "DoRA.*", NO_MAGNITUDE),
    ("ComfyUI", ".*", SPLIT_NAMES, "LoRA with bias|full difference", NO_SPLIT_BIAS),
    ("ComfyUI", ".*", "diffusers|peft", "LoRA|LoRA, split|LoCon.*|LoHa.*|LoKr.*", NO_METADATA),
    ("ComfyUI", "SD 3.*|Flux.1|AuraFlow", SPLIT_NAMES, "DoRA.*|GLoRA|B?OFT|replaced weight", NO_SWAP),
)
"""(peer, model, spelling, algebra, why): regular expressions, and the reason that the table quotes."""


OVER_BASE = "ComfyUI divides DoRA's magnitude by ‖W‖, not by ‖W + ΔW‖; with that the change is equal"


def explained(peer: str, subject: Subject, spelling: str, algebra: str) -> str | None:
    told = (peer, subject.label, spelling, algebra)
    return next((row[-1] for row in EXPLAINED if all(map(re.fullmatch, row[:-1], told))), None)


HEADER = """| peer | model | spelling | read | keys consumed | error, float64 | float32 | why not, or how |
|---|---|---|---|---|---|---|---|"""


def measured(peer: Any, only: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Rows of the table, and how many files of each are read wrongly without an explanation."""
    for one in peer.subjects(only):
        unknown = f"; not in our tables: {', '.join(one.unknown)}" if one.unknown else ""
        print(f"{one.label}: {len(one.modules)} modules{unknown}", file=sys.stderr, flush=True)
        if not one.parts:
            yield f"| {peer.name} | {one.label} | | 0 | | | | our tables have diffusers' names of it alone |", 0
            continue
        adapters = [(algebra.name, made(one, algebra), algebra.dtype) for algebra in peer.algebras]
        adapters += [(f"{a.name}, split", made_split(one, a), a.dtype) for a in peer.algebras[:2]]
        for spelling in one.spellings:
            cells = [(n, d, ask(one, a, spelling, d)) for n, a, d in adapters if a is not None]
            yield row(peer.name, one, spelling, cells)


def row(peer: str, one: Subject, spelling: str, cells: Sequence[tuple[str, torch.dtype, Cell]]) -> tuple[str, int]:
    """One model in one spelling: what is read, and of the rest why not."""
    notes: dict[str, list[str]] = {}
    read: list[tuple[torch.dtype, Cell]] = []
    failed = 0
    for name, dtype, cell in cells:
        right = cell.is_right and not cell.reason
        if right:
            read.append((dtype, cell))
        why = cell.note if right else cell.reason or explained(peer, one, spelling, name)
        if why is None:
            failed += 1
            why = f"**FAILED** ({cell.error:.0e}; {', '.join([*cell.left, *cell.missing][:2])})"
        if why:
            notes.setdefault(why, []).append(name)
    keys = sum(cell.keys for _, cell in read)
    errors = [max((c.error for d, c in read if d == dtype), default=None) for dtype in TOLERANCE]
    told = "; ".join(f"{why}: {', '.join(names)}" for why, names in notes.items())
    worst = " | ".join("" if error is None else f"{error:.0e}" for error in errors)
    return (
        f"| {peer} | {one.label} | {spelling} | {len(read)} of {len(cells)} | {keys} of {keys} | {worst} | {told} |",
        failed,
    )


def main() -> int:
    """Print or write the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--comfyui", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--sd-scripts", type=Path, help="a checkout of sd-scripts")
    parser.add_argument("--output", type=Path, help="where to write the table, instead of printing it")
    parser.add_argument("--only", nargs="*", default=[], help="families or models, as the table names them")
    arguments = parser.parse_args()
    logging.getLogger().handlers = [logging.NullHandler()]  # what ComfyUI says is counted, not shown
    out = arguments.output.open("w", encoding="utf-8") if arguments.output else sys.stdout
    print(HEADER, file=out)
    rows = failed = 0
    for peer, checkout in ((ComfyUI, arguments.comfyui), (SdScripts, arguments.sd_scripts)):
        if checkout is None:
            print(f"{peer.name}: no checkout given, left out", file=sys.stderr)
            continue
        loader = peer(checkout)
        print(f"{peer.name}: stubs for {', '.join(loader.stubs) or 'nothing'}", file=sys.stderr)
        for line, wrong in measured(loader, arguments.only):
            print(line, file=out, flush=True)
            rows, failed = rows + 1, failed + wrong
    print(f"{rows} rows, {failed} files read wrongly without an explanation", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
