"""Stage 2, steps 4 and 5, for the prompts of one call: candidates, the choice among them, what they may change."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcolor_core.adapters import fitted_unet
from diffcolor_core.attention import phrase_regions
from diffcolor_core.color import lock_luminance
from diffcolor_core.color_terms import ColoredPhrase, ColorReport, report
from diffcolor_core.fits import Fit, chroma_of
from diffcolor_core.images import gray_input
from diffcolor_core.in_context import exaggerate, interpolate
from diffcolor_core.models import Checkpoint
from diffcolor_core.sampling import fill_up, generate


@dataclass(frozen=True)
class Choice:
    """The best of the pictures made for one prompt."""

    generated: Tensor
    alpha: float
    scores: dict[float, float]


class Painter:
    """Step 4 and 5 of stage 2 for the prompts of one call: candidates, their choice, what they may change."""

    BATCH = 8  # pictures generated at a time

    def __init__(self, checkpoint: Checkpoint, fit: Fit, before: Tensor) -> None:
        self.checkpoint, self.fit, self.before = checkpoint, fit, before
        self.unet = fitted_unet(checkpoint.unet, fit.settings.stage2.adapter_rank, fit.unet_state)
        self.e_opt = fit.prompt_embeds.to(checkpoint.device)
        self.e_empty = checkpoint.encode_prompts([""])
        self.z = checkpoint.encode(before[None].to(checkpoint.device))
        self._regions: dict[str, Tensor] = {}

    def choose(
        self, prompts: Sequence[str], phrases: Sequence[list[ColoredPhrase]], alphas: Sequence[float]
    ) -> list[Choice]:
        """For each prompt the picture of the best alpha, or one with an ignored colour word exaggerated."""
        targets = [self.checkpoint.encode_prompts([prompt]) for prompt in prompts]
        embeds = [interpolate(self.e_opt, e, self.e_empty, alpha) for e in targets for alpha in alphas]
        x = self._generate(embeds)
        choices = []
        for i, (prompt, items) in enumerate(zip(prompts, phrases, strict=True)):
            candidates = x[i * len(alphas) : (i + 1) * len(alphas)]
            if len(alphas) == 1 and not self.fit.settings.stage2.word_weights:
                choices.append(Choice(candidates[0], alphas[0], {}))
                continue
            scores = [self._score(picture, prompt, items) for picture in candidates]
            best = max(range(len(alphas)), key=scores.__getitem__)
            chosen = self._exaggerated(targets[i], alphas[best], candidates[best], scores[best], prompt, items)
            choices.append(Choice(chosen, alphas[best], dict(zip(alphas, scores, strict=True))))
        return choices

    def _exaggerated(
        self, e: Tensor, alpha: float, best: Tensor, score: float, prompt: str, items: list[ColoredPhrase]
    ) -> Tensor:
        """`best`, or a better picture with the phrases whose colour word it ignores exaggerated."""
        weights = self.fit.settings.stage2.word_weights
        colored = [item for item in items if item.color is not None]
        reports = self.reports(best, prompt, items)
        ignored = [i.phrase for i, r in zip(colored, reports, strict=True) if r.agreement < 0.5 and r.feasible]
        if not ignored or not weights:
            return best
        spans = self.checkpoint.token_positions(prompt, [(phrase.start, phrase.end) for phrase in ignored])
        tokens = [token for span in spans for token in span]
        embeds = [
            interpolate(self.e_opt, exaggerate(e, self.e_empty, tokens, weight), self.e_empty, alpha)
            for weight in weights
        ]
        tried = [(self._score(x, prompt, items), x) for x in self._generate(embeds)]
        top, picture = max(tried, key=lambda pair: pair[0])
        return picture if top > score else best

    def _generate(self, embeds: list[Tensor]) -> Tensor:
        """One picture per e(alpha), all from the same noised latent: [B, 3, h, w] in [-1, 1]."""
        longest = max(e.shape[1] for e in embeds)
        pictures = []
        for start in range(0, len(embeds), self.BATCH):
            batch = torch.cat([fill_up(e, self.e_empty, longest) for e in embeds[start : start + self.BATCH]])
            generator = torch.Generator().manual_seed(self.fit.seed)
            sampling = self.fit.settings.sampling
            negative = self.fit.context_prompt if self.fit.settings.stage2.negative_context else None
            x = generate(self.checkpoint, self.unet, self.z, batch, self.fit.lightness, sampling, generator, negative)
            pictures.append(x.cpu())
        return torch.cat(pictures)

    def regions(self, prompt: str, items: list[ColoredPhrase]) -> Tensor:
        """Where each noun phrase of the prompt is, [P, h, w]."""
        if prompt not in self._regions:
            gray = gray_input(self.fit.lightness)[None].to(self.checkpoint.device)
            self._regions[prompt] = phrase_regions(
                self.checkpoint,
                self.checkpoint.encode(gray),
                self.fit.lightness,
                prompt,
                [item.phrase for item in items],
                torch.Generator().manual_seed(self.fit.seed),
            )
        return self._regions[prompt]

    def reports(self, x: Tensor, prompt: str, items: list[ColoredPhrase]) -> tuple[ColorReport, ...]:
        """What became of each colour word in a picture [3, h, w] in [-1, 1]."""
        if all(item.color is None for item in items):
            return ()
        lab = torch.cat((self.fit.lightness, chroma_of(x)))
        return tuple(report(items, self.regions(prompt, items), lab))

    def _score(self, x: Tensor, prompt: str, items: list[ColoredPhrase]) -> float:
        """Mean agreement of the colour words, less a fiftieth of the mean chroma change where nothing was asked."""
        agreements = [min(r.agreement, 0.9) for r in self.reports(x, prompt, items)]
        score = sum(agreements) / max(1, len(agreements))
        unchanged = [i for i, item in enumerate(items) if not item.changed]
        if unchanged:
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
