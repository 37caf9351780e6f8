"""LPIPS, FID and KID by torchmetrics: the field's figures, which need networks that others have trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity


@dataclass(frozen=True)
class Perceptual:
    """lpips: two pictures [B, 3, H, W] in [0, 1] to their distance. inception: uint8 pictures to features [B, d]."""

    lpips: nn.Module
    inception: nn.Module

    @classmethod
    def load(cls) -> "Perceptual":
        """AlexNet for LPIPS, Inception v3 for FID and KID, from torch's cache or the network.

        Raises ValueError where their packages or weights are not to be had.
        """
        try:
            lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
            return cls(lpips, FrechetInceptionDistance(feature=2048).inception)
        except (ImportError, OSError) as error:
            raise ValueError(
                "LPIPS, FID and KID need pretrained networks: `pip install torchvision torch-fidelity`, once with "
                f"access to the network for their weights ({error})"
            ) from error

    def distance(self, x: Tensor, y: Tensor) -> float:
        """LPIPS of two pictures [3, H, W] in [0, 1]."""
        return float(self.lpips(x[None].float(), y[None].float()))

    def set_distances(self, truths: Sequence[Tensor], pictures: Sequence[Tensor]) -> dict[str, float]:
        """fid and kid between two sets of at least 2 pictures [3, H, W] in [0, 1]; of few pictures they say little."""
        fid = FrechetInceptionDistance(feature=self.inception)
        kid = KernelInceptionDistance(feature=self.inception, subset_size=min(50, len(truths)))
        for metric in (fid, kid):
            for real, side in ((True, truths), (False, pictures)):
                for x in side:
                    metric.update((x[None] * 255).round().to(torch.uint8), real=real)
        return {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}
