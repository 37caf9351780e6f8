"""The noun phrases of a prompt.

They come from HanTa's part-of-speech tagger (hidden Markov model, tags of the British National Corpus), whose
English model is part of the package. That model is a pickle, so it is loaded from the installed package only,
never from the working folder, and only if its hash is that of the file that we have inspected.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

GENERIC_PROMPT = "a photograph"
"""What is said of a picture of which nobody has said anything."""
CAPTION_MODEL = "Salesforce/blip-image-captioning-large"
"""The model that is asked by default, BLIP (Li et al. 2022). Of the smaller `-base` there is only a pickle."""
_MODEL_SHA256 = "99ddc9b14b3fe604b245e2d7a3aef59ab1bdd06b1bae4f4ce74738902e2a0265"
HEX = r"#[0-9a-fA-F]{6}\b"
"""A colour as in HTML."""
_WORD = re.compile(rf"{HEX}|[^\W_]+(?:[-'’][^\W_]+)*|[^\w\s]")
_PREPOSITIONS = (
    *("in front of", "on top of", "in back of", "in the middle of", "in the background", "in the foreground"),
    *("in the distance", "on the left", "on the right", "on the side of"),
)
_ADJECTIVE_TAGS = ("AJ", "VVG", "VVN", "ORD")
_NOUN_TAGS = ("NN", "NP")


@dataclass(frozen=True)
class NounPhrase:
    """A noun with its description, `prompt[start:end]`, without the article. `noun` is its last word in lower case."""

    start: int
    noun_start: int
    end: int
    text: str
    noun: str


@cache
def _tagger() -> Any:
    from HanTa.HanoverTagger import HanoverTagger

    path = resources.files("HanTa") / "morphmodel_en.pgz"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _MODEL_SHA256:
        raise RuntimeError(
            f"HanTa's English model at {path} has SHA-256 {digest}, not {_MODEL_SHA256}. It is a pickle, which can "
            "run code, so it is not loaded: install the HanTa version that constraints.txt pins."
        )
    return HanoverTagger(str(path))


def noun_phrases(prompt: str) -> list[NounPhrase]:
    """The noun phrases of an English prompt, in order: each is a row of adjectives and nouns.

    "a brown dog on a wooden bench" gives "brown dog" and "wooden bench". Compound prepositions such as "in front
    of" contain none.
    """
    places = list(_WORD.finditer(prompt))
    words = [place.group() for place in places]
    read = ["red" if word[0] == "#" and len(word) > 1 else word.lower() for word in words]
    tags = [tag for _, _, tag in _tagger().tag_sent(read)] if words else []
    for preposition in _PREPOSITIONS:
        parts = preposition.split()
        for i in range(len(words) - len(parts) + 1):
            if [word.lower() for word in words[i : i + len(parts)]] == parts:
                tags[i : i + len(parts)] = ["PRP"] * len(parts)

    phrases = []
    i = 0
    while i < len(words):
        first = i
        while i < len(words) and (tags[i].startswith(_ADJECTIVE_TAGS) or (tags[i] == "CJC" and _joins(tags, first, i))):
            i += 1
        nouns = i
        while i < len(words) and tags[i].startswith(_NOUN_TAGS):
            i += 1
        if i == nouns:
            i = max(first + 1, nouns)
            continue
        while first < nouns and tags[first].startswith(("VV", "CJ")):
            first += 1  # a verb or a conjunction cannot open a phrase
        start, end = places[first].start(), places[i - 1].end()
        phrases.append(NounPhrase(start, places[i - 1].start(), end, prompt[start:end], words[i - 1].lower()))
    return phrases


def _joins(tags: list[str], first: int, i: int) -> bool:
    """Whether the "and" at i joins two adjectives of one phrase ("white and blue shirts")."""
    return i > first and i + 1 < len(tags) and tags[i - 1].startswith("AJ") and tags[i + 1].startswith("AJ")
