import math
from dataclasses import replace

import pytest
import torch

from diffcolor_core.color_terms import colored_phrases
from diffcolor_core.config import AlignmentSettings, SamplingSettings, Settings, Stage2Settings
from diffcolor_core.fits import Fit
from diffcolor_core.models import load_checkpoint
from diffcolor_core.optimising import Photograph
from diffcolor_core.progress import silent
from diffcolor_core.stage2 import (
    FittedModel,
    fit_in_context,
    insert_identifiers,
    interpolate,
    prompt_parts,
    rare_tokens,
    recolor,
    reconstruction_loss,
    with_changes,
)
from diffcolor_scans.color_names import exact_chroma

MARK = ["[*]"] * 30
CONTEXT = "a ball on a table"


@pytest.fixture(scope="module")
def checkpoint(tiny_folder):
    return load_checkpoint(str(tiny_folder))


def settings(**stage2) -> Settings:
    steps = {"embedding_steps": 2, "model_steps": 2, "embedding_learning_rate": 1e-2, "model_learning_rate": 1e-3}
    return Settings(
        stage2=Stage2Settings(**steps | stage2),
        sampling=SamplingSettings(num_steps=3),
        alignment=AlignmentSettings(enabled=False),
    )


def fitted(checkpoint, **stage2) -> FittedModel:
    """A fit of 32 x 32 px whose primary has a smooth chroma."""
    chosen, ramp = settings(**stage2), torch.linspace(-20, 20, 32).expand(32, 32)
    lightness, primary = torch.linspace(20, 80, 32).expand(1, 32, 32), torch.stack((ramp, ramp.T))
    photograph = Photograph(lightness, CONTEXT, torch.Generator().manual_seed(0))
    [made] = fit_in_context(checkpoint, [photograph], [primary], chosen, silent)
    fit = Fit(
        scan=None,
        scan_sha256="",
        lightness=lightness,
        content_px=(32, 32),
        primary=primary,
        rewritten_prompt=made.rewritten_prompt,
        prompt_embeds=made.prompt_embeds,
        unet_state={},
        context_prompt=CONTEXT,
        settings=chosen,
        seed=4,
        model_id=checkpoint.model_id,
        model_revision=checkpoint.model_revision,
        losses=made.losses,
        stage1_seconds=0.0,
        stage2_seconds=0.0,
    )
    return FittedModel(checkpoint, fit, made.unet)


def colors(model: FittedModel, prompts, alpha=1.0, base_prompt=CONTEXT):
    return [made.chroma for made in recolor(model, prompts, alpha, model.fit.primary, base_prompt)]


# ------------------------------------------------------------------ step 1: identifiers


@pytest.mark.parametrize(
    ("prompt", "rewritten"),
    [
        (  # the paper's own example
            "A dog sitting on a wooden bench, with grassland and sky",
            "A [*] dog sitting on a [*] wooden bench, with [*] grassland and [*] sky",
        ),
        (
            "a red ball and a blue box in front of a yellow wall",
            "a [*] red ball and a [*] blue box in front of a [*] yellow wall",
        ),
        ("three men in white and dark blue shirts", "three [*] men in [*] white and dark blue shirts"),
        (
            "a large red brick university building behind a green lawn",
            "a [*] large red brick university building behind a [*] green lawn",
        ),
        ("", ""),
        ("!!! ,,,", "!!! ,,,"),
    ],
)
def test_identifiers_stand_before_every_noun_phrase(prompt, rewritten):
    assert insert_identifiers(prompt, MARK) == rewritten


def test_more_noun_phrases_than_identifiers_is_an_error():
    with pytest.raises(ValueError, match="2 noun phrases"):
        insert_identifiers("a ball and a box", ["one"])


def test_rare_tokens_are_one_token_each(checkpoint):
    tokens = rare_tokens(checkpoint.tokenizer, 20)
    assert len(set(tokens)) == 20
    for token in tokens:
        assert len(checkpoint.tokenizer(token, add_special_tokens=False).input_ids) == 1


def test_identifiers_are_no_words_of_the_prompt(checkpoint):
    first, second, third = rare_tokens(checkpoint.tokenizer, 3)
    made = fitted(checkpoint, embedding_steps=0, model_steps=0)
    assert made.fit.rewritten_prompt == f"a {first} ball on a {second} table"
    context = f"a {first} on a {second.upper()} table"
    photograph = Photograph(made.fit.lightness, context, torch.Generator())
    chosen = settings(embedding_steps=0, model_steps=0)
    [made] = fit_in_context(checkpoint, [photograph], [made.fit.primary], chosen, silent)
    assert made.rewritten_prompt.split().count(first) == 1
    assert third in made.rewritten_prompt.split()


def test_without_identifiers_the_prompt_stays(checkpoint):
    made = fitted(checkpoint, embedding_steps=0, model_steps=0, use_identifiers=False)
    assert made.fit.rewritten_prompt == CONTEXT
    assert torch.equal(made.fit.prompt_embeds, checkpoint.encode_prompts([CONTEXT]))


# ------------------------------------------------------------------ steps 2 and 3: equations (5), (6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_of_5_and_6_is_the_mean_squared_error(tiny_folder, tiny_v_folder, kind):
    """Recomputed draw by draw and value by value."""
    checkpoint = load_checkpoint(str(tiny_folder if kind == "epsilon" else tiny_v_folder))
    z = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    e = checkpoint.encode_prompts([CONTEXT])
    with torch.no_grad():
        found = reconstruction_loss(checkpoint, checkpoint.unet, z, e, 3, [torch.Generator().manual_seed(2)])
        draws = torch.Generator().manual_seed(2)
        timesteps = torch.randint(1000, (3,), generator=draws).tolist()
        squares = []
        for t, eps in zip(timesteps, torch.randn(3, 4, 8, 6, generator=draws), strict=True):
            abar = float(checkpoint.scheduler.alphas_cumprod[t])
            a, b = math.sqrt(abar), math.sqrt(1 - abar)
            output = checkpoint.unet((a * z[0] + b * eps)[None], t, encoder_hidden_states=e).sample[0]
            wanted = eps if kind == "epsilon" else a * eps - b * z[0]
            squares += [value**2 for value in (output - wanted).flatten().tolist()]
    assert float(found) == pytest.approx(sum(squares) / len(squares), rel=1e-4)


def test_each_step_trains_its_own_part(checkpoint):
    start = checkpoint.encode_prompts([fitted(checkpoint, embedding_steps=0, model_steps=0).fit.rewritten_prompt])

    def changed(model: FittedModel) -> tuple[bool, bool]:
        weights = zip(model.unet.parameters(), checkpoint.unet.parameters(), strict=True)
        return (not torch.equal(model.fit.prompt_embeds, start), any(not torch.equal(a, b) for a, b in weights))

    assert changed(fitted(checkpoint, embedding_steps=2, model_steps=0)) == (True, False)
    assert changed(fitted(checkpoint, embedding_steps=0, model_steps=2)) == (False, True)


def test_both_steps_lower_the_loss_on_the_same_draws(checkpoint):
    from diffcolor_scans.color import lock_luminance

    model = fitted(checkpoint, embedding_steps=25, model_steps=25)
    z = checkpoint.encode(lock_luminance(model.fit.primary, model.fit.lightness)[None] * 2 - 1)

    @torch.no_grad()
    def loss(unet, e) -> float:
        return float(reconstruction_loss(checkpoint, unet, z, e, 32, [torch.Generator().manual_seed(1)]))

    start = loss(checkpoint.unet, checkpoint.encode_prompts([model.fit.rewritten_prompt]))
    after_embedding = loss(checkpoint.unet, model.fit.prompt_embeds)
    assert loss(model.unet, model.fit.prompt_embeds) < after_embedding < start


# ------------------------------------------------------------------ step 4: equation (7)


@pytest.mark.parametrize(("chunks_opt", "chunks_target"), [(1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0, 1.4])
def test_interpolation_is_equation_7(chunks_opt, chunks_target, alpha):
    """Number by number; the shorter of the two continues with the empty prompt's embeds, chunk after chunk."""
    generator = torch.Generator().manual_seed(0)
    e_opt, e_target, e_empty = (torch.randn(1, 3 * n, 2, generator=generator) for n in (chunks_opt, chunks_target, 1))
    found = interpolate(e_opt, e_target, e_empty, alpha)
    assert found.shape == (1, 3 * max(chunks_opt, chunks_target), 2)
    for token in range(found.shape[1]):
        for channel in range(2):
            opt, target = (
                float(e[0, token, channel] if token < e.shape[1] else e_empty[0, token % 3, channel])
                for e in (e_opt, e_target)
            )
            assert float(found[0, token, channel]) == pytest.approx((1 - alpha) * opt + alpha * target, abs=1e-5)


def test_alpha_0_ignores_the_target_and_alpha_1_ignores_the_fit(checkpoint):
    model = fitted(checkpoint)
    red, green = "a red ball on a table", "a green ball on a table"
    one, two = colors(model, [red, green], alpha=0.0)
    assert torch.equal(one, two)
    other = FittedModel(checkpoint, replace(model.fit, prompt_embeds=model.fit.prompt_embeds * 2), model.unet)
    (before,), (after,) = colors(model, [red]), colors(other, [red])
    assert torch.equal(before, after)
    (half,) = colors(model, [red], alpha=0.5)
    assert float((half - before).abs().max()) > 0.01


def test_a_long_prompt_beside_short_ones_is_what_it_is_alone(checkpoint):
    model = fitted(checkpoint)
    prompts = ["a red ball", "a blue ball on a table " * 12, "a red ball"]
    together = colors(model, prompts)
    torch.testing.assert_close(together[0], together[2], atol=1e-2, rtol=0)
    (alone,) = colors(model, [prompts[1]])
    torch.testing.assert_close(together[1], alone, atol=1e-2, rtol=0)


def test_more_prompts_than_a_batch_keep_their_order(checkpoint, monkeypatch):
    from diffcolor_core import stage2

    model = fitted(checkpoint, regional_prompts=True)
    prompts = [f"a {color} ball on a {other} table" for color in ("red", "blue") for other in ("green", "red", "blue")]
    together = colors(model, prompts)
    monkeypatch.setattr(stage2, "MAX_BATCH", 2)
    for whole, part in zip(together, colors(model, prompts), strict=True):
        torch.testing.assert_close(whole, part, atol=0.1, rtol=0)  # two prompts differ by 2 or more


def test_the_negative_prompt_is_the_context_without_its_colours(checkpoint, monkeypatch):
    from diffcolor_core import stage2

    asked = []
    plain = stage2.generate
    monkeypatch.setattr(stage2, "generate", lambda *a: asked.append(a[7]) or plain(*a))
    for negative_context in (False, True):
        model = fitted(checkpoint, negative_context=negative_context)
        colored = FittedModel(checkpoint, replace(model.fit, context_prompt="a red ball on a blue table"), model.unet)
        colors(colored, ["a green ball"])
    assert asked == ["", "a ball on a table"]


# ------------------------------------------------------------------ step 5: what may change


def halves(*_) -> torch.Tensor:
    """Regions set by hand: the first noun on the left, the second on the right."""
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    return torch.stack((left, 1 - left))


def test_each_colour_of_a_regional_prompt_makes_its_nouns_regions(checkpoint, monkeypatch):
    from diffcolor_core import stage2

    monkeypatch.setattr(stage2, "phrase_regions", halves)
    model = fitted(checkpoint, regional_prompts=True)

    def parts(prompt):
        return prompt_parts(model, prompt, colored_phrases(prompt, CONTEXT))

    (red, left), (blue, right) = parts("a red ball on a blue table")
    assert (red, blue) == ("a red ball on a table", "a ball on a blue table")
    assert torch.equal(torch.stack((left, right)), halves())
    ((text, whole),) = parts("a red ball on a red table")  # one colour: there is nothing to keep apart
    assert (text, whole.unique().tolist()) == ("a red ball on a red table", [1.0])
    ((text, _),) = parts("a red ball on a table")
    assert text == "a red ball on a table"


def test_only_the_regions_of_changed_nouns_change(checkpoint, monkeypatch):
    from diffcolor_core import stage2

    monkeypatch.setattr(stage2, "phrase_regions", halves)
    base = "a red ball on a blue table"
    free, keeping = (fitted(checkpoint, keep_unchanged=keep) for keep in (False, True))
    primary = free.fit.primary

    def made(model, prompt):
        return colors(model, [prompt], base_prompt=base)[0]

    assert torch.equal(made(keeping, base), primary)
    (edited, anew) = (made(model, "a green ball on a blue table") for model in (keeping, free))
    assert torch.equal(edited[..., 16:], primary[..., 16:])
    torch.testing.assert_close(edited[..., :16], anew[..., :16])
    assert float((anew - primary)[..., 16:].abs().max()) > 0.01
    everything = "a green ball on a red table"
    torch.testing.assert_close(made(keeping, everything), made(free, everything))


def test_an_exact_colour_reaches_its_noun_alone(checkpoint, monkeypatch):
    from diffcolor_core import stage2

    monkeypatch.setattr(stage2, "phrase_regions", halves)
    model = fitted(checkpoint)
    exact, word = (colors(model, [f"a {color} ball on a table"])[0] for color in ("#8b0000", "red"))
    for made, wanted in zip(exact[:, :, :16], exact_chroma("#8b0000"), strict=True):
        torch.testing.assert_close(made, torch.full((32, 16), wanted))
    assert torch.equal(exact[..., 16:], word[..., 16:])  # the code is read as "red"


def test_two_steered_nouns_share_what_is_both_theirs(checkpoint, monkeypatch):
    monkeypatch.setattr(FittedModel, "regions", lambda *_: torch.full((2, 4, 4), 0.5))
    prompt, made = "a #ff0000 sky and a #0000ff sky", torch.zeros(2, 4, 4)
    steered = with_changes(fitted(checkpoint), prompt, colored_phrases(prompt, CONTEXT), made, made)
    mean = torch.tensor([exact_chroma("#ff0000"), exact_chroma("#0000ff")]).mean(dim=0)
    torch.testing.assert_close(steered, mean[:, None, None].expand(2, 4, 4))


def test_nouns_are_found_behind_a_code_that_stays(checkpoint, monkeypatch):
    from diffcolor_core import stage2

    asked = []
    plain = stage2.phrase_regions
    monkeypatch.setattr(stage2, "phrase_regions", lambda *a: asked.append(a[2:4]) or plain(*a))
    prompt = "a ball in #8b0000 on a table"
    fitted(checkpoint).regions(prompt, colored_phrases(prompt, CONTEXT))
    ((text, places),) = asked
    assert "#" not in text
    assert [text[place.start : place.end] for place in places][-1] == "table"


def test_parts_of_a_prompt_fill_the_picture_even_if_the_nouns_do_not(checkpoint, monkeypatch):
    shares = torch.tensor([0.3, 0.1])[:, None, None].expand(2, 4, 4)
    monkeypatch.setattr(FittedModel, "regions", lambda *_: shares)
    prompt = "a red ball on a blue table"
    parts = prompt_parts(fitted(checkpoint, regional_prompts=True), prompt, colored_phrases(prompt, CONTEXT))
    torch.testing.assert_close(parts[0][1], torch.full((4, 4), 0.75))
    torch.testing.assert_close(sum(mask for _, mask in parts), torch.ones(4, 4))


def test_each_coloured_noun_is_reported(checkpoint):
    (made,) = recolor(fitted(checkpoint), ["a red ball on a table"], 1.0, torch.zeros(2, 32, 32), CONTEXT)
    assert [(noun.noun, noun.color) for noun in made.nouns] == [("ball", "red")]
    (made,) = recolor(fitted(checkpoint), ["a ball"], 1.0, torch.zeros(2, 32, 32), CONTEXT)
    assert made.nouns == ()


def test_regions_are_looked_for_once_for_prompts_that_differ_in_colours(checkpoint, monkeypatch):
    from diffcolor_core import stage2

    looked_for = []
    plain = stage2.phrase_regions
    monkeypatch.setattr(stage2, "phrase_regions", lambda *a: looked_for.append(a[2]) or plain(*a))
    model = fitted(checkpoint, regional_prompts=True, keep_unchanged=True)
    colors(model, ["a red ball on a blue table", "a green ball on a white table"])
    colors(model, ["a pink ball on a blue table"])
    assert looked_for == ["a ball on a table"]
