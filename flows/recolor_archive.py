"""The flow `recolor-archive`: new colours for images that have been fitted before."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.colorize_archive import AtLeastOne, colorize_archive
from tasks.errors import ManifestError
from tasks.lease import last_record
from tasks.storage import Store


@flow(name="recolor-archive")
def recolor_archive(
    output: str,
    catalog: str,
    num_actors: AtLeastOne = 1,
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0,
    ray_address: str | None = None,
    run_id: str | None = None,
) -> dict[str, int]:
    """Add variants to an output without fitting again; return how many of the asked ones there are by status.

    Archive, model, settings, seed and file formats are those of the output's last run. An image whose
    fit is not there any more is fitted first.

    Args:
        output: fsspec URL of the folder that colorize-archive wrote to.
        catalog: URL of the catalog: image, target_prompt and, optionally, context_prompt (else the image's last one).
        num_actors: Ray actors, one image in flight on each.
        gpus_per_actor: GPUs of each actor; 0 runs on the CPU.
        ray_address: Address of a Ray cluster; by default a local Ray for this run.
        run_id: Name of the run in the manifest; by default its start time.
    """
    record = last_record(Store(output))
    if record is None:
        raise ManifestError(f"no run has been recorded in {output!r}: colorize an archive into it first")
    same = ("archive", "output", "model", "preset", "seed", "image_format", "access_copy", "keep_fits", "overrides")
    return colorize_archive(
        **({key: record[key] for key in same if key in record} | {"output": output}),
        catalog=catalog,
        num_actors=num_actors,
        gpus_per_actor=gpus_per_actor,
        ray_address=ray_address,
        run_id=run_id,
        whole_archive=False,
    )
