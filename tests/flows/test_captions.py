import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffcolor_core.model_files import identify
from flows.cli import app
from flows.colorize_archive import colorize_archive
from tasks.manifest import query
from tasks.storage import Store
from tasks.verify import verify

CHURCH, BOAT = "a church on a hill", "a boat on a river"


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, value in (("dark.png", 30), ("light.png", 230)):
        Image.fromarray(np.full((20, 30), value, np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    (folder / "catalog.csv").write_text("image,context_prompt,target_prompt,shelf\nlight.png,,a red boat,A 7\n")
    return folder


@pytest.fixture
def author(tiny_blip) -> str:
    return "model {}@{}".format(*identify(str(tiny_blip)))


def colored(output: Path) -> set[tuple]:
    sql = "select image_key, context_prompt, target_prompt, catalog_columns from results where status = 'ok'"
    return {
        (*prompts, json.loads(more)["caption_source"]) for *prompts, more in query(Store(str(output)), sql).fetchall()
    }


@pytest.mark.usefixtures("without_actors")
def test_a_model_proposes_a_person_corrects_and_a_run_takes_it(archive, tiny_blip, author, tmp_path):
    def command(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert result.exit_code == code, result.output
        return result.output

    catalog, output = tmp_path / "catalog.csv", tmp_path / "out"
    caption = ("caption", archive, "--out", catalog, "--model", tiny_blip, "--device", "cpu")
    assert "2 captioned, 0 had been before, 1 without a caption" in command(*caption, code=3)
    catalog.write_text(catalog.read_text().replace(f"dark.png,{CHURCH}", "dark.png,a stone church on a hill"))
    assert "0 captioned, 2 had been before, 1 without a caption" in command(*caption, code=3)
    with catalog.open() as file:
        told = {
            row["image"]: (row["context_prompt"], row["caption_source"], row["shelf"]) for row in csv.DictReader(file)
        }
    assert told == {
        "light.png": (BOAT, author, "A 7"),
        "broken.jpg": ("", "", ""),
        "dark.png": ("a stone church on a hill", "person", ""),
    }
    assert "1 quarantined" in command("run", archive, output, "--catalog", catalog, "--model", "demo", code=3)
    assert colored(output) == {
        ("dark.png", "a stone church on a hill", None, "person"),
        ("light.png", BOAT, "a red boat", author),
    }
    assert "no model 'nonsense'" in command(*caption[:-3], "nonsense", code=2)
    assert "no model 'nonsense'" in command("run", archive, output, "--caption", "nonsense", code=2)


@pytest.mark.usefixtures("without_actors")
def test_a_run_captions_what_nobody_has_and_keeps_what_a_person_corrects(archive, tiny_blip, author, tmp_path):
    output = tmp_path / "out"
    arguments = {"archive": str(archive), "output": str(output), "model": "demo", "caption": str(tiny_blip)}
    summary = colorize_archive(**arguments)
    assert summary == {"ok": 2, "quarantined": 1, "failed": 0, "done_before": 0}
    assert colored(output) == {("dark.png", CHURCH, None, author), ("light.png", BOAT, "a red boat", author)}
    assert colorize_archive(**arguments)["done_before"] == 3
    catalog = output / "catalog.csv"
    catalog.write_text(catalog.read_text().replace(f"dark.png,{CHURCH}", "dark.png,a chapel"))
    assert colorize_archive(**arguments)["done_before"] == 2
    assert ("dark.png", "a chapel", None, "person") in colored(output)
    assert list(verify(Store(str(output)))) == []
    assert not (output / "catalog.csv.captions").exists()
