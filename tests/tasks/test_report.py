"""The builder of the report: what it writes, what it uses again, and that no text becomes markup."""

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image, ImageColor

from support.outputs import CONTEXT, SCRIPT, TARGETS, make_output, ok_row
from tasks.compaction import compact
from tasks.errors import ManifestError, NoManifestError
from tasks.layout import is_record, key_of, report_thumbnail, report_view
from tasks.manifest import commit_part
from tasks.report import build, write_report
from tasks.report.overview import is_obeyed
from tasks.report.sheet import MAT, comparison, contact_sheet
from tasks.storage import Store, folder_of, joined
from tasks.verify import verify


@pytest.fixture
def archive(tmp_path) -> Path:
    return tmp_path / "scans"


def rows_of(report: Store, prefix: str = "report/"):
    """What the page's data files hold: (images of the gallery, their details), in the order of the page."""
    page = report.read(f"{prefix}index.html").decode()
    setting = json.loads(Setting.of(page))
    images, details = [], []
    for index, full, num_images in setting["files"]:
        for digest, rows in ((index, images), (full, details)):
            text = report.read(f"{prefix}data/{digest}.js").decode()
            start = f'diffcolor.receive("{digest}", '
            assert text.startswith(start)
            rows.extend(json.loads(text[len(start) : -len(");\n")]))
        assert len(images) == len(details)
        assert num_images <= 4 * build.IMAGES_PER_FILE
    return setting, images, details


class Setting(HTMLParser):
    """Finds the setting of a page, and every element and attribute that may run code."""

    def __init__(self):
        super().__init__()
        self.setting, self.scripts, self.handlers = None, [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.setting = attributes.get("data-setting", self.setting)
        self.handlers += [name for name in attributes if name.startswith("on") or name == "style"]
        if tag == "script":
            self.scripts.append(attributes.get("src"))

    @classmethod
    def of(cls, page):
        parser = cls()
        parser.feed(page)
        return parser.setting


def names(store: Store, folder: str) -> set[str]:
    return {key for key, _ in store.walk(folder)}


def test_a_report_shows_every_result_with_its_pictures(archive, store):
    rows = make_output(archive, store, ["a/1.png", "b & c.png"])
    quarantined = {"image_key": "z.png", "status": "quarantined", "error_class": "UnreadableImageError"}
    commit_part(store, "000001-000001-00001", [ok_row("z.png", 9, TARGETS[0]) | quarantined])
    done = write_report(store)
    assert (done.num_images, done.num_results, done.num_data_files) == (3, 5, 2)
    assert (done.made.num_pictures, done.made.num_unseen) == (2 * 4, 0)  # a scan, a primary and two results each
    assert done.address == store.uri("report/index.html")

    setting, images, details = rows_of(store)
    assert [image[0] for image in images] == ["a/1.png", "b & c.png", "z.png"]
    assert images[0][1:4] == [56, 40, [["shelf", "drawer-0"]]]
    first = dict(zip(setting["columns"], images[0][4][0], strict=True))
    expected = min((row for row in rows if row["image_key"] == "a/1.png"), key=lambda row: row["variant"])
    for name in ("variant", "target_prompt", "output_sha256", "colorfulness"):
        assert first[name] == expected[name]
    assert first["obeyed"] is (expected["target_prompt"] == TARGETS[0])
    # the files that the page shows are there: thumbnails and scans in the report, pictures in the output
    for record in (record for image in details for record in image):
        for picture in record["pictures"].values():
            assert store.has(f"report/{picture['thumb']}")
            assert store.has(f"report/{picture['view']}".replace("report/../", ""))
    assert details[0][0]["pictures"]["primary"] == details[0][1]["pictures"]["primary"]
    assert details[2][0]["pictures"] == {}
    assert all(is_record(key) for key in names(store, "report"))
    assert not list(verify(store))


def test_the_first_page_has_an_example_of_each_image_with_the_colours_asked_for_if_there_are_any(archive, store):
    rows = make_output(archive, store, ["a.png", "b.png"])
    captionless = [row | {"target_prompt": None, "generation": 2} for row in rows if row["image_key"] == "b.png"]
    commit_part(store, "000002-000000-00001", captionless)
    write_report(store)
    page = store.read("report/index.html").decode()
    assert page.count('class="before"') == 2
    assert f'alt="a.png: {TARGETS[0]}"' in page or f'alt="a.png: {TARGETS[1]}"' in page
    assert 'alt="b.png: no colours asked for"' in page


def test_what_a_report_has_made_is_used_again(archive, store, monkeypatch):
    keys = [f"{number:02}.png" for number in range(40)]
    monkeypatch.setattr(build, "IMAGES_PER_FILE", 4)
    make_output(archive, store, keys[:30])
    first = write_report(store)
    assert first.made.num_pictures == 30 * 4
    assert first.num_data_files > 6
    again = write_report(store)
    assert (again.made.num_pictures, again.num_data_files) == (0, 0)
    compact(store)
    again = write_report(store)
    assert (again.made.num_pictures, again.num_data_files) == (0, 0)

    before = names(store, "report/thumbs") | names(store, "report/data")
    make_output(archive, store, ["05b.png"], "000002-000000-00001")  # between others
    more = write_report(store)
    assert more.made.num_pictures == 4
    assert more.num_data_files <= 4  # the file that it falls into, or that it divides
    assert before < names(store, "report/thumbs") | names(store, "report/data"), "an open page still finds its rows"
    write_report(store)
    named = {f"report/data/{digest}.js" for *digests, _ in rows_of(store)[0]["files"] for digest in digests}
    assert names(store, "report/data") == named, "what no page names any more is deleted"
    assert [image[0] for image in rows_of(store)[1]] == sorted([*keys[:30], "05b.png"])


def test_a_file_that_is_gone_or_changed_is_not_shown_and_said(archive, store):
    make_output(archive, store, ["a.png", "b.png"])
    (archive / "a.png").unlink()
    Image.new("L", (9, 9)).save(archive / "b.png")
    made = write_report(store).made
    assert made.num_unseen == 2
    assert "FileNotFoundError" in made.examples["a.png"]
    assert "not the file any more" in made.examples["b.png"]
    setting, images, details = rows_of(store)
    place = setting["columns"].index("scan_thumb")
    assert [result[place] for image in images for result in image[4]] == [None] * 4
    assert all(record["pictures"].keys() == {"primary", "output"} for image in details for record in image)


def test_prompts_names_and_columns_stay_text(archive, store):
    make_output(archive, store, ["a.png"])
    evil = ok_row(f"{SCRIPT}.png", 1, SCRIPT, context_prompt=f"</script>{SCRIPT}", variant="target-1")
    evil |= {"run_id": SCRIPT, "catalog_columns": json.dumps({SCRIPT: SCRIPT, "__proto__": "x"})}
    broken = evil | {"variant": "target-2", "status": "failed", "error_class": SCRIPT, "error_message": SCRIPT}
    broken |= {"nouns": [{"noun": SCRIPT, "color": SCRIPT, "agreement": -1.0, "feasible": True}]}
    missed = broken | {"variant": "target-3", "status": "ok", "colorfulness": float("nan")}
    commit_part(store, "000001-000001-00001", [evil, broken, missed])
    write_report(store)
    page = store.read("report/index.html").decode()
    found = Setting()
    found.feed(page)
    assert SCRIPT not in page
    assert page.count("&lt;script&gt;") >= 6
    assert found.handlers == []
    assert [source.partition("?")[0] for source in found.scripts] == [
        name for name in build.STATIC if name[-2:] == "js"
    ]
    setting, images, details = rows_of(store)
    assert images[0][0] == f"{SCRIPT}.png"
    assert images[0][3] == [[SCRIPT, SCRIPT], ["__proto__", "x"]] or images[0][3] == [
        ["__proto__", "x"],
        [SCRIPT, SCRIPT],
    ]
    assert dict(zip(setting["columns"], images[0][4][2], strict=True))["colorfulness"] is None
    assert details[0][2]["nouns"][0]["noun"] == SCRIPT


def test_a_report_elsewhere_links_to_the_output(archive, tmp_path):
    output, to = Store(str(tmp_path / "it's #1, 50% out")), Store(str(tmp_path / "shown" / "here"))
    make_output(archive, output, ["a.png"])
    done = write_report(output, to.url)
    assert Path(done.address) == tmp_path / "shown" / "here" / "index.html"
    assert not output.has("report/index.html")
    _, _, details = rows_of(to, "")
    linked = details[0][0]["files"]["output"]
    assert linked.startswith("../../it%27s%20%231%2C%2050%25%20out/images/")
    assert (tmp_path / "shown" / "here" / unquote(linked)).is_file()


def test_an_object_store_learns_what_its_files_are(archive, s3_url):
    output = Store(s3_url)
    make_output(archive, output, ["a.png"])
    done = write_report(output)
    assert done.made.num_pictures == 4
    kinds = {
        name.rpartition(".")[2]: output.fs.info(output.uri(name), refresh=True)["ContentType"]
        for name in names(output, "report")
    }
    assert kinds["html"] == "text/html"
    assert kinds["css"] == "text/css"
    assert kinds["js"] in ("text/javascript", "application/javascript")
    assert kinds["webp"] == "image/webp"
    assert kinds["jpg"] == "image/jpeg"
    assert write_report(output).made.num_pictures == 0


def test_a_report_on_another_store_holds_the_pictures_itself(archive, tmp_path):
    output, to = Store(str(tmp_path / "out")), Store(f"memory://{tmp_path}/report")
    rows = make_output(archive, output, ["a.png"])
    write_report(output, to.url)
    _, _, details = rows_of(to, "")
    assert details[0][0]["files"] == {}
    assert to.has(report_view(rows[0]["output_sha256"]))
    assert to.has(report_thumbnail(rows[0]["input_sha256"]))


def test_tiffs_are_shown_as_large_jpegs(archive, tmp_path):
    output = Store(str(tmp_path / "out"))
    (row, _) = make_output(archive, output, ["a.png"])
    key = "images/a/target-9.tif"
    Path(output.uri(key)).parent.mkdir()
    Image.new("RGB", (56, 40), "red").save(output.uri(key))
    row |= {"output_uri": output.uri(key), "output_sha256": output.sha256(key), "generation": 2}
    commit_part(output, "000002-000000-00001", [row])
    write_report(output)
    view = output.uri(f"report/{report_view(row['output_sha256'])}")
    with Image.open(view) as image:
        assert (image.format, image.size) == ("JPEG", (56, 40))


def test_no_manifest_is_an_error(store):
    with pytest.raises(NoManifestError):
        write_report(store)
    assert not names(store, "report")


def test_words_are_obeyed_if_all_of_them_are():
    word = {"agreement": 0.9}
    assert is_obeyed([word, word]) is True
    assert is_obeyed([word, {"agreement": 0.4}]) is False
    assert is_obeyed([]) is is_obeyed(None) is None


@pytest.mark.parametrize("address", ["/scans", "s3://museum/box", "zip://::/scans/1.zip", "zip://recto::s3://m/1.zip"])
def test_the_folder_of_a_joined_address(address):
    assert folder_of(joined(address, "a/b.png"), "a/b.png").replace("recto/", "recto") == address
    with pytest.raises(ValueError, match="no address of"):
        folder_of(joined(address, "a/b.png"), "c.png")


def test_a_sheet_and_a_comparison(archive, store):
    make_output(archive, store, ["a.png", "b.png"])
    sheet = contact_sheet(store, columns=1, picture_px=64)
    line = (sheet.height - 16) // 4  # two images with two results each
    assert sheet.width == 3 * (64 + 16) + 16
    # of the first line the scan is gray, the primary and the result are not
    chroma = [max(pixel) - min(pixel) for pixel in (sheet.getpixel((16 + 32 + 80 * i, 16 + 32)) for i in range(3))]
    assert chroma[0] == 0 < min(chroma[1:])
    assert sheet.getpixel((16 + 32, 16 + line + 32)) == sheet.getpixel((16 + 32, 16 + 32)), "the same scan again"
    assert contact_sheet(store, limit=1, picture_px=64).height < sheet.height / 2
    assert comparison(store, "a.png", picture_px=64).width == 3 * 80 + 16  # scan, primary and two results: two lines
    with pytest.raises(ManifestError, match="no coloured image 'c.png'"):
        comparison(store, "c.png")


def test_a_sheet_with_the_originals_beside_the_results(archive, store, tmp_path):
    rows = make_output(archive, store, ["a.png", "b.png"])
    truth = Store(str(tmp_path / "truth"))
    truth.write("a.png", store.read(key_of(rows[0]["output_uri"])))
    sheet = contact_sheet(store, columns=1, limit=4, picture_px=64, truth=truth)
    assert sheet.width == 4 * (64 + 16) + 16
    line = (sheet.height - 16) // 4

    def middle(row, column):
        return sheet.getpixel((16 + 80 * column + 32, 16 + line * row + 32))

    obeyed = next(number for number in (0, 1) if middle(number, 2) == middle(number, 3))
    assert middle(1 - obeyed, 2) != middle(1 - obeyed, 3) == middle(obeyed, 3), "each result beside the same original"
    assert middle(2, 3) == ImageColor.getrgb(MAT), "there is no original of b.png"

    commit_part(store, "000002-000000-00001", [row | {"target_prompt": None, "generation": 2} for row in rows])
    sheet = contact_sheet(store, columns=1, picture_px=64, truth=truth)
    assert sheet.width == 3 * (64 + 16) + 16, "no column for colours that nobody asked for"


def test_the_context_of_the_rows_is_what_the_page_hands_to_recolor(archive, store):
    make_output(archive, store, ["a.png"])
    write_report(store)
    setting, images, _ = rows_of(store)
    place = setting["columns"].index("context_prompt")
    assert {result[place] for result in images[0][4]} == {CONTEXT}
