import pytest
import torch

from diffcolor_core.attention import recorded_attention
from diffcolor_core.models import load_checkpoint
from diffcolor_core.prompts import noun_phrases
from diffcolor_core.regions import RegionalPrompts, phrase_regions

PROMPT = "a red ball and a blue box on a table"


@pytest.fixture(scope="module")
def checkpoint(tiny_folder):
    return load_checkpoint(str(tiny_folder))


def test_recording_changes_nothing_and_ends(checkpoint):
    z, t = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    embeds = checkpoint.encode_prompts(["a red ball"])
    processors = dict(checkpoint.unet.attn_processors)
    with torch.no_grad():
        plain = checkpoint.predict(checkpoint.unet, z, t, embeds)
        with recorded_attention(checkpoint.unet) as recorder:
            recorded = checkpoint.predict(checkpoint.unet, z, t, embeds)
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-4)
    assert checkpoint.unet.attn_processors == processors
    # One layer down and two up at the latent's own size, one at half of it in the middle.
    assert [attention.shape for attention in recorder.maps] == [(1, cells, 77) for cells in (192, 48, 192, 192)]
    for attention in recorder.maps:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:2]))


@pytest.mark.parametrize("size", [(32, 32), (32, 24), (16, 64)])
def test_regions_share_the_picture(checkpoint, size):
    lightness = torch.rand(1, *size, generator=torch.Generator().manual_seed(1)) * 100
    regions = phrase_regions(checkpoint, lightness, PROMPT, noun_phrases(PROMPT), torch.Generator().manual_seed(3))
    assert regions.shape == (3, *size)
    assert float(regions.min()) >= 0
    torch.testing.assert_close(regions.sum(dim=0), torch.ones(size))


def test_a_region_is_where_its_noun_is_looked_at(checkpoint, monkeypatch):
    """With attention that is set by hand: "ball" on the left half, "box" on the right, "table" nowhere."""
    phrases = noun_phrases(PROMPT)
    ball, box, _ = (
        tokens[0] for tokens in checkpoint.token_positions(PROMPT, [(p.noun_start, p.end) for p in phrases])
    )
    attention = torch.full((1, 16, 16, 77), 1e-6)
    attention[:, :, :8, ball] = attention[:, :, 8:, box] = 1

    def predict(self, unet, z_t, t, prompt_embeds):
        next(m for name, m in unet.named_modules() if name.endswith("attn2")).processor.maps.append(
            attention.flatten(1, 2)
        )

    monkeypatch.setattr(type(checkpoint), "predict", predict)
    regions = phrase_regions(checkpoint, torch.full((1, 32, 32), 50.0), PROMPT, phrases, torch.Generator())
    assert float(regions[0, :, :12].min()) > 0.99
    assert float(regions[1, :, 20:].min()) > 0.99
    assert float(regions[2].max()) < 0.01


def test_regional_outputs_are_joined_by_their_masks():
    masks = torch.zeros(3, 8, 8)
    masks[0, :, :4] = masks[1, :, 4:] = masks[2] = 1  # two prompts for the first picture, one for the second
    regional = RegionalPrompts(torch.tensor([0, 0, 1]), masks)
    embeds = torch.tensor([10.0, 20.0, 1.0, 2.0, 3.0])  # two unconditional rows in front

    def predict(z_t, t, e):
        assert t.tolist() == [7, 8, 7, 7, 8]
        return z_t + e.view(-1, 1, 1, 1)

    joined = regional.predict(predict, torch.zeros(4, 1, 4, 4), torch.tensor([7, 8, 7, 8]), embeds)
    assert joined[0].unique().tolist() == [10]
    assert joined[1].unique().tolist() == [20]
    assert joined[2, 0, :, :2].unique().tolist() == [1]
    assert joined[2, 0, :, 2:].unique().tolist() == [2]
    assert joined[3].unique().tolist() == [3]
