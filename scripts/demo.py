"""The main job on a tiny Flux pipeline: load, switch, fuse, unfuse, save, convert, detach; checked at each step.

Writes a picture grid and a text report, and exits with 1 if a check fails. The pipeline is a real `FluxPipeline` with
seeded random weights, so its pictures show nothing; they only have to differ where the settings differ.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_loaders as ll

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
PIXELS = 128
SEED = 8
# Fusing rounds the sum of two products once more than the forward does; pictures are in [0, 1].
FUSED_TOLERANCE = 1e-4
VISIBLE = 0.02

TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}
ABSENT: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


@dataclass
class Panel:
    """One picture of the grid and what stands under it."""

    title: str
    caption: str
    pixels: np.ndarray
    passed: bool


@dataclass
class Demo:
    """The pipeline at work, and what was seen and checked so far."""

    pipe: Any
    panels: list[Panel] = field(default_factory=list)
    checks: list[tuple[bool, str]] = field(default_factory=list)

    def check(self, passed: bool, text: str) -> bool:
        self.checks.append((bool(passed), text))
        return bool(passed)

    def show(self, title: str, judge: Callable[[np.ndarray], tuple[bool, str]] | None = None) -> np.ndarray:
        """Draw the pipeline's picture, judge it, and put it into the grid."""
        pixels = draw(self.pipe)
        passed, caption = judge(pixels) if judge else (True, "")
        if judge:
            self.check(passed, f"{title}: {caption}")
        self.panels.append(Panel(title, caption, pixels, passed))
        return pixels


def build_pipeline() -> Any:
    """A FluxPipeline of 0.6 M random weights; the prompt's embeddings are given to it, so it has no text encoder."""
    torch.manual_seed(SEED)
    transformer = diffusers.FluxTransformer2DModel(**TRANSFORMER)
    vae = diffusers.AutoencoderKL(**VAE)
    make_colourful(transformer, vae)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        **ABSENT,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def make_colourful(transformer: nn.Module, vae: nn.Module) -> None:
    """Widen the usual initialisation, which gives almost grey pictures; found by trying."""
    for weight in transformer.parameters():
        if weight.ndim == 2:
            weight.normal_(std=weight.shape[1] ** -0.5)
    for kernel in vae.parameters():
        if kernel.ndim == 4:
            kernel.normal_(std=1.4 * kernel[0].numel() ** -0.5)
    # The four pixels of a patch get one value, else every picture is a weave of 2x2 patches.
    out = transformer.get_submodule("proj_out")
    assert isinstance(out, nn.Linear)
    out.weight.copy_(2 * out.weight[::4].repeat_interleave(4, 0))
    out.bias.zero_()


@torch.no_grad()
def draw(pipe: Any, **options: Any) -> np.ndarray:
    """One picture `[height, width, 3]` in [0, 1], always from the same start and the same embeddings."""
    size = PIXELS // 2
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(1, 4, 5, 5, generator=generator)
    start = nn.functional.interpolate(start, size=(size, size), mode="bicubic", align_corners=True)
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randn(1, 8, 32, generator=generator)
    pooled = torch.randn(1, 32, generator=generator)
    images = pipe(
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        latents=pipe._pack_latents(start, 1, 4, size, size),
        height=PIXELS,
        width=PIXELS,
        num_inference_steps=4,
        output_type="np",
        **options,
    ).images
    return images[0]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's own weights under their plain names, whether adapters are attached or not."""
    tensors = {key.replace(".base_layer.", "."): tensor for key, tensor in model.state_dict().items()}
    return {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}


def changed_elements(before: dict[str, Tensor], model: nn.Module) -> int:
    """Number of weights with another bit pattern than before."""
    after = base_weights(model)
    assert after.keys() == before.keys()
    return sum(int((after[key].view(torch.int32) != before[key].view(torch.int32)).sum()) for key in before)


def same_as(reference: np.ndarray, name: str) -> Callable[[np.ndarray], tuple[bool, str]]:
    """A judge that wants every bit of the picture equal."""

    def judge(pixels: np.ndarray) -> tuple[bool, str]:
        different = int((pixels != reference).sum())
        return different == 0, f"equal to '{name}'" if not different else f"{different} values differ from '{name}'"

    return judge


def other_than(reference: np.ndarray, name: str) -> Callable[[np.ndarray], tuple[bool, str]]:
    """A judge that wants a difference one can see."""

    def judge(pixels: np.ndarray) -> tuple[bool, str]:
        distance = float(np.abs(pixels - reference).mean())
        return distance > VISIBLE, f"mean distance to '{name}': {distance:.2f}"

    return judge


def close_to(reference: np.ndarray, name: str) -> Callable[[np.ndarray], tuple[bool, str]]:
    """A judge that allows for the rounding of a fused weight."""

    def judge(pixels: np.ndarray) -> tuple[bool, str]:
        distance = float(np.abs(pixels - reference).max())
        return distance < FUSED_TOLERANCE, f"at most {distance:.0e} from '{name}'"

    return judge


def demonstrate(folder: Path) -> Demo:
    """Run the whole main job; files go to `folder`."""
    demo = Demo(build_pipeline())
    pipe, model = demo.pipe, demo.pipe.transformer
    before, layout, classes = {k: v.clone() for k, v in base_weights(model).items()}, repr(model), type(model)
    plain = demo.show("plain")

    ll.attach(pipe)
    report = pipe.load_lora_weights(FIXTURES / "tiny_flux_kohya.safetensors", adapter_name="lagoon")
    demo.check(
        report.format == "kohya" and not report.unmatched and not report.ignored,
        f"the kohya file is bound whole: {report.components['transformer']} modules of {report.family}",
    )
    lagoon = demo.show("lagoon", other_than(plain, "plain"))
    pipe.set_adapters("lagoon", 0.5)
    half = demo.show("lagoon, half weight", other_than(lagoon, "lagoon"))
    seen, distance = other_than(plain, "plain")(half)
    demo.check(seen, f"lagoon, half weight: {distance}")
    pipe.set_adapters("lagoon")
    scaled = draw(pipe, joint_attention_kwargs={"scale": 0.5})
    demo.check(np.array_equal(scaled, half), 'joint_attention_kwargs={"scale": 0.5} gives the half-weight picture')

    pipe.load_lora_weights(FIXTURES / "tiny_flux_diffusers.safetensors", adapter_name="amber")
    demo.show("amber", other_than(plain, "plain"))
    pipe.set_adapters(["lagoon", "amber"])
    both = demo.show("both", other_than(lagoon, "lagoon"))
    show_fusing(demo, before, both)
    pipe.disable_lora()
    demo.check(np.array_equal(draw(pipe), plain), "disable_lora() gives the plain picture")
    pipe.enable_lora()
    pipe.delete_adapters("amber")
    show_spellings(demo, folder, lagoon)

    ll.detach(pipe)
    demo.check(repr(model) == layout and type(model) is classes, "detach() gives back the model, module for module")
    demo.check(changed_elements(before, model) == 0, "detach() leaves no weight changed")
    demo.show("detached", same_as(plain, "plain"))
    return demo


def show_fusing(demo: Demo, before: dict[str, Tensor], both: np.ndarray) -> None:
    """Both adapters into the weights and out again."""
    total = sum(tensor.numel() for tensor in before.values())
    demo.pipe.fuse_lora()
    fused = changed_elements(before, demo.pipe.transformer)
    demo.check(fused > total // 2, f"fuse_lora() changes {fused:,} of {total:,} weights")
    demo.show("both, fused", close_to(both, "both"))
    demo.pipe.unfuse_lora()
    left = changed_elements(before, demo.pipe.transformer)
    demo.check(left == 0, f"unfuse_lora() leaves {left} of {total:,} weights changed")
    demo.show("unfused", same_as(both, "both"))


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files hold the same numbers under the same keys, whatever they are stored in."""
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[key].float(), second[key].float()) for key in first)


def show_spellings(demo: Demo, folder: Path, lagoon: np.ndarray) -> None:
    """The loaded adapter saved, converted to three spellings, and each file loaded again."""
    pipe = demo.pipe
    saved = pipe.save_lora_weights(folder, adapter_name="lagoon", weight_name="lagoon_diffusers.safetensors")
    files = {"diffusers": saved}
    for spelling in ("peft", "original", "kohya"):
        # No published Flux has these widths, so the file alone does not tell its family.
        target = folder / f"lagoon_{spelling}.safetensors"
        files[spelling] = ll.convert(saved, target, format=spelling, family="flux1")
    demo.check(
        same_tensors(FIXTURES / "tiny_flux_kohya.safetensors", files["kohya"]),
        "kohya file -> pipeline -> diffusers file -> kohya file gives the first file's keys and numbers",
    )
    for spelling, path in files.items():
        pipe.delete_adapters("lagoon")
        report = pipe.load_lora_weights(path, adapter_name="lagoon")
        demo.check(report.format == spelling, f"{path.name} is read as {report.format}")
        word = "saved" if spelling == "diffusers" else "converted"
        demo.show(f"{word}: {spelling}", same_as(lagoon, "lagoon"))


INK, PAPER, GREY, GREEN, RED = "#1d2430", "#fbfaf7", "#6b7280", "#2f855a", "#c53030"
SIDE, GAP, TOP, FOOT = 192, 20, 84, 52
# The decoder's zero padding shows in the outer pixels; they are left out of the grid, not of the checks.
EDGE = 6
ROWS = (
    ("Switching", ("plain", "lagoon", "lagoon, half weight", "amber")),
    ("Fusing", ("both", "both, fused", "unfused", "detached")),
    ("Files", ("saved: diffusers", "converted: peft", "converted: original", "converted: kohya")),
)


def paint_grid(demo: Demo, path: Path) -> None:
    """The panels as one labelled picture; a dot is green where the check under the panel passed."""
    panels = {panel.title: panel for panel in demo.panels}
    columns = max(len(titles) for _, titles in ROWS)
    size = (GAP + columns * (SIDE + GAP), TOP + len(ROWS) * (SIDE + FOOT + 34) + 8)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    big, middle, small = (ImageFont.load_default(points) for points in (22, 15, 12))
    pen.text((GAP, 18), "lora_loaders: one tiny Flux pipeline, two adapters", INK, big)
    failed = sum(not passed for passed, _ in demo.checks)
    verdict = f"{len(demo.checks) - failed} of {len(demo.checks)} checks passed"
    pen.text((GAP, 50), f"{verdict}; random weights, so only equal and different count", GREY, middle)
    for row, (heading, titles) in enumerate(ROWS):
        top = TOP + row * (SIDE + FOOT + 34)
        pen.text((GAP, top + 4), heading, GREY, middle)
        pen.line((GAP + pen.textlength(heading, middle) + 12, top + 14, size[0] - GAP, top + 14), "#d9d6cd")
        for column, title in enumerate(titles):
            left, panel = GAP + column * (SIDE + GAP), panels[title]
            inner = panel.pixels[EDGE:-EDGE, EDGE:-EDGE]
            picture = Image.fromarray((inner * 255).round().astype("uint8"))
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top + 30))
            below = top + 30 + SIDE + 6
            pen.text((left, below), title, INK, middle)
            if panel.caption:
                pen.ellipse((left, below + 25, left + 8, below + 33), GREEN if panel.passed else RED)
                pen.text((left + 14, below + 21), panel.caption, GREY, small)
    sheet.save(path)


def write_report(demo: Demo, path: Path, seconds: float) -> str:
    """What was checked, one line each; returned as it is written."""
    failed = [text for passed, text in demo.checks if not passed]
    lines = [
        f"lora_loaders {ll.__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}, CPU",
        "",
        *(f"{'ok    ' if passed else 'FAILED'}  {text}" for passed, text in demo.checks),
        "",
        f"{len(demo.checks) - len(failed)} of {len(demo.checks)} checks passed in {seconds:.1f} s",
    ]
    text = "\n".join(lines)
    path.write_text(text + "\n", "utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="folder for the picture and the report")
    folder: Path = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    began = time.perf_counter()
    demo = demonstrate(folder)
    paint_grid(demo, folder / "demo.png")
    print(write_report(demo, folder / "report.txt", time.perf_counter() - began))
    print(f"picture: {folder / 'demo.png'}")
    return 0 if all(passed for passed, _ in demo.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
