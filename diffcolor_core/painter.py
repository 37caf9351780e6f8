"""Stage 2, steps 4 and 5, for the prompts of one call: candidates, the choice among them, what they may change."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffcolor_core.attention import phrase_regions
from diffcolor_core.color import lock_luminance
from diffcolor_core.color_terms import (
    ColoredPhrase,
    ColorReport,
    report,
    with_color_alone,
    without_colors,
)
from diffcolor_core.fits import Fit, chroma_of
from diffcolor_core.images import gray_input
from diffcolor_core.in_context import exaggerate, interpolate
from diffcolor_core.models import Checkpoint
from diffcolor_core.prompts import NounPhrase, noun_phrases
from diffcolor_core.sampling import Regional, fill_up, generate


@dataclass(frozen=True)
class Choice:
    """The best of the pictures made for one prompt."""

    generated: Tensor
    alpha: float
    scores: dict[float, float]


@dataclass(frozen=True)
class _Job:
    """One picture to generate: e(alpha) of its prompts, and the part of the picture [R, h, w] that each is for."""

    embeds: list[Tensor]
    masks: Tensor


@dataclass(frozen=True)
class FittedModel:
    """What all recolouring of one fit shares: its weights in a UNet, and where its nouns are, by plain prompt."""

    fit: Fit
    unet: UNet2DConditionModel
    regions: dict[str, Tensor] = field(default_factory=dict)


class Painter:
    """Step 4 and 5 of stage 2 for the prompts of one call: candidates, their choice, what they may change."""

    BATCH = 8  # pictures generated at a time

    def __init__(self, checkpoint: Checkpoint, fitted: FittedModel, before: Tensor) -> None:
        self.checkpoint, self.before = checkpoint, before
        self.fit, self.unet, self._regions = fitted.fit, fitted.unet, fitted.regions
        self.e_opt = self.fit.prompt_embeds.to(checkpoint.device)
        self.e_empty = checkpoint.encode_prompts([""])
        self.z = checkpoint.encode(before[None].to(checkpoint.device))

    def choose(
        self, prompts: Sequence[str], phrases: Sequence[list[ColoredPhrase]], alphas: Sequence[float]
    ) -> list[Choice]:
        """For each prompt the picture of the best alpha, or one with an ignored colour word exaggerated."""
        jobs = [
            self._job(prompt, items, alpha) for prompt, items in zip(prompts, phrases, strict=True) for alpha in alphas
        ]
        x = self._generate(jobs)
        choices = []
        for i, (prompt, items) in enumerate(zip(prompts, phrases, strict=True)):
            candidates = x[i * len(alphas) : (i + 1) * len(alphas)]
            if len(alphas) == 1 and not self.fit.settings.stage2.word_weights:
                choices.append(Choice(candidates[0], alphas[0], {}))
                continue
            scores = [self._score(picture, prompt, items) for picture in candidates]
            best = max(range(len(alphas)), key=scores.__getitem__)
            chosen = self._exaggerated(alphas[best], candidates[best], scores[best], prompt, items)
            choices.append(Choice(chosen, alphas[best], dict(zip(alphas, scores, strict=True))))
        return choices

    def _exaggerated(self, alpha: float, best: Tensor, score: float, prompt: str, items: list[ColoredPhrase]) -> Tensor:
        """`best`, or a better picture with the phrases whose colour word it ignores exaggerated."""
        colored = [item for item in items if item.color is not None]
        reports = self.reports(best, prompt, items)
        ignored = [i.phrase for i, r in zip(colored, reports, strict=True) if r.agreement < 0.5 and r.feasible]
        weights = self.fit.settings.stage2.word_weights
        if not ignored or not weights:
            return best
        jobs = [self._job(prompt, items, alpha, ignored, weight) for weight in weights]
        tried = [(self._score(x, prompt, items), x) for x in self._generate(jobs)]
        top, picture = max(tried, key=lambda pair: pair[0])
        return picture if top > score else best

    def _job(
        self,
        prompt: str,
        items: list[ColoredPhrase],
        alpha: float,
        exaggerated: Sequence[NounPhrase] = (),
        weight: float = 1.0,
    ) -> _Job:
        """e(alpha) of a prompt, or of its variants of one colour with the regions that they are for."""
        texts, masks = [prompt], torch.ones(1, *self.fit.lightness.shape[-2:])
        colors = [item.color for item in items]
        if self.fit.settings.stage2.regional_prompts and len({*colors} - {None}) > 1:
            regions = self.regions(prompt, items)
            wanted = list(dict.fromkeys(colors))
            texts = [prompt if color is None else with_color_alone(prompt, items, color) for color in wanted]
            masks = torch.stack([regions[[c == color for c in colors]].sum(dim=0) for color in wanted])
        embeds = []
        for text in texts:
            e = self.checkpoint.encode_prompts([text])
            if exaggerated:
                nouns = {phrase.noun for phrase in exaggerated}
                spans = [(phrase.start, phrase.end) for phrase in noun_phrases(text) if phrase.noun in nouns]
                tokens = [i for span in self.checkpoint.token_positions(text, spans) for i in span]
                e = exaggerate(e, self.e_empty, tokens, weight)
            embeds.append(interpolate(self.e_opt, e, self.e_empty, alpha))
        return _Job(embeds, masks)

    def _generate(self, jobs: list[_Job]) -> Tensor:
        """One picture per job, all from the same noised latent: [B, 3, h, w] in [-1, 1]."""
        longest = max(e.shape[1] for job in jobs for e in job.embeds)
        settings = self.fit.settings
        negative = without_colors(self.fit.context_prompt) if settings.stage2.negative_context else None
        pictures = []
        for start in range(0, len(jobs), self.BATCH):
            batch = jobs[start : start + self.BATCH]
            embeds = torch.cat([fill_up(e, self.e_empty, longest) for job in batch for e in job.embeds])
            owners = torch.tensor([i for i, job in enumerate(batch) for _ in job.embeds])
            regional = Regional(owners, torch.cat([job.masks for job in batch]))
            x = generate(
                self.checkpoint,
                self.unet,
                self.z,
                embeds,
                self.fit.lightness,
                settings.sampling,
                torch.Generator().manual_seed(self.fit.seed),
                negative_prompt=negative,
                regional=regional,
            )
            pictures.append(x.cpu())
        return torch.cat(pictures)

    def regions(self, prompt: str, items: list[ColoredPhrase]) -> Tensor:
        """Where each noun phrase of the prompt is, [P, h, w].

        Looked for under the prompt without its colour words: they say nothing of a gray picture, and
        could mislead; prompts that differ in colours share the answer.
        """
        plain = with_color_alone(prompt, items, None)
        phrases = noun_phrases(plain)
        if [phrase.noun for phrase in phrases] != [item.phrase.noun for item in items]:
            plain, phrases = prompt, [item.phrase for item in items]  # the tagger reads it otherwise without colours
        if plain not in self._regions:
            gray = gray_input(self.fit.lightness)[None].to(self.checkpoint.device)
            self._regions[plain] = phrase_regions(
                self.checkpoint,
                self.checkpoint.encode(gray),
                self.fit.lightness,
                plain,
                phrases,
                torch.Generator().manual_seed(self.fit.seed),
            )
        return self._regions[plain]

    def reports(self, x: Tensor, prompt: str, items: list[ColoredPhrase]) -> tuple[ColorReport, ...]:
        """What became of each colour word in a picture [3, h, w] in [-1, 1]."""
        if all(item.color is None for item in items):
            return ()
        lab = torch.cat((self.fit.lightness, chroma_of(x)))
        return tuple(report(items, self.regions(prompt, items), lab))

    def _score(self, x: Tensor, prompt: str, items: list[ColoredPhrase]) -> float:
        """Mean agreement of the colour words, less a fiftieth of the mean chroma change where none was asked.

        The latter counts only if it will stay: see `keep_unchanged`.
        """
        agreements = [min(r.agreement, 0.9) for r in self.reports(x, prompt, items)]
        score = sum(agreements) / max(1, len(agreements))
        unchanged = [i for i, item in enumerate(items) if not item.changed]
        if unchanged and not self.fit.settings.stage2.keep_unchanged:
            outside = self.regions(prompt, items)[unchanged].sum(dim=0)
            drift = (chroma_of(x) - chroma_of(self.before)).norm(dim=0)
            score -= float((outside * drift).sum() / outside.sum().clamp(min=1e-6)) / 50
        return score

    def keep_unchanged(self, x: Tensor, prompt: str, items: list[ColoredPhrase]) -> Tensor:
        """`x` in the regions of the nouns whose colour word changed, the picture before elsewhere."""
        if not self.fit.settings.stage2.keep_unchanged or all(item.changed for item in items) or not items:
            return x
        changed = [i for i, item in enumerate(items) if item.changed]
        inside = self.regions(prompt, items)[changed].sum(dim=0)
        chroma = inside * chroma_of(x) + (1 - inside) * chroma_of(self.before)
        return lock_luminance(chroma, self.fit.lightness) * 2 - 1
