"""One file of every spelling of every family here, keys written out by hand as its trainer writes them."""

import json
from collections.abc import Callable

import torch
from random_files import RANK, RandomFile

H = 16  # width of the small models here
ALPHA = 3.0  # no power of two, so that a forgotten alpha or a wrong rank is seen


def qkv(block: str, names: str = "to_q to_k to_v") -> list[str]:
    return [f"transformer.{block}.attn.{name}" for name in names.split()]


def flux_block(file: RandomFile, double: str, single: str, sep: str, *, alpha: float | None) -> None:
    """One double and one single block under the original names, `sep` between their parts."""

    def add(stem: str, targets: str | list[str], rows: int, columns: int, *shares: int) -> None:
        file.lora(stem.replace(".", sep), targets, rows * H, columns * H, shares=shares, alpha=alpha)

    path = "transformer.transformer_blocks.1"
    added = qkv("transformer_blocks.1", "add_q_proj add_k_proj add_v_proj")
    add(f"{double}.1.img_attn.qkv", qkv("transformer_blocks.1"), 3, 1)
    add(f"{double}.1.txt_attn.qkv", added, 3, 1)
    add(f"{double}.1.img_attn.proj", f"{path}.attn.to_out.0", 1, 1)
    add(f"{double}.1.txt_attn.proj", f"{path}.attn.to_add_out", 1, 1)
    add(f"{double}.1.img_mlp.0", f"{path}.ff.net.0.proj", 4, 1)
    add(f"{double}.1.img_mlp.2", f"{path}.ff.net.2", 1, 4)
    add(f"{double}.1.txt_mlp.0", f"{path}.ff_context.net.0.proj", 4, 1)
    add(f"{double}.1.txt_mlp.2", f"{path}.ff_context.net.2", 1, 4)
    add(f"{double}.1.img_mod.lin", f"{path}.norm1.linear", 6, 1)
    add(f"{double}.1.txt_mod.lin", f"{path}.norm1_context.linear", 6, 1)
    path = "transformer.single_transformer_blocks.37"
    parts = [*qkv("single_transformer_blocks.37"), f"{path}.proj_mlp"]
    add(f"{single}.37.linear1", parts, 7, 1, 1, 1, 1, 4)
    add(f"{single}.37.linear2", f"{path}.proj_out", 1, 5)
    add(f"{single}.37.modulation.lin", f"{path}.norm.linear", 3, 1)


def flux_top(file: RandomFile, prefix: str, sep: str, *, alpha: float | None) -> None:
    """The modules outside of the blocks; the final modulation's halves change places."""
    top = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    for original, path in top.items():
        file.lora(prefix + original.replace(".", sep), f"transformer.{path}", H, H, alpha=alpha)
    final = "final_layer.adaLN_modulation.1".replace(".", sep)
    file.lora(prefix + final, "transformer.norm_out.linear", 2 * H, H, swap=True, alpha=alpha)


def flux_kohya() -> RandomFile:
    file = RandomFile("flux1")
    flux_block(file, "lora_unet_double_blocks", "lora_unet_single_blocks", "_", alpha=ALPHA)
    flux_top(file, "lora_unet_", "_", alpha=ALPHA)
    layer = "text_model.encoder.layers.3.mlp.fc1"
    file.lora(f"lora_te1_{layer.replace('.', '_')}", f"text_encoder.{layer}", 4 * H, H, alpha=ALPHA)
    t5 = "encoder.block.2.layer.0.SelfAttention.q"
    file.lora(f"lora_te3_{t5.replace('.', '_')}", f"text_encoder_2.{t5}", H, H, alpha=ALPHA)
    return file


def flux_original() -> RandomFile:
    """ai-toolkit, SimpleTuner and ComfyUI: PEFT's suffixes, no alpha."""
    file = RandomFile("flux1", "peft")
    flux_block(file, "diffusion_model.double_blocks", "diffusion_model.single_blocks", ".", alpha=None)
    flux_top(file, "diffusion_model.", ".", alpha=None)
    return file


def flux_comfy_with_text() -> RandomFile:
    file = RandomFile("flux1", "kohya")
    flux_block(file, "diffusion_model.double_blocks", "diffusion_model.single_blocks", ".", alpha=ALPHA)
    clip, t5 = "text_model.encoder.layers.0.self_attn.k_proj", "encoder.block.0.layer.1.DenseReluDense.wi_0"
    file.lora(f"text_encoders.clip_l.transformer.{clip}", f"text_encoder.{clip}", H, H, alpha=ALPHA)
    file.lora(f"text_encoders.t5xxl.transformer.{t5}", f"text_encoder_2.{t5}", H, H, alpha=ALPHA)
    return file


def flux_bfl() -> RandomFile:
    """BFL's own: no prefix, a bias on the up factor; the bias of the final modulation is swapped with it."""
    file = RandomFile("flux1", "peft")
    flux_block(file, "double_blocks", "single_blocks", ".", alpha=None)
    flux_top(file, "", ".", alpha=None)
    return file


def flux_xlabs() -> RandomFile:
    file = RandomFile("flux1", "xlabs")
    double, single = "double_blocks.0.processor", "single_blocks.5.processor"
    path = "transformer.transformer_blocks.0.attn"
    file.lora(f"{double}.qkv_lora1", qkv("transformer_blocks.0"), 3 * H, H)
    file.lora(f"{double}.qkv_lora2", qkv("transformer_blocks.0", "add_q_proj add_k_proj add_v_proj"), 3 * H, H)
    file.lora(f"{double}.proj_lora1", f"{path}.to_out.0", H, H)
    file.lora(f"{double}.proj_lora2", f"{path}.to_add_out", H, H)
    file.lora(f"{single}.qkv_lora", qkv("single_transformer_blocks.5"), 3 * H, H)
    file.lora(f"{single}.proj_lora", "transformer.single_transformer_blocks.5.proj_out", H, 5 * H)
    return file


def flux_onetrainer() -> RandomFile:
    """diffusers' names flattened; its `te2` is T5, which sd-scripts calls `te3`."""
    file = RandomFile("flux1")
    paths = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0", "norm_out.linear", "proj_out"]
    for path in [*paths, "single_transformer_blocks.3.proj_mlp", "transformer_blocks.2.ff.net.0.proj"]:
        file.lora(f"lora_transformer_{path.replace('.', '_')}", f"transformer.{path}", 2 * H, H, alpha=ALPHA)
    clip, t5 = "text_model.encoder.layers.0.self_attn.out_proj", "encoder.block.0.layer.0.SelfAttention.k"
    file.lora(f"lora_te1_{clip.replace('.', '_')}", f"text_encoder.{clip}", H, H, alpha=ALPHA)
    file.lora(f"lora_te2_{t5.replace('.', '_')}", f"text_encoder_2.{t5}", H, H, alpha=ALPHA)
    return file


def flux_omi() -> RandomFile:
    """OneTrainer's later output: original names whose fused modules are numbered parts."""
    file = RandomFile("flux1")
    for index, path in enumerate(qkv("transformer_blocks.0")):
        file.lora(f"transformer.double_blocks.0.img_attn.qkv.{index}", path, H, H, alpha=ALPHA)
    single = "transformer.single_transformer_blocks.0"
    for index, name in enumerate(["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]):
        rows = 4 * H if name == "proj_mlp" else H
        file.lora(f"transformer.single_blocks.0.linear1.{index}", f"{single}.{name}", rows, H, alpha=ALPHA)
    return file


FLUX_PATHS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.18.ff.net.2",
    "single_transformer_blocks.0.proj_out",
)


def flux_diffusers(style: str = "peft", prefix: str = "transformer.") -> RandomFile:
    file = RandomFile("flux1", style)
    for path in (*FLUX_PATHS, "x_embedder", "context_embedder", "norm_out.linear", "proj_out"):
        file.lora(prefix + path, f"transformer.{path}", 2 * H, H)
    return file


def flux_peft_slot() -> RandomFile:
    return flux_diffusers("peft-slot", "base_model.model.")


def flux_peft_without_weight() -> RandomFile:
    return flux_diffusers("peft-bare")


def flux_peft_wrapped_twice() -> RandomFile:
    return flux_diffusers("peft", "base_model.model.transformer.")


def flux_diffusers_dotted() -> RandomFile:
    return flux_diffusers("dotted")


def peft_config(**fields: object) -> dict[str, object]:
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "use_rslora": False, **fields}


def flux_peft_folder() -> RandomFile:
    """The configuration beside the file says alpha; a pattern with a regular expression says another one."""
    file = RandomFile("flux1", "peft", config=peft_config(alpha_pattern={"attn.to_q": 5, r"^proj_out": 7}))
    for path in FLUX_PATHS:
        alpha = 5 if path.endswith("attn.to_q") else 8
        file.lora(f"base_model.model.{path}", f"transformer.{path}", H, H, scaling=alpha / RANK)
    file.lora("base_model.model.proj_out", "transformer.proj_out", H, H, scaling=7 / RANK)
    return file


def flux_peft_rank_pattern() -> RandomFile:
    """The rank is each tensor's own, whatever the configuration's `r` says."""
    file = RandomFile("flux1", "peft", config=peft_config(rank_pattern={"proj_out": 8}))
    file.lora("base_model.model.proj_out", "transformer.proj_out", H, H, rank=8, scaling=8 / 8)
    file.lora("base_model.model.x_embedder", "transformer.x_embedder", H, H, scaling=8 / RANK)
    return file


def flux_peft_rslora() -> RandomFile:
    file = RandomFile("flux1", "peft", config=peft_config(use_rslora=True))
    file.lora("base_model.model.proj_out", "transformer.proj_out", H, H, rank=2, scaling=8 / 2**0.5)
    file.lora("base_model.model.x_embedder", "transformer.x_embedder", H, H, scaling=8 / RANK**0.5)
    return file


def flux_diffusers_metadata() -> RandomFile:
    """diffusers' header: one configuration a component, its name before each field."""
    file = RandomFile("flux1", "peft")
    said = {"transformer.r": RANK, "transformer.lora_alpha": 6, "transformer.use_rslora": False}
    said |= {"transformer.alpha_pattern": {"single_transformer_blocks.0.proj_out": 1}}
    said |= {"text_encoder.r": RANK, "text_encoder.lora_alpha": 2}
    file.metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(said)}
    for path in FLUX_PATHS:
        alpha = 1 if path.startswith("single") else 6
        file.lora(f"transformer.{path}", f"transformer.{path}", H, H, scaling=alpha / RANK)
    clip = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    file.lora(clip, clip, H, H, scaling=2 / RANK)
    return file


def flux_kohya_header_alpha() -> RandomFile:
    """No `.alpha` in the file, but the header says one: it goes to the modules of the rank that it is for."""
    file = RandomFile("flux1", metadata={"ss_network_dim": str(RANK), "ss_network_alpha": "2.0"})
    file.lora("lora_unet_img_in", "transformer.x_embedder", H, H, scaling=2 / RANK)
    file.lora("lora_unet_txt_in", "transformer.context_embedder", H, H, rank=8, scaling=1)
    file.lora("lora_unet_final_layer_linear", "transformer.proj_out", H, H, alpha=ALPHA)
    return file


# Stable Diffusion.

SGM = {  # name in the original checkpoint -> diffusers' path, output rows, inputs, kernel
    "input_blocks.0.0": ("conv_in", H, 4, (3, 3)),
    "time_embed.0": ("time_embedding.linear_1", 4 * H, H, ()),
    "label_emb.0.2": ("add_embedding.linear_2", 4 * H, H, ()),
    "input_blocks.1.0.in_layers.2": ("down_blocks.0.resnets.0.conv1", H, H, (3, 3)),
    "input_blocks.3.0.op": ("down_blocks.0.downsamplers.0.conv", H, H, (3, 3)),
    "input_blocks.4.0.skip_connection": ("down_blocks.1.resnets.0.conv_shortcut", 2 * H, H, (1, 1)),
    "input_blocks.4.0.emb_layers.1": ("down_blocks.1.resnets.0.time_emb_proj", H, H, ()),
    "input_blocks.5.1.proj_in": ("down_blocks.1.attentions.1.proj_in", H, H, ()),
    "input_blocks.8.1.transformer_blocks.9.attn2.to_k": (
        *("down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k", H, 2 * H, ()),
    ),
    "middle_block.0.out_layers.3": ("mid_block.resnets.0.conv2", H, H, (3, 3)),
    "middle_block.1.transformer_blocks.0.attn1.to_out.0": (
        *("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", H, H, ()),
    ),
    "middle_block.2.in_layers.2": ("mid_block.resnets.1.conv1", H, H, (3, 3)),
    "output_blocks.2.1.transformer_blocks.7.ff.net.0.proj": (
        *("up_blocks.0.attentions.2.transformer_blocks.7.ff.net.0.proj", 8 * H, H, ()),
    ),
    "output_blocks.2.2.conv": ("up_blocks.0.upsamplers.0.conv", H, H, (3, 3)),
    "output_blocks.5.0.emb_layers.1": ("up_blocks.1.resnets.2.time_emb_proj", H, H, ()),
    "out.2": ("conv_out", 4, H, (3, 3)),
}
CLIP_LAYER = "text_model.encoder.layers.7.self_attn.q_proj"


def sdxl_kohya() -> RandomFile:
    file = RandomFile("sdxl")
    for original, (path, rows, columns, kernel) in SGM.items():
        file.lora(f"lora_unet_{original.replace('.', '_')}", f"unet.{path}", rows, columns, kernel, alpha=ALPHA)
    for number, encoder in ((1, "text_encoder"), (2, "text_encoder_2")):
        file.lora(f"lora_te{number}_{CLIP_LAYER.replace('.', '_')}", f"{encoder}.{CLIP_LAYER}", H, H, alpha=ALPHA)
    return file


def unet_file(family: str, style: str, stem: Callable[[str], str], alpha: float | None) -> RandomFile:
    """Under diffusers' own names, spelled by `stem`."""
    file = RandomFile(family, style)
    for path, rows, columns, kernel in SGM.values():
        if not path.startswith(("add_embedding", "up_blocks.0.attentions", "down_blocks.2.attentions.1.tr")):
            file.lora(stem(path), f"unet.{path}", rows, columns, kernel, alpha=alpha)
    return file


def sdxl_kohya_diffusers_names() -> RandomFile:
    return unet_file("sdxl", "kohya", lambda path: f"lora_unet_{path.replace('.', '_')}", ALPHA)


def sdxl_diffusers() -> RandomFile:
    file = unet_file("sdxl", "peft", lambda path: f"unet.{path}", None)
    for encoder in ("text_encoder", "text_encoder_2"):
        file.lora(f"{encoder}.{CLIP_LAYER}", f"{encoder}.{CLIP_LAYER}", H, H)
    return file


def sdxl_old_processors() -> RandomFile:
    """2023's diffusers, which called its attention processors' parts so."""
    file = RandomFile("sdxl", "processor")
    block = "down_blocks.2.attentions.0.transformer_blocks.2.attn1"
    for name in ("to_q", "to_k", "to_v"):
        file.lora(f"unet.{block}.processor.{name}", f"unet.{block}.{name}", H, H)
    layer = "text_model.encoder.layers.0"
    for encoder in ("text_encoder", "text_encoder_2"):
        stem = f"{encoder}.{layer}.self_attn"
        file.lora(f"{stem}.q_proj", f"{stem}.q_proj", H, H, style="linear-layer")
        file.lora(f"{stem}.to_k", f"{stem}.k_proj", H, H, style="processor")
        file.lora(f"{stem}.to_out", f"{stem}.out_proj", H, H, style="processor")
        file.lora(f"{encoder}.{layer}.mlp.fc1", f"{encoder}.{layer}.mlp.fc1", H, H, style="linear-layer")
    return file


def sd15_kohya() -> RandomFile:
    file = unet_file("sd15", "kohya", lambda path: f"lora_unet_{path.replace('.', '_')}", ALPHA)
    file.lora(f"lora_te_{CLIP_LAYER.replace('.', '_')}", f"text_encoder.{CLIP_LAYER}", H, H, alpha=ALPHA)
    return file


def sd15_dotted() -> RandomFile:
    """The newer of diffusers' two dotted styles, on a conv proj_in as SD 1.5 has it."""
    file = RandomFile("sd15", "dotted")
    for path in ("down_blocks.0.attentions.0.proj_in", "up_blocks.1.attentions.2.proj_out"):
        file.lora(f"unet.{path}", f"unet.{path}", H, H, (1, 1))
    file.lora(f"text_encoder.{CLIP_LAYER}", f"text_encoder.{CLIP_LAYER}", H, H)
    return file


def sd15_without_text_model_level() -> RandomFile:
    """From transformers 5.6 on CLIPTextModel has no `text_model.`: files of either kind mean the same module."""
    file = RandomFile("sd15", "peft")
    bare = CLIP_LAYER.removeprefix("text_model.")
    file.lora(f"text_encoder.{bare}", f"text_encoder.{CLIP_LAYER}", H, H)
    return file


def sd15_tucker() -> RandomFile:
    file = RandomFile("sd15")
    down, mid, up = file.randn(4, H, 1, 1), file.randn(4, 4, 3, 3), file.randn(2 * H, 4, 1, 1)
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    file.tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up}
    file.tensors[f"{stem}.alpha"] = torch.tensor(ALPHA, dtype=torch.float64)
    core = torch.einsum("oa,abhw,bi->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    file.expect("unet.down_blocks.0.resnets.0.conv1", core * ALPHA / 4)
    return file


# Qwen-Image.

QWEN_PATHS = (
    *("img_in", "txt_in", "norm_out.linear", "proj_out", "time_text_embed.timestep_embedder.linear_1"),
    *(f"transformer_blocks.59.attn.{n}" for n in ("to_q", "add_k_proj", "to_out.0", "to_add_out")),
    *(
        "transformer_blocks.0.img_mod.1",
        "transformer_blocks.0.img_mlp.net.0.proj",
        "transformer_blocks.0.txt_mlp.net.2",
    ),
)


def qwen_file(style: str, stem: Callable[[str], str], alpha: float | None) -> RandomFile:
    file = RandomFile("qwen-image", style)
    for path in QWEN_PATHS:
        file.lora(stem(path), f"transformer.{path}", 2 * H, H, alpha=alpha)
    return file


def qwen_kohya() -> RandomFile:
    file = qwen_file("kohya", lambda path: f"lora_unet_{path.replace('.', '_')}", ALPHA)
    layer = "layers.5.self_attn.q_proj"
    file.lora(f"lora_te_{layer.replace('.', '_')}", f"text_encoder.model.language_model.{layer}", H, H, alpha=ALPHA)
    return file


def qwen_lightning() -> RandomFile:
    """No prefix, dotted diffusers names, kohya's suffixes and alpha."""
    return qwen_file("kohya", lambda path: path, ALPHA)


def qwen_ai_toolkit() -> RandomFile:
    """`diffusion_model.` over diffusers' names."""
    return qwen_file("peft", lambda path: f"diffusion_model.{path}", None)


def qwen_diffusers() -> RandomFile:
    file = qwen_file("peft", lambda path: f"transformer.{path}", None)
    layer = "model.language_model.layers.5.mlp.down_proj"
    file.lora(f"text_encoder.{layer}", f"text_encoder.{layer}", H, H)
    return file


def qwen_simpletuner() -> RandomFile:
    return qwen_file("dotted", lambda path: f"transformer.{path}", None)


def qwen_lycoris() -> RandomFile:
    return qwen_file("kohya", lambda path: f"lycoris_{path.replace('.', '_')}", ALPHA)


SPELLINGS: dict[str, Callable[[], RandomFile]] = {
    maker.__name__.replace("_", " "): maker
    for maker in (
        *(flux_kohya, flux_original, flux_comfy_with_text, flux_bfl, flux_xlabs, flux_onetrainer, flux_omi),
        *(flux_diffusers, flux_diffusers_dotted, flux_peft_slot, flux_peft_without_weight, flux_peft_wrapped_twice),
        *(flux_peft_folder, flux_peft_rank_pattern, flux_peft_rslora, flux_diffusers_metadata, flux_kohya_header_alpha),
        *(sdxl_kohya, sdxl_kohya_diffusers_names, sdxl_diffusers, sdxl_old_processors),
        *(sd15_kohya, sd15_dotted, sd15_without_text_model_level, sd15_tucker),
        *(qwen_kohya, qwen_lightning, qwen_ai_toolkit, qwen_diffusers, qwen_simpletuner, qwen_lycoris),
    )
}
