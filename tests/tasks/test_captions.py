import csv
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffcolor_core.errors import ModelError
from diffcolor_core.model_files import identify
from tasks import captions
from tasks.archive import read_catalog
from tasks.captioner import Captioner
from tasks.captions import caption_archive
from tasks.errors import CatalogError
from tasks.storage import Store
from tests.conftest import ON_S3_TOO

CHURCH, BOAT = "a church on a hill", "a boat on a river"


def encoded(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((20, 30), value, np.uint8)).save(file, "png")
    return file.getvalue()


def table(path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8"), newline="")))


def fill(store: Store, num_images: int = 2) -> None:
    """Dark and light scans in turn."""
    for number in range(num_images):
        store.write(f"box 1/{number}.png", encoded(230 if number % 2 else 30))


@pytest.fixture
def archive(tmp_path) -> Store:
    store = Store(str(tmp_path / "scans"))
    fill(store)
    return store


@pytest.fixture
def author(tiny_blip) -> str:
    return "model {}@{}".format(*identify(str(tiny_blip)))


def test_captions_of_a_model_of_the_archive_and_of_a_person(archive, tiny_blip, author, tmp_path):
    archive.write("broken.jpg", b"\xff\xd8\xff\xe0 not a picture")
    archive.write("known, ü.png", encoded(30))
    archive.write("out/runs/000001.json", b"{}")
    archive.write("out/images/colored.png", encoded(30))  # of a run: no scan
    archive.write(
        "catalog.csv",
        (
            "image,context_prompt,target_prompt,rights\n"
            '"known, ü.png",a mill,a red mill,"mine, all"\n'
            "box 1/0.png,,a white church,\n"
            "gone.png,,,yours\n"
        ).encode(),
    )
    out = str(tmp_path / "catalog.csv")
    options = {"model": str(tiny_blip), "batch_size": 2}
    assert caption_archive(archive.url, out, **options) == {"captioned": 2, "before": 1, "failed": 2}
    empty = {"context_prompt": "", "target_prompt": "", "rights": "", "caption_source": ""}
    empty |= {"caption_proposed": "", "caption_error": ""}
    rows = table(out)
    why = {row["image"]: row.pop("caption_error") for row in rows}
    assert why.pop("broken.jpg").startswith("UnreadableImageError: ")
    assert why.pop("gone.png").startswith("FileNotFoundError: ")
    assert set(why.values()) == {""}
    empty.pop("caption_error")
    proposed = {"caption_source": author}
    known = {"context_prompt": "a mill", "target_prompt": "a red mill", "rights": "mine, all"}
    assert rows == [
        empty | known | {"image": "known, ü.png", "caption_source": "archive"},
        empty
        | proposed
        | {"image": "box 1/0.png", "context_prompt": CHURCH, "target_prompt": "a white church"}
        | {"caption_proposed": CHURCH},
        empty | {"image": "gone.png", "rights": "yours"},
        empty | proposed | {"image": "box 1/1.png", "context_prompt": BOAT, "caption_proposed": BOAT},
        empty | {"image": "broken.jpg"},
    ]

    # a person corrects one, empties another, fills a third in; the archive grows, one image is mended
    text = Path(out).read_text()
    text = text.replace(f"box 1/0.png,{CHURCH},", 'box 1/0.png,"a chapel, on a hill",')
    text = text.replace(f"box 1/1.png,{BOAT},", "box 1/1.png,,").replace("gone.png,,", "gone.png,a gate,")
    Path(out).write_text(text)
    archive.write("new.png", encoded(230))
    archive.write("broken.jpg", encoded(30))
    assert caption_archive(archive.url, out, **options) == {"captioned": 2, "before": 4}
    rows = table(out)
    told = [(r["image"], r["context_prompt"], r["caption_source"], r["caption_proposed"], r["rights"]) for r in rows]
    assert told == [
        ("known, ü.png", "a mill", "archive", "", "mine, all"),
        ("box 1/0.png", "a chapel, on a hill", "person", CHURCH, ""),
        ("gone.png", "a gate", "person", "", "yours"),
        ("box 1/1.png", "", "person", BOAT, ""),
        ("broken.jpg", CHURCH, author, CHURCH, ""),
        ("new.png", BOAT, author, BOAT, ""),
    ]
    assert not any(row["caption_error"] for row in rows)

    # now there is nothing left to do: the file stays as it is, and no model is needed
    before = Path(out).read_bytes()
    assert caption_archive(archive.url, out, model="no/model") == {"before": 6}
    assert Path(out).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["catalog.csv", "scans"]


def test_the_archives_own_catalog_may_be_filled_in_place(archive, tiny_blip, author):
    archive.write("catalog.csv", b"image,context_prompt,shelf\nbox 1/0.png,a mill,A 7\nbox 1/1.png,,A 8\n")
    out = f"{archive.root}/catalog.csv"
    assert caption_archive(archive.url, out, model=str(tiny_blip)) == {"captioned": 1, "before": 1}
    assert caption_archive(archive.url, out, model=str(tiny_blip)) == {"before": 2}
    told = [(r["image"], r["context_prompt"], r["caption_source"], r["shelf"]) for r in table(out)]
    assert told == [("box 1/0.png", "a mill", "archive", "A 7"), ("box 1/1.png", BOAT, author, "A 8")]


def test_columns_that_are_no_text_are_kept_as_json(archive, tiny_blip, tmp_path):
    catalog = tmp_path / "known.jsonl"
    catalog.write_text(json.dumps({"image": "box 1/0.png", "year": 1910, "tags": ["ü", 2]}) + "\n")
    out = str(tmp_path / "out.csv")
    caption_archive(archive.url, out, model=str(tiny_blip), catalog=str(catalog))
    assert [(row["year"], row["tags"]) for row in table(out)] == [("1910", '["ü", 2]'), ("", "")]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("is_killed", [False, True])
def test_an_interruption_loses_at_most_one_batch(archive, tiny_blip, tmp_path, monkeypatch, is_killed):
    """A killed process cannot write the catalog any more; what it had saved is in the next one."""
    fill(archive, 7)
    out = str(tmp_path / "catalog.csv")
    seen = []
    describe, write = Captioner.captions, captions._write

    def stop_at_the_third_batch(captioner, pictures):
        if len(seen) == 4:
            raise StoppedError
        seen.extend(pictures)
        return describe(captioner, pictures)

    monkeypatch.setattr(Captioner, "captions", stop_at_the_third_batch)
    if is_killed:
        monkeypatch.setattr(captions, "_write", lambda *_: None)
    with pytest.raises(StoppedError):
        caption_archive(archive.url, out, model=str(tiny_blip), batch_size=2)
    assert os.path.exists(out) is not is_killed
    if not is_killed:
        assert [bool(row["context_prompt"]) for row in table(out)] == [True] * 4 + [False] * 3

    monkeypatch.setattr(captions, "_write", write)
    monkeypatch.setattr(Captioner, "captions", lambda self, some: seen.extend(some) or describe(self, some))
    calls = []
    caption_archive(archive.url, out, model=str(tiny_blip), batch_size=2, progress=lambda *done: calls.append(done[1:]))
    assert calls == [(2, 3), (3, 3)]
    assert len(seen) == 7, "what is captioned is not captioned again"
    assert [row["context_prompt"] for row in table(out)] == [CHURCH, BOAT] * 3 + [CHURCH]
    assert sorted(os.listdir(tmp_path)) == ["catalog.csv", "scans"]


def test_archives_in_zip_and_tar_files(archive, tiny_blip, tmp_path):
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as packed, tarfile.open(tmp_path / "scans.tar", "w") as tar:
        for key, _ in archive.list():
            packed.write(f"{archive.root}/{key}", f"recto/{key}")
            tar.add(f"{archive.root}/{key}", key)
    for url in (f"zip://recto::{tmp_path}/scans.zip", f"tar://::{tmp_path}/scans.tar"):
        out = str(tmp_path / f"{url[:3]}.csv")
        assert caption_archive(url, out, model=str(tiny_blip), batch_size=1) == {"captioned": 2}
        assert [(row["image"], row["context_prompt"]) for row in table(out)] == [
            ("box 1/0.png", CHURCH),
            ("box 1/1.png", BOAT),
        ]


@ON_S3_TOO
def test_archive_and_catalog_on_any_store(store, tiny_blip):
    scans, out = Store(f"{store.url}/scans"), f"{store.url}/words/catalog.csv"
    fill(scans)
    assert caption_archive(scans.url, out, model=str(tiny_blip)) == {"captioned": 2}
    assert caption_archive(scans.url, out, model="no/model") == {"before": 2}
    assert [row.context_prompt for row in read_catalog(scans, out)] == [CHURCH, BOAT]
    assert [key for key, _ in store.list("words")] == ["words/catalog.csv"]


def test_a_limit_is_of_the_archive_and_not_of_what_is_left(archive, tiny_blip, tmp_path):
    fill(archive, 5)
    out = str(tmp_path / "catalog.csv")
    assert caption_archive(archive.url, out, model=str(tiny_blip), limit=2) == {"captioned": 2}
    assert caption_archive(archive.url, out, model=str(tiny_blip), limit=3) == {"captioned": 1, "before": 2}
    assert [bool(row["context_prompt"]) for row in table(out)] == [True] * 3 + [False] * 2


def test_a_name_that_no_catalog_can_hold_is_left_out_aloud(archive, tiny_blip, tmp_path, caplog):
    archive.write(" spaced.png", encoded(30))
    out = str(tmp_path / "catalog.csv")
    assert caption_archive(archive.url, out, model=str(tiny_blip)) == {"captioned": 2}
    assert "' spaced.png' begins or ends with a space" in caplog.text


def test_wrong_arguments_write_nothing(archive, tiny_folder, tmp_path):
    for arguments, kind, message in (
        ((archive.url, "catalog.jsonl"), CatalogError, "a name ending in .csv"),
        ((f"{archive.url}/none", "catalog.csv"), ValueError, "there is no archive"),
        ((archive.url, "catalog.csv"), ModelError, "cannot load"),
    ):
        with pytest.raises(kind, match=message):
            caption_archive(arguments[0], str(tmp_path / arguments[1]), model=str(tiny_folder))
    assert os.listdir(tmp_path) == ["scans"]


def test_an_edit_during_the_captioning_is_kept(archive, tiny_blip, tmp_path, monkeypatch):
    out = tmp_path / "catalog.csv"
    describe = Captioner.captions

    def edit_meanwhile(self, pictures):
        out.write_text("image,context_prompt\nbox 1/0.png,a chapel\n")
        return describe(self, pictures)

    monkeypatch.setattr(Captioner, "captions", edit_meanwhile)
    caption_archive(archive.url, str(out), model=str(tiny_blip))
    assert {row["image"]: row["context_prompt"] for row in table(out)} == {
        "box 1/0.png": "a chapel",
        "box 1/1.png": BOAT,
    }
