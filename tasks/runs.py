"""A run before it begins: its options checked, its model identified, its catalog read. Nothing is written yet."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from diffcolor_core.config import preset as settings_preset, preset_for
from tasks.archive import COLUMNS, RECOLOR_COLUMNS, read_catalog
from tasks.lease import last_record
from tasks.options import PictureOptions, RecolorOptions, RunOptions
from tasks.records import RunConfig
from tasks.storage import Store

if TYPE_CHECKING:
    from tasks.planning import Plan


MAX_UNASKED_FIT_BYTES = 256 * 2**20
"""Larger fits are kept only if --keep-fits asks for it."""


@dataclass(frozen=True)
class Run:
    """A run that can begin. plan: holds the catalog, and is filled once the output is this run's."""

    asked: RunOptions | RecolorOptions
    config: RunConfig
    plan: "Plan"


_OPEN: ContextVar[Run | None] = ContextVar("open_run", default=None)


@contextmanager
def open_run(asked: RunOptions | RecolorOptions) -> Iterator[Run]:
    """Check everything that can be checked before a run begins, the cheapest first.

    Inside the context, the same options give the same run: a command opens it to check them, the flow that it then
    calls goes on with it, and nothing is read or hashed twice. Raises ValueError or OSError with what is wrong.
    """
    already = _OPEN.get()
    if already is not None and already.asked == asked:
        yield already
        return
    options = asked if isinstance(asked, RunOptions) else _as_in_last_run(asked)
    source, target = Store(options.archive), Store(options.output)
    if not source.exists():
        raise FileNotFoundError(f"there is no archive at {options.archive!r}: give an existing folder or URL")
    from tasks.planning import open_plan, output_below  # slow: DuckDB

    output_below(source, target)
    settings = settings_preset(options.preset or preset_for(options.model), options.overrides)
    if options.batch > 1 and None in (settings.stage1.adapter_rank, settings.stage2.adapter_rank):
        raise ValueError(
            f"--batch {options.batch}: photographs share a batch only if each trains adapters of its own, so take "
            "--preset standard or fast, or --set stage1.adapter_rank=4 --set stage2.adapter_rank=4"
        )
    num_steps = (settings.stage1.num_steps, settings.stage2.embedding_steps, settings.stage2.model_steps)
    if options.compile and not any(num_steps):
        raise ValueError("--compile: these settings take no step of optimisation, so there is nothing to compile")
    whole_archive = isinstance(asked, RunOptions)
    required = COLUMNS[:2] if whole_archive else RECOLOR_COLUMNS
    with open_plan(read_catalog(source, options.catalog, required)) as plan:
        from diffcolor_core.model_files import BUNDLES, identify, resolve

        if options.caption is not None:
            resolve(options.caption)

        # Like the addresses of the stores: actors, and a later `recolor`, may run in another folder.
        is_path = options.model not in BUNDLES and os.path.exists(options.model)
        model = os.path.abspath(options.model) if is_path else options.model
        model_id, model_revision = identify(model)
        fit_bytes = trained_bytes(model, settings.stage2.adapter_rank)
        found: dict[str, str | bool] = {"archive": source.address, "output": target.address, "model": model}
        if options.keep_fits is None:
            found["keep_fits"] = fit_bytes <= MAX_UNASKED_FIT_BYTES
        config = RunConfig(
            options=options.model_copy(update=found),
            run_id=options.run_id or datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"),
            model_id=model_id,
            model_revision=model_revision,
            settings=settings,
            whole_archive=whole_archive,
            fit_bytes=fit_bytes,
        )
        run = Run(asked, config, plan)
        token = _OPEN.set(run)
        try:
            yield run
        finally:
            _OPEN.reset(token)


def trained_bytes(model: str, adapter_rank: int | None) -> int:
    """What the weights that stage 2 trains take in float32, which is what a kept fit takes, about.

    Reads the UNet's configuration only. Raises ModelError if there is none.
    """
    import torch  # slow
    from diffusers import UNet2DConditionModel

    from diffcolor_core.adapters import trainable_copy
    from diffcolor_core.errors import ModelError
    from diffcolor_core.model_files import folder_of, resolve

    source, commit = resolve(model)
    try:
        config = UNet2DConditionModel.load_config(folder_of(source), subfolder="unet", revision=commit)
    except OSError as error:
        raise ModelError(f"cannot load {model!r}: {error}") from error
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
    trained = trainable_copy(unet, adapter_rank, [torch.Generator()])
    return sum(4 * parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)


def _as_in_last_run(asked: RecolorOptions) -> RunOptions:
    """Archive, model, settings and pictures are those of the output's last run; the rest is as asked."""
    record = last_record(Store(asked.output))
    if record is None:
        from tasks.errors import ManifestError

        raise ManifestError(f"no run has been recorded in {asked.output!r}: colorize an archive into it first")
    same = ("archive", "model", "preset", *PictureOptions.model_fields)
    last = {name: record[name] for name in same if name in record}
    return RunOptions.model_validate(last | asked.model_dump())
