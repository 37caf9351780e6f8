"""Prompts as text: noun phrases, identifiers, and their tokens.

Noun phrases come from HanTa's part-of-speech tagger (hidden Markov model, tags of the British
National Corpus), whose English model installs with the package. That model is a pickle: it is
loaded only from the installed package, never from the working folder, and only if its hash is the
one that we have looked at.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

_MODEL_SHA256 = "99ddc9b14b3fe604b245e2d7a3aef59ab1bdd06b1bae4f4ce74738902e2a0265"
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*|[^\w\s]")
_PREPOSITIONS = (
    "in front of",
    "on top of",
    "in back of",
    "in the middle of",
    "in the background",
    "in the foreground",
    "in the distance",
    "on the left",
    "on the right",
    "on the side of",
)
_ADJECTIVE_TAGS = ("AJ", "VVG", "VVN", "ORD")
_NOUN_TAGS = ("NN", "NP")


@dataclass(frozen=True)
class NounPhrase:
    """A noun with what describes it: `prompt[start:end]`, without its article. `noun`, its last word, is lower case."""

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
            f"HanTa's English model at {path} has SHA-256 {digest}, expected {_MODEL_SHA256}. It is a pickle "
            "and would run as code, so it is not loaded: install the HanTa version pinned in constraints.txt."
        )
    return HanoverTagger(str(path))


def noun_phrases(prompt: str) -> list[NounPhrase]:
    """The noun phrases of an English prompt, in order: adjectives and nouns up to the last noun of each.

    "a brown dog on a wooden bench" gives "brown dog" and "wooden bench". Set prepositions such as
    "in front of" hold no noun phrase.
    """
    places = list(_WORD.finditer(prompt))
    words = [place.group() for place in places]
    tags = [tag for _, _, tag in _tagger().tag_sent([word.lower() for word in words])] if words else []
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
            first += 1  # a participle or "and" does not open a phrase: "sitting" of "sitting dogs" may, of "and" never
        start, end = places[first].start(), places[i - 1].end()
        phrases.append(
            NounPhrase(
                start=start,
                noun_start=places[i - 1].start(),
                end=end,
                text=prompt[start:end],
                noun=words[i - 1].lower(),
            )
        )
    return phrases


def _joins(tags: list[str], first: int, i: int) -> bool:
    """Whether the "and" at i stands between two adjectives of one phrase ("white and blue shirts")."""
    return i > first and i + 1 < len(tags) and tags[i - 1].startswith("AJ") and tags[i + 1].startswith("AJ")


def insert_identifiers(prompt: str, identifiers: list[str]) -> str:
    """c' from c: one identifier before every noun phrase, after its article (`method.md`, stage 2, step 1).

    "A dog on a wooden bench" becomes "A sks dog on a ktn wooden bench". Raises ValueError if there
    are more noun phrases than identifiers.
    """
    phrases = noun_phrases(prompt)
    if len(phrases) > len(identifiers):
        raise ValueError(
            f"the prompt has {len(phrases)} noun phrases but there are only {len(identifiers)} identifiers: "
            "shorten the prompt"
        )
    pieces, last = [], 0
    for phrase, identifier in zip(phrases, identifiers, strict=False):
        pieces += [prompt[last : phrase.start], identifier, " "]
        last = phrase.start
    return "".join([*pieces, prompt[last:]])


def rare_tokens(tokenizer: Any, count: int) -> list[str]:
    """Up to `count` words that are one rare token each: the last-merged short whole words of a CLIP vocabulary.

    BPE merges are learned most frequent first, so the highest ids are the rarest. Words of English
    as the tagger knows them are fine too: rare is what matters, not meaningless.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: -item[1])
    words = (piece.removesuffix("</w>") for piece, _ in vocabulary if piece.endswith("</w>"))
    return [word for word in words if 2 <= len(word) <= 4 and word.isascii() and word.isalpha()][:count]
