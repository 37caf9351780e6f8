"""What a webhook is told of runs, read back from the webhook."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows import monitoring
from flows.colorize_archive import colorize_archive
from flows.monitoring import watched
from support.waiting import wait_for
from support.webhook import listening
from tasks.metrics import RunMetrics
from tasks.options import RunOptions, flow_arguments
from tasks.progress import RunProgress
from tests.flows.test_monitoring import a_config, a_row, run_of

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"
SECRET = "T0PSECRET"  # in the webhook's address


@pytest.fixture
def webhook() -> Iterator[list[dict[str, Any]]]:
    """What is sent to the block `custom-webhook/people`, made as the page says."""
    with listening() as (url, received):
        (documented,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
        code = documented.replace("https://hooks.example.org", url).replace("the secret part", SECRET)
        exec(code.replace('save("people")', 'save("people", overwrite=True)'), {})
        yield received


NOTIFY = {"notify": "custom-webhook/people"}


def test_a_run_that_fails_is_told_of_once(webhook, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    options = RunOptions(archive=str(tmp_path / "nowhere"), output=str(tmp_path / "out"), **NOTIFY)
    with pytest.raises(FileNotFoundError):
        colorize_archive(**flow_arguments(options))
    (told,) = webhook
    assert told["path"] == f"/{SECRET}"
    assert told["subject"] == "diffcolor: colorize-archive failed: nowhere"
    assert "there is no archive at" in told["body"]
    assert SECRET not in caplog.text


def test_too_many_quarantined_images_are_told_of_once(webhook, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)

    @flow
    def short(limits: dict[str, float]) -> None:
        config = a_config(tmp_path, **NOTIFY, **limits)
        logger = logging.getLogger("nobody")
        with watched(config) as run, run.showing(RunProgress(4, logger, RunMetrics("short", 4))) as progress:
            progress.image_done([a_row(0, "quarantined")])
            for number in (1, 2, 3):
                progress.image_done([a_row(number, "ok") | {"sampling_seconds": 1.0, "fit_reused": True}])

    short({"notify_quarantined": 0.25})
    assert webhook == [], "one of four is not more than a quarter"
    state = short({}, return_state=True)
    (told,) = webhook
    assert told["subject"].startswith("diffcolor: many images quarantined: ")
    assert "1 of 4 images were quarantined, of 4 that this run has to do (1 UnreadableImageError)" in told["body"]
    assert "The limit is 10%" in told["body"]
    assert str(run_of(state)) in told["body"]
    assert SECRET not in caplog.text


def test_too_many_quarantined_images_are_told_of_while_the_run_goes_on(webhook, tmp_path, monkeypatch):
    monkeypatch.setattr(monitoring, "UPDATE_SECONDS", 0.1)
    config = a_config(tmp_path, **NOTIFY)

    @flow
    def long() -> None:
        logger = logging.getLogger("nobody")
        with watched(config) as run, run.showing(RunProgress(99, logger, RunMetrics("long", 99))) as progress:
            for number in range(monitoring.ENOUGH_IMAGES):
                progress.image_done([a_row(number, "quarantined")])
            wait_for(lambda: webhook, seconds=30)
            for number in range(49):
                progress.image_done([a_row(number, "quarantined")])

    long()
    (told,) = webhook
    assert "50 of 50 images were quarantined, of 99" in told["body"]


def test_a_run_that_is_stopped_has_not_failed(webhook, small_archive, tiny_folder, tmp_path, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.colorize_archive.hold_output", stop)
    with pytest.raises(KeyboardInterrupt):
        colorize_archive(str(small_archive), str(tmp_path / "out"), model=str(tiny_folder), options=NOTIFY)
    assert webhook == []


def test_a_webhook_that_refuses_does_no_harm_and_its_address_is_not_logged(webhook, caplog):
    caplog.set_level(logging.DEBUG)
    monitoring._notify("custom-webhook/people", "refused", "text", logging.getLogger("here"))
    assert len(webhook) == 1
    assert "custom-webhook/people could not be told (HTTPStatusError)" in caplog.text
    assert SECRET not in caplog.text
    assert "127.0.0.1" not in "".join(r.getMessage() for r in caplog.records if r.name.startswith(("httpx", "here")))


def test_a_block_that_is_not_there_is_told_before_the_run(small_archive, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="no block 'custom-webhook/nobody'"):
        colorize_archive(
            str(small_archive),
            str(tmp_path / "out"),
            model=str(tiny_folder),
            options={"notify": "custom-webhook/nobody"},
        )
    assert not (tmp_path / "out").exists()


def test_parameters_that_are_refused_are_told_of_too(webhook):
    with pytest.raises(Exception, match="num_actors"):
        colorize_archive("in", "out", options=NOTIFY | {"num_actors": 0})
    (told,) = webhook
    assert told["subject"] == "diffcolor: colorize-archive failed: in"
    with pytest.raises(Exception, match="options"):
        colorize_archive("in", "out", options="none")
    assert len(webhook) == 1


def test_an_address_is_no_block():
    with pytest.raises(ValueError, match="notify"):
        RunOptions(archive="in", output="out", notify="https://hooks.example/secret")
