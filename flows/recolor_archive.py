"""The flow `recolor-archive`: new colours for images that have been fitted before."""

from prefect import flow

from flows.colorize_archive import colorize
from flows.monitoring import name_of_run, notify_of_failure, watched
from tasks.options import RecolorOptions, flow_parameters
from tasks.runs import open_run


@flow(
    name="recolor-archive",
    flow_run_name=name_of_run,
    on_failure=[notify_of_failure],
    on_crashed=[notify_of_failure],
)
@flow_parameters(RecolorOptions)
def recolor_archive(options: RecolorOptions) -> dict[str, int]:
    """Add variants to an output from its kept fits; return how many of the asked ones there are by status.

    Archive, model, settings, seed and file formats are those of the output's last run. An image whose fit is not
    there any more is fitted first.
    """
    with open_run(options) as run, watched(run.config) as watch:
        return colorize(run, watch)
