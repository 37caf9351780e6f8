"""What Prometheus finds of runs, and what the dashboard shows of it."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

from prefect import flow
from prometheus_client.parser import text_string_to_metric_families

from flows import monitoring
from flows.colorize_archive import colorize_archive
from flows.monitoring import Watched
from support.s3_server import free_port
from support.waiting import wait_for
from tasks.manifest import query
from tasks.metrics import BOUNDARIES_SECONDS, EXPORTED, RunMetrics
from tasks.progress import RunProgress
from tasks.storage import Store
from tests.flows.test_monitoring import a_config

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "monitoring.md"


def scraped(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The samples of ours that Ray's agent serves: value by name and our own labels."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k in ("run", "status", "stage", "le"))): (
            sample.value
        )
        for family in families
        for sample in family.samples
        if "diffcolor" in sample.name
    }


def test_prometheus_finds_the_numbers_of_a_run(small_archive, tmp_path):
    import ray

    run_id = f"run {tmp_path.name}"
    colorize_archive(str(small_archive), str(tmp_path / "out"), model="demo", options={"run_id": run_id})
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def sample(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
        return name, frozenset({"run": run_id, **labels}.items())

    expected = {
        sample("ray_diffcolor_images_total", status="ok"): 3,
        sample("ray_diffcolor_images_total", status="quarantined"): 1,
        sample("ray_diffcolor_images_left"): 0,
        sample("ray_diffcolor_stage_seconds_count", stage="stage1"): 3,
        sample("ray_diffcolor_stage_seconds_count", stage="stage2"): 3,
        sample("ray_diffcolor_stage_seconds_count", stage="sampling"): 4,
        sample("ray_diffcolor_stage_seconds_bucket", stage="sampling", le="3600.0"): 4,
    }
    wait_for(lambda: expected.items() <= scraped(url).items(), seconds=60)  # Ray passes them on every 10 s
    rows = query(Store(str(tmp_path / "out")), "select sampling_seconds from results where status = 'ok'").fetchall()
    found = scraped(url)
    for boundary in BOUNDARIES_SECONDS:  # Ray counts by bucket, and takes the middle of each for the sum
        within = sum(seconds <= boundary for (seconds,) in rows)
        bucket = sample("ray_diffcolor_stage_seconds_bucket", stage="sampling", le=str(float(boundary)))
        assert found[bucket] == within, boundary
    assert {name for name, labels in found if ("run", run_id) in labels} == set(EXPORTED)


def test_the_queue_is_told_again_and_again(tmp_path, monkeypatch):
    """Ray forgets a gauge that is not set for 20 s, and an image may take longer."""
    monkeypatch.setattr(monitoring, "UPDATE_SECONDS", 0.05)
    set_again = threading.Event()
    metrics = RunMetrics("slow", 7)
    monkeypatch.setattr(metrics, "queue", lambda num_left: set_again.set() if num_left == 7 else None)

    @flow
    def slow() -> None:
        with Watched(a_config(tmp_path)).showing(RunProgress(7, logging.getLogger("nobody"), metrics)):
            assert set_again.wait(30)

    slow()


def test_a_local_run_serves_its_metrics_where_it_is_told_to(tmp_path):
    """`diffcolor run` in a process of its own, with a Ray of its own."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect")}
    (documented,) = re.findall(r"^diffcolor (run .* --metrics-port) 9404$", PAGE.read_text(), re.MULTILINE)
    arguments = documented.replace("out/demo", str(tmp_path / "out")).split()
    command = [Path(sys.executable).with_name("diffcolor"), *arguments, str(port), "--run-id", "mine"]
    log = tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)

    def is_served() -> bool:
        assert run.poll() is None, log.read_text()
        try:
            found = scraped(f"http://127.0.0.1:{port}/metrics")
        except OSError:  # not started yet
            return False
        return ("ray_diffcolor_images_left", frozenset({("run", "mine")})) in found

    try:
        wait_for(is_served, seconds=300)
    finally:
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(120) == 143


def test_the_dashboard_shows_what_is_exported():
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    (variable,) = [v for v in dashboard["templating"]["list"] if v["type"] == "query"]
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = set()
    for expression in [*expressions, variable["query"]]:
        metrics = set(re.findall(r"\b[a-z_]*diffcolor[a-z0-9_]*", expression))
        assert metrics, expression
        assert metrics <= set(EXPORTED), expression
        shown |= metrics
        labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", expression)) | {
            label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")
        }
        assert labels <= {"run", "status", "stage", "le"}, expression
    assert shown == set(EXPORTED)
    assert all(panel["title"] and panel["description"] for panel in dashboard["panels"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
