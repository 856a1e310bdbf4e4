"""The parity table: every algebra beside lycoris-lora, PEFT and its closed formula, on every kind of layer.

    python scripts/parity/algebras.py [--output table.md]

Needs peft and lycoris-lora (scripts/setup_peers, then PYTHONPATH=.venv/peers). Files that they write are read; files
that are written here they read back; what neither writes is put together by hand. A cell is the largest error relative
to the largest value, in float32 and in float64. A peer that cannot do a thing is quoted; one that computes something
else than its own merged weight says is marked, and the formula judges; the files are read for it without lora_loaders.
"""

import argparse
import copy
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from formulas import bias_change, kronecker, kronecker_of_peft
from rows import ALGEBRAS, LAYERS, OUT, STAND_INS, Algebra, Layer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders import fusing
from lora_loaders.attaching import apply
from lora_loaders.conversion import parse
from lora_loaders.errors import MalformedAdapterError, UnsupportedBaseError
from lora_loaders.files import read
from lora_loaders.layout import ModelLayout
from lora_loaders.plans import AttachPlan, plan_adapter
from lora_loaders.saving import capture

DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
PEER_ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}
"""A peer rounds too, and in more places."""
STEPS = ("ΔW", "forward", "fuse", "reload")
LAWS = (
    "joins inputs that the groups of this convolution keep apart: its weight has no place for such a change",
    "the adapter changes a bias too, and an embedding has none",
    "the adapter changes a bias too, and a raw parameter has none",
)
"""What our errors say where a change is no change of that layer at all."""


MODULE = re.compile(r"^(lycoris_it(_[a-z_]+?)?|base_model\.model\.it)\.")
SLOTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "dora_scale": "magnitude",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_embedding_A": "embedding_down",
    "lora_embedding_B": "embedding_up",
    "oft_R.scaled_oft": "scaled_oft",
    "diff_b": "bias",
}
"""Suffix in a file -> the formulas' word for it, where that is another."""


class Net(nn.Module):
    """One layer, under a name that trainers' presets leave alone."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.it = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.it(x)


@dataclass
class Cells:
    """Errors of one row and one peer: step -> dtype -> error, or why there is none."""

    errors: dict[str, dict[torch.dtype, float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def put(self, step: str, dtype: torch.dtype, one: Tensor, other: Tensor) -> float:
        """Note an error; where a step has two, of a weight and of a bias, the larger stands."""
        error = relative(one, other)
        kept = self.errors.setdefault(step, {})
        kept[dtype] = max(error, kept.get(dtype, 0.0))
        return error

    def show(self, step: str, tolerance: Mapping[torch.dtype, float]) -> str:
        if step in self.reasons:
            return self.reasons[step]
        errors, note = self.errors.get(step, {}), self.notes.get(step, "")
        if not errors:
            return note or "NOT MEASURED"
        bad = "" if all(error <= tolerance[dtype] for dtype, error in errors.items()) else " **off**"
        return " / ".join(f"{error:.0e}" for error in errors.values()) + (f" ({note})" if note else bad)


@dataclass(frozen=True)
class Peer:
    """What a peer says of one layer; where it raises, the exception's words stand instead."""

    name: str
    file: Path
    forward: Tensor | str
    merged: Tensor | str
    reload: Callable[[Path], Tensor]
    format: str


def said(ask: Callable[[], Tensor]) -> Tensor | str:
    """An answer, or the words of the peer's own refusal."""
    try:
        with torch.no_grad():
            return ask()
    except Exception as error:  # whatever a peer raises is what the table quotes
        return f"raises {type(error).__name__}: {' '.join(str(error).split())[:60]}"


def relative(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def randomised(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.copy_(noise + (1.0 if parameter.ndim and bool((parameter == 1).all()) else 0.0))


def inputs(layer: Layer, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if layer.kind == "embedding":
        return torch.randint(0, OUT, layer.inputs, generator=generator)
    return torch.randn(*layer.inputs, generator=generator, dtype=torch.float64).to(dtype)


def dtype_of(net: Net) -> torch.dtype:
    return next(net.parameters()).dtype


def planned(net: Net, file: Path) -> AttachPlan:
    """The plan of a file for this layer, which may be widened."""
    layout = ModelLayout({"transformer": net})
    return plan_adapter(
        layout.components, parse(read(file), None, layout), layout=layout, widens=("it",), may_widen=True
    )


def lycoris_says(algebra: Algebra, net: Net, x: Tensor, folder: Path) -> Peer:
    lycoris: Any = import_module("lycoris.wrapper")
    assert not isinstance(algebra.lycoris, str)
    dtype, model = dtype_of(net), copy.deepcopy(net)
    layer: Any = model.it
    options: dict[str, Any] = {"linear_dim": 4, "linear_alpha": 2, **algebra.lycoris}
    network = lycoris.create_lycoris(model, 1.0, **options)
    if not network.loras:
        raise TypeError(f"it has no module for {type(layer).__name__}")
    network.apply_to()  # its state dictionary is empty before
    randomised((p for n, p in network.named_parameters() if "dora_scale" not in n), 3)
    network.to(dtype).eval()
    stretch(network, "dora_scale")
    folder.mkdir(exist_ok=True)
    file = folder / "lycoris.safetensors"
    network.save_weights(str(file), dtype, {})
    out = said(lambda: model(x))
    network.restore()

    def merged() -> Tensor:
        network.merge_to(1.0)
        return layer.weight.detach()

    def reloaded(path: Path) -> Tensor:
        fresh = copy.deepcopy(net)
        other, _ = lycoris.create_lycoris_from_weights(1.0, str(path), fresh)
        for lora in other.loras:
            lora.to(dtype).eval()
        other.merge_to(1.0)
        merged: Any = fresh.it
        return merged.weight.detach()

    return Peer("LyCORIS", file, out, said(merged), reloaded, "lycoris")


def peft_says(algebra: Algebra, net: Net, x: Tensor, folder: Path) -> Peer:
    peft: Any = import_module("peft")
    assert not isinstance(algebra.peft, str)
    config, options = algebra.peft
    (parameter, _), *_ = net.it.named_parameters()
    targets: dict[str, list[str]] = {"target_modules": ["it"]}
    if parameter not in ("weight", "bias"):
        targets = {"target_modules": [], "target_parameters": [f"it.{parameter}"]}
    wrapped = peft.get_peft_model(
        copy.deepcopy(net), getattr(peft, config)(**targets, **options), autocast_adapter_dtype=False
    )
    randomised((p for n, p in wrapped.named_parameters() if ".base_layer." not in n and "magnitude" not in n), 3)
    wrapped.to(dtype_of(net)).eval()
    stretch(wrapped, "magnitude")
    out = said(lambda: wrapped(x))
    wrapped.save_pretrained(folder / "peft")

    def merged(path: Path) -> Tensor:
        again = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(path), autocast_adapter_dtype=False)
        return getattr(again.to(dtype_of(net)).merge_and_unload().it, parameter).detach()

    return Peer("PEFT", folder / "peft", out, said(lambda: merged(folder / "peft")), merged, "peft")


@torch.no_grad()
def stretch(model: nn.Module, name: str) -> None:
    """Magnitudes away from the norms they start as."""
    for path, parameter in model.named_parameters():
        if name in path:
            parameter *= 1.3


def by_hand(algebra: Algebra, net: Net, x: Tensor, folder: Path) -> Peer:
    """A file of which no peer says anything."""
    assert not isinstance(algebra.by_hand, str)
    (name, weight), *_ = net.it.named_parameters()
    module = "lycoris_it" if name == "weight" or algebra.name == "difference of a modulation" else f"lycoris_it_{name}"
    file, form = folder / "by hand.safetensors", "lycoris"
    if algebra.config is not None:
        module, file, form = "base_model.model.it", folder / "adapter_model.safetensors", "peft"
        config = {"target_modules": ["it"], **algebra.config}
        file.with_name("adapter_config.json").write_text(json.dumps(config), "utf-8")
    given = algebra.by_hand(weight.detach()).items()
    tensors = {s: t if isinstance(t, Tensor) else torch.randn(t, dtype=torch.float64) * 0.3 for s, t in given}
    save_file({module + s: t.to(weight.dtype) if t.is_floating_point() else t for s, t in tensors.items()}, file)
    return Peer("by hand", file, "", "", lambda path: weight, form)


PEERS = {"LyCORIS": lycoris_says, "PEFT": peft_says}
SOURCES = {**PEERS, "by hand": by_hand}


def spoken(file: Path) -> tuple[dict[str, Tensor], float | None]:
    """What a file says of its one module, tensors in float64 and alpha, read without lora_loaders."""
    file = file / "adapter_model.safetensors" if file.is_dir() else file
    config = json.loads(path.read_text("utf-8")) if (path := file.with_name("adapter_config.json")).is_file() else {}
    slots: dict[str, Tensor] = {}
    for key, tensor in load_file(file).items():
        suffix = MODULE.sub("", key)
        name = SLOTS.get(suffix, suffix if suffix == "weight" else suffix.removesuffix(".weight"))
        slots[name] = tensor.double() if tensor.is_floating_point() else tensor
    if config and "magnitude" in slots:  # PEFT's are of each output; an embedding's weight it sees transposed
        slots["magnitude"] = slots["magnitude"].flatten() if "up" in slots else slots["magnitude"].view(1, -1)
    slots.pop("reshape_weight", None)
    alpha = slots.pop("alpha", None)
    return slots, config.get("lora_alpha", config.get("alpha")) if alpha is None else float(alpha)


def measure(algebra: Algebra, layer: str, name: str) -> tuple[Cells, Cells]:
    """Ours against this source of a file, where it says what the file means, and ours against the formula."""
    theirs, formula = Cells(), Cells()
    options = getattr(algebra, name.lower().replace(" ", "_"))
    if isinstance(options, str):
        theirs.reasons = dict.fromkeys(STEPS, options)
        return theirs, formula
    for dtype in DTYPES:
        torch.manual_seed(1)
        net = Net(LAYERS[layer].make).to(dtype).eval()
        if LAYERS[layer].kind in ("norm", "norm without bias"):
            randomised(net.parameters(), 4)
        x = inputs(LAYERS[layer], dtype)
        with tempfile.TemporaryDirectory() as folder:
            peer = asked(algebra, net, x, Path(folder), name)
            if isinstance(peer, str):
                theirs.reasons = dict.fromkeys(STEPS, f"{name} makes none: {peer}")
                peer = stand_in(algebra, net, x, Path(folder), name)
            if isinstance(peer, Peer) and (law := forbids(net, peer.file)):
                theirs.reasons = formula.reasons = dict.fromkeys(STEPS, f"impossible: {law}")
            elif peer is not None:
                compare(algebra, net, x, peer, theirs, formula, Path(folder))
            else:
                formula.reasons = dict.fromkeys(STEPS, f"no file of it exists: {name} makes none")
    return theirs, formula


def refusal(net: Net, file: Path) -> str:
    """Why the tensors of this file make no change of this layer, in the words of the error; empty where they do."""
    try:
        done = planned(net, file)
        return "; ".join(done.problems or done.unmatched.values())
    except MalformedAdapterError as error:
        return "; ".join(error.problems)


def forbids(net: Net, file: Path) -> str:
    """The law of nature by which this file can be for no such layer; empty where there is none."""
    said = refusal(net, file)
    return next((law for law in LAWS if law in said), "")


def asked(algebra: Algebra, net: Net, x: Tensor, folder: Path, name: str) -> Peer | str:
    found: list[Peer] = []

    def ask() -> Tensor:
        found.append(SOURCES[name](algebra, net, x, folder))
        return x

    answer = said(ask)
    return answer if isinstance(answer, str) else found[0]


def stand_in(algebra: Algebra, net: Net, x: Tensor, folder: Path, name: str) -> Peer | None:
    """A file that the peer makes for a plain layer, where it fits this one; nothing else of the peer's."""
    torch.manual_seed(1)
    make = STAND_INS.get(next(net.parameters()).ndim)
    if make is None:
        return None
    plain = Net(make).to(dtype_of(net)).eval()
    peer = asked(algebra, plain, x, folder / "plain", name)
    if isinstance(peer, str) or refusal(net, peer.file):
        return None
    return replace(peer, forward="", merged="")


def compare(algebra: Algebra, net: Net, x: Tensor, peer: Peer, theirs: Cells, formula: Cells, folder: Path) -> None:
    dtype, model = dtype_of(net), copy.deepcopy(net)
    done = planned(model, peer.file)
    if not done.bindings or done.ignored or done.problems:
        raise SystemExit(f"{algebra.name}, {net.it}: {done.problems}, {done.ignored}")
    (parameter, weight), *_ = net.it.named_parameters()
    delta = done.bindings[0].delta
    if parameter == "weight" and delta.shape and weight.ndim == 2:
        weight = F.pad(weight, (0, max(0, delta.shape[1] - weight.shape[1])))  # inputs that are heeded from now on
    weight = weight.detach()
    slots, alpha = spoken(peer.file)
    if algebra.name == "LoKr, both whole" and peer.format == "peft":
        alpha = None  # 8 / 8
    change_of = kronecker_of_peft if (algebra.formula, peer.format) == (kronecker, "peft") else algebra.formula
    wanted = change_of(slots, weight.double(), alpha)
    twin: Any = copy.deepcopy(net.it).double()
    values = {parameter: weight.double() + wanted}
    own_bias = getattr(net.it, "bias", None)
    start = torch.zeros(len(weight), dtype=torch.float64) if own_bias is None else own_bias.detach().double()
    wanted_bias = bias_change(slots, start, alpha)
    changes_bias = bool(wanted_bias.any())
    if own_bias is not None or (changes_bias and hasattr(twin, "bias")):
        twin.bias = nn.Parameter(start)
        values["bias"] = start + wanted_bias
    truth = torch.func.functional_call(twin, values, (x.double() if x.is_floating_point() else x,)).detach()
    if changes_bias and "bias" not in values:
        truth = truth + wanted_bias  # a layer that knows no bias: it is added behind it
    ours = delta.delta_weight(weight).view(weight.shape)
    formula.put("ΔW", dtype, ours, wanted)
    apply(done, "x")
    adapter = captured(model)
    with torch.no_grad():
        out = model(x)
    formula.put("forward", dtype, out, truth)
    fused, fused_bias = None, None
    try:
        fused, fused_bias = fused_and_back(model, parameter)
        formula.put("fuse", dtype, fused, weight.double() + wanted)
    except UnsupportedBaseError as error:
        formula.reasons["fuse"] = f"impossible: {error.what}"
    if changes_bias:
        formula.put("ΔW", dtype, told(delta.delta_bias(own_bias)), wanted_bias)
    if changes_bias and fused is not None:
        formula.put("fuse", dtype, told(fused_bias), values["bias"])
    path = folder / "ours" if peer.format == "peft" else folder / "ours.safetensors"
    written = ll.write_adapter(adapter, path, peer.format)
    source = written.parent if peer.format == "peft" else written
    reread = planned(copy.deepcopy(net), source).bindings[0].delta
    again = reread.delta_weight(weight).view(weight.shape)
    formula.put("reload", dtype, again, wanted)
    if changes_bias:
        formula.put("reload", dtype, told(reread.delta_bias(own_bias)), wanted_bias)
    if peer.forward == "" or fused is None:
        return
    whole = weight.double() + wanted
    beside(theirs, peer, "forward", dtype, out, peer.forward, truth)
    # A peer's ΔW is what merging changed, so its error is one of the merged weight.
    beside(theirs, peer, "ΔW", dtype, weight.double() + ours.double(), peer.merged, whole)
    beside(theirs, peer, "fuse", dtype, fused, peer.merged, whole)
    # The peer reads our file as it reads its own; what our file says is judged by the formula.
    back, own = said(lambda: peer.reload(source)), peer.merged if isinstance(peer.merged, Tensor) else fused
    beside(theirs, peer, "reload", dtype, own, back, whole, weight.double() + again.double())


def told(bias: Tensor | None) -> Tensor:
    """The change of a bias that there is to be."""
    assert bias is not None
    return bias


def fused_and_back(model: nn.Module, parameter: str) -> tuple[Tensor, Tensor | None]:
    """The fused weight and bias; unfusing must leave every bit as it was."""

    def photographed() -> dict[str, Tensor]:
        own = {name.replace("base_layer.", ""): tensor for name, tensor in model.named_parameters()}
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in own.items()}

    before = photographed()
    fusing.fuse(model)
    fused = photographed()
    fusing.unfuse(model)
    after = photographed()
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), f"unfusing left {name} changed"
    return fused[f"it.{parameter}"], fused.get("it.bias")


def beside(
    cells: Cells,
    peer: Peer,
    step: str,
    dtype: torch.dtype,
    ours: Tensor,
    theirs: Tensor | str,
    truth: Tensor,
    judged: Tensor | None = None,
) -> None:
    """Put ours against the peer's into a cell; what the peer does wrong by itself is named."""
    kind = str(dtype).removeprefix("torch.")
    are_right = relative(ours if judged is None else judged, truth) <= PEER_ROUNDING[dtype]
    if isinstance(theirs, str):
        cells.notes[step] = f"{peer.name} {theirs} in {kind}"
    elif theirs.shape != truth.shape:
        cells.notes[step] = f"{peer.name}'s has the shape {list(theirs.shape)}, the layer's is {list(truth.shape)}"
    elif cells.put(step, dtype, ours, theirs) > PEER_ROUNDING[dtype] and are_right:
        # Only the peer's own error is an explanation; where ours is off the formula too, the cell says so.
        cells.notes[step] = f"{peer.name} is {relative(theirs, truth):.0e} off the formula in {kind}"


def captured(model: nn.Module) -> Any:
    """What is attached, as it would be saved."""
    model.__dict__["peft_config"] = {"x": ll.LoraConfig()}
    try:
        return capture({"transformer": model}, "x", None)
    finally:
        del model.__dict__["peft_config"]


def rows(only: str) -> list[list[str]]:
    table: list[list[str]] = []
    for algebra in (a for a in ALGEBRAS if only in a.name):
        for layer in [name for name, layer in LAYERS.items() if layer.kind in algebra.on]:
            measured = {name: measure(algebra, layer, name) for name in SOURCES}
            merged = Cells()
            for _, own in measured.values():
                merged.reasons |= own.reasons
                for step, errors in own.errors.items():
                    for dtype, error in errors.items():
                        kept = merged.errors.setdefault(step, {})
                        kept[dtype] = max(error, kept.get(dtype, 0.0))
            if merged.errors:
                merged.reasons = {step: reason for step, reason in merged.reasons.items() if step not in merged.errors}
            cells = [measured[name][0].show(step, PEER_ROUNDING) for name in PEERS for step in STEPS]
            table.append([algebra.name, layer, *cells, *(merged.show(step, TOLERANCE) for step in STEPS)])
            print(" | ".join(table[-1]), flush=True)
    return table


TITLE = """# Every algebra beside lycoris-lora, PEFT and its closed formula

{}, CPU; `python scripts/parity/algebras.py --output <this file>`

A cell is the largest error relative to the largest value, float32 / float64; where a change has a bias, of its too,
the larger. Files that the peer wrote are the inputs,
and where no trainer writes a thing, files made by hand; where a peer does not know a layer, those for a plain one;
"reload" is the peer's merge of the file that is written here against its merge of its own. A peer's ΔW is taken from
its merged weight. In brackets stands what the peer itself gets wrong against the formula, or its own words where it
refuses; the formula judges. Named causes: both peers' forwards of LoRA, LoHa, LoKr, OFT, GLoRA and full differences pad
circular and reflecting convolutions with zeros; PEFT's leave out dilation; its OFT folds overlapping patches; LyCORIS
merges LoHa and LoKr with alpha / rank twice (`get_diff_weight`), has DoRA to float32 rounding only, and cannot turn
in float64. "Impossible" quotes the law of nature by which a change is none of that layer, in the words of the error
that such a file is refused with.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table as Markdown to this file too")
    parser.add_argument("--only", default="", help="the algebras whose names hold this")
    arguments = parser.parse_args()
    try:
        import_module("lycoris")
        peft: Any = import_module("peft")
    except ImportError as error:
        print(f"{error.name} is not to be found; the table compares with its files: run scripts/setup_peers first")
        return 2
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    table = rows(arguments.only)
    if arguments.output:
        head = ["algebra", "layer", *(f"{name} {step}" for name in (*PEERS, "formula") for step in STEPS)]
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *table)]
        versions = f"torch {torch.__version__}, peft {peft.__version__}, lycoris-lora {version('lycoris-lora')}"
        arguments.output.write_text("\n".join([TITLE.format(versions), *lines]) + "\n", "utf-8")
    bad = [f"{row[0]}, {row[1]}" for row in table if any("**off**" in cell or "NOT" in cell for cell in row)]
    print(f"{len(table)} rows, {len(bad)} with a cell that is off" + "".join(f"\n  {row}" for row in bad))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
