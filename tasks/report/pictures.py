"""The report's pictures: a thumbnail of each scan, primary and result, made once for each content.

A picture's name is the SHA-256 of the file that it shows, so a later report finds what an earlier one has made.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image

from diffcolor_core import read_picture
from tasks.layout import key_of, report_thumbnail, report_view
from tasks.storage import Store, folder_of

THUMBNAIL_PX = 320
"""Longest side of a thumbnail: a card of the gallery at twice its width on a common screen."""
VIEW_PX = 4096
"""Longest side of a large picture. The files themselves stay as they are, and the page links to them."""
NUM_EXAMPLES = 5
SHOWN = (".png", ".jpg", ".webp")
"""Suffixes of result files that browsers show."""


class Source(NamedTuple):
    """A file that the page shows. kind: scan, primary or output. sha256: its hash, which names what is made of it.

    with_view: whether the page also needs a large picture, because it cannot show or reach the file.
    """

    kind: str
    key: str
    uri: str
    sha256: str
    with_view: bool

    def read(self, output: Store) -> bytes:
        """The file's bytes. A scan lies in the archive, everything else in the output."""
        store = Store(folder_of(self.uri, self.key)) if self.kind == "scan" else output
        return store.read(self.key)


@dataclass
class Made:
    """What a report had to make. examples: a few of the files that could not be shown, with the reason."""

    num_pictures: int = 0
    num_unseen: int = 0
    examples: dict[str, str] = field(default_factory=dict)


def sources_of(row: Mapping[str, Any], *, reachable: bool) -> Iterator[Source]:
    """What there is to show of a manifest row.

    A scan counts if it has been decoded once. reachable: whether the page can link to the output's files.
    """
    if row["width_px"] is not None and row["input_sha256"] is not None:
        yield Source("scan", row["image_key"], row["input_uri"], row["input_sha256"], with_view=True)
    for kind in ("primary", "output"):
        uri, sha256 = row[f"{kind}_uri"], row[f"{kind}_sha256"]
        if row["status"] == "ok" and uri is not None and sha256 is not None:
            linked = reachable and shown_key(row, kind) is not None
            yield Source(kind, key_of(uri), uri, sha256, with_view=not linked)


def shown_key(row: Mapping[str, Any], kind: str) -> str | None:
    """The key of the file that shows a row's "primary" or "output" in a browser; None if no browser shows it."""
    uris = (row["access_uri"], row["output_uri"]) if kind == "output" else (row["primary_uri"],)
    return next((key_of(uri) for uri in uris if uri is not None and uri.endswith(SHOWN)), None)


def make_pictures(
    output: Store, sources: Iterable[Source], write: Callable[[str, bytes], None], pool: ThreadPoolExecutor, made: Made
) -> set[str]:
    """Write the thumbnail, and the large picture if it is needed, of each source; the hashes of those it could not.

    A file that is gone, was changed since or cannot be decoded is left out and counted in `made`.
    """
    failed = set()
    by_sha256 = {source.sha256: source for source in sources}
    problems = pool.map(lambda source: _make(output, source, write), by_sha256.values())
    for source, problem in zip(by_sha256.values(), problems, strict=True):
        if problem is None:
            made.num_pictures += 1
        else:
            made.num_unseen += 1
            if len(made.examples) < NUM_EXAMPLES:
                made.examples[source.key] = problem
            failed.add(source.sha256)
    return failed


def _make(output: Store, source: Source, write: Callable[[str, bytes], None]) -> str | None:
    """Write what is made of one source; the reason if nothing can be made of it."""
    try:
        data = source.read(output)
        if hashlib.sha256(data).hexdigest() != source.sha256:
            return "it is not the file any more that the manifest names"
        image = read_picture(data).to_pil()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    if source.with_view:
        write(report_view(source.sha256), _encoded(_on_white(image), VIEW_PX, "jpeg", quality=88))
    write(report_thumbnail(source.sha256), _encoded(image, THUMBNAIL_PX, "webp", quality=80))  # last: stands for both
    return None


def _encoded(image: Image.Image, side_px: int, image_format: str, **options: Any) -> bytes:
    small = image.copy()
    small.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    small.save(buffer, image_format, **options)
    return buffer.getvalue()


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
