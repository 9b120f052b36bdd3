# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Stable Diffusion, opened
#
# A prompt becomes 77 vectors, noise becomes a latent under their influence, the latent becomes a
# picture. This notebook takes the three parts out of the house and looks into each.
#
# It wants a model of Stable Diffusion 1.x or 2.x that draws from words alone:
#
# ```
# minidiffusion download sd1.5          # 4 GB, into models/
# MODEL=sd1.5 jupyter lab               # or the path of a file or folder
# ```
#
# The file is plain Python as well: `MODEL=... FIGURES=folder python three_parts.py` runs it from
# top to bottom and leaves the figures in a folder; `jupytext --to ipynb three_parts.py` makes a
# notebook. The network is asked 75 times: seconds on a GPU, minutes on a processor.
# `docs/stable-diffusion/` is the text that goes with it.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

import minidiffusion
from minidiffusion.diffusion import SAMPLERS, START, guided, keyed
from minidiffusion.layers.attention import split_heads

MODEL = os.environ.get("MODEL", "sd1.5")
FIGURES = os.environ.get("FIGURES")
PROMPT = "an astronaut scuba diving"
STEPS, SCALE, SEED = 20, 7.5, 7


def show(name):
    """The figure on the screen, or in a file."""
    figure = plt.gcf()
    if FIGURES:
        Path(FIGURES).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(FIGURES) / f"{name}.png", dpi=110)
    elif plt.get_backend().lower() != "agg":
        plt.show()
    plt.close(figure)


pipe = minidiffusion.load(MODEL)
for part in (pipe.text.encoder, pipe.network, pipe.autoencoder):
    weights = sum(weight.numel() for weight in part.parameters())
    print(f"{type(part).__name__:12} {weights / 1e6:8.1f} million weights, {pipe.device}")
print(f"{pipe.row.family}: predicts {pipe.row.target}, latents of {pipe.row.shape}")

# %% [markdown]
# ## 1. Tokens
#
# The text encoder reads no letters. Byte-pair encoding cuts the prompt into pieces of a vocabulary
# of 49,408; frequent words are one piece, rare ones several, and `</w>` marks where a word ends.
# Between a start and an end token lie 75 places; what is left over is padding.

# %%
tokenizer = pipe.text.tokenizer
ids = pipe.text.tokenize(PROMPT)
pieces = tokenizer.pieces(PROMPT)
for number, piece in zip(tokenizer.encode(PROMPT), pieces, strict=True):
    print(f"{number:6}  {piece}")
print("all places:", tuple(ids.shape), "filled with", ids[0, -1].item())
assert ids[0, 0] == tokenizer.bos and ids[0, len(pieces) + 1] == tokenizer.eos
for text in ("Astronaut", "astronautical", "kerplunk", "🐙", "写真"):
    print(f"{text:14} {tokenizer.pieces(text)}")

# %% [markdown]
# Capitals are gone, rare words cost more of the 75 places, and what is not English falls apart
# into bytes. `decode` glues the pieces together again.

# %%
assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT

# %% [markdown]
# ## 2. Embeddings
#
# The encoder, a transformer, gives each of the 77 places a vector. Attention in it is causal: a
# place knows what stands before it and nothing of what follows. So *cat* below has one vector in
# both prompts, while the last words, and the end token with them, differ.

# %%
cond = pipe.condition(PROMPT)
print("tokens", tuple(cond.tokens.shape), "pooled", tuple(cond.pooled.shape))

first, second = pipe.condition(["a cat in a hat", "a cat on the moon"]).tokens.float()
distance = (first - second).norm(dim=1)
for place, words in enumerate(("start", "a / a", "cat / cat", "in / on", "a / the", "hat / moon")):
    print(f"{words:10} {distance[place]:.4f} apart")
assert distance[:3].max() < 1e-3 * distance[3]


# %%
def cosines(vectors):
    vectors = F.normalize(vectors.float(), dim=1)
    return (vectors @ vectors.T).cpu().numpy()


def matrix(axes, values, names, title):
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=50, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(title, fontsize=10)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            shade = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade, size=6)


PLACES = ["start", *(piece.removesuffix("</w>") for piece in pieces), "end", "padding"]
TEXTS = ["a cat", "a kitten", "a dog", "a racing car", "a lorry", "scuba diving"]
ends = pipe.condition(TEXTS).pooled
_, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
matrix(left, cosines(cond.tokens[0, : len(PLACES)]), PLACES, "places of one prompt")
matrix(right, cosines(ends), TEXTS, "whole prompts (pooled)")
show("embeddings")

# %% [markdown]
# The start token sees nothing but itself, so it is the same vector in every prompt. The network
# attends to the 77 vectors; the pooled one, of the end token, Stable Diffusion 1 and 2 do not use
# at all.

# %% [markdown]
# ## 3. The noise schedule
#
# `x = alpha * x0 + sigma * eps` over a thousand training times. A sampler visits a few of them:
# twenty for DDIM on the ladder of latent diffusion, and twenty for DPM++ on the one of Karras et
# al., which spends its steps where little noise is left.

# %%
path = pipe.row.path
levels = [path.grid(float(time)) for time in range(1000)]
alpha, sigma = (np.array([getattr(level, name) for level in levels]) for name in ("alpha", "sigma"))
assert np.allclose(alpha**2 + sigma**2, 1)
LADDERS = {name: path.ladder(STEPS, name) for name in ("ldm", "karras")}

_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot(alpha, label="alpha, the share of the picture")
left.plot(sigma, label="sigma, the share of the noise")
left.set(xlabel="training time", title="the path")
left.legend(fontsize=8)
right.plot(2 * np.log10(alpha / sigma), color="grey", label="all thousand")
for (name, ladder), mark in zip(LADDERS.items(), "o|", strict=True):
    noisy = [level for level in ladder if level.sigma > 0]
    ratios = [2 * np.log10(level.alpha / level.sigma) for level in noisy]
    right.plot([level.t for level in noisy], ratios, mark, ms=9, mfc="none", label=f"{name}, 20")
right.set(xlabel="training time", title="log10 of signal to noise: alpha² / sigma²")
right.legend(fontsize=8)
show("schedule")
print(f"at time 999 {alpha[-1] ** 2:.4f} of the variance is still picture")

# %% [markdown]
# ## 4. The latent as a picture
#
# The network never sees a pixel. It works on four channels of 64 x 64 numbers, one place for 8 x 8
# pixels: 48 times fewer than the picture. `pipe.stream` walks the ladder; each step carries `x`,
# where the walk is, and `x0`, what the network thinks it will be. The autoencoder decodes the last
# one.

# %%
steps = []
for step in pipe.stream(
    PROMPT, num_steps=STEPS, guidance_scale=SCALE, sampler="ddim", seed=SEED
):  # to cancel, leave the loop
    steps.append(step)
latent = steps[-1].x
picture = pipe.decode(latent)
print("latent", tuple(latent.shape), "picture", tuple(picture.shape))
print("mean and spread of a channel:", [f"{c.mean():.2f} {c.std():.2f}" for c in latent[0]])


# %%
def bare(axes, image, title, **options):
    axes.imshow(image.float().cpu().numpy(), **options)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def visible(image):
    """(3, h, w) in [-1, 1] as matplotlib wants it."""
    return ((image + 1) / 2).clamp(0, 1).permute(1, 2, 0)


# %% [markdown]
# How much of the picture is a *linear* function of the latent? Make the picture as small as the
# latent and fit, by least squares, colours = channels times a 4 x 3 matrix, plus a constant. That
# is a preview that costs nothing, and the fit says how good it is.

# %%
factor = pipe.autoencoder.config.factor
colours = F.avg_pool2d(picture.float(), factor)[0].flatten(1).T.cpu()
ones = torch.ones(len(colours), 1)
channels = torch.cat([latent[0].float().flatten(1).T.cpu(), ones], dim=1)
mixture = torch.linalg.lstsq(channels, colours).solution


def preview(latent):
    """The linear approximation of decode, at the latent's size."""
    flat = latent[0].float().flatten(1).T.cpu() @ mixture[:-1] + mixture[-1]
    return flat.T.unflatten(1, latent.shape[2:])


left_over = (channels @ mixture - colours).square().sum()
explained = 1 - left_over / (colours - colours.mean(dim=0)).square().sum()
print(f"{100 * explained:.0f} % of the small picture's variance is linear in the latent")
assert 0 <= explained <= 1

_, axes = plt.subplots(1, 6, figsize=(12, 2.4), layout="constrained")
for k in range(4):
    bare(axes[k], latent[0, k], f"channel {k}", cmap="gray")
bare(axes[4], visible(preview(latent)), "linear")
bare(axes[5], visible(picture[0]), "decoded")
show("latent")

# %% [markdown]
# The autoencoder stands alone: a picture goes in and comes out, a little poorer. This is the most
# that img2img and inpainting can keep of a picture of yours.

# %%
with torch.no_grad():
    again = pipe.decode(pipe.autoencoder.encode(picture.clamp(-1, 1)))
error = (again - picture.clamp(-1, 1)).square().mean()
print(f"there and back: {10 * torch.log10(4 / error):.1f} dB (PSNR)")

# %% [markdown]
# ## 5. Denoising, watched
#
# Above: where the walk is. Below: what the network thinks the picture will be, from its first
# guess, a blur, on. Form is settled early, texture late.

# %%
chosen = [0, STEPS // 8, STEPS // 4, STEPS // 2, 3 * STEPS // 4, STEPS - 1]
_, axes = plt.subplots(2, len(chosen), figsize=(12, 4.2), layout="constrained")
for k, column in zip(chosen, axes.T, strict=True):
    step = steps[k]
    bare(column[0], visible(preview(step.x)), f"x after step {k + 1}, t = {step.level.t:.0f}")
    bare(column[1], visible(preview(step.x0)), "x0")
show("denoising")

# %% [markdown]
# ## 6. Which word works where
#
# Layers all over the UNet, sixteen in full size, attend to the prompt: every place of the feature
# map asks, every token answers, and a softmax over the 77 answers decides how much each counts.
# Nobody keeps these numbers, so a hook works them out a second time from what the layer was given.


# %%
def listen(layer, kept):
    """Keeps the layer's weights, averaged over its heads: (places, 77)."""

    def hook(layer, given, _):
        x, context = given
        q = split_heads(layer.q(x), layer.heads).float()
        k = split_heads(layer.kv(context).chunk(2, dim=-1)[0], layer.heads).float()
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
        kept.append(weights[0].mean(dim=0))

    return layer.register_forward_hook(hook)


@torch.no_grad()
def ask(x, t, cond):
    return pipe.network(x, t, cond)


def attention(x, level, cond):
    """The mean over all layers, at the latent's size: (77, rows, columns)."""
    layers = [m for name, m in pipe.network.named_modules() if name.endswith("cross_attention")]
    kept = []
    hooks = [listen(layer, kept) for layer in layers]
    try:
        ask(x, x.new_full((len(x),), level.t), cond)
    finally:
        for hook in hooks:
            hook.remove()
    rows, columns = x.shape[2:]
    total = 0
    for weights in kept:
        height = round((len(weights) * rows / columns) ** 0.5)
        plane = weights.T.unflatten(1, (height, -1))[None]
        total = total + F.interpolate(plane, size=(rows, columns), mode="bilinear")[0]
    return total / len(kept)


maps = {k: attention(steps[k].x, steps[k].level, cond) for k in chosen[:-1]}
mean = torch.stack(list(maps.values())).mean(dim=0)

# %% [markdown]
# A word may be several tokens: their maps are added. With the start token and with the end and its
# padding, the maps add up to 1 at every place: what one word gains, another loses. In trained
# models the start token takes the most; it is where attention goes that wants nothing. Each map
# below has its own scale of brightness.

# %%
words, spans = [], []
for place, piece in enumerate(pieces, start=1):
    if not spans or pieces[place - 2].endswith("</w>"):
        words.append("")
        spans.append([])
    words[-1] += piece.removesuffix("</w>")
    spans[-1].append(place)
GROUPS = {"(start)": [0], **dict(zip(words, spans, strict=True))}
GROUPS["(end, padding)"] = list(range(len(pieces) + 1, 77))


def by_word(planes):
    return {word: planes[places].sum(dim=0) for word, places in GROUPS.items()}


shares = by_word(mean)
whole = torch.stack(list(shares.values())).sum(dim=0)
assert torch.allclose(whole, torch.ones_like(whole), atol=1e-4)

_, axes = plt.subplots(2, len(GROUPS), figsize=(2 * len(GROUPS), 4.4), layout="constrained")
early, late = (by_word(maps[k]) for k in (chosen[0], chosen[-2]))
for column, word in zip(axes.T, GROUPS, strict=True):
    for one, found, when in zip(column, (early, late), ("early", "late"), strict=True):
        share = 100 * found[word].mean()
        bare(one, found[word], f"{word}, {when}\n{share:.1f} % of all", cmap="magma")
show("attention")

# %% [markdown]
# ## 7. Guidance is a vector
#
# At each step the network is asked twice in one batch, with the prompt and with the empty one. The
# difference of its answers is a direction: towards the words. Guidance is one addition, `without +
# scale * (with - without)`; here it is written by hand, handed to the sampler, and gives what the
# pipeline gave, to the last bit.

# %%
nothing = pipe.condition("")
log = []


def combine(outs, level):
    conditional, unconditional = outs
    direction = conditional - unconditional
    log.append((level, conditional, unconditional))
    return unconditional + SCALE * direction


noise = keyed([SEED], pipe.row.shape, pipe.device)
denoise = guided(ask, pipe.row.target, [cond, nothing], combine)
walked = list(SAMPLERS["ddim"](denoise, noise(START), path.ladder(STEPS, "ldm"), noise))
assert torch.equal(walked[-1].x, latent)


# %%
def length(x):
    return x.flatten().norm()


times = [level.t for level, *_ in log]
ratios = [length(c - u) / length(u) for _, c, u in log]
nearness = [F.cosine_similarity(c.flatten(), u.flatten(), dim=0) for _, c, u in log]
answer = {"eps": "the noise", "v": "the velocity v"}[pipe.row.target]
print(f"the network's answer is {answer}, a vector of {latent[0].numel()} numbers")
print(f"the words move it by {100 * min(ratios):.2g} to {100 * max(ratios):.2g} % of its length")

_, (plane, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
level, with_words, without = log[STEPS // 2]
along = without.flatten() / length(without)
difference = (with_words - without).flatten()
across = difference - (difference @ along) * along
x, y = (float(part / length(without)) for part in (difference @ along, length(across)))
guided_x, guided_y = 1 + SCALE * x, SCALE * y
for start, end, color, label in (
    ((0, 0), (1, 0), "grey", "without words"),
    ((0, 0), (guided_x, guided_y), "black", "guided"),
    ((1, 0), (guided_x, guided_y), "tab:orange", f"{SCALE} times what the words change"),
    ((1, 0), (1 + x, y), "tab:blue", "what the words change"),
):
    plane.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "lw": 2})
    plane.plot(*zip(start, end, strict=True), color=color, lw=1, label=label)
plane.set_aspect("equal", adjustable="datalim")
plane.margins(0.1, 0.6)
plane.set_title(f"the plane of both answers, t = {level.t:.0f}", fontsize=10)
plane.legend(fontsize=7, loc="upper left")
middle.plot(times, [100 * float(ratio) for ratio in ratios], "o-", ms=4)
middle.set(xlabel="network time", title="length of the difference, % of the answer")
right.plot(times, [float(one.clamp(-1, 1).acos().rad2deg()) for one in nearness], "o-", ms=4)
right.set(xlabel="network time", title="angle between the answers, degrees")
for axes in (middle, right):
    axes.invert_xaxis()
    axes.title.set_size(10)
show("guidance")

# %% [markdown]
# A negative prompt replaces the empty one: the same addition, from another origin. Put `nothing =
# pipe.condition("blurry")` above and run the cells again.

# %% [markdown]
# ## 8. Starting from a picture
#
# img2img noises a given picture to a level in the middle of the ladder and walks down from there.
# `strength` is the share of the steps that are taken; at 0 the picture only goes through the
# autoencoder.

# %%
(drawn,) = pipe.pictures(latent)
OTHER = "an oil painting of an octopus"
STRENGTHS = (0.0, 0.25, 0.5, 0.75)
_, axes = plt.subplots(1, 1 + len(STRENGTHS), figsize=(12, 2.9), layout="constrained")
axes[0].imshow(drawn)
axes[0].set_title("given", fontsize=9)
for one, strength in zip(axes[1:], STRENGTHS, strict=True):
    start = path.ladder(STEPS, "ldm", strength=strength)[0]
    (found,) = pipe.img2img(
        drawn, OTHER, strength=strength, num_steps=STEPS, sampler="ddim", seed=SEED
    )
    one.imshow(found)
    walk = f"{int(STEPS * strength)} steps from t = {start.t:.0f}" if strength else "no step"
    one.set_title(f"strength {strength}: {walk}", fontsize=8)
for one in axes:
    one.set_axis_off()
show("strength")
