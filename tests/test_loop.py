"""The curator's whole loop on real parts: run, look, approve, hand on, ask for other colours, look again."""

import hashlib
import json
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import bagit
import fsspec
import pytest
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from support.browser import pages, wait_for
from support.pictures import gray_picture
from support.runs import ROOT
from tasks.layout import EXPORT_TABLE
from tasks.manifest import query
from tasks.storage import Store

ASKED = "a white vase on a red table"
NOTE = 'for the catalogue, "as is"'


@dataclass(frozen=True)
class Place:
    """Where an archive and its output are. page: the report's address in a browser, origin: how requests begin."""

    archive: str
    model: str
    output: str
    page: str
    origin: str

    def run(self, *words: object, code: int = 0) -> str:
        """stderr of `diffcolor run` or `recolor` with few steps, in a process of its own."""
        command = [sys.executable, "-m", "support.driver", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stderr


@pytest.fixture
def place(s3_environment, small_archive, tiny_folder) -> Place:
    """A real S3 server whose objects a browser may read. Of a disk: tests/flows/test_documents.py."""
    Image.fromarray(gray_picture(seed=9)).save(small_archive / "without a caption.png")
    server, bucket = fsspec.filesystem("s3"), f"loop-{uuid.uuid4().hex}"
    server.mkdir(bucket)
    reading = {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
    server.call_s3("put_bucket_policy", Bucket=bucket, Policy=json.dumps({"Statement": [reading]}))
    server.put(f"{small_archive}/", f"{bucket}/scans/", recursive=True)
    origin = f"{s3_environment['AWS_ENDPOINT_URL']}/{bucket}/"
    page = f"{origin}out/report/index.html"
    return Place(f"s3://{bucket}/scans", str(tiny_folder), f"s3://{bucket}/out", page, origin)


@pytest.fixture
def open_report(chrome, place):
    """Opens a view of the report."""
    with pages(chrome, place.origin) as open_address:
        yield lambda view: open_address(f"{place.page}#view={view}")


def told(*words: object) -> str:
    """What another command prints."""
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.output


def show(page, place: Place, key: str) -> None:
    """Open the page of one picture."""
    page.goto(f"{place.page}#view=picture&image={quote(key)}")
    wait_for(page, f"document.getElementById('picture-title').textContent === {json.dumps(key)}")


def saved(page, button: str, folder: Path) -> Path:
    """The file that the page saves under "Choices"."""
    page.get_by_role("link", name="Choices").click()
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return file


@pytest.mark.timeout(1800)
def test_run_look_approve_hand_on_ask_again_and_look(place, open_report, tmp_path):
    # 1. a run writes its report
    place.run("run", place.archive, place.output, "--model", place.model, code=3)  # the archive's broken file
    output = Store(place.output)
    page = open_report("gallery")
    wait_for(page, "document.getElementById('num-found').textContent === '6 of 6 results'")

    # 2. approve two pictures and reject one in the browser
    for key, prompt, choice in (
        ("scan 0.png", "a red ball on a green table", "Approve"),
        ("scan 0.png", "a blue ball on a green table", "Reject"),
        ("scan 1.png", "a yellow box on a blue table", "Approve"),
    ):
        show(page, place, key)
        variant = page.locator("#variants li", has_text=prompt.split()[1])
        variant.get_by_role("button", name=choice).click()
        if prompt.startswith("a red"):
            variant.get_by_label("Note").fill(NOTE)
            variant.get_by_label("Note").press("Tab")
    page.get_by_role("link", name="Choices").click()
    page.get_by_label("Who chooses").fill("Ada")
    choices = saved(page, "Save choices", tmp_path)

    # 3. the choices come into the manifest, and once only
    assert "3 choices applied, 0 were there before" in told("approve", place.output, choices)
    assert "0 choices applied, 3 were there before" in told("approve", place.output, choices)
    columns = "target_prompt, choice, choice_note, choice_by, output_sha256"
    rows = query(output, f"select {columns} from results where status = 'ok'").fetchall()
    assert {target: rest for target, *rest, _ in rows} == {
        "a red ball on a green table": ["approved", NOTE, "Ada"],
        "a blue ball on a green table": ["rejected", "", "Ada"],
        "a yellow box on a blue table": ["approved", "", "Ada"],
        None: [None, None, None],
    }
    approved = {sha256 for _, choice, *_, sha256 in rows if choice == "approved"}

    # 4. the approved ones, and nothing else, are handed on
    told("export", place.output, tmp_path / "bag", "--approved", "--bag")
    bag = bagit.Bag(str(tmp_path / "bag"))
    bag.validate()
    handed_on = {name: Path(bag.path, name).read_bytes() for name in bag.payload_entries()}
    assert sorted(handed_on) == sorted(["data/scan 0.png", "data/scan 1.png", f"data/{EXPORT_TABLE}"])
    del handed_on[f"data/{EXPORT_TABLE}"]
    assert {hashlib.sha256(data).hexdigest() for data in handed_on.values()} == approved

    # 5. ask for other colours in the page, for one picture and for several; `recolor` takes the file as it is
    show(page, place, "scan 2.png")
    page.locator("#ask-one").get_by_label("Prompt").fill(ASKED)
    page.get_by_role("button", name="Ask for these colours").click()
    page.get_by_role("link", name="Gallery", exact=True).click()
    page.get_by_label("Search").fill("without a caption")
    wait_for(page, "document.getElementById('num-found').textContent === '1 of 6 results'")
    page.get_by_role("button", name="Select all of these").click()
    page.get_by_label("Other colours for all of them").fill(ASKED)
    page.locator("#ask-many").get_by_role("button", name="Ask for these colours").click()
    catalog = saved(page, "Save recolor catalog", tmp_path)
    said = place.run("recolor", place.output, "--catalog", catalog)
    assert "to look at: " in said
    sql = (
        f"select image_key, status, fit_reused, context_is_generic, choice from results where target_prompt = '{ASKED}'"
    )
    assert query(output, f"{sql} order by image_key").fetchall() == [
        ("scan 2.png", "ok", True, False, None),
        ("without a caption.png", "ok", True, True, None),
    ]
    assert query(output, "select count(*) from results where choice is not null").fetchall() == [(3,)]

    # 6. the report of that run shows it, and somebody else sees what was decided
    page = open_report("gallery&choice=approved")
    wait_for(page, "document.getElementById('num-found').textContent === '2 of 8 results'")
    show(page, place, "scan 2.png")
    page.locator("#variants li", has_text="white").get_by_role("link").click()
    wait_for(page, "document.querySelector('#variants .current').textContent.includes('white')")
    page.wait_for_load_state("networkidle")
    shown = page.evaluate("[...document.querySelectorAll('.frame img')].map(i => [i.alt, i.naturalWidth])")
    assert shown == [[ASKED, 56], ["scan", 56]]
    assert page.locator("#facts dl", has_text="fit").get_by_text("reused").count() == 1
    show(page, place, "scan 0.png")
    assert "in the manifest by Ada" in page.locator("#variants li", has_text="red").text_content()
