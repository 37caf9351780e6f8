"""docs/results.md is what benchmarks/results/ gives, and the check notices when it is not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def check(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.report", "--check", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_committed_page_is_what_the_results_give():
    done = check()
    assert done.returncode == 0, done.stderr


def test_another_figure_is_another_page(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    drift = json.loads((results / "drift.json").read_text())
    drift["drift"]["figures"]["wrong_at_borders"]["unet"] += 0.1
    (results / "drift.json").write_text(json.dumps(drift))
    done = check("--results", str(results))
    assert done.returncode == 1
    assert "run `make docs`" in done.stderr


def test_every_result_is_read():
    template = (ROOT / "benchmarks" / "results.md.jinja").read_text()
    for path in RESULTS.glob("*.json"):
        assert path.stem.startswith("study-") or path.stem in template, path.name  # studies are read by their prefix


def test_the_index_names_every_script_and_every_result():
    index = (ROOT / "benchmarks" / "README.md").read_text()
    for path in (*RESULTS.glob("*.json"), *(ROOT / "benchmarks").glob("*.py")):
        assert path.stem in index, path.name
