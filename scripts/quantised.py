"""Adapters on quantised bases: for every backend that is installed, does it load, run, fuse and come back to the byte.

    python scripts/quantised.py                 # whatever runs on this machine's CPU
    python scripts/quantised.py --device cuda   # also what needs a GPU
    python scripts/quantised.py --write FILE    # the table as a page under benchmarks/

A small Flux transformer made of random numbers is quantised the way diffusers does it, by its own configurations.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers as released
import torch
from bench import report
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.errors import UnsupportedBaseError
from lora_loaders.layers.base_weight import bits_of, is_plain, read_weight
from lora_loaders.layers.layer import AdapterLayer
from lora_loaders.layers.quantised import scheme_of

diffusers: Any = released  # its classes are only partly typed
WIDTH = 256
RANK = 8


@dataclass(frozen=True)
class Backend:
    """One way of quantising, the packages it needs, and how a saved model is opened with it."""

    name: str
    needs: tuple[str, ...]
    open: Callable[[Path, torch.device], nn.Module]
    cuda_only: bool = False

    def missing(self, device: torch.device) -> str | None:
        absent = [name for name in self.needs if not is_installed(name)]
        if absent:
            return f"{', '.join(absent)} is not installed"
        return "needs a CUDA device" if self.cuda_only and device.type != "cuda" else None


def is_installed(name: str) -> bool:
    parent = name.rpartition(".")[0]
    return (not parent or is_installed(parent)) and importlib.util.find_spec(name) is not None


def plain_model(width: int = WIDTH) -> Any:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=False,
    )
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def call_of(model: Any, device: torch.device) -> Callable[[], Tensor]:
    torch.manual_seed(1)
    width, dtype = model.config.joint_attention_dim, torch.bfloat16
    inputs = {
        "hidden_states": torch.randn(1, 16, 64),
        "encoder_hidden_states": torch.randn(1, 8, width),
        "pooled_projections": torch.randn(1, width),
    }
    moved = {key: value.to(device, dtype) for key, value in inputs.items()}
    ids = {"img_ids": torch.zeros(16, 3, device=device), "txt_ids": torch.zeros(8, 3, device=device)}
    step = torch.full((1,), 0.5, device=device, dtype=dtype)
    return torch.no_grad()(lambda: model(**moved, **ids, timestep=step, return_dict=False)[0])


def lora_file(model: nn.Module, seed: int, scale: float = 0.02) -> dict[str, Tensor]:
    """A file for every linear layer of the blocks, strong enough that eight bits can hold it."""
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in path:
            key = f"transformer.{path}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, module.in_features) * scale
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, RANK) * scale
    return tensors


# How each backend opens a saved model


def by_config(make: Callable[[], Any], folder: Path, device: torch.device) -> nn.Module:
    # On the device from the start: some kernels that pack weights have no counterpart on the CPU.
    place = {} if device.type == "cpu" else {"device_map": device.type}
    model = diffusers.FluxTransformer2DModel.from_pretrained(
        folder, quantization_config=make(), torch_dtype=torch.bfloat16, **place
    )
    return model if next(model.parameters()).device.type == device.type else model.to(device)


def bitsandbytes(bits: int, folder: Path, device: torch.device, **options: Any) -> nn.Module:
    if device.type == "cuda":
        names = {
            8: {"load_in_8bit": True},
            4: {"load_in_4bit": True, **{f"bnb_4bit_{k}": v for k, v in options.items()}},
        }
        return by_config(lambda: diffusers.BitsAndBytesConfig(**names[bits]), folder, device)
    # diffusers asks for a GPU before it quantises; the layers themselves run on a CPU too.
    library = importlib.import_module("bitsandbytes").nn
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)

    def layer(linear: nn.Linear) -> nn.Module:
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        if bits == 8:
            return library.Linear8bitLt(*sizes, has_fp16_weights=False)
        double = options.get("use_double_quant", False)
        return library.Linear4bit(*sizes, torch.bfloat16, quant_type=options["quant_type"], compress_statistics=double)

    for path, linear in [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in p]:
        new = layer(linear).to(torch.bfloat16)
        new.load_state_dict(linear.state_dict())
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model.to(device)


def gguf(kind: str, folder: Path, device: torch.device) -> nn.Module:
    library: Any = importlib.import_module("gguf")
    quants: Any = importlib.import_module("gguf.quants")
    path = folder / f"{kind}.gguf"
    writer = library.GGUFWriter(path, "flux")
    plain = diffusers.FluxTransformer2DModel.from_pretrained(folder)
    for name, tensor in plain.state_dict().items():
        stored = getattr(library.GGMLQuantizationType, kind if tensor.ndim == 2 and "blocks" in name else "F32")
        writer.add_tensor(name, quants.quantize(tensor.numpy(), stored), raw_dtype=stored)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return diffusers.FluxTransformer2DModel.from_single_file(
        str(path),
        config=str(folder),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    ).to(device)


def torchao(name: str, **options: Any) -> Callable[[Path, torch.device], nn.Module]:
    def make() -> Any:
        library: Any = importlib.import_module("torchao.quantization")
        granularity = importlib.import_module("torchao.quantization.granularity")
        given = {
            **options,
            **({"weight_dtype": getattr(torch, options["weight_dtype"])} if "weight_dtype" in options else {}),
            **({"granularity": granularity.PerGroup(options["granularity"])} if "granularity" in options else {}),
        }
        return diffusers.TorchAoConfig(getattr(library, name)(**given))

    return partial(by_config, make)


def quanto(kind: str) -> Callable[[Path, torch.device], nn.Module]:
    return partial(by_config, lambda: diffusers.QuantoConfig(weights_dtype=kind))


def cast(folder: Path, device: torch.device) -> nn.Module:
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return model


BNB, AO, QUANTO, GGUF = ("bitsandbytes", "accelerate"), ("torchao", "accelerate"), ("optimum.quanto",), ("gguf",)
BACKENDS = (
    Backend("bitsandbytes 8-bit", BNB, partial(bitsandbytes, 8)),
    Backend("bitsandbytes nf4", BNB, partial(bitsandbytes, 4, quant_type="nf4")),
    Backend("bitsandbytes nf4, nested", BNB, partial(bitsandbytes, 4, quant_type="nf4", use_double_quant=True)),
    Backend("bitsandbytes fp4", BNB, partial(bitsandbytes, 4, quant_type="fp4")),
    Backend("torchao int8 weight-only", AO, torchao("Int8WeightOnlyConfig", version=2)),
    Backend("torchao int8 dynamic", AO, torchao("Int8DynamicActivationInt8WeightConfig", version=2)),
    Backend("torchao int4, unpacked", AO, torchao("IntxWeightOnlyConfig", weight_dtype="int4", granularity=64)),
    Backend(
        "torchao int4, tinygemm",
        AO,
        torchao("Int4WeightOnlyConfig", group_size=64, int4_packing_format="tile_packed_to_4d"),
        cuda_only=True,
    ),
    Backend("torchao float8 weight-only", AO, torchao("Float8WeightOnlyConfig")),
    Backend("torchao float8 dynamic", AO, torchao("Float8DynamicActivationFloat8WeightConfig"), cuda_only=True),
    *(Backend(f"quanto {kind}", QUANTO, quanto(kind)) for kind in ("int8", "float8", "int4", "int2")),
    *(Backend(f"GGUF {kind}", GGUF, partial(gguf, kind)) for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16")),
    Backend("float8 layerwise casting", (), cast),
)


# The check itself


@dataclass
class Row:
    """What one backend did; errors are relative (norm of the difference over norm of the right answer)."""

    backend: str
    layers: int = 0
    forward_error: float = float("nan")
    base_error: float = float("nan")
    fuse: str = ""
    lost: float = float("nan")
    kept: float = float("nan")
    bytes_equal: bool | None = None


def stored(model: nn.Module) -> dict[str, dict[str, Any]]:
    """A copy of every byte that the adapted layers store."""
    snapshot: dict[str, dict[str, Any]] = {}
    for path, layer in quantised_layers(model):
        parts = scheme_of(layer.base_layer).stored(layer.base_layer)
        snapshot[path] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in parts.items()}
    return snapshot


def same_bytes(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bytes(value, other[key]) for key, value in one.items())
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits_of(one), bits_of(other))
    return one == other


def quantised_layers(model: nn.Module) -> list[tuple[str, AdapterLayer]]:
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, AdapterLayer)]
    return [(path, layer) for path, layer in layers if not is_plain(layer.base_layer)]


@torch.no_grad()
def errors_of(model: nn.Module, file: dict[str, Tensor], device: torch.device) -> tuple[float, float]:
    """Worst relative errors over the layers: with the adapter, and of the base alone, against float32 arithmetic."""
    worst = [0.0, 0.0]
    for path, layer in quantised_layers(model):
        base: Any = layer.base_layer
        x = torch.randn(32, base.in_features, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)
        weight, bias = read_weight(base), 0.0 if base.bias is None else base.bias.float()
        down, up = (file[f"transformer.{path}.lora_{side}.weight"].to(device) for side in "AB")
        for n, (run, change) in enumerate(((layer, up @ down), (base, 0.0))):
            right = x.float() @ (weight + change).t() + bias
            worst[n] = max(worst[n], float((run(x).float() - right).norm() / right.norm()))
    return worst[0], worst[1]


def check(backend: Backend, folder: Path, device: torch.device) -> Row:
    """Open, load, run, fuse, run, unfuse, unload; raises only where an adapter does not load or run."""
    row = Row(backend.name)
    model: Any = ll.attach(backend.open(folder, device))
    run = call_of(model, device)
    plain = run()
    file = lora_file(model, seed=3)
    row.layers = model.load_lora_adapter(file, adapter_name="a").components["transformer"]
    assert len(quantised_layers(model)) > 0, "nothing is quantised"
    row.forward_error, row.base_error = errors_of(model, file, device)
    assert not torch.equal(run(), plain), "the adapter changes nothing"
    before = stored(model)
    try:
        report = model.fuse_lora()
        assert run().isfinite().all()
        fused = [layer.fused.memory() for _, layer in quantised_layers(model)]
        own = sum(v.nbytes for parts in before.values() for v in parts.values() if isinstance(v, Tensor))
        row.fuse, row.lost, row.kept = "yes", report.lost, sum(fused) / own
        model.unfuse_lora()
    except UnsupportedBaseError as error:
        row.fuse = f"refused: {error.what}"
    row.bytes_equal = same_bytes(before, stored(model))
    model.unload_lora()
    assert torch.equal(run(), plain), "unloading leaves something behind"
    return row


def show(row: Row | str, name: str) -> str:
    if isinstance(row, str):
        return f"| {name} | {row} | | | | | | |"
    return (
        f"| {name} | {row.layers} | {row.base_error:.1e} | {row.forward_error:.1e} | {row.fuse} | {row.lost:.0%} | "
        f"{row.kept:.2f} | {'yes' if row.bytes_equal else 'NO'} |"
    )


NOTES = (
    "A Flux transformer with one double and one single block of width 256, and a LoRA of rank 8 on each linear layer",
    "of the blocks. Errors are relative, the worst of all layers, against float32 arithmetic on the dequantised weight",
    "in bfloat16: the base's alone, and with the adapter unfused. Of ΔW lost: the share that quantising the fused",
    "weight again lost. Record/weight: bytes kept for unfusing over those of the weights. Bytes back: whether unfusing",
    "gave every byte back.",
)


def backends() -> str:
    """Versions of the quantisers that are installed."""
    found = {name: importlib.util.find_spec(name) for name in ("bitsandbytes", "torchao", "gguf")}
    names = [name for name, spec in found.items() if spec] + ["optimum-quanto"] * is_installed("optimum.quanto")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) or "no quantiser"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the table as JSON here")
    parser.add_argument("--write", type=Path, help="also write the table as a page here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    warnings.simplefilter("ignore")
    lines = ["| backend | layers | base's error | with the adapter | fuses | of ΔW lost | record/weight | bytes back |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain_model().save_pretrained(folder)
        for backend in BACKENDS:
            missing = backend.missing(device)
            row = f"skipped: {missing}" if missing else check(backend, Path(folder), device)
            rows[backend.name] = row if isinstance(row, str) else vars(row)
            lines.append(show(row, backend.name))
            print(lines[-1], flush=True)
    if options.write:
        processor = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
        body = "\n".join([*NOTES, "", *lines])
        report("Adapters on quantised bases", f"{processor}; {backends()}", body, options.write)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1), "utf-8")
    return int(any(not isinstance(row, str) and not row["bytes_equal"] for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
