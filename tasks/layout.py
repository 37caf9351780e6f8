"""The keys of an output: where a run writes each file, and how to recognise it again.

    images/<name>-<image digest>/primary-<config>.png     the primary, with <...>.jpg if an access copy is asked for
    images/<name>-<image digest>/target-<config>.png      one picture per target prompt
    fits/<xx>/<content>-<fit>/fit.safetensors, fit.json   the kept fit; `expired` in its place once it is deleted
    manifest/<run>-<shard>-<number>.parquet               a part: its appearance commits its rows
    manifest/<run>-repair.parquet                         the rows that `verify --repair` has queued again
    manifest/compacted-<number>-<token>/*.parquet         the parts of a compaction
    manifest/compacted-<number>.json                      the pointer to them; the highest number counts
    approvals/<number>.parquet                            what people have chosen: the rows of one file of choices
    results.parquet                                       the latest row of each image and variant, for readers
    catalog.csv                                           with `--caption`: the catalog of the run, with its captions
    catalog.csv.captions/<token>.jsonl                    captions of an interrupted run that are not in it yet
    runs/<run>.json, .beat, .end                          a run's record and lease, its sign of life, its end
    report/index.html, *.css, *.js, report.json           the report: its page, and the record of what it names
    report/data/<digest>.js                               rows for the page, under the hash of their text
    report/thumbs/<xx>/<sha256>.webp                      a small picture of the file with this hash
    report/views/<xx>/<sha256>.jpg                        a large one, where a browser cannot show or reach the file
    damaged/<key>                                         what `verify --repair` has set aside
    probe-<token>                                         a few seconds: does this store have conditional PUTs?
    .tmp/<machine>~<process>~<token>                      on a local disk: files that are still being written

<run> is the run's number on this output, its generation. Digests are the first hex digits of a SHA-256.
"""

import hashlib
import re
import unicodedata

IMAGES = "images"
FITS = "fits"
MANIFEST = "manifest"
APPROVALS = "approvals"
EXPORT_TABLE = "diffcolor-export.csv"
"""In a folder that `diffcolor export` writes: what each of its pictures is."""
RUNS = "runs"
DAMAGED = "damaged"
RESULTS = "results.parquet"
REPORT = "report"
REPORT_PAGE = f"{REPORT}/index.html"
CATALOG = "catalog.csv"
TEMPORARY = ".tmp"
PROBE = "probe-"

FILES = ("output", "access", "primary")
"""The files of a row: each is named by <file>_uri, its hash is <file>_sha256."""
FIT_FILES = ("fit.safetensors", "fit.json")
"""The files of a kept fit, in the order in which they are written: without the second there is no fit."""
EXPIRED = "expired"
"""The file that a fit leaves behind when it is deleted on purpose."""

POINTER = re.compile(rf"{MANIFEST}/compacted-(\d{{6}})\.json")
COMPACTED_PART = re.compile(rf"{MANIFEST}/compacted-(\d{{6}})-[^/]+/[^/]+\.parquet")
LOOSE_PART = re.compile(rf"{MANIFEST}/[^/]+\.parquet")
APPROVAL = re.compile(rf"{APPROVALS}/(\d{{6}})\.parquet")
RUN_RECORD = re.compile(rf"{RUNS}/(\d{{6}})\.json")
RUN_FILE = re.compile(rf"{RUNS}/\d{{6}}\.(json|beat|end)")


def slug(text: str, limit: int = 60) -> str:
    """`text` as a readable part of a key: ASCII letters, digits, '.', '_' and '-', never empty, no '.' in front."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip(".-_")[:limit].rstrip(".-_") or "image"


# ------------------------------------------------------------------ images and fits


def picture_stem(image_key: str, input_sha256: str, config_sha256: str, *, primary: bool) -> str:
    """The key of a picture without its suffix. The same image, bytes and configuration give the same key."""
    digest = hashlib.sha256(f"{image_key}/{input_sha256}".encode()).hexdigest()[:16]
    return f"{IMAGES}/{slug(image_key)}-{digest}/{'primary' if primary else 'target'}-{config_sha256[:12]}"


def fit_folder(input_sha256: str, fit_sha256: str) -> str:
    """The folder of a kept fit, by the content of the image and all that shapes the fit."""
    return f"{FITS}/{input_sha256[:2]}/{input_sha256[:32]}-{fit_sha256[:12]}"


def key_of(uri: str) -> str:
    """The key of a picture or a fit from the address in its row, even if the output has been moved since."""
    for folder in (IMAGES, FITS):
        head, found, tail = uri.rpartition(f"/{folder}/")
        if found and head:
            return f"{folder}/{tail}"
    return uri


# ------------------------------------------------------------------ the manifest


def part(name: str) -> str:
    """The key of a loose part."""
    return f"{MANIFEST}/{name}.parquet"


def part_name(generation: int, shard: int, number: int) -> str:
    """The name of the part that a run's shard commits after its image `number`."""
    return f"{generation:06d}-{shard:06d}-{number:05d}"


def repair_name(generation: int) -> str:
    """The name of the part that a repair commits."""
    return f"{generation:06d}-repair"


def compaction(number: int, token: str) -> str:
    """The folder of a compaction's parts. The token keeps two compactions of one number apart."""
    return f"{MANIFEST}/compacted-{number:06d}-{token}"


def pointer(number: int) -> str:
    """The key of the record that names a compaction's parts."""
    return f"{MANIFEST}/compacted-{number:06d}.json"


def approval(number: int) -> str:
    """The key of the choices that were applied as the output's `number`th file of them."""
    return f"{APPROVALS}/{number:06d}.parquet"


# ------------------------------------------------------------------ runs


def run_record(generation: int) -> str:
    """The key of a run's record, which is also its lease."""
    return f"{RUNS}/{generation:06d}.json"


def run_beat(generation: int) -> str:
    """The key that a living run rewrites again and again."""
    return f"{RUNS}/{generation:06d}.beat"


def run_end(generation: int) -> str:
    """The key that a run writes when it ends in order."""
    return f"{RUNS}/{generation:06d}.end"


def damaged(key: str) -> str:
    """Where `verify --repair` moves the file at `key`."""
    return f"{DAMAGED}/{key}"


def is_record(key: str) -> bool:
    """Whether the key is one that no manifest row names, but that belongs to an output."""
    return (
        key in (RESULTS, CATALOG)
        or key.startswith((f"{CATALOG}.captions/", f"{DAMAGED}/", f"{REPORT}/"))
        or any(pattern.fullmatch(key) for pattern in (RUN_FILE, LOOSE_PART, POINTER, APPROVAL))
    )


# ------------------------------------------------------------------ the report


def report_data(digest: str) -> str:
    """The name, below the report's folder, of some of its rows."""
    return f"data/{digest}.js"


def report_thumbnail(sha256: str) -> str:
    """The name, below the report's folder, of the small picture of a file with this hash."""
    return f"thumbs/{sha256[:2]}/{sha256[:32]}.webp"


def report_view(sha256: str) -> str:
    """The name, below the report's folder, of the large picture of a file with this hash."""
    return f"views/{sha256[:2]}/{sha256[:32]}.jpg"
