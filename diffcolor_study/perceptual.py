"""LPIPS, FID and KID from torchmetrics. They need networks trained by others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity


@dataclass(frozen=True)
class Perceptual:
    """The two networks.

    lpips: maps two pictures [B, 3, H, W] in [0, 1] to their distance. inception: maps uint8 pictures
    [B, 3, H, W] to features [B, d].
    """

    lpips: nn.Module
    inception: nn.Module

    @classmethod
    def load(cls) -> "Perceptual":
        """Load AlexNet (LPIPS) and Inception v3 (FID, KID) from torch's cache, or download them.

        Raises ValueError if their packages or weights are not available.
        """
        try:
            lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
            return cls(lpips, FrechetInceptionDistance(feature=2048).inception)
        except (ImportError, OSError) as error:
            raise ValueError(
                "LPIPS, FID and KID need pretrained networks: `pip install torchvision torch-fidelity` and, on first "
                f"use, network access for their weights ({error})"
            ) from error

    def distance(self, x: Tensor, y: Tensor) -> float:
        """LPIPS of two pictures [3, H, W] in [0, 1]."""
        return float(self.lpips(x[None].float(), y[None].float()))

    def set_distances(self, truths: Sequence[Tensor], pictures: Sequence[Tensor]) -> dict[str, float]:
        """FID and KID between two sets of at least two pictures [3, H, W] in [0, 1]; unreliable for small sets."""
        fid = FrechetInceptionDistance(feature=self.inception)
        kid = KernelInceptionDistance(feature=self.inception, subset_size=min(50, len(truths)))
        for metric in (fid, kid):
            for real, side in ((True, truths), (False, pictures)):
                for x in side:
                    metric.update((x[None] * 255).round().to(torch.uint8), real=real)
        return {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}
