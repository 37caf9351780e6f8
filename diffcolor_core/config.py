"""Settings of the method: frozen records with every unit, default and reason, and the named presets.

[P] marks a value from the paper, [A] one from its author's prototype, [O] one of ours: `docs/method.md`
has the equations, the reasons and what each departure from the paper measured.
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
    """Colorization with a generative colour prior: equations (1) to (3)."""

    enabled: bool = True
    """False leaves the primary gray, so that stage 2 works on the scan itself. For ablations."""
    num_steps: int = Field(1500, ge=0)
    """Optimisation steps N1 [P]."""
    learning_rate: float = Field(1.5e-6, gt=0)
    """Adam's rate for all UNet weights at SD-1.5 scale [A]. A smaller model needs a larger rate."""
    adapter_rank: int | None = Field(None, ge=1)
    """Train low-rank adapters of this rank on the UNet's attention [O] instead of all weights [P]."""
    contrastive_weight: float = Field(0.5, ge=0)
    """w_con of equation (3) [A]."""
    diffusion_weight: float = Field(1.0, ge=0)
    """w_diff of equation (3) [A]."""
    diffusion_target: Literal["noise", "prior"] = "noise"
    """What (2) pulls the prediction towards: the drawn noise [P], or the frozen model's own prediction [O].
    The noise belongs to a gray picture, so it teaches the model that the prompt means gray."""
    temperature: float = Field(0.01, gt=0)
    """tau of equation (1): CLIP's own logit scale [A]."""
    max_timestep: float = Field(1.0, gt=0, le=1)
    """Largest t drawn, as a part of the schedule; 1 is all of it [P]. In strong noise CLIP sees a blur [O]."""
    recompute: bool = False
    """Compute the blocks of UNet and VAE decoder again in the backward pass [O], instead of keeping what is inside
    them: about 30% more operations, and much less memory. Results are the same."""
    tiny_decoder: bool = False
    """CLIP sees what the checkpoint's tiny VAE decodes, if it has one [O]: quicker, and nearly the same picture."""
    num_views: int = Field(0, ge=0)
    """Random crops, flips and noisy copies that CLIP judges too, against colours that only CLIP likes [O]; 0 is [P]."""
    stop_below: float = Field(0.0, ge=0)
    """Stop once the mean contrastive loss of five steps is below this (nats) [O]. 0 never stops early."""
    strength: float | None = Field(None, ge=0, le=1)
    """Starting noise of the primary. None takes that of `sampling` [P]. More keeps less of the gray [O]."""
    anti_color_prompts: tuple[str, ...] = (
        "A grayscale photograph",
        "A picture with scratches",
        "Brownish average colors for objects",
    )
    """c_k^- of equation (1) [P, figure]."""


class SamplingSettings(_Record):
    """Deterministic DDIM (eta 0) from the noised latent."""

    num_steps: int = Field(50, ge=1)
    """K, the DDIM steps over the full schedule. The part that `strength` gives is run."""
    strength: float = Field(0.8, ge=0, le=1)
    """Starting noise level, as a fraction of the schedule. 0 adds no noise and takes no step."""
    guidance_scale: float = Field(3.0, ge=1)
    """Classifier-free guidance [A]. 1 means none."""
    project_luminance: bool = True
    """Give each step's clean estimate the scan's luminance [O], so that colours keep to the scan's edges."""
    tiny_projection: bool = False
    """Do that by the checkpoint's tiny VAE, if it has one [O]: the change that it tells is added to the estimate."""


class AlignmentSettings(_Record):
    """Spatial alignment, equation (4)."""

    enabled: bool = True
    """False keeps the generated colours where they are."""
    timestep: int = Field(261, ge=0, le=999)
    """Noise level at which the frozen UNet's features are read, DIFT's choice [O]."""
    up_block: int = Field(1, ge=0)
    """Up block whose activations are the features, counted from 0. DIFT takes the second [O]."""
    temperature: float = Field(0.01, gt=0)
    """tau_a of equation (4) [A]."""
    radius: int = Field(1, ge=0)
    """Half the side of the search window, in feature cells [O]. It is small as the pictures nearly match."""
    min_similarity: float = Field(0.6, ge=-1, le=1)
    """A cell keeps its own colour if its best cosine similarity is below this [O]."""
    propagate: bool = False
    """Solve for the chroma anew along the scan's edges [O], so that no colour leaks over the border of a thing."""


class Stage2Settings(_Record):
    """In-context controllable colorization: equations (5) to (7)."""

    embedding_steps: int = Field(500, ge=0)
    """N2, steps of equation (5), with the UNet frozen [P]."""
    embedding_learning_rate: float = Field(1e-3, gt=0)
    """Adam's rate for e_opt [A]."""
    model_steps: int = Field(1000, ge=0)
    """N3, steps of equation (6), with the embedding frozen [P]."""
    model_learning_rate: float = Field(1e-6, gt=0)
    """Adam's rate for all UNet weights at SD-1.5 scale [A]."""
    recompute: bool = False
    """Compute the UNet's blocks again in the backward pass [O], as in stage 1."""
    use_identifiers: bool = True
    """Put a rare token before each noun phrase of the context prompt [P]."""
    adapter_rank: int | None = Field(None, ge=1)
    """Train low-rank adapters of this rank on the UNet's attention [O] instead of all weights [P]."""
    alpha: float = 1.2
    """Interpolation of equation (7): 0 is e_opt, 1 the target's embedding, more exaggerates it [A: 1.2 to 1.4]."""
    negative_context: bool = False
    """Guide away from the context prompt without its colour words [O] instead of the empty prompt [A], so that
    guidance pushes towards the target's colours. The old colour words must not be in it: see docs/method.md."""
    regional_prompts: bool = False
    """Generate each noun's region under that noun's colour word alone [O]: no word can colour another noun."""
    keep_unchanged: bool = False
    """Change the picture only in the regions of nouns whose colour word the target changes [O]."""
    steer_words: bool = False
    """Give a noun's region the hue of its colour word where what the model made contradicts it [O]."""


class Settings(_Record):
    """Everything that shapes a result besides the picture, the prompts, the seed and the model."""

    working_size_px: int | None = Field(None, gt=0)
    """The picture is scaled to the area of a square with this side. None takes the model's native side."""
    batch_size: int = Field(1, ge=1)
    """Noise draws per optimisation step."""
    color_prior: bool = False
    """Sample from the picture that the checkpoint's colour prior makes of the scan and the prompt [O], instead of the
    gray scan or the primary. For checkpoints that have such a prior: the bundled `photo`."""
    prior_gain: float = Field(1.0, ge=0)
    """The colour prior's chroma times this [O]: the mean of what is likely is paler than any of it."""
    stage1: Stage1Settings = Stage1Settings()
    alignment: AlignmentSettings = AlignmentSettings()
    stage2: Stage2Settings = Stage2Settings()
    sampling: SamplingSettings = SamplingSettings()

    def sha256(self) -> str:
        """Hash over every setting. It does not depend on the order of fields or on the platform."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def _real(stage1_steps: int, embedding_steps: int, model_steps: int, sampling_steps: int) -> Settings:
    """What suits a photograph and a published checkpoint, with these numbers of steps: see docs/method.md."""
    return Settings(
        stage1=Stage1Settings(
            num_steps=stage1_steps,
            learning_rate=3e-5,
            adapter_rank=4,
            diffusion_target="prior",
            temperature=0.05,
            max_timestep=0.6,
            recompute=True,
            tiny_decoder=True,
            stop_below=0.1,
            strength=1.0,
        ),
        alignment=AlignmentSettings(propagate=True),
        stage2=Stage2Settings(
            embedding_steps=embedding_steps,
            model_steps=model_steps,
            model_learning_rate=1e-4,
            recompute=stage1_steps > 0,  # the quicker presets would rather have the time than the memory
            use_identifiers=embedding_steps > 0,
            adapter_rank=4,
            negative_context=True,
            regional_prompts=True,
            keep_unchanged=True,
        ),
        sampling=SamplingSettings(num_steps=sampling_steps, tiny_projection=True),
    )


PRESETS: dict[str, Settings] = {
    "paper": Settings(),
    "standard": _real(150, 150, 300, 20),
    "fast": _real(0, 80, 120, 12),
    "instant": _real(0, 0, 0, 8),
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
        alignment=AlignmentSettings(propagate=True),
        stage2=Stage2Settings(
            embedding_steps=40,
            embedding_learning_rate=1e-2,
            model_steps=40,
            model_learning_rate=5e-5,
            alpha=1.0,
            negative_context=True,
            regional_prompts=True,
            keep_unchanged=True,
        ),
        sampling=SamplingSettings(num_steps=8),
    ),
    "photo": Settings(
        working_size_px=144,
        color_prior=True,
        prior_gain=1.15,
        stage1=Stage1Settings(num_steps=0, adapter_rank=4),  # of no step: a copy that shares its weights
        alignment=AlignmentSettings(enabled=False, propagate=True),
        stage2=Stage2Settings(
            embedding_steps=0, model_steps=0, adapter_rank=4, alpha=1.0, keep_unchanged=True, steer_words=True
        ),
        sampling=SamplingSettings(num_steps=8, strength=0.0),
    ),
}


def preset_for(model: str) -> str:
    """The name of the preset that suits a model: a bundled model's own, else `standard`."""
    return model if model in ("photo", "demo") else "standard"


def preset(name: str, overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings called `name`, with some of them overridden by path: {"stage2.adapter_rank": 4}.

    Raises ValueError for an unknown name or path, with the nearest known one, and for a value out of range.
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
    """Each setting's path with the group that holds it."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _places(value, f"{prefix}{name}.")
        else:
            yield prefix + name, values


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
