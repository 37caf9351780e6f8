"""docs/results.md is what benchmarks/results/ gives, and the check notices when it is not."""

import json
import shutil
from pathlib import Path

import pytest
import typer

from benchmarks.report import main

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_committed_page_is_what_the_results_give(monkeypatch):
    monkeypatch.chdir(ROOT)
    main(check=True)


def test_another_figure_is_another_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    drift = json.loads((results / "drift.json").read_text())
    drift["drift"]["figures"]["wrong_at_borders"]["unet"] += 0.1
    (results / "drift.json").write_text(json.dumps(drift))
    with pytest.raises(typer.Exit) as exit:
        main(check=True, results=results)
    assert exit.value.exit_code == 1
    assert "run `make docs`" in capsys.readouterr().err


def test_every_result_is_read():
    template = (ROOT / "benchmarks" / "results.md.jinja").read_text()
    for path in RESULTS.glob("*.json"):
        assert path.stem.startswith("study-") or path.stem in template, path.name  # studies are read by their prefix


def test_the_index_names_every_script_and_every_result():
    index = (ROOT / "benchmarks" / "README.md").read_text()
    for path in (*RESULTS.glob("*.json"), *(ROOT / "benchmarks").glob("*.py")):
        assert path.stem in index, path.name
