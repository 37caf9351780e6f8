"""The options of a run: each is one field, with its type, default, limits and description.

Everything else is derived from these fields: the parameters of the flows, the flags of the command line, the keys of
`diffcolor.toml`, the variables DIFFCOLOR_*, what `RunConfig` holds and the table in docs/options.md. The description of
a field is the text below it. A class is a group: its docstring is the heading of its flags and of its table.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from diffcolor_core.config import PRESETS
from diffcolor_core.prompts import GENERIC_PROMPT

if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(PRESETS)]

AtLeastOne = Annotated[int, Field(ge=1)]


class _Options(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        field_title_generator=lambda name, _: name,  # of Prefect's form, as the parameters beside them
    )


class WhatOptions(_Options):
    """What to colorize"""

    archive: str
    """Folder or URL of the scans: `../scans`, `s3://museum/scans`. URLs are those of fsspec."""
    output: str
    """Folder or URL for pictures and manifest, created if missing."""
    catalog: str | None = None
    """CSV, JSONL or Parquet with the columns image, context_prompt and, optionally, target_prompt. Without this
    option, `catalog.csv` in the archive is taken if it is there."""
    prompt: Annotated[str, Field(min_length=1)] = GENERIC_PROMPT
    """Context prompt of every image for which the catalog has none. It says what is in the picture."""
    caption: str | None = None
    """First let this image-to-text model describe the images that have no context prompt, as `diffcolor caption` does:
    a local folder, or a hub id at a commit. The captions are kept, and may be corrected, in `OUTPUT/catalog.csv`."""
    model: str = "photo"
    """`photo`, the bundled model for photographs; `demo`, for rendered scenes; a local diffusers folder;
    `stable-diffusion-v1-5/stable-diffusion-v1-5`; or another hub id at a commit: `owner/name@commit`."""
    preset: PresetName | None = None
    """Settings of the method, by default those that suit the model. `photo` and `demo` belong to the bundled models and
    take seconds on a CPU. Every other model takes `standard`, which needs a GPU. `fast` and `instant` take fewer
    operations, and `paper`, with the paper's 1500, 500 and 1000 steps, many more: docs/method.md."""
    limit: AtLeastOne | None = None
    """Only the first images, in the order of their names: at most this many pairs of image and context prompt."""


class PictureOptions(_Options):
    """Pictures"""

    image_format: Literal["png", "tiff"] = "png"
    """Format of the pictures. Both are lossless and keep the bit depth of the scan."""
    access_copy: Literal["jpeg", "webp"] | None = None
    """Write a small lossy copy beside each picture."""
    seed: int = 0
    """Seed of every random draw. The same seed gives the same pixels on the same hardware and number of threads."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the networks compute in. `auto` takes bfloat16 on GPUs that have it, else float32. What is trained stays
    float32. There is no float16: Stable Diffusion's VAE overflows in it, and small gradients vanish."""
    overrides: dict[str, Any] | None = None
    """Settings that differ from the preset's, by path: `stage2.adapter_rank=4`."""
    batch: AtLeastOne = 1
    """Photographs that an actor fits at once. A GPU then does more in the same time, and needs more memory. It needs
    settings with adapters, as in `standard` and `fast`. Only photographs of one working shape share a batch, and a
    short one is filled with copies. The size of the batch shows in the last digits, so another one does the work again.
    On a CPU each actor takes one thread then: give `--num-actors` as many as there are cores."""
    compile: bool = False
    """Compile the steps of the optimisation with PyTorch's compiler, which needs a C++ compiler beside it and takes
    minutes for each shape of picture. On a CPU it gains little, on a GPU nobody has measured it yet. The last digits
    differ, so that the work is done again."""
    keep_fits: bool | None = None
    """Keep each fit in `OUTPUT/fits`, so that later prompts need no fitting. A fit is as large as the weights that were
    trained: 3.4 GB for Stable Diffusion 1.5 with `paper`, a few megabytes with adapters. By default fits of up to
    256 MiB are kept."""


class MachineOptions(_Options):
    """Machines"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. `auto` takes the GPUs that are there, and the CPU where there are none."""
    num_actors: AtLeastOne | None = None
    """Ray actors, each with one image or one batch at a time. By default one per GPU, or one on the CPU."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each actor; below 1, actors share a GPU. By default 1, or less if there are more actors than GPUs."""
    ray_address: str | None = None
    """Address of a Ray cluster: `auto` on one of its nodes. By default, a local Ray runs as long as the run does."""
    shard_size: AtLeastOne = 32
    """Images per Prefect task. The last shards are smaller, so that all actors finish together. With `--batch`, shards
    hold whole batches, at least one."""
    log_format: Literal["text", "json"] = "text"
    """`json` writes every line to stderr as a JSON object, with run, shard, image and attempt, and one for each image
    that is done; lines of the actors are among them."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port on loopback where Prometheus finds the metrics of the local Ray while the run lasts. By default a free
    one. A cluster serves them where its `ray start` was told to."""


class ResumeOptions(_Options):
    """Resuming and faults"""

    run_id: str | None = None
    """Name of the run in the manifest and in the metadata of its pictures. By default the time of its start."""
    retry: Literal["failed", "quarantined"] = "failed"
    """What to try again besides what is not done: images that `failed`, or also those that were `quarantined`."""
    commit_every: AtLeastOne = 8
    """Images per manifest part. A run that is killed repeats at most this many images of each shard."""
    max_hours: Annotated[float, Field(ge=0.001)] | None = None
    """Stop the run in order after so many hours, as SIGTERM does: finished images are committed, and the same command
    goes on later."""
    image_timeout_seconds: Annotated[float, Field(ge=1)] = 3600.0
    """Seconds after which an image's actor is killed, in case a decoder or a driver hangs. With `--batch`, so many for
    each photograph of the batch."""
    max_attempts: AtLeastOne = 3
    """How many times an image may kill its actor before it is quarantined."""
    notify: Annotated[str, Field(pattern=r"^[a-z0-9-]+/[a-z0-9-]+$")] | None = None
    """Notification block of the Prefect server, as TYPE/NAME: `slack-webhook/archive`. It is told once if the run fails
    or crashes, and once if too many images are quarantined. Its address stays in the block."""
    notify_quarantined: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the run's images above which `notify` tells of quarantined ones: 0.1 is one in ten."""


class AfterwardsOptions(_Options):
    """Afterwards"""

    report: bool = True
    """Write the page `OUTPUT/report/index.html` when the run has ended, as `diffcolor report OUTPUT` does."""


# Pydantic puts the fields of the last base first. A flow takes those one by one, and the others as one record.
class MoreOptions(AfterwardsOptions, ResumeOptions, MachineOptions, PictureOptions):
    """Everything that `colorize-archive` takes in its one parameter `options`."""


class RunOptions(MoreOptions, WhatOptions):
    """Everything that can be asked of a run over an archive."""


class RecolorWhatOptions(_Options):
    """What to recolor"""

    output: str
    """Folder or URL of the output that a run over an archive has made."""
    catalog: str
    """CSV, JSONL or Parquet with the columns image, target_prompt and, optionally, context_prompt. An image without
    a context prompt here keeps its last one."""


class MoreRecolorOptions(AfterwardsOptions, ResumeOptions, MachineOptions):
    """Everything that `recolor-archive` takes in its one parameter `options`."""


class RecolorOptions(MoreRecolorOptions, RecolorWhatOptions):
    """Everything that can be asked of a run that recolors. The rest is as in the output's last run."""


def groups(options: type[BaseModel]) -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """The headings of the groups of an options record, each with its fields by name, in the order of declaration."""
    for group in reversed(options.__mro__):
        if issubclass(group, _Options) and group.__bases__ == (_Options,):
            yield group.__doc__ or "", group.model_fields


def flow_parameters(
    options: type[BaseModel],
) -> Callable[[Callable[[Any], dict[str, int]]], Callable[..., dict[str, int]]]:
    """Make a function of one `options` record into one that Prefect can make a flow of.

    Its parameters are the fields of the record's second base, one by one, and `options`, a record of the first.
    Prefect takes their descriptions from the docstring and shows them in its form.
    """
    rest, flat = _rest_and_flat(options)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(
            name,
            kind,
            annotation=annotation_of(field),
            default=inspect.Parameter.empty if field.is_required() else field.default,
        )
        for name, field in flat.model_fields.items()
    ]
    parameters.append(inspect.Parameter("options", kind, annotation=rest, default=rest()))
    described = [f"{name}: {in_one_line(field)}" for name, field in flat.model_fields.items()]
    described.append("options: Everything else, as one record.")

    signature = inspect.Signature(parameters, return_annotation=dict[str, int])

    def decorate(function: Callable[[Any], dict[str, int]]) -> Callable[..., dict[str, int]]:
        @wraps(function)
        def flow_function(*positional: Any, **named: Any) -> dict[str, int]:
            given = signature.bind(*positional, **named).arguments
            more = dict(given.pop("options", rest()))
            return function(options.model_validate(given | more))

        flow_function.__signature__ = signature  # type: ignore[attr-defined]
        flow_function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": dict[str, int]}
        arguments = "\n".join(f"    {line}" for line in described)
        flow_function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nArgs:\n{arguments}"
        return flow_function

    return decorate


def flow_arguments(options: BaseModel) -> dict[str, Any]:
    """The arguments with which a flow made by `flow_parameters` gets these options."""
    rest, flat = _rest_and_flat(type(options))
    values = dict(options)
    return {name: values[name] for name in flat.model_fields} | {
        "options": rest(**{name: values[name] for name in rest.model_fields})
    }


def _rest_and_flat(options: type[BaseModel]) -> tuple[type[BaseModel], type[BaseModel]]:
    rest, flat = options.__bases__
    assert issubclass(rest, BaseModel)
    assert issubclass(flat, BaseModel)
    return rest, flat


def annotation_of(field: FieldInfo) -> Any:
    """The type of an option, with its limits."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def in_one_line(field: FieldInfo) -> str:
    """The description of an option, without line breaks."""
    return " ".join((field.description or "").split())
