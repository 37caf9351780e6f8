"""What people see of a run in Prefect: its name, its artifacts, and the notifications that it sends.

All of them are a courtesy: if Prefect's server or a webhook does not answer, the log says so and the run goes on.
"""

import contextvars
import logging
import os
import re
import shlex
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prefect import get_run_logger, runtime
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import TerminationSignal
from prefect.logging.loggers import flow_run_logger
from prefect.utilities.urls import url_for

from tasks.layout import REPORT_PAGE
from tasks.progress import Logger, RunProgress, visible
from tasks.records import RunConfig
from tasks.storage import Store

UPDATE_SECONDS = 10.0
"""Time between two updates of the progress artifact and of the queue's metric."""
ENOUGH_IMAGES = 50
"""Before the end of a run its share of quarantined images counts only once so many are done."""
MAX_CHARACTERS = 300
"""Of a key or a message in an artifact or a notification."""


# ------------------------------------------------------------------ names


def name_of_run() -> str:
    """The flow run's name: what it is about, and the time."""
    return f"{_subject(runtime.flow_run.parameters)}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def _subject(parameters: Mapping[str, Any]) -> str:
    """The last part of the archive's address; of a recolor run, which names no archive, the output's."""
    address = without_secrets(parameters.get("archive") or parameters["output"])
    path = address if "://" in address else os.path.abspath(address)
    return shortened(path.rstrip("/").rpartition("/")[2], 60)


def without_secrets(address: str) -> str:
    """A path as it is; a URL, also each of a chained one, without user, password, query and fragment."""
    return "::".join(
        re.sub(r"://[^/]*@", "://", re.split("[?#]", part)[0]) if "://" in part else part
        for part in address.split("::")
    )


def shortened(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text in one line, without control characters, and not longer than `limit`."""
    text = visible(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# ------------------------------------------------------------------ artifacts


@dataclass
class Watched:
    """A run as its artifacts tell of it. progress: None until work begins; summary: None unless it has ended."""

    config: RunConfig
    progress: RunProgress | None = None
    summary: dict[str, int] | None = None
    told: bool = False
    """Whether a notification has told of quarantined images."""

    @contextmanager
    def showing(self, progress: RunProgress) -> Iterator[RunProgress]:
        """Keep a progress artifact and the queue's metric up to date, and tell of too many quarantined images."""
        self.progress = progress
        logger = get_run_logger()
        artifact: Any = None
        ended = threading.Event()

        def show() -> None:
            nonlocal artifact
            percent, words = 100 * progress.counts.total() / progress.num_images, progress.in_words()
            with _no_harm(logger, "the progress artifact could not be written"):
                if artifact is None:
                    artifact = create_progress_artifact(percent, key="diffcolor-progress", description=words)
                else:
                    update_progress_artifact(artifact, percent, words)

        def keep_up() -> None:
            shown = 0
            while not ended.wait(UPDATE_SECONDS):
                done = progress.counts.total()
                progress.metrics.queue(progress.num_images - done)
                if done > shown:
                    shown = done
                    show()
                if done >= ENOUGH_IMAGES:
                    self.tell_of_quarantined(logger)

        with progress:
            show()
            context = contextvars.copy_context()  # it holds the flow run and the address of Prefect's server
            thread = threading.Thread(target=context.run, args=(keep_up,), name="progress", daemon=True)
            thread.start()
            try:
                yield progress
            finally:
                ended.set()
                thread.join()
                show()

    def tell_of_quarantined(self, logger: Logger) -> None:
        """Notify, once, if the share of quarantined images is above the limit."""
        options, progress = self.config.options, self.progress
        if options.notify is None or progress is None or self.told:
            return
        num_quarantined, num_done = progress.counts["quarantined"], progress.counts.total()
        if not num_done or num_quarantined / num_done <= options.notify_quarantined:
            return
        self.told = True
        errors = ", ".join(f"{count} {name}" for name, count in progress.most_frequent_errors())
        subject = f"diffcolor: many images quarantined: {shortened(runtime.flow_run.name)}"
        body = (
            f"{num_quarantined} of {num_done} images were quarantined, of {progress.num_images} that this run has to "
            f"do ({errors}). The limit is {options.notify_quarantined:.0%} (notify_quarantined)."
        )
        _notify(options.notify, subject, f"{body} {_place(runtime.flow_run.id)}", logger)


@contextmanager
def watched(config: RunConfig) -> Iterator[Watched]:
    """A run whose artifacts are written when the context ends, however it ends.

    Raises ValueError if the run's notification block is not there.
    """
    if config.options.notify is not None:
        _load(config.options.notify)
    run = Watched(config)
    state = "finished"
    try:
        yield run
        if run.summary is not None and (run.summary["quarantined"] or run.summary["failed"]):
            state = "finished, with quarantined or failed images"
    except Exception as error:
        state = f"failed: {type(error).__name__}: {error}"
        raise
    except BaseException:
        state = "stopped; finished images are committed"
        raise
    finally:
        logger = get_run_logger()
        run.tell_of_quarantined(logger)
        with _no_harm(logger, "no table of quarantined images"):
            _list_quarantined(run)
        with _no_harm(logger, "no summary artifact"):
            create_markdown_artifact(_summary(run, state), key="diffcolor-summary")


def _list_quarantined(run: Watched) -> None:
    """A table of this run's quarantined images; none if there are none."""
    if run.progress is None or not run.progress.quarantined:
        return
    rows = [
        {"image": _as_code_span(shortened(key)), "error": error, "reason": _as_code_span(shortened(message))}
        for key, error, message in run.progress.quarantined
    ]
    num_more = run.progress.counts["quarantined"] - len(rows)
    first = f"These are the first {len(rows)}, and there are **{num_more:,} more**. " if num_more else ""
    sql = "select * from results where status = 'quarantined' and run_id = '{}'"
    sql = visible(sql.format(run.config.run_id.replace("'", "''")))
    quoted = shlex.quote(sql) if re.search(r'["$`\\!]', sql) else f'"{sql}"'
    create_table_artifact(
        rows,
        key="diffcolor-quarantined",
        description=f"Images that this run has quarantined. {first}This lists all with all columns:\n\n"
        + _as_code(f"diffcolor query {_output_quoted(run)} {quoted}"),
    )


def _summary(run: Watched, state: str) -> str:
    """Markdown, bounded in size. Names and messages stand in a block of code, where nothing is markup."""
    options, progress, summary = run.config.options, run.progress, run.summary
    output = Store(options.output)
    facts = {
        "run": run.config.run_id,
        "state": state,
        "archive": without_secrets(options.archive),
        "output": without_secrets(options.output),
    }
    if progress is not None:
        facts["images"] = progress.in_words()
    if output.has(REPORT_PAGE):
        facts["report"] = without_secrets(output.uri(REPORT_PAGE))
    lines = [_as_code(*(f"{name + ':':9}{shortened(value, 1000)}" for name, value in facts.items()))]
    if summary is not None:
        lines += ["", "| variants | |", "|---|---:|"]
        lines += [f"| {name.replace('_', ' ')} | {count:,} |" for name, count in summary.items()]
    if progress is not None and (errors := progress.most_frequent_errors()):
        lines += ["", "| images that are not ok, by error | |", "|---|---:|"]
        lines += [f"| `{name}` | {count:,} |" for name, count in errors]
    lines += ["", "More:", "", _as_code(f"diffcolor status {_output_quoted(run)}")]
    return "\n".join(lines)


def _as_code_span(text: str) -> str:
    """Code within a line: Prefect reads the cells of a table as Markdown, also the links and pictures in them."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _as_code(*lines: str) -> str:
    """A block of code. No line may begin with a fence, so each begins with a word of ours."""
    return "\n".join(("```text", *lines, "```"))


def _output_quoted(run: Watched) -> str:
    """The output's address for a shell."""
    return shlex.quote(visible(without_secrets(run.config.options.output)))


@contextmanager
def _no_harm(logger: Logger, what: str) -> Iterator[None]:
    """Log an error as a warning that begins with `what`; the run goes on."""
    try:
        yield
    except Exception as error:
        logger.warning("%s (%s)", what, type(error).__name__)


# ------------------------------------------------------------------ notifications


def notify_of_failure(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """A hook for failed and crashed flow runs. A run that was stopped by a signal has not failed.

    Prefect calls it in the flow's process or, if that was killed, in its worker.
    """
    options = flow_run.parameters.get("options")  # as JSON; in a run that is refused it may be anything
    block = options.get("notify") if isinstance(options, dict) else None
    if block is None or isinstance(state.data, KeyboardInterrupt | SystemExit | TerminationSignal):
        return
    # In the worker flow_run has the name that it had before it began.
    subject = f"diffcolor: {flow.name} {(state.name or 'failed').lower()}: {_subject(flow_run.parameters)}"
    body = f"{shortened(state.message or '')} {_place(flow_run.id)}"
    _notify(block, subject, body, flow_run_logger(flow_run, flow))


def _notify(block: str, subject: str, body: str, logger: Logger) -> None:
    """Send a notification. What goes wrong is logged by its class alone: messages hold the webhook's address."""
    http = logging.getLogger("httpx")  # logs addresses from INFO on
    level = http.level
    http.setLevel(logging.WARNING)
    try:
        loaded = _load(block)
        with loaded.raise_on_failure():
            loaded.notify(body, subject)
    except Exception as error:
        logger.warning("the notification block %s could not be told (%s)", block, type(error).__name__)
    finally:
        http.setLevel(level)


def _load(block: str) -> Any:
    """The block TYPE/NAME of the Prefect server. Raises ValueError if it is not there, or cannot notify."""
    import prefect.blocks.notifications  # noqa: F401  the types of blocks that Prefect brings

    try:
        loaded: Any = Block.load(block)
    except ValueError as error:
        raise ValueError(f"notify: this Prefect server has no block {block!r}: create it there first") from error
    if not isinstance(loaded, NotificationBlock):
        raise ValueError(f"notify: block {block!r} cannot notify: give a notification block, e.g. slack-webhook/NAME")
    return loaded


def _place(flow_run_id: Any) -> str:
    """Where Prefect shows a flow run, if it has pages."""
    return url_for("flow-run", flow_run_id) or ""
