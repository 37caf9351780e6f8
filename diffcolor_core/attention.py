"""Where a word looks: cross-attention maps of a UNet (after DAAM, Tang et al. 2022), and regions from them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from diffcolor_core.diffusion import add_noise
from diffcolor_core.images import upsample_guided
from diffcolor_core.models import Checkpoint
from diffcolor_core.prompts import NounPhrase


class RecordedAttention:
    """Plain cross-attention that keeps its probabilities, averaged over heads: [B, cells, tokens] a call."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
        """Attend as diffusers does; hidden_states [B, cells, C], encoder_hidden_states [B, tokens, D]."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k = heads(attn.to_q(hidden_states)), heads(attn.to_k(encoder_hidden_states))
        weights = (attn.scale * q @ k.mT).softmax(dim=-1)
        self.maps.append(weights.float().mean(dim=1))
        mixed = (weights @ heads(attn.to_v(encoder_hidden_states))).transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed)


@contextmanager
def recorded_attention(unet: UNet2DConditionModel) -> Iterator[RecordedAttention]:
    """While it lasts, every cross-attention of `unet` is recorded; the processors are then put back."""
    recorder, before = RecordedAttention(), {}
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            before[module] = module.processor
            module.set_processor(recorder)
    try:
        yield recorder
    finally:
        for module, processor in before.items():
            module.set_processor(processor)


@torch.no_grad()
def phrase_regions(
    checkpoint: Checkpoint,
    z: Tensor,
    lightness_star: Tensor,
    prompt: str,
    phrases: Sequence[NounPhrase],
    generator: torch.Generator,
    *,
    timesteps: Sequence[int] = (50, 100, 200),
) -> Tensor:
    """Which part of a picture each noun phrase names, without a segmenter: [P, h, w], summing to 1 over P.

    z: [1, C, h/f, w/f], the latent of the gray or coloured picture; lightness_star: [1, h, w]. The
    noun's attention in the base UNet, averaged over layers and timesteps, relative to the other
    phrases' nouns; brought to full size along the picture's own edges.
    """
    positions = checkpoint.token_positions(prompt, [(phrase.noun_start, phrase.end) for phrase in phrases])
    embeds = checkpoint.encode_prompts([prompt])
    eps = torch.randn((len(timesteps), *z.shape[1:]), generator=generator).to(z)
    t = torch.tensor(timesteps, device=z.device)
    with recorded_attention(checkpoint.unet) as recorder:
        z_t = add_noise(checkpoint.scheduler, z.expand_as(eps), eps, t)
        checkpoint.denoise(checkpoint.unet, z_t, t, embeds.expand(len(t), -1, -1))
    height, width = z.shape[-2:]
    heat = torch.zeros(len(phrases), height, width)
    for attention in recorder.maps:
        reduction = round((height * width / attention.shape[1]) ** 0.5)
        if reduction > 2:  # the coarsest layers see the whole picture at once
            continue
        grid = attention.mean(dim=0).T.unflatten(1, (-(-height // reduction), -(-width // reduction))).cpu()
        nouns = torch.stack([grid[list(tokens)].mean(dim=0) for tokens in positions])
        heat += F.interpolate(nouns[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    share = (heat / heat.sum(dim=0).clamp(min=1e-12)) ** 4
    share = share / share.sum(dim=0).clamp(min=1e-12)
    full = upsample_guided(
        share,
        F.adaptive_avg_pool2d(lightness_star, (height, width)),
        lightness_star,
        slice(0, lightness_star.shape[-2]),
        lightness_star.shape[-2],
    )
    return full / full.sum(dim=0)
