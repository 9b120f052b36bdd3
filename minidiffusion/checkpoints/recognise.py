"""What a file of weights holds, by the names and shapes in it; what it is called does not count."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

from minidiffusion.checkpoints.rename import Shape, check, matching, named
from minidiffusion.checkpoints.sizes import SIZES

Kind = Literal["denoiser", "autoencoder", "text encoder", "T5"]


class Part(NamedTuple):
    """A network in a file: its names' dialect, what stands before them, sizes for its config.

    kind: what it is for. network: its architecture.
    """

    kind: Kind
    network: str
    dialect: str
    prefix: str
    sizes: dict[str, object]


SIGNS: tuple[tuple[Kind, str, str, str], ...] = (
    ("denoiser", "unet", "ldm", "input_blocks.0.0.weight"),
    ("denoiser", "unet", "diffusers", "up_blocks.0.resnets.0.time_emb_proj.weight"),
    ("denoiser", "mmdit", "ldm", "joint_blocks.0.x_block.attn.qkv.weight"),
    ("denoiser", "mmdit", "diffusers", "transformer_blocks.0.attn.add_q_proj.weight"),
    ("autoencoder", "autoencoder", "ldm", "decoder.mid.block_1.norm1.weight"),
    ("autoencoder", "autoencoder", "diffusers-former",
     "decoder.mid_block.attentions.0.query.weight"),
    ("autoencoder", "autoencoder", "diffusers", "decoder.mid_block.resnets.0.norm1.weight"),
    ("text encoder", "clip", "transformers", "text_model.embeddings.token_embedding.weight"),
    ("text encoder", "clip", "transformers-bare", "embeddings.token_embedding.weight"),
    ("text encoder", "clip", "openclip", "transformer.resblocks.0.ln_1.weight"),
    ("T5", "t5", "transformers", "encoder.embed_tokens.weight"),
    ("T5", "t5", "transformers-shared", "shared.weight"),
)  # fmt: skip
"""One tensor that every network of its kind and dialect has, and no other; of two dialects with
the same prefix the first counts."""
PREFIXES: dict[Kind, tuple[str, ...]] = {
    "denoiser": ("", "model.diffusion_model."),
    "autoencoder": ("", "first_stage_model."),
    "text encoder": (
        "",
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "conditioner.embedders.0.model.",
        "conditioner.embedders.1.model.",
        "text_encoders.clip_l.transformer.",
        "text_encoders.clip_g.transformer.",
    ),
    "T5": ("", "text_encoders.t5xxl.transformer."),
}
SINGLE_FILE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
PLACES = (*SINGLE_FILE, "conditioner.embedders.", "text_encoders.")
"""Where single files keep their parts."""
IGNORED = (
    r"betas|alphas_.*|sqrt_.*|log_.*|posterior_.*|model_ema\..*|(.*\.)?position_ids|logvar|"
    r"denoiser\.sigmas|loss\..*|depth_model\..*"
)
"""Constants of training, its averages and losses, and the network that makes depth maps of 2."""
UNUSED = r"logit_scale|attn_mask|visual\..*|vision_model\..*|visual_projection\..*"
"""The half of CLIP that looks at pictures, and what training needed."""
EMA = "model_ema.diffusion_model"
STRANGERS = (
    (r"lora_(unet|te\d?)_.*", "this is a LoRA (kohya): give it as --lora"),
    (r".*\.lora_[AB](\..*)?|.*\.lora\.(up|down)\..*", "this is a LoRA (peft): give it as --lora"),
    (r".*\.(hada_w\d.*|lokr_.*|oft_.*)", "this is a LyCORIS adapter: not supported"),
    (r"(control_model|controlnet_cond_embedding|controlnet_down_blocks|input_hint_block)\..*",
     "this is a ControlNet: not supported"),
    (r"string_to_param.*|emb_params|clip_[lg]|<.*>",
     "this is a textual inversion embedding: not a network"),
    (r"(model\.diffusion_model\.)?double_blocks\..*", "Flux's denoiser: not supported"),
    (r".*(motion_modules|temporal_|time_stack).*", "a network of videos: not supported"),
    (r"autoencoder\.(encoder|decoder)\..*", "an autoencoder of our own: give it as --vae, or to "
     "through.autoencoder of a recipe"),
    (r"clip\.(text|picture)\..*", "a CLIP of our own: through.clip of a recipe takes it"),
    (r"(vision_model|visual)\..*", "the half of CLIP that looks at pictures: not needed here"),
    (r"(.*[./])?(exp_avg|exp_avg_sq|momentum_buffer)([./].*)?|optimizer.*|state\..*|param_groups.*",
     "the state of an optimizer: not a network"),
)  # fmt: skip
"""What people give as a model by mistake."""


def parts(shapes: Mapping[str, Shape]) -> list[Part]:
    """The networks of a file whose names and shapes these are; none where all is strange."""
    found: list[Part] = []
    for kind, network, dialect, sign in SIGNS:
        for prefix in PREFIXES[kind]:
            # T5's table of tokens may stand in a file under both of its names.
            twice = any((part.kind, part.prefix) == (kind, prefix) for part in found)
            if prefix + sign in shapes and not twice:
                inner = inside(shapes, prefix)
                sizes = SIZES[network](inner, dialect, prefix.startswith("conditioner."))
                found.append(Part(kind, network, dialect, prefix, sizes))
    return found


def inside(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    start = len(prefix)
    return {name[start:]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def stranger(names: Collection[str]) -> str:
    """In a few words, what a file seems to hold that is none of the networks known here."""
    for pattern, words in STRANGERS:
        if matching(pattern, names):
            return words
    tensors = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"no network that is known here: {tensors}, {named(sorted(names))}"


def check_rest(names: Iterable[str], where: object) -> None:
    """Raises ValueError for names of a single file that belong to no part and to nothing known."""
    known = re.compile(IGNORED)
    rest = [n for n in names if not n.startswith(PLACES) and not known.fullmatch(n)]
    if rest:
        raise ValueError(f"{where}: {len(rest)} unknown keys: {named(sorted(rest))}")


def check_part(
    shapes: Mapping[str, Shape], wanted: Mapping[str, Shape], part: Part, where: object
) -> None:
    """Raises ValueError unless a part is all there, and nothing stands beside it unexplained."""
    allowed = passed_over(part)
    start = len(part.prefix)
    found = {
        name: shape
        for name, shape in shapes.items()
        if name.startswith(part.prefix) and (name in wanted or not allowed.fullmatch(name[start:]))
    }
    check(found, wanted, where)


def passed_over(part: Part) -> re.Pattern[str]:
    """Names in a part that are known and not used."""
    if part.kind == "T5":
        return re.compile(rf"{IGNORED}|shared\.weight|decoder\..*|lm_head\..*")
    if part.kind != "text encoder":
        return re.compile(IGNORED)
    last = part.sizes["layers"]
    # Stable Diffusion 2 works on the last layer but one of a whole OpenCLIP encoder.
    openclip = rf"transformer\.resblocks\.{last}\..*|text_projection"
    spare = openclip if part.dialect == "openclip" else r"text_projection\.weight"
    return re.compile(f"{IGNORED}|{UNUSED}|{spare}")
