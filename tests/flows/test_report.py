"""The report at the end of a run, and of a run that recolors."""

import csv

import pytest
from typer.testing import CliRunner

from flows.cli import app


@pytest.mark.usefixtures("without_actors")
def test_a_run_writes_its_report(small_archive, tiny_folder, tmp_path):
    """And `recolor` takes the catalog that the page makes; the report then shows the new colours."""
    out = tmp_path / "out"
    arguments = ["run", str(small_archive), str(out), "--model", str(tiny_folder)]
    result = CliRunner().invoke(app, [*arguments, "--no-report"])
    assert result.exit_code == 3, result.output
    assert not (out / "report").exists()
    catalog = tmp_path / "recolor.csv"
    with catalog.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows(
            [["image", "target_prompt", "context_prompt"], ["scan 0.png", "a white ball", "a ball on a table"]]
        )
    result = CliRunner().invoke(app, ["recolor", str(out), "--catalog", str(catalog)])
    assert result.exit_code == 0, result.output
    assert f"to look at: {out}/report/index.html" in result.output
    assert len(list((out / "report" / "thumbs").rglob("*.webp"))) == 3 + 3 + 4  # scans, primaries, results
    result = CliRunner().invoke(app, ["report", str(out), "--to", str(tmp_path / "shown")])
    assert result.exit_code == 0, result.output
    assert "4 images, 6 results; pictured 10 files" in result.output.replace("\n", " ")
