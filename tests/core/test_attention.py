import pytest
import torch

from diffcolor_core.models import load_checkpoint
from diffcolor_core.prompts import noun_phrases
from diffcolor_core.regions import phrase_regions, recorded_attention


@pytest.fixture(scope="module")
def checkpoint(tiny_folder):
    return load_checkpoint(str(tiny_folder))


def test_recording_changes_nothing_and_ends(checkpoint):
    z, t = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    embeds = checkpoint.encode_prompts(["a red ball"])
    processors = dict(checkpoint.unet.attn_processors)
    plain = checkpoint.denoise(checkpoint.unet, z, t, embeds)
    with recorded_attention(checkpoint.unet) as recorder, torch.no_grad():
        recorded = checkpoint.denoise(checkpoint.unet, z, t, embeds)
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-4)
    assert checkpoint.unet.attn_processors == processors
    for attention in recorder.maps:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:2]))


@pytest.mark.parametrize("size", [(32, 32), (32, 24), (16, 64)])
def test_regions_share_the_picture(checkpoint, size):
    prompt = "a red ball and a blue box on a table"
    l_star = torch.rand(1, *size, generator=torch.Generator().manual_seed(1)) * 100
    z = torch.randn(1, 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(2))
    phrases = noun_phrases(prompt)
    regions = phrase_regions(checkpoint, z, l_star, prompt, phrases, torch.Generator().manual_seed(3))
    assert regions.shape == (3, *size)
    torch.testing.assert_close(regions.sum(dim=0), torch.ones(size))


def test_tokens_are_found_beyond_the_first_chunk(checkpoint):
    from diffcolor_core.models import _chunks

    prompt = "a red ball and a blue box on a table " * 12
    phrases = noun_phrases(prompt)
    ids = torch.cat(_chunks(checkpoint.tokenizer, prompt))
    for phrase, tokens in zip(
        phrases, checkpoint.token_positions(prompt, [(p.noun_start, p.end) for p in phrases]), strict=True
    ):
        assert checkpoint.tokenizer.decode(ids[tokens]).strip() == phrase.noun
