"""The columns that every manifest row has, whatever the outcome."""

from datetime import UTC, datetime
from typing import Any

from diffcolor_core import __version__
from diffcolor_core.prompts import GENERIC_PROMPT
from tasks.records import PlannedImage, RunConfig
from tasks.storage import joined

Row = dict[str, Any]


def base_row(config: RunConfig, planned: PlannedImage, index: int) -> Row:
    """The columns of variant `index` that do not depend on the outcome."""
    work, variant = planned.work, planned.work.variants[index]
    now = datetime.now(UTC)
    return {
        "run_id": config.run_id,
        "image_key": work.image_key,
        "variant": variant.name,
        "attempt": planned.attempts[index],
        "input_uri": joined(config.options.archive, work.image_key),
        "input_version": work.version,
        "context_prompt": work.context_prompt,
        "context_is_generic": work.context_prompt == GENERIC_PROMPT,
        "target_prompt": variant.target_prompt,
        "model_id": config.model_id,
        "model_revision": config.model_revision,
        "config_sha256": config.config_sha256(work.context_prompt, variant.target_prompt),
        "seed": config.options.seed,
        "started_at": now,
        "finished_at": now,
        "software_version": __version__,
        "generation": config.generation,
        "catalog_columns": variant.catalog_columns,
    }


def error_rows(
    config: RunConfig, planned: PlannedImage, status: str, error: BaseException, shared: Row | None = None
) -> list[Row]:
    """One row for each variant of an image that could not be colorized."""
    what = {
        "status": status,
        "error_class": type(error).__name__,
        "error_message": str(error)[:2000],
        "finished_at": datetime.now(UTC),
    }
    return [base_row(config, planned, i) | (shared or {}) | what for i in range(len(planned.attempts))]
