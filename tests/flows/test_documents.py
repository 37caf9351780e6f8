"""Every command of docs/curators.md and docs/operate.md, run as it stands there."""

import json
import re
import shlex
from pathlib import Path

import bagit
import pytest
from typer.testing import CliRunner

from flows.cli import app
from tasks.manifest import query
from tasks.storage import Store

DOCS = Path(__file__).parents[2] / "docs"


def commands(name: str) -> list[list[str]]:
    """The command lines of a document's examples, without `diffcolor`."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line.strip()]
    found = [shlex.split(line, comments=True) for line in lines]
    assert {words[0] for words in found} == {"diffcolor"}
    return [words[1:] for words in found]


def give(*words: object) -> str:
    """stdout of a command that ends with 0, or with 3 where the archive's broken file is told."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code in (0, 3), (words, result.output)
    return result.stdout


@pytest.fixture
def demo(small_archive, tiny_folder, tmp_path, monkeypatch):
    """A working folder in which `examples/archive` and `out/demo` are the tests' own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFCOLOR_MODEL", str(tiny_folder))
    (tmp_path / "examples").mkdir()
    archive = small_archive.rename(tmp_path / "examples" / "archive")
    (archive / "scan 0.png").rename(archive / "01-ball-and-bottle.png")  # as in the repository's
    catalog = archive / "catalog.csv"
    catalog.write_text(catalog.read_text().replace("scan 0.png", "01-ball-and-bottle.png"))
    return Store("out/demo")


@pytest.mark.usefixtures("without_actors")
def test_the_curators_commands(demo, tmp_path):
    give("run", "examples/archive", "out/demo")
    rows = query(
        demo, "select image_key, variant, output_sha256 from results where status = 'ok' order by all"
    ).fetchall()
    choices = [
        {"image": image, "variant": variant, "sha256": sha256, "choice": "approved", "note": "fine"}
        for image, variant, sha256 in rows[:3]
    ]
    choices[1]["choice"] = "rejected"
    record = {"schema": 1, "who": "Ada", "saved": "2026-11-25T12:00:00Z", "choices": choices}
    (tmp_path / "choices.json").write_text(json.dumps(record))
    (tmp_path / "recolor.csv").write_text("image,target_prompt\nscan 2.png,a white vase on a red table\n")
    said = {" ".join(words): give(*words) for words in commands("curators.md")}
    assert said["report out/demo"].strip() == demo.uri("report/index.html")
    assert (tmp_path / "sheet.png").exists()
    assert (tmp_path / "compare.png").exists()
    assert query(demo, "select image_key from results where fit_reused").fetchall() == [("scan 2.png",)]
    asked = [
        json.loads(line) for line in next(text for words, text in said.items() if "choice_note" in words).splitlines()
    ]
    assert [line["choice"] for line in asked] == ["approved", "rejected", "approved"]
    assert len(list((tmp_path / "handover").rglob("*.png"))) == 2
    assert len(list((tmp_path / "for-the-web").rglob("*.jpg"))) == 2
    assert (tmp_path / "reds" / "diffcolor-export.csv").exists()
    bag = bagit.Bag(str(tmp_path / "accession-2026-17"))
    bag.validate()
    assert len(bag.payload_entries()) == 3


@pytest.mark.usefixtures("without_actors")
def test_the_operators_commands(demo):
    """One after the other on an empty output: first without measurements, at last with all done."""
    told = [give(*words) for words in commands("operate.md")]
    first, probed, given = (json.loads(text) for text in told[:3])
    assert (first["images_new"], first["images_unusable"], first["seconds"]) == (4, 1, None)
    assert probed["seconds"] > 0
    assert (given["gpu_hours"], given["cost"]) == (3 * 420 / 3600, 3 * 420 / 3600 * 2.5)
    assert query(demo, "select count(*) from results where status = 'ok'").fetchall() == [(4,)]
    assert json.loads(give("run", "examples/archive", "out/demo", "--dry-run"))["variants_done"] == {
        "ok": 4,
        "quarantined": 1,
    }
