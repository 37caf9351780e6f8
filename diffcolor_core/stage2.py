"""Stage 2 of the paper, in-context controllable colorization: equations (5) to (7).

Symbols as in `docs/method.md`:

    x^_pri   the primary: chroma beside the scan's lightness    z, z_t, eps, t  latent, noised latent, noise, time
    c, c'    context prompt, the same with identifiers          c^              target prompt
    T(c)     checkpoint.encode_prompts([c])                     e_opt, theta    what (5) and (6) find
    x_fin    `chroma` of a Recoloring beside the scan's lightness

[P] marks what is the paper's, [A] its author's prototype's, [O] ours. Steps 1 to 3 are done once for a photograph
(`fit_in_context`), steps 4 and 5 for every target prompt (`recolor`), without any fine-tuning.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer

from diffcolor_core.adapters import fitted_copies, trainable_copy
from diffcolor_core.alignment import align_chroma
from diffcolor_core.color_terms import (
    ColoredPhrase,
    ColorReport,
    colored_phrases,
    report,
    spoken,
    spoken_phrase,
    with_color_alone,
    without_colors,
)
from diffcolor_core.config import Settings
from diffcolor_core.diffusion import training_target
from diffcolor_core.fits import Fit
from diffcolor_core.models import Checkpoint, pad_embeds, recomputing
from diffcolor_core.optimising import Photograph, mse_of_each, noised, optimise
from diffcolor_core.progress import Progress
from diffcolor_core.prompts import noun_phrases
from diffcolor_core.regions import RegionalPrompts, named_regions, noun_text, phrase_regions
from diffcolor_core.sampling import generate
from diffcolor_core.steering import steered_to
from diffcolor_scans.edges import propagate

MAX_BATCH = 8
"""Pictures that are generated at a time."""


class InContextFit(NamedTuple):
    """What steps 1 to 3 give: c', e_opt [1, tokens, width], a frozen UNet with theta, and the losses of each step."""

    rewritten_prompt: str
    prompt_embeds: Tensor
    unet: UNet2DConditionModel
    losses: dict[str, list[float]]


def fit_in_context(
    checkpoint: Checkpoint,
    photographs: Sequence[Photograph],
    chromas: Sequence[Tensor],
    settings: Settings,
    progress: Progress,
) -> list[InContextFit]:
    """Fit an embedding and a copy of the base UNet to each primary x^_pri.

    photographs: one, or several as for stage 1. chromas: [2, h, w] of their primaries. The checkpoint's own weights
    are not changed. Raises ValueError for a prompt with more noun phrases than there are identifiers, and for
    several photographs without adapters.
    """
    stage2, generators = settings.stage2, [p.generator for p in photographs]
    latents = [checkpoint.encode_colored(p.lightness, c[None]) for p, c in zip(photographs, chromas, strict=True)]
    z = torch.cat(latents)  # [N, C, h/f, w/f]

    # 1. c' from c: one identifier for every noun phrase
    rewritten = [p.context_prompt for p in photographs]
    if stage2.use_identifiers:
        rewritten = [with_identifiers(checkpoint.tokenizer, c) for c in rewritten]

    # 2. (5) e_opt = argmin_e E ||eps - eps_theta(z_t, t, e)||^2, from e = T(c'), with the base UNet frozen
    e_opt = checkpoint.encode_apart(rewritten).requires_grad_(True)

    def minimise(
        name: str, unet: UNet2DConditionModel, trained: list[Tensor], rate: float, num_steps: int
    ) -> list[dict[str, list[float]]]:
        def losses_of() -> tuple[Tensor]:
            return (reconstruction_loss(checkpoint, unet, z, e_opt, settings.batch_size, generators, stage2.recompute),)

        told = partial(progress, f"stage 2, {name}")
        return optimise(trained, rate, num_steps, losses_of, (name,), generators, told)

    of_embedding = minimise(
        "embedding", checkpoint.unet, [e_opt], stage2.embedding_learning_rate, stage2.embedding_steps
    )
    e_opt.requires_grad_(False)

    # 3. (6) theta = argmin E ||eps - eps_theta(z_t, t, e_opt)||^2, from the base UNet, not from stage 1's [O]
    unet = trainable_copy(checkpoint.unet, stage2.adapter_rank, generators)
    trained = [p for p in unet.parameters() if p.requires_grad]
    of_model = minimise("model", unet, trained, stage2.model_learning_rate, stage2.model_steps)
    fitted = fitted_copies(unet, checkpoint.unet, stage2.adapter_rank, len(photographs))
    losses = [one | two for one, two in zip(of_embedding, of_model, strict=True)]
    return [InContextFit(*made) for made in zip(rewritten, e_opt.cpu().split(1), fitted, losses, strict=True)]


def with_identifiers(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """c' from c, with the rarest tokens that are no words of c. Raises as `insert_identifiers` does."""
    words = prompt.lower().split()
    return insert_identifiers(prompt, [token for token in rare_tokens(tokenizer, 100) if token not in words])


def rare_tokens(tokenizer: CLIPTokenizer, count: int) -> list[str]:
    """Up to `count` identifiers: words of 2 to 4 letters that are one token each, the rarest first.

    A byte-pair vocabulary learns the most frequent pieces first, so the highest token ids are the rarest.
    Identifiers may be English words: they need to be rare, not meaningless.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: -item[1])
    words = (piece.removesuffix("</w>") for piece, _ in vocabulary if piece.endswith("</w>"))
    return [word for word in words if 2 <= len(word) <= 4 and word.isascii() and word.isalpha()][:count]


def insert_identifiers(prompt: str, identifiers: Sequence[str]) -> str:
    """c' from c [P]: an identifier before every noun phrase, after its article.

    "A dog on a wooden bench" becomes "A sks dog on a ktn wooden bench". Raises ValueError if there are more
    noun phrases than identifiers.
    """
    phrases = noun_phrases(prompt)
    if len(phrases) > len(identifiers):
        raise ValueError(
            f"the prompt has {len(phrases)} noun phrases, but there are only {len(identifiers)} identifiers: "
            "shorten the prompt"
        )
    pieces, last = [], 0
    for phrase, identifier in zip(phrases, identifiers, strict=False):
        pieces += [prompt[last : phrase.start], identifier, " "]
        last = phrase.start
    return "".join([*pieces, prompt[last:]])


def reconstruction_loss(
    checkpoint: Checkpoint,
    unet: UNet2DConditionModel,
    z: Tensor,
    prompt_embeds: Tensor,
    num_draws: int,
    generators: Sequence[torch.Generator],
    recompute: bool = False,
) -> Tensor:
    """||eps - eps_theta(z_t, t, e)||^2, the mean over `num_draws` of t and eps for each photograph: [N].

    The loss of (5) and (6). z: [N, C, h/f, w/f]. prompt_embeds: [N, tokens, width].
    """
    schedule = checkpoint.scheduler
    draws = noised(schedule, z, num_draws, len(schedule.alphas_cumprod), generators)
    with recomputing(unet) if recompute else nullcontext():
        output = checkpoint.predict(unet, draws.z_t, draws.t, prompt_embeds.repeat_interleave(num_draws, dim=0))
    return mse_of_each(output, training_target(schedule, draws.z, draws.eps, draws.t), len(z))


@dataclass(frozen=True)
class FittedModel:
    """A fit whose weights are in a UNet, ready for any number of prompts."""

    checkpoint: Checkpoint
    fit: Fit
    unet: UNet2DConditionModel
    _found: dict[tuple[str, ...], Tensor] = field(default_factory=dict, repr=False)

    def regions(self, prompt: str, phrases: Sequence[ColoredPhrase]) -> Tensor:
        """Where each noun phrase of the prompt is: [P, h, w], at most 1 over P [O].

        They are looked for under the prompt without its colour words. Those say nothing about a gray picture, and
        prompts that differ in colours alone then share the answer. `noun_regions` are told a noun's earlier colour.
        """
        if self.checkpoint.noun_regions is not None:
            nouns = tuple(noun_text(prompt, phrase, phrase.before) for phrase in phrases)
            if nouns not in self._found:
                told = torch.tensor([phrase.before is not None for phrase in phrases])
                self._found[nouns] = named_regions(self.checkpoint, self.fit.lightness, nouns, told)
            return self._found[nouns]
        plain = with_color_alone(prompt, phrases, None)
        places = noun_phrases(plain)
        if [place.noun for place in places] != [phrase.phrase.noun for phrase in phrases]:
            plain, places = prompt, [phrase.phrase for phrase in phrases]  # read otherwise without its colours
        plain, places = spoken(plain), [spoken_phrase(plain, place) for place in places]
        if (plain,) not in self._found:
            noise = torch.Generator().manual_seed(self.fit.seed)
            self._found[plain,] = phrase_regions(self.checkpoint, self.fit.lightness, plain, places, noise)
        return self._found[plain,]


@dataclass(frozen=True)
class Recoloring:
    """What steps 4 and 5 give for one prompt, at working size.

    chroma: x_fin, [2, h, w]. generated: the picture before alignment, L*a*b* [3, h, w]. nouns: whether each
    noun got the colour that the prompt gives it.
    """

    chroma: Tensor
    generated: Tensor
    nouns: tuple[ColorReport, ...]


def recolor(
    fitted: FittedModel, prompts: Sequence[str], alpha: float, base_chroma: Tensor, base_prompt: str
) -> list[Recoloring]:
    """Colour a fitted photograph as each prompt says.

    base_chroma: [2, h, w], the colours to start from: the primary's, or those of an earlier recolouring.
    base_prompt: the prompt that they belong to; it tells which colour words are new.
    """
    checkpoint, fit, settings = fitted.checkpoint, fitted.fit, fitted.fit.settings
    assert fit.prompt_embeds is not None  # a fit without stage 2 has no weights for a FittedModel
    all_phrases = [colored_phrases(prompt, base_prompt) for prompt in prompts]

    # 4. e(alpha), equation (7): for each prompt the embeds that make its picture, and the part of it that each makes
    e_opt, e_empty = fit.prompt_embeds.to(checkpoint.device), checkpoint.encode_prompts([""])
    jobs = [
        [
            (interpolate(e_opt, checkpoint.encode_prompts([text]), e_empty, alpha), mask)
            for text, mask in prompt_parts(fitted, prompt, phrases)
        ]
        for prompt, phrases in zip(prompts, all_phrases, strict=True)
    ]

    # 5. Generate from the forward-diffused latent of the base picture, align, keep what must not change
    negative = without_colors(fit.context_prompt) if settings.stage2.negative_context else ""
    if settings.color_prior:
        expected_before = checkpoint.prior_chroma(fit.lightness, [base_prompt])
    pictures: list[Tensor] = []
    for start in range(0, len(jobs), MAX_BATCH):
        batch = jobs[start : start + MAX_BATCH]
        num_tokens = max(e.shape[1] for job in batch for e, _ in job)
        e_alpha = torch.cat([pad_embeds(e, e_empty, num_tokens) for job in batch for e, _ in job])
        owners = torch.tensor([index for index, job in enumerate(batch) for _ in job])
        regional = RegionalPrompts(owners, torch.stack([mask for job in batch for _, mask in job]))
        noise = torch.Generator().manual_seed(fit.seed)
        starts = base_chroma[None]
        if settings.color_prior:  # [O] plus what the prior expects to differ under the prompt, exaggerated as in (7)
            expected = checkpoint.prior_chroma(fit.lightness, prompts[start : start + MAX_BATCH])
            starts = base_chroma + alpha * settings.prior_gain * (expected - expected_before)
        z = checkpoint.encode_colored(fit.lightness, starts)
        pictures += generate(
            checkpoint, fitted.unet, z, e_alpha, fit.lightness, settings.sampling, noise, negative, regional
        )
    results = []
    for prompt, phrases, generated in zip(prompts, all_phrases, pictures, strict=True):
        noise = torch.Generator().manual_seed(fit.seed)
        chroma = align_chroma(checkpoint, fit.lightness, generated, settings.alignment, noise)
        chroma = with_changes(fitted, prompt, phrases, chroma, base_chroma)
        nouns: tuple[ColorReport, ...] = ()
        if any(phrase.color is not None for phrase in phrases):
            nouns = tuple(report(phrases, fitted.regions(prompt, phrases), torch.cat((fit.lightness, chroma))))
        results.append(Recoloring(chroma, generated, nouns))
    return results


def with_changes(
    fitted: FittedModel, prompt: str, phrases: Sequence[ColoredPhrase], chroma: Tensor, base_chroma: Tensor
) -> Tensor:
    """Chroma [2, h, w] in which steered nouns obey [O].

    With `keep_unchanged` only the regions of changed nouns differ from `base_chroma`.
    """
    settings = fitted.fit.settings
    changed = [phrase.changed for phrase in phrases]

    def along_edges(region: Tensor) -> Tensor:
        if not settings.alignment.propagate:
            return region
        return propagate(region[None], fitted.fit.lightness)[0].clamp(0, 1)

    if settings.stage2.keep_unchanged and not all(changed):  # the regions of changed nouns alone change
        inside = along_edges(fitted.regions(prompt, phrases)[changed].sum(dim=0))
        chroma = inside * chroma + (1 - inside) * base_chroma
    steered = chroma
    for index, phrase in enumerate(phrases):
        if phrase.changed and phrase.color is not None:  # else nobody needs the regions
            region = fitted.regions(prompt, phrases)[index]
            target = steered_to(phrase, region, chroma, words=settings.stage2.steer_words)
            if target is not None:
                steered = steered + along_edges(region) * (target[:, None, None] - chroma)
    return steered


def interpolate(e_opt: Tensor, e_target: Tensor, e_empty: Tensor, alpha: float) -> Tensor:
    """(7) e(alpha) = (1 - alpha) e_opt + alpha T(c^).

    e_opt: [1, tokens, width]. e_target: [B, tokens', width]. e_empty: [1, one chunk, width], the empty prompt's
    embeds, with which the one that has fewer chunks is padded.
    """
    num_tokens = max(e_opt.shape[1], e_target.shape[1])
    return (1 - alpha) * pad_embeds(e_opt, e_empty, num_tokens) + alpha * pad_embeds(e_target, e_empty, num_tokens)


def prompt_parts(fitted: FittedModel, prompt: str, phrases: Sequence[ColoredPhrase]) -> list[tuple[str, Tensor]]:
    """The prompts that make one picture, each with the part of it that it makes, [h, w]; the parts sum to 1.

    With regional prompts [O] there is one for each colour of the prompt, in which that colour alone is named. It
    makes the regions of the nouns with that colour. Nouns without a colour share the whole prompt.
    """
    colors = [phrase.color for phrase in phrases]
    if not fitted.fit.settings.stage2.regional_prompts or len({*colors} - {None}) < 2:
        return [(prompt, torch.ones(fitted.fit.lightness.shape[-2:]))]
    regions = fitted.regions(prompt, phrases)
    regions = regions / regions.sum(dim=0)  # noun regions leave some to none of the nouns
    parts = []
    for color in dict.fromkeys(colors):
        text = prompt if color is None else with_color_alone(prompt, phrases, color)
        parts.append((text, regions[[other == color for other in colors]].sum(dim=0)))
    return parts
