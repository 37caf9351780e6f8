"""`run --dry-run` as a command: what it prints, and that no store sees a write."""

import json
import os
import random
import subprocess
import sys

import fsspec
import pytest
from typer.testing import CliRunner

from flows.cli import app
from support.pictures import make_archive
from support.proxy import faulty_proxy
from support.runs import ROOT
from tasks.storage import Store

READS = {"GET", "HEAD"}


def dry_run(archive, output, *options, environment=None):
    """What `diffcolor run --dry-run` prints in a pipe, in a process of its own."""
    command = [sys.executable, "-m", "support.driver", "run", str(archive), str(output), "--dry-run", *options]
    variables = os.environ | (environment or {})
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_dry_run_prints_json_and_makes_no_output(tmp_path, tiny_folder):
    archive = make_archive(tmp_path / "scans", 2)
    before = sorted(tmp_path.rglob("*"))
    told = dry_run(archive, tmp_path / "out", "--model", tiny_folder, "--seconds-per-image", "1800", "--device", "cpu")
    assert (told["images_new"], told["images_unusable"], told["variants_to_do"]) == (3, 1, 4)
    assert told["seconds"] == 3600
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.timeout(900)
def test_a_store_sees_no_write(tmp_path, tiny_folder, s3_environment, s3_url):
    """Scans and output on a real S3 server, behind a proxy that counts calls by method. With a trial."""
    archive, output = make_archive(tmp_path / "scans", 3), f"{s3_url}/out"
    store = fsspec.filesystem("s3")
    store.put(f"{archive}/", f"{s3_url}/scans/", recursive=True)
    with faulty_proxy(s3_environment["AWS_ENDPOINT_URL"], (), 0.0, random.Random(0)) as proxy:
        behind = {"AWS_ENDPOINT_URL": proxy.url}
        told = dry_run(f"{s3_url}/scans", output, "--model", tiny_folder, "--probe", environment=behind)
        assert told["seconds_from"] == "a trial of 3 images"
        assert proxy.calls["GET"] > 0
        assert set(proxy.calls) <= READS, proxy.calls
    assert not Store(output).exists()


def test_flags_of_a_dry_run_go_with_it():
    result = CliRunner().invoke(app, ["run", "in", "out", "--probe"])
    assert result.exit_code == 2
    assert "go with --dry-run" in result.output
