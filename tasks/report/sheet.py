"""Pictures of results as one picture: a contact sheet of many images, or all that there is of one."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffcolor_core import read_picture
from tasks.errors import ManifestError
from tasks.manifest import connect
from tasks.report.overview import OBEYED
from tasks.report.pictures import sources_of
from tasks.storage import Store

INK, QUIET, PAPER, MAT = "#22201c", "#645f56", "#f6f4ef", "#e6e2d9"
GAP_PX = 16
TEXT_PX = 15
TEXT_LINES = 3
SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""Of the files in which a sheet can be kept, with Pillow's name of their format."""
Cell = tuple[Image.Image | None, str, str]
"""A picture, if it can be shown, with its title and its text."""

_ROWS = "from results where status = 'ok'"


def contact_sheet(
    output: Store, *, columns: int = 2, limit: int = 24, picture_px: int = 256, truth: Store | None = None
) -> Image.Image:
    """Scan, primary and colours of the first results, in the order of their images, as one picture.

    columns: results in each line. truth: a folder that has the originals in their own colours under the scans' keys;
    they are drawn last. Raises ManifestError if there is no result.
    """
    rows = _rows(output, f"{_ROWS} order by image_key, target_prompt nulls first limit ?", [limit])
    if not rows:
        raise ManifestError(f"no image of {output.url!r} has been coloured yet: there is nothing to show")
    shown = [_cells_of(output, row, picture_px) for row in rows]
    widest = max(map(len, shown))
    cells: list[Cell | None] = []
    for row, some in zip(rows, shown, strict=True):
        cells += [*some, *[None] * (widest - len(some))]  # a result without a target prompt leaves a gap
        if truth is not None:
            cells.append(_cell(partial(truth.read, row["image_key"]), "original", "", picture_px))
    return _drawn(cells, min((widest + (truth is not None)) * columns, len(cells)), picture_px)


def comparison(output: Store, image_key: str, *, picture_px: int = 512) -> Image.Image:
    """The scan of one image, its primary and all its variants, with their prompts, as one picture.

    Raises ManifestError if the image has no result.
    """
    rows = _rows(output, f"{_ROWS} and image_key = ? order by target_prompt nulls first, variant", [image_key])
    if not rows:
        raise ManifestError(
            f'{output.url!r} has no coloured image {image_key!r}: `diffcolor query OUTPUT "select distinct image_key '
            "from results where status = 'ok'\"` lists them"
        )
    cells: list[Cell] = []
    for row in rows:
        for cell in _cells_of(output, row, picture_px):
            if all(cell[1:] != other[1:] for other in cells):
                cells.append(cell)
    return _drawn(cells, min(3, len(cells)), picture_px)


def _rows(output: Store, sql: str, parameters: list[Any]) -> list[dict[str, Any]]:
    cursor = connect(output, views=["results"]).execute(sql, parameters)
    return list(cursor.to_arrow_table().to_pylist())


def _cells_of(output: Store, row: dict[str, Any], picture_px: int) -> list[Cell]:
    """Scan, primary and colours of one result. What cannot be read says why."""
    there = {source.kind: source for source in sources_of(row | {"primary_sha256": row["primary_uri"]}, reachable=True)}
    texts = {
        "scan": (f"scan: {row['image_key']}", row["context_prompt"] or ""),
        "primary": ("primary: no colours asked for", row["context_prompt"] or ""),
    }
    if row["target_prompt"] is not None:
        missed = [n for n in row["nouns"] or () if (n["agreement"] or 0) < OBEYED]
        words = ", ".join(f"{n['color']} {n['noun']}" for n in missed)
        texts["output"] = (f"not obeyed: {words}" if words else "colours asked for", row["target_prompt"])
    read = {kind: partial(source.read, output) for kind, source in there.items()}
    return [_cell(read.get(kind), title, text, picture_px) for kind, (title, text) in texts.items()]


def _cell(read: Callable[[], bytes] | None, title: str, text: str, picture_px: int) -> Cell:
    if read is None:
        return None, title, text
    try:
        picture = read_picture(read()).to_pil()
    except (OSError, ValueError) as error:
        return None, title, f"cannot be shown: {error}"
    return ImageOps.contain(picture.convert("RGB"), (picture_px, picture_px)), title, text


def _drawn(cells: Sequence[Cell | None], columns: int, picture_px: int) -> Image.Image:
    """The cells in lines of `columns`, each picture above its title and its text."""
    line_px = TEXT_PX * 4 // 3
    height = picture_px + line_px * (1 + TEXT_LINES) + GAP_PX
    step = picture_px + GAP_PX
    lines = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * step + GAP_PX, lines * height + GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        if cell is None:
            continue
        picture, title, text = cell
        x, y = GAP_PX + number % columns * step, GAP_PX + number // columns * height
        draw.rectangle((x, y, x + picture_px - 1, y + picture_px - 1), fill=MAT)
        if picture is not None:
            sheet.paste(picture, (x + (picture_px - picture.width) // 2, y + (picture_px - picture.height) // 2))
        y += picture_px + line_px // 4
        for line, color in [(line, INK) for line in _wrapped(title, picture_px, 1)] + [
            (line, QUIET) for line in _wrapped(text, picture_px, TEXT_LINES)
        ]:
            draw.text((x, y), line, fill=color, font=_font())
            y += line_px
    return sheet


@cache
def _font() -> Any:
    return ImageFont.load_default(TEXT_PX)


def _wrapped(text: str, width_px: int, num_lines: int) -> list[str]:
    """The text in at most `num_lines` lines of this width, with an ellipsis if there is more."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= width_px:
            lines[-1] = longer
        elif len(lines) == num_lines:
            lines[-1] = f"{longer} …"
            break
        else:
            lines.append(word)
    return [_cut(line, width_px) for line in lines if line]


def _cut(line: str, width_px: int) -> str:
    if _font().getlength(line) <= width_px:
        return line
    line = line.removesuffix(" …")
    while line and _font().getlength(f"{line}…") > width_px:
        line = line[:-1]
    return f"{line}…"
