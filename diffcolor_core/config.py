"""Settings of the method: frozen records with every unit, default and reason, and the named presets.

Step counts and rates marked [P] are the paper's, [A] the author's prototype's, [O] ours
(`../shared/method.md` keeps the marks' meaning).
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Stage1Settings(_Record):
    """Colorization with generative colour prior: equations (1) to (3)."""

    enabled: bool = True
    """Off, stage 2 works on the gray picture itself: Imagic alone, for the ablation."""
    num_steps: int = Field(1500, ge=0)
    """Optimisation steps N1 [P]."""
    learning_rate: float = Field(1.5e-6, gt=0)
    """Adam on all UNet weights, at SD-1.5 scale [A]; a smaller model wants a larger rate."""
    adapter_rank: int | None = Field(None, ge=1)
    """Train low-rank adapters of this rank on the UNet's attention [O] instead of all weights [P]."""
    contrastive_weight: float = Field(0.5, ge=0)
    """w_con of equation (3) [A]."""
    diffusion_weight: float = Field(1.0, ge=0)
    """w_diff of equation (3) [A]."""
    diffusion_target: Literal["noise", "prior"] = "noise"
    """What equation (2) pulls the prediction to: the drawn noise [P], or the frozen model's own
    prediction [O], which does not teach the model that the context prompt means gray."""
    temperature: float = Field(0.01, gt=0)
    """tau of equation (1): CLIP's own logit scale [A]."""
    max_timestep: float = Field(1.0, gt=0, le=1)
    """Largest t drawn, as a fraction of the schedule; 1 is the whole schedule [P]. The one-step
    clean estimate that CLIP judges is a blur where the noise is strong."""
    num_views: int = Field(0, ge=0)
    """Random crops, flips and noisy copies that CLIP judges besides the whole picture [O], against
    colours that only CLIP likes; 0 is the paper's."""
    stop_below: float = Field(0.0, ge=0)
    """End when the running mean of the contrastive loss falls below this (nats) [O]; 0 never ends early."""
    strength: float | None = Field(None, gt=0, le=1)
    """Starting noise level of the primary; None is that of `sampling` [P]. From stronger noise less of
    the gray survives, and the colours are more vivid [O]."""
    anti_color_prompts: tuple[str, ...] = (
        "A grayscale photograph",
        "A picture with scratches",
        "Brownish average colors for objects",
    )
    """c_k^- of equation (1) [P, figure]."""


class SamplingSettings(_Record):
    """K-step DDIM from the noised latent (eta 0)."""

    num_steps: int = Field(50, ge=1)
    """K, the DDIM steps of a full schedule; `strength` of them are run."""
    strength: float = Field(0.8, gt=0, le=1)
    """Starting noise level, as a fraction of the schedule."""
    guidance_scale: float = Field(3.0, ge=1)
    """Classifier-free guidance [A]; 1 is none."""
    negative_prompt: str = ""
    """The unconditional branch's prompt; the author's is empty [A]."""
    project_luminance: bool = True
    """Replace the luminance of the clean estimate by the scan's at every step [O]: the colours
    then keep to the scan's own edges. Off for the ablation."""


class AlignmentSettings(_Record):
    """Spatial alignment, equation (4)."""

    enabled: bool = True
    features: Literal["unet", "vae"] = "unet"
    """phi: activations of the frozen UNet (DIFT), or of the VAE's encoder."""
    timestep: int = Field(261, ge=0, le=999)
    """Noise level at which the frozen UNet's features are read (DIFT) [O]."""
    up_block: int = Field(1, ge=0)
    """Which up block's activations are the features; DIFT's is the second [O]."""
    temperature: float = Field(0.01, gt=0)
    """tau_a of equation (4) [A]."""
    radius: int = Field(1, ge=0)
    """Half side of the search window, in feature cells [O]: the pictures are nearly registered."""
    min_similarity: float = Field(0.6, ge=-1, le=1)
    """Cosine similarity below which a cell keeps the colour of its own position [O]."""


class Stage2Settings(_Record):
    """In-context controllable colorization: equations (5) to (7)."""

    embedding_steps: int = Field(500, ge=0)
    """N2, steps of equation (5), the UNet frozen [P]."""
    embedding_learning_rate: float = Field(1e-3, gt=0)
    """Adam on e_opt [A]."""
    model_steps: int = Field(1000, ge=0)
    """N3, steps of equation (6), the embedding frozen [P]."""
    model_learning_rate: float = Field(1e-6, gt=0)
    """Adam on all UNet weights, at SD-1.5 scale [A]."""
    use_identifiers: bool = True
    """Put a rare token before each noun phrase of the context prompt [P]."""
    adapter_rank: int | None = Field(None, ge=1)
    """Train low-rank adapters (LoRA) of this rank on the UNet's attention [O] instead of all weights [P]."""
    alphas: tuple[float, ...] = Field((1.2,), min_length=1)
    """Interpolation of equation (7): 0 is e_opt, 1 the target's embedding, beyond 1 exaggerates [A: 1.2
    to 1.4]. Of several, the one whose picture obeys the prompt best is kept [O]."""
    word_weights: tuple[float, ...] = ()
    """Where the best alpha's picture ignores a colour word, that word's embedding is exaggerated by each
    of these factors, and the best picture kept [O]."""
    negative_context: bool = False
    """The unconditional branch of guidance gets the context prompt without its colour words [O] instead of
    `negative_prompt`: guidance then pushes to what the target says beyond it, its colours. (With its colour
    words it would push away from the old colours, and past the new ones: gray for yellow came out blue.)"""
    regional_prompts: bool = False
    """Each noun's region is generated under the target prompt with that noun's colour word alone [O]: no
    word can colour another noun. Regions as cross-attention shows them."""
    keep_unchanged: bool = False
    """A noun whose colour word the target leaves as it was keeps its colour [O]: the picture changes only
    in the regions of the other nouns, as cross-attention shows them."""


class Settings(_Record):
    """All that shapes a result besides the picture, the prompts, the seed and the model."""

    working_size_px: int | None = Field(None, gt=0)
    """Side of the square whose area the picture is scaled to for the model; None is the model's native side."""
    batch_size: int = Field(1, ge=1)
    """Noise draws per optimisation step."""
    stage1: Stage1Settings = Stage1Settings()
    alignment: AlignmentSettings = AlignmentSettings()
    stage2: Stage2Settings = Stage2Settings()
    sampling: SamplingSettings = SamplingSettings()

    def sha256(self) -> str:
        """Hash of every setting, stable across field order and platforms."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


PRESETS: dict[str, Settings] = {
    "paper": Settings(),
    "demo": Settings(
        batch_size=2,
        stage1=Stage1Settings(
            num_steps=24,
            learning_rate=2e-5,
            diffusion_target="prior",
            temperature=0.05,
            max_timestep=0.6,
            num_views=2,
            stop_below=0.1,
            strength=1.0,
        ),
        stage2=Stage2Settings(
            embedding_steps=40,
            embedding_learning_rate=1e-2,
            model_steps=40,
            model_learning_rate=5e-5,
            alphas=(1.0,),
            negative_context=True,
            regional_prompts=True,
            keep_unchanged=True,
        ),
        sampling=SamplingSettings(num_steps=8),
    ),
}


def preset(name: str, overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings called `name`, some of them overridden by path: {"stage2.adapter_rank": 4}.

    Raises ValueError for a name, a path or a value that cannot be, with the nearest name or path that can.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}{_hint(name, PRESETS)}: choose one of {', '.join(sorted(PRESETS))}")
    values = PRESETS[name].model_dump()
    places = dict(_places(values))
    for path, value in (overrides or {}).items():
        if path not in places:
            raise ValueError(f"no setting {path!r}{_hint(path, places)}: there are {', '.join(places)}")
        places[path][path.rpartition(".")[2]] = value
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"setting {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(wrong) from error


def _places(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every setting's path, and the group that holds it."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _places(value, f"{prefix}{name}.")
        else:
            yield prefix + name, values


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
