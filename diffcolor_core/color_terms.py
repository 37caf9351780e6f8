"""Colours in prompts: the noun that they belong to, and whether a picture obeys them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from diffcolor_core.prompts import HEX, NounPhrase, noun_phrases
from diffcolor_scans.color import max_chroma
from diffcolor_scans.color_names import basic_term, hue_of, is_color

FULL_CHROMA = 20.0
"""C*ab that is enough for a colour. Where sRGB cannot reach it, a hue cannot be shown well."""


@dataclass(frozen=True)
class ColoredPhrase:
    """A noun phrase and its first colour (None without one), compared with an earlier prompt's.

    changed: whether that had another colour, or no such noun. before: the colour that it had there.
    """

    phrase: NounPhrase
    color: str | None
    changed: bool
    before: str | None = None


@dataclass(frozen=True)
class ColorReport:
    """Whether one noun got its colour.

    agreement: from -1 (the opposite hue) to 1 (as asked); for a neutral colour from 1 (no chroma) down to -1; 0 if the
    noun was not found.
    achievable_chroma: the largest C*ab of that hue that sRGB can show at the region's lightness; None for a neutral
    colour. If it is small, the colour is infeasible there: a yellow at L* 20, for instance.
    lightness: the region's median L*; None if the noun was not found.
    """

    noun: str
    color: str
    agreement: float
    achievable_chroma: float | None
    lightness: float | None

    @property
    def feasible(self) -> bool:
        """Whether sRGB can show the colour at the region's lightness."""
        return self.achievable_chroma is None or self.achievable_chroma >= FULL_CHROMA


def spoken(prompt: str) -> str:
    """The prompt with every hex code replaced by the basic term nearest to it: no text encoder knows codes."""
    return re.sub(HEX, lambda match: basic_term(match.group()), prompt)


def spoken_phrase(prompt: str, phrase: NounPhrase) -> NounPhrase:
    """A phrase of `prompt` where it stands in `spoken(prompt)`."""
    start, noun_start, end = (len(spoken(prompt[:place])) for place in (phrase.start, phrase.noun_start, phrase.end))
    return replace(phrase, start=start, noun_start=noun_start, end=end)


def color_words(description: str) -> list[str]:
    """The colours of a description, such as what stands before a noun, in lower case."""
    words = re.findall(rf"{HEX}|[a-z]+", description.lower())
    return list(filter(is_color, words))


def _color_of(prompt: str, phrase: NounPhrase) -> str | None:
    """The first colour word before the noun. The noun itself may look like one: "an orange and a plum"."""
    return next(iter(color_words(prompt[phrase.start : phrase.noun_start])), None)


def colored_phrases(prompt: str, before: str) -> list[ColoredPhrase]:
    """The noun phrases of `prompt` with their colours, compared with those of the earlier prompt `before`.

    Phrases correspond by their noun: the first "dog" of one prompt is the first "dog" of the other.
    """
    old: dict[str, list[str | None]] = {}
    for phrase in noun_phrases(before):
        old.setdefault(phrase.noun, []).append(_color_of(before, phrase))
    result = []
    for phrase in noun_phrases(prompt):
        color, known = _color_of(prompt, phrase), old.get(phrase.noun, [])
        is_new = not known
        earlier = None if is_new else known.pop(0)
        result.append(ColoredPhrase(phrase, color, is_new or earlier != color, earlier))
    return result


def with_color_alone(prompt: str, phrases: Sequence[ColoredPhrase], color: str | None) -> str:
    """The prompt without the colour words of its noun phrases, except those whose colour is `color`."""
    text = prompt
    for item in reversed(phrases):
        if item.color not in (None, color):
            start, end = item.phrase.start, item.phrase.noun_start
            some = f"(?:{'|'.join(color_words(text[start:end]))})\\b"
            joined = rf"(?:\s*(?:,\s*and|,|-|and)\s*(?={some}))?"  # "white and blue shirts"
            words = re.sub(rf"(?<!\w){some}{joined}\s*", "", text[start:end], flags=re.IGNORECASE)
            text = text[:start] + words + text[end:]
    return text


def without_colors(prompt: str) -> str:
    """The prompt without the colour words of its noun phrases."""
    return with_color_alone(prompt, colored_phrases(prompt, ""), None)


FOUND = 0.05
"""A region that is nowhere more than this is that of a noun which was not found."""


def median_inside(region: Tensor, values: Tensor) -> list[float] | None:
    """The median of values [C, h, w] where a region [h, w] is at least half, or else where it is most.

    None for a region of a noun that was not found.
    """
    if float(region.max()) < FOUND:
        return None
    medians: list[float] = values[:, region >= min(0.5, float(region.max()))].median(dim=1).values.tolist()
    return medians


def report(phrases: Sequence[ColoredPhrase], regions: Tensor, lab: Tensor) -> list[ColorReport]:
    """How well a picture, L*a*b* [3, h, w], obeys each coloured phrase in the phrase's region [P, h, w]."""
    reports = []
    for item, region in zip(phrases, regions, strict=True):
        if item.color is None:
            continue
        medians = median_inside(region, lab)
        if medians is None:
            reports.append(ColorReport(item.phrase.noun, item.color, 0.0, None, None))
            continue
        lightness, a, b = medians
        hue, chroma, reachable = hue_of(item.color), math.hypot(a, b), None
        if hue is None:
            agreement = 1 - min(2.0, chroma / FULL_CHROMA)
        else:
            reachable = max_chroma(lightness, hue)
            turn = math.cos(math.atan2(b, a) - math.radians(hue))
            agreement = turn * min(1.0, chroma / max(1.0, min(FULL_CHROMA, reachable)))
        reports.append(ColorReport(item.phrase.noun, item.color, agreement, reachable, lightness))
    return reports
