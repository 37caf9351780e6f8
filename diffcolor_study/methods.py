"""The methods that the study compares: DiffColor, its ablations and the baselines, all as settings of one code."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffcolor_core.config import PRESETS, Settings, preset


@dataclass(frozen=True)
class Method:
    """A change of the preset's settings. fit_on_target: the target prompt is also the fit's context prompt."""

    derive: Callable[[Settings], Settings]
    description: str
    fit_on_target: bool = False


def _with(**changes: Any) -> Callable[[Settings], Settings]:
    """A change of some settings: `_with(color_prior=False, stage1={"num_steps": 0})`."""

    def derive(settings: Settings) -> Settings:
        fields = settings.model_dump()
        merged = {name: fields[name] | new if isinstance(new, dict) else new for name, new in changes.items()}
        return Settings.model_validate(fields | merged)

    return derive


def scaled_steps(settings: Settings, factor: float) -> Settings:
    """The settings with all three numbers of optimisation steps times `factor`."""
    one, two = settings.stage1, settings.stage2
    steps = {"embedding_steps": round(two.embedding_steps * factor), "model_steps": round(two.model_steps * factor)}
    return _with(stage1={"num_steps": round(one.num_steps * factor)}, stage2=steps)(settings)


def _preset(name: str) -> Method:
    """A preset instead of the given settings, with learning rates that suit the demo model. It spares no memory."""
    rates: dict[str, Any] = {"stage1.recompute": False, "stage2.recompute": False}
    rates |= {"stage1.learning_rate": 4e-4, "stage2.model_learning_rate": 1e-3, "stage2.embedding_learning_rate": 1e-2}
    if PRESETS[name].stage1.adapter_rank is None:  # all weights
        rates |= {"stage1.learning_rate": 2e-5, "stage2.model_learning_rate": 5e-5}
    return Method(lambda _: preset(name, rates), f"preset `{name}`, at learning rates that suit the demo model")


_PAPERS = {"keep_unchanged": False, "negative_context": False, "regional_prompts": False, "steer_words": False}
_NO_FIT = {"embedding_steps": 0, "model_steps": 0, "alpha": 1.0, **_PAPERS}
_PLAIN: dict[str, Any] = {"color_prior": False, "stage1": {"enabled": False}, "alignment": {"enabled": False}}
_OFF = {"project_luminance": False, "strength": 0.8}  # as plain img2img samples
_TRAINED = {"num_steps": 24, "learning_rate": 2e-5, "temperature": 0.05, "max_timestep": 0.6, "num_views": 2}
_FITTED = {"embedding_steps": 40, "embedding_learning_rate": 1e-2, "model_steps": 40, "model_learning_rate": 1e-3}


def _imagic(settings: Settings) -> Settings:
    fits = {} if settings.stage2.model_steps else _FITTED  # preset `photo` takes no steps, and imagic is nothing else
    return _with(**_PLAIN, stage2={"alpha": 1.2, **_PAPERS, **fits}, sampling=_OFF)(settings)


def chosen_methods(names: Iterable[str]) -> dict[str, Method]:
    """The methods of these names. Raises ValueError for an unknown name, listing the known ones."""
    listed = list(names)
    if unknown := [name for name in listed if name not in METHODS]:
        raise ValueError(f"no method {', '.join(unknown)}: choose from {', '.join(METHODS)}")
    return {name: METHODS[name] for name in listed}


METHODS: dict[str, Method] = {
    "full": Method(_with(), "DiffColor with the preset's settings"),
    # baselines
    "img2img": Method(
        _with(**_PLAIN, stage2=_NO_FIT, sampling=_OFF), "noised gray latent, target prompt, luminance lock"
    ),
    "img2img-projected": Method(_with(**_PLAIN, stage2=_NO_FIT), "img2img with luminance projection at each step"),
    "text-to-image": Method(
        _with(**_PLAIN, stage2=_NO_FIT, sampling={**_OFF, "strength": 1.0}), "from pure noise, luminance lock"
    ),
    "imagic": Method(_imagic, "stage 2 on the gray picture, without stage 1"),
    "stage1": Method(
        _with(stage1={"enabled": True}, stage2={"embedding_steps": 0, "model_steps": 0}),
        "stage 1 alone, fitted to the target prompt",
        fit_on_target=True,
    ),
    # ablations of stage 1
    "no-stage1": Method(_with(stage1={"enabled": False}), "without stage 1"),
    "untrained-stage1": Method(_with(stage1={"num_steps": 0}), "the primary from the model as it is, no training"),
    "no-contrastive": Method(_with(stage1={"contrastive_weight": 0.0}), "stage 1 without equation (1)"),
    "no-anti-color": Method(_with(stage1={"anti_color_prompts": ("",)}), "equation (1) against an empty prompt"),
    "no-views": Method(_with(stage1={"num_views": 0}), "CLIP judges the whole picture only, as in the paper"),
    "no-early-stop": Method(_with(stage1={"stop_below": 0.0}), "stage 1 runs all its steps, as in the paper"),
    "noise-target": Method(_with(stage1={"diffusion_target": "noise"}), "equation (2) as in the paper"),
    "all-timesteps": Method(_with(stage1={"max_timestep": 1.0}), "stage 1 over the whole noise schedule"),
    # ablations of stage 2 and of sampling
    "no-fit": Method(_with(stage2={"embedding_steps": 0, "model_steps": 0}), "without stage 2's optimisation"),
    "no-identifiers": Method(_with(stage2={"use_identifiers": False}), "without identifiers"),
    "adapters": Method(_with(stage2={"adapter_rank": 4, "model_learning_rate": 1e-3}), "low-rank adapters of rank 4"),
    "alpha-0.8": Method(_with(stage2={"alpha": 0.8}), "alpha 0.8"),
    "alpha-1.2": Method(_with(stage2={"alpha": 1.2}), "alpha 1.2"),
    "negative-empty": Method(_with(stage2={"negative_context": False}), "an empty negative prompt, as the author's"),
    "no-regional": Method(_with(stage2={"regional_prompts": False}), "one prompt for the whole picture"),
    "no-keep": Method(_with(stage2={"keep_unchanged": False}), "unchanged nouns are generated anew"),
    "no-gain": Method(_with(prior_gain=1.0), "the colour prior's chroma as it is"),
    "no-steering": Method(_with(stage2={"steer_words": False}), "what the model made of a word stays"),
    "no-projection": Method(_with(sampling={"project_luminance": False}), "without luminance projection"),
    "tiny-vae": Method(
        _with(stage1={"tiny_decoder": True}, sampling={"tiny_projection": True}), "the tiny VAE where it may stand in"
    ),
    "no-alignment": Method(_with(alignment={"enabled": False}), "without spatial alignment"),
    "no-propagation": Method(_with(alignment={"propagate": False}), "chroma not solved for anew along edges"),
    # what is off in preset `photo`
    "alpha-0.5": Method(_with(stage2={"alpha": 0.5}), "the prompt's words count half as much as in `full`"),
    "unet": Method(
        _with(color_prior=False, sampling={"strength": 0.8}), "sampled from the gray picture, without the colour prior"
    ),
    "sampled": Method(_with(sampling={"strength": 0.3}), "sampled from the colour prior's picture at strength 0.3"),
    "stage1-trained": Method(
        _with(stage1=_TRAINED, sampling={"strength": 0.3}), "`sampled`, with stage 1's training by equation (3)"
    ),
    "stage2-fitted": Method(
        _with(stage2=_FITTED, sampling={"strength": 0.3}), "`sampled`, with stage 2's fits by equations (5) and (6)"
    ),
    **{name: _preset(name) for name in ("paper", "standard", "fast", "instant")},
    # ablations of both stages
    "half-steps": Method(partial(scaled_steps, factor=0.5), "half the optimisation steps"),
    "double-steps": Method(partial(scaled_steps, factor=2), "twice the optimisation steps"),
}
