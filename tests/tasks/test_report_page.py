"""The report in a headless Chromium, as a curator uses it."""

import functools
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from support.browser import NoBrowserError, axe_core, pages, wait_for
from support.outputs import CONTEXT, SCRIPT, TARGETS, make_output, ok_row
from tasks.archive import RECOLOR_COLUMNS, read_catalog
from tasks.manifest import commit_part, query
from tasks.report import write_report
from tasks.storage import Store

KEYS = [f"box {number % 3}/scan {number:02}.png" for number in range(30)]
EVIL = f"{SCRIPT}.png".replace("/", "∕")  # a name of a file may hold everything but a slash


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Store:
    """Thirty images with two results each, one broken image, and one whose every text is a script."""
    folder = tmp_path_factory.mktemp("report")
    store = Store(str(folder / "out"))
    make_output(folder / "scans", store, KEYS)
    broken = {"status": "quarantined", "error_class": "UnreadableImageError", "error_message": "the file is empty"}
    evil = {"target_prompt": SCRIPT, "context_prompt": SCRIPT, "run_id": "second", "catalog_columns": None}
    rows = [ok_row("broken.png", 0, TARGETS[0]) | broken, ok_row(EVIL, 1, TARGETS[0]) | evil]
    commit_part(store, "000002-000000-00001", rows)
    write_report(store)
    return store


@pytest.fixture
def open_page(chrome, output):
    """Opens a view of the report."""
    address = Path(output.uri("report/index.html")).as_uri()
    with pages(chrome, "file://") as open_address:
        yield lambda view="", **options: open_address(f"{address}{view}", **options)


def cards(page) -> list[str]:
    """The names on the cards that are shown."""
    return page.locator("#cards .key").all_text_contents()


def found(page, number: int) -> None:
    wait_for(page, f"document.getElementById('num-found').textContent.startsWith('{number} of ')")


def picture(key: str) -> str:
    return f"#view=picture&image={quote(key, safe='')}"


def test_search_filter_and_order(open_page):
    page = open_page("#view=gallery")
    found(page, 62)
    assert len(cards(page)) < 62, "cards far from the screen are not made"
    page.get_by_label("Search").fill("scan 07 BLUE")
    found(page, 1)
    assert cards(page) == [KEYS[7]]
    page.get_by_label("Search").fill("drawer-3")  # a catalog column
    found(page, 14)
    page.get_by_label("Search").fill("")
    page.get_by_role("combobox", name="Status").select_option("quarantined")
    found(page, 1)
    assert cards(page) == ["broken.png"]
    page.get_by_role("combobox", name="Status").select_option("")
    page.get_by_role("combobox", name="Words").select_option("not all obeyed")
    found(page, 30)
    page.get_by_role("combobox", name="Words").select_option("")
    page.get_by_role("combobox", name="Run").select_option("second")
    found(page, 1)
    page.get_by_role("combobox", name="Run").select_option("")
    page.get_by_role("combobox", name="Sort by").select_option("colourfulness")
    page.get_by_role("combobox", name="Order").select_option("downwards")
    wait_for(page, "location.hash.includes('order=down')")
    values = page.evaluate("diffcolor.results.map(r => r.colorfulness)")
    first = page.locator("#cards .key").first.text_content()
    assert page.evaluate("key => diffcolor.results.find(r => r.image.key === key).colorfulness", first) == max(values)
    page.mouse.wheel(0, 100_000)
    wait_for(page, "[...document.querySelectorAll('#cards li')].at(-1).ariaPosInSet === '62'")
    page.reload()  # the address keeps the filters
    found(page, 62)
    assert page.get_by_role("combobox", name="Order").input_value() == "down"


def test_the_slider_by_keyboard_and_other_ways_to_compare(open_page):
    page = open_page("#view=gallery")
    page.get_by_role("link", name=KEYS[0]).first.click()
    page.wait_for_selector("#picture:not([hidden])")
    slider = page.get_by_role("slider")
    assert slider.input_value() == "50"
    slider.focus()
    left_picture = "getComputedStyle(document.querySelectorAll('.split img')[1]).clipPath"
    assert page.evaluate(left_picture) == "inset(0px 50% 0px 0px)"
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert page.evaluate(left_picture) == "inset(0px 40% 0px 0px)"
    page.keyboard.press("Home")
    assert page.evaluate(left_picture) == "inset(0px 100% 0px 0px)"
    shown = "[...document.querySelectorAll('.frame img')].map(i => [i.complete, i.naturalWidth, i.naturalHeight])"
    page.wait_for_load_state("networkidle")
    assert page.evaluate(shown) == [[True, 56, 40]] * 2  # the picture's own file, and the scan

    page.get_by_label("1:1").check()
    assert page.evaluate("document.querySelector('.frame').clientWidth") == 56
    page.get_by_label("1:1").uncheck()
    page.get_by_label("side by side").check()
    page.get_by_role("combobox", name="Left").select_option(TARGETS[0])
    page.get_by_role("combobox", name="Right").select_option(TARGETS[1])
    assert page.locator(".pane figcaption").all_text_contents() == list(TARGETS)
    page.get_by_role("link", name="next ›").click()
    wait_for(page, f"document.getElementById('picture-title').textContent !== {json.dumps(KEYS[0])}")
    assert page.locator("#place").text_content() == "3 of 32"  # the first is the one whose name is a script


def test_what_is_chosen_survives_a_reload_and_is_saved(open_page, output, tmp_path):
    page = open_page(picture(KEYS[3]))
    obeyed = page.locator("#variants li", has_text="red")
    missed = page.locator("#variants li", has_text="blue")
    assert page.locator("mark.missed", has_text="blue").count() >= 1
    assert page.locator("mark.infeasible", has_text="yellow").count() >= 1
    obeyed.get_by_role("button", name="Approve").click()
    obeyed.get_by_label("Note").fill('for the catalogue, "as is"')
    missed.get_by_role("button", name="Reject").click()
    page.reload()
    page.wait_for_selector("#variants li")
    assert obeyed.get_by_role("button", name="Approve").get_attribute("aria-pressed") == "true"
    assert obeyed.get_by_label("Note").input_value() == 'for the catalogue, "as is"'
    page.goto(page.url.partition("#")[0] + "#view=gallery&choice=approved")
    found(page, 1)

    page.get_by_role("link", name="Choices").click()
    page.get_by_role("button", name="Save choices").click()
    assert page.evaluate("document.activeElement.name") == "who", "nobody has said who chooses"
    page.get_by_label("Who chooses").fill("Ada")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save choices").click()
    assert download.value.suggested_filename == "choices.json"
    saved = json.loads(Path(download.value.path()).read_text())
    assert (saved["schema"], saved["who"], saved["saved"][-1]) == (1, "Ada", "Z")
    rows = query(output, f"select target_prompt, variant, output_sha256 from results where image_key = '{KEYS[3]}'")
    named = {target: {"image": KEYS[3], "variant": v, "sha256": sha256} for target, v, sha256 in rows.fetchall()}
    assert sorted(saved["choices"], key=lambda c: c["choice"]) == [
        named[TARGETS[0]] | {"choice": "approved", "note": 'for the catalogue, "as is"'},
        named[TARGETS[1]] | {"choice": "rejected", "note": ""},
    ]
    page.get_by_role("button", name="Take back").first.click()
    page.get_by_role("button", name="Take back").first.click()
    assert page.get_by_role("button", name="Save choices").is_disabled()


def test_other_colours_are_asked_for_one_and_for_many(open_page, tmp_path):
    page = open_page(picture(KEYS[5]))
    prompt = page.locator("#ask-one").get_by_label("Prompt")
    prompt.fill("a blue ball on a yellow table")
    hints = page.locator("#hints li").all_text_contents()
    assert any("blue ball" in hint and "not obeyed" in hint for hint in hints)
    assert any("yellow table" in hint and "cannot be shown" in hint for hint in hints)
    for typed, told in (  # the table is dark, the ball is not
        ("a turquoise ball on a gold table", ["gold table"]),
        ("a #8b0000 ball on a #ffd700 wooden table", ["#ffd700 table"]),
        ("a goldenrod ball on a goldenrod table", ["goldenrod table"]),
        ("a #ffd700 ball on a gray table", []),
        ("a ball on a #0000ff table", []),  # sRGB has dark blues, but no dark cyan
        ("a ball on a #00ffff table", ["#00ffff table"]),
        ("a ball on a yellow bench and a table", []),
    ):
        prompt.fill(typed)
        assert page.locator("#hints li mark").all_text_contents() == told
    prompt.fill('a "pink" ball, on a white table')
    page.get_by_role("button", name="Ask for these colours").click()
    page.get_by_role("button", name="Ask for these colours").click()
    assert page.locator("#asked").text_content() == "This has been asked for already."
    page.get_by_role("link", name="Gallery", exact=True).click()
    page.get_by_label("Search").fill("box 0")
    page.get_by_role("combobox", name="Words").select_option("all obeyed")
    wait_for(page, "location.hash.includes('words=yes')")
    number = page.evaluate("document.getElementById('num-found').textContent")
    page.get_by_role("button", name="Select all of these").click()
    page.get_by_label("Other colours for all of them").fill("a purple ball on a brown table")
    page.locator("#ask-many").get_by_role("button", name="Ask for these colours").click()
    page.get_by_role("link", name="Choices").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save recolor catalog").click()
    catalog = tmp_path / download.value.suggested_filename
    download.value.save_as(catalog)
    rows = list(read_catalog(Store(str(tmp_path)), str(catalog), RECOLOR_COLUMNS))
    assert (rows[0].image, rows[0].target_prompt) == (KEYS[5], 'a "pink" ball, on a white table')
    assert {row.context_prompt for row in rows} == {CONTEXT}
    assert len(rows) == 1 + int(number.split()[0])
    assert {row.target_prompt for row in rows[1:]} == {"a purple ball on a brown table"}


def test_a_script_in_a_prompt_stays_text(open_page):
    page = open_page("#view=gallery&run=second")
    found(page, 1)
    assert cards(page) == [EVIL]
    page.get_by_role("link", name=EVIL).click()
    page.wait_for_selector("#variants li")
    assert SCRIPT in page.locator("#variants").text_content()
    assert page.locator("#picture-title").text_content() == EVIL
    page.locator("#ask-one").get_by_label("Prompt").fill(SCRIPT)
    page.get_by_role("button", name="Ask for these colours").click()
    page.get_by_role("link", name="Choices").click()
    assert SCRIPT in page.locator("#request-list").text_content()
    assert "broken into" not in page.title()
    assert page.locator("main script").count() == 0


VIEWS = ["#view=overview", "#view=gallery", picture(KEYS[0]), picture("broken.png"), "#view=choices"]


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_needs_no_sideways_scrolling(open_page, view):
    page = open_page(view)
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, scheme):
    try:
        script = axe_core()
    except NoBrowserError as error:
        pytest.skip(str(error))
    page = open_page(color_scheme=scheme, bypass_csp=True)
    page.evaluate(script)
    for view in VIEWS:
        page.goto(page.url.partition("#")[0] + view)
        page.wait_for_load_state("networkidle")
        page.wait_for_selector("main > section:not([hidden])")
        violations = page.evaluate("axe.run({preload: false}).then(result => result.violations)")
        serious = [
            (v["id"], [n["html"] for n in v["nodes"]]) for v in violations if v["impact"] in ("serious", "critical")
        ]
        assert serious == [], view


def test_a_report_behind_a_web_server(chrome, output):
    """As from an object store: the same page, and every request goes there."""
    handler = functools.partial(QuietHandler, directory=output.root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = chrome.new_page()
        failed = []
        page.on("response", lambda response: response.ok or failed.append(response.url))
        page.on("requestfailed", lambda request: failed.append(request.url))
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/report/index.html{picture(KEYS[0])}")
        page.wait_for_selector("#variants li")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("[...document.querySelectorAll('.frame img')].map(i => i.naturalWidth)") == [56, 56]
        assert failed == []
        page.close()
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass
