"""Screenshots of a report for the docs, taken by a headless Chromium.

make demo && make screenshots     (10 seconds)
"""

from pathlib import Path
from typing import Annotated

import typer

from support.browser import browser, chromium, wait_for

VIEWS = {
    "overview": "({view: 'overview'})",
    "gallery": "({view: 'gallery'})",
    "picture": """(r => ({view: 'picture', image: r.image.key, variant: r.variant}))(
        diffcolor.results.find(r => r.obeyed === false) ?? diffcolor.results[0])""",
}
"""Each view's name, with JavaScript for its address. The picture is the first one with a word that was not obeyed."""


def main(
    report: Annotated[Path, typer.Argument(help="Folder of the report, such as out/demo/report.")],
    folder: Annotated[Path, typer.Argument(help="Folder for the pictures.")],
    install: Annotated[bool, typer.Option(help="Install Chromium if it is missing (Debian, root).")] = False,
    every: Annotated[bool, typer.Option(help="Each view also in the dark and on a phone.")] = False,
) -> None:
    """Take a picture of each view of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    with browser(chromium(install=install)) as running:
        for suffix, size, scheme in (("", 1280, "light"), ("-dark", 1280, "dark"), ("-phone", 390, "light")):
            if suffix and not every:
                continue
            context = running.new_context(viewport={"width": size, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            page = context.new_page()
            page.on("console", lambda message: print(message.type, message.text))
            page.on("pageerror", lambda error: print(error))
            page.goto(f"{report.absolute().as_uri()}/index.html")
            wait_for(page, "diffcolor.loaded")
            for name, parts in VIEWS.items():
                address = page.evaluate(f"diffcolor.address({parts})")
                page.goto(f"{report.absolute().as_uri()}/index.html{address}")
                page.wait_for_selector(f"#{name}:not([hidden])")
                page.wait_for_load_state("networkidle")
                page.screenshot(
                    path=folder / f"report-{name}{suffix}.jpg", type="jpeg", quality=85, full_page=name == "overview"
                )


if __name__ == "__main__":
    typer.run(main)
