"""Cross-attention of a UNet that is read while it computes: which cell looks at which word (after DAAM)."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor


class RecordedAttention:
    """Plain cross-attention that keeps its probabilities: for each call a map [B, cells, tokens], the heads' mean."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
        """Attend as diffusers does; hidden_states [B, cells, C], encoder_hidden_states [B, tokens, D]."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, heads, cells or tokens, width]

        q, k = heads(attn.to_q(hidden_states)), heads(attn.to_k(encoder_hidden_states))
        weights = (attn.scale * q @ k.mT).softmax(dim=-1)  # [B, heads, cells, tokens]
        self.maps.append(weights.float().mean(dim=1))
        mixed = (weights @ heads(attn.to_v(encoder_hidden_states))).transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed)


@contextmanager
def recorded_attention(unet: UNet2DConditionModel) -> Iterator[RecordedAttention]:
    """Record every cross-attention of `unet` inside the block. Its own processors are put back afterwards."""
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
