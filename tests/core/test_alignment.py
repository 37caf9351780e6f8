import pytest
import torch
from torch.nn import functional as F

from diffcolor_core.alignment import align_chroma, shift_by_weights, unet_features, window_weights
from diffcolor_core.config import AlignmentSettings
from diffcolor_core.models import load_checkpoint
from diffcolor_scans.images import gray_input


def unit_features(d: int, h: int, w: int) -> torch.Tensor:
    return F.normalize(torch.randn(d, h, w, generator=torch.Generator().manual_seed(0)), dim=0)


def test_weights_are_the_softmax_of_equation_4():
    """Independent formula, cell by cell."""
    settings = AlignmentSettings(radius=1, temperature=0.1, min_similarity=-1)
    phi, other = unit_features(6, 5, 4), unit_features(6, 5, 4).flip(1).contiguous()
    weights = window_weights(phi, other, settings)
    for y in range(1, 4):
        for x in range(1, 3):
            scores = torch.stack(
                [phi[:, y, x] @ other[:, y + dy, x + dx] / 0.1 for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            )
            torch.testing.assert_close(weights[:, y, x], scores.exp() / scores.exp().sum())


def test_a_shifted_picture_is_shifted_back():
    settings = AlignmentSettings(radius=1, temperature=0.01, min_similarity=0.5)
    phi = unit_features(32, 6, 6)
    moved = torch.roll(phi, 1, dims=2)  # everything one cell to the right
    chroma = torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(1))
    moved_chroma = torch.roll(chroma, 4, dims=2)
    back = shift_by_weights(moved_chroma, window_weights(phi, moved, settings), 1)
    torch.testing.assert_close(back[..., :18], chroma[..., :18], atol=1e-3, rtol=0)


def test_a_weak_match_keeps_its_place():
    settings = AlignmentSettings(radius=1, min_similarity=0.99)
    weights = window_weights(unit_features(32, 6, 6), unit_features(32, 6, 6).flip(0), settings)
    chroma = torch.randn(2, 12, 12)
    assert torch.equal(shift_by_weights(chroma, weights, 1), chroma)


def generated(size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    """L*a*b* [3, h, w] without structure."""
    generator = torch.Generator().manual_seed(0)
    lightness = torch.rand(1, *size, generator=generator) * 100
    return torch.cat((lightness, torch.randn(2, *size, generator=generator) * 20))


@pytest.mark.parametrize("block", [0, 1])
def test_a_picture_is_aligned_with_itself(tiny_folder, block):
    checkpoint, lab = load_checkpoint(str(tiny_folder)), generated()
    settings = AlignmentSettings(up_block=block, temperature=1e-4)
    x = gray_input(lab[:1])
    phi = unet_features(checkpoint, torch.stack((x, x)), settings, torch.Generator().manual_seed(0))
    assert torch.equal(phi[0], phi[1])
    aligned = align_chroma(checkpoint, lab[:1], lab, settings, torch.Generator().manual_seed(0))
    assert float((aligned - lab[1:]).abs().median()) < 1e-2


def test_switched_off_the_chroma_stays(tiny_folder):
    checkpoint, lab = load_checkpoint(str(tiny_folder)), generated()
    other = lab[:1].flip(-1)
    off = align_chroma(checkpoint, other, lab, AlignmentSettings(enabled=False), torch.Generator())
    assert torch.equal(off, lab[1:])


def test_an_up_block_that_is_not_there_is_named(tiny_folder):
    lab = generated((32, 32))
    with pytest.raises(ValueError, match="this UNet has 2 up blocks"):
        align_chroma(load_checkpoint(str(tiny_folder)), lab[:1], lab, AlignmentSettings(up_block=7), torch.Generator())
