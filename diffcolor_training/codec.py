"""The photo model's VAE: an AutoencoderKL that is set up, not trained."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from diffcolor_training.photos import SIDE_PX

LATENT_CHANNELS = 12
CHROMA_CHANNELS = 2  # the first ones
_OPPONENT = torch.tensor([[0.299, 0.587, 0.114], [-0.5, 1.0, -0.5], [0.5, 0.0, -0.5]])


def build_vae(codec: Tensor) -> AutoencoderKL:
    """An AutoencoderKL whose latents are `codec` [12, 18] times the cell: 16 pixels of Y, mean U and mean V.

    The networks are set up to be linear, not trained: a VAE of this size trained from nothing on these
    photographs for as long as there was lost most of the chroma. Residual branches end in zeros, so what is
    left are convolutions that gather a 4 x 4 cell; SiLU is undone by pairs, silu(x) - silu(-x) = x; group
    normalisation is held still by two large constant channels. The decoder gives back the cell's mean
    colour in all of its pixels: luminance is never taken from it, and chroma must survive many passes.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=SIDE_PX,
        scaling_factor=1.0,
    ).requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    encoder, decoder = vae.encoder, vae.decoder
    encoder.conv_in.weight[:3, :, 1, 1] = _OPPONENT
    gather = encoder.down_blocks[0].downsamplers[0].conv.weight
    for dy in (0, 1):
        for dx in (0, 1):
            gather[2 * dy + dx, 0, dy, dx] = 1
            gather[4, 1, dy, dx] = gather[5, 2, dy, dx] = 0.25
    encoder.down_blocks[1].resnets[0].conv_shortcut.weight[:6, :6, 0, 0] = torch.eye(6)
    gather = encoder.down_blocks[1].downsamplers[0].conv.weight
    for dy in (0, 1):
        for dx in (0, 1):
            for y in (0, 1):
                for x in (0, 1):
                    gather[4 * (2 * dy + y) + 2 * dx + x, 2 * y + x, dy, dx] = 1
            gather[16, 4, dy, dx] = gather[17, 5, dy, dx] = 0.25
    _pairs(encoder.down_blocks[2].resnets[0].conv_shortcut, codec)
    _undo(encoder.conv_norm_out, LATENT_CHANNELS)
    for k in range(LATENT_CHANNELS):
        encoder.conv_out.weight[k, 2 * k : 2 * k + 2, 1, 1] = torch.tensor([1.0, -1.0])
    nn.init.constant_(encoder.conv_out.bias[LATENT_CHANNELS:], -12.0)  # logarithm of the posterior's variance
    vae.quant_conv.weight[:, :, 0, 0] = torch.eye(2 * LATENT_CHANNELS)
    vae.post_quant_conv.weight[:, :, 0, 0] = torch.eye(LATENT_CHANNELS)

    means = torch.zeros(3, 18)  # of Y, U, V in a cell
    means[0, :16] = 1 / 16
    means[1, 16] = means[2, 17] = 1
    decoder.conv_in.weight[:3, :, 1, 1] = torch.linalg.inv(_OPPONENT) @ means @ torch.linalg.pinv(codec)
    for block in decoder.up_blocks[:2]:
        width = block.upsamplers[0].conv.weight.shape[0]
        block.upsamplers[0].conv.weight[:, :, 1, 1] = torch.eye(width)
    width = decoder.up_blocks[1].resnets[0].conv_shortcut.weight.shape[0]
    decoder.up_blocks[1].resnets[0].conv_shortcut.weight[:, :width, 0, 0] = torch.eye(width)
    _pairs(decoder.up_blocks[2].resnets[0].conv_shortcut, torch.eye(3))
    _undo(decoder.conv_norm_out, 3)
    for k in range(3):
        decoder.conv_out.weight[k, 2 * k : 2 * k + 2, 1, 1] = torch.tensor([1.0, -1.0])
    return vae.eval()


_STILL = 100.0  # of the two constant channels


def _pairs(conv: nn.Conv2d, matrix: Tensor) -> None:
    """A 1 x 1 convolution that gives each row of `matrix` twice, with both signs, and the constant channels."""
    rows, columns = matrix.shape
    conv.weight[: 2 * rows, :columns, 0, 0] = torch.stack((matrix, -matrix), dim=1).flatten(0, 1)
    assert conv.bias is not None
    conv.bias[2 * rows : 2 * rows + 2] = torch.tensor([_STILL, -_STILL])


def _undo(norm: nn.GroupNorm, num_values: int) -> None:
    """Scale what the constant channels have made the normalisation divide by."""
    norm.weight.zero_()
    norm.weight[: 2 * num_values] = (2 * _STILL**2 / norm.num_channels) ** 0.5


def cells_of(x: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] as cells [B, 18, H/4, W/4]: 16 pixels of Y, mean U and mean V."""
    yuv = torch.einsum("ij,bjhw->bihw", _OPPONENT.to(x), x)
    return torch.cat((F.pixel_unshuffle(yuv[:, :1], 4), F.avg_pool2d(yuv[:, 1:], 4)), dim=1)


def fit_codec(x: Tensor) -> Tensor:
    """The map [12, 18] from cells to latents, from pictures [N, 3, H, W] in [-1, 1].

    First the two of chroma with unit variance, decorrelated; then the ten first principal components of
    luminance, with a standard deviation of 3 for the first and less for detail: luminance outlasts colour
    in the noise, as it does in large VAEs.
    """
    rows = cells_of(x).movedim(1, -1).flatten(0, 2).double()
    codec = torch.zeros(LATENT_CHANNELS, 18, dtype=torch.float64)
    ab = torch.linalg.svd(rows[:, 16:].T @ rows[:, 16:] / len(rows))
    codec[:CHROMA_CHANNELS, 16:] = (ab.U / ab.S.sqrt()).T
    luminance = rows[:, :16] - rows[:, :16].mean()
    spread = torch.linalg.svd(luminance.T @ luminance / len(rows))
    deviations = spread.S.sqrt()[: LATENT_CHANNELS - CHROMA_CHANNELS]
    wanted = 3 * (deviations / deviations[0]).sqrt().clamp(min=0.25)
    codec[CHROMA_CHANNELS:, :16] = (spread.U[:, : len(wanted)] * (wanted / deviations)).T
    return codec.float()


def encode(codec: Tensor, rgb: Tensor) -> Tensor:
    """Latents [B, 12, h/4, w/4] of sRGB [B, 3, h, w] in [0, 1]: what the VAE of this codec gives."""
    return torch.einsum("ij,bjhw->bihw", codec.to(rgb), cells_of(rgb * 2 - 1))
