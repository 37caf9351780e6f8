import json
import os
import zipfile
from datetime import datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.archive import COLUMNS, RECOLOR_COLUMNS, check_columns, is_image_key, read_catalog, variant_name
from tasks.errors import CatalogError
from tasks.storage import Store

ROWS = [
    {"image": "a, b.png", "context_prompt": "a ball", "target_prompt": "a red ball", "source": "x"},
    {"image": "a, b.png", "context_prompt": "a ball", "target_prompt": None, "source": "y"},
    {"image": "sub/ü.tif", "context_prompt": "a box", "target_prompt": "a blue box", "source": ""},
]


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / "archive"
    for name in ("a, b.png", "sub/ü.tif", "unlisted.jpg", "letter.doc", ".hidden", "notes.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return Store(str(folder))


def write_catalog(archive: Store, kind: str) -> str:
    path = f"{archive.root}/prompts.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "jsonl":
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
    else:
        with open(path, "w", encoding="utf-8-sig") as file:
            file.write("image,context_prompt,target_prompt,source\n")
            for row in ROWS:
                file.write(",".join(f'"{value or ""}"' for value in row.values()) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_each_kind_of_catalog_gives_the_same_rows(archive, kind):
    rows = read_catalog(archive, write_catalog(archive, kind))
    assert [(r.number, r.image, r.context_prompt, r.target_prompt) for r in rows] == [
        (1, "a, b.png", "a ball", "a red ball"),
        (2, "a, b.png", "a ball", None),
        (3, "sub/ü.tif", "a box", "a blue box"),
    ]


def test_what_counts_as_an_image(archive):
    keys = [key for key, _ in archive.list() if is_image_key(key)]
    assert keys == ["a, b.png", "letter.doc", "sub/ü.tif", "unlisted.jpg"]
    assert read_catalog(archive, None) is None


def test_what_a_row_leaves_out_at_its_end_is_empty(archive):
    archive.write("catalog.csv", b"image,context_prompt,target_prompt\na.png,x,y\nb.png,x\n")
    rows = list(read_catalog(archive, None))
    assert [(row.image, row.target_prompt) for row in rows] == [("a.png", "y"), ("b.png", None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,prompt\na.png,x\n", "no column 'context_prompt'.*did you mean your 'prompt'"),
        ("file,context_prompt\na.png,x\n", "no column 'image'"),
        ("image,context_prompt\na.png,x\n,y\n", "row 2: no image"),
        (f"image,context_prompt\na.png,{'x' * 5000}\n", "row 1: context_prompt has 5000 characters, the limit is 4000"),
        (f"image,context_prompt\na.png,{'x' * 10_000_000}\n", "field larger than field limit"),
        ('image,context_prompt\n"a.png,x\n', "unexpected end of data"),
        ("image,context_prompt\nb.png,y\na\xff.png,x\n", "line 3 is not UTF-8"),
        ("image,context_prompt,target_prompt\na.png,a dog on a bench, with grass,a red dog\n", "row 1 .*more.*quotes"),
        ("image,context_prompt,target_promt\na.png,x,y\n", "'target_prompt' .did you mean your 'target_promt'"),
        ("image,context_prompt,Target prompt\na.png,x,y\n", "did you mean your 'Target prompt'"),
        ("image,context_prompt,image\na.png,x,b.png\n", "column 'image' appears twice"),
    ],
)
def test_a_catalog_that_is_wrong_says_where(archive, text, message):
    path = f"{archive.root}/bad.csv"
    with open(path, "w", encoding="latin-1") as file:
        file.write(text)
    with pytest.raises(CatalogError, match=message):
        list(read_catalog(archive, path))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"image": "a.png", "context_prompt": "x"}\nnonsense\n', "line 2: "),
        ('{"image": "a.png", "context_prompt": "x"}\n\n[]\n', "line 3: it is not a JSON object"),
        ('{"context_prompt": "x"}\n', "line 1: there is no column 'image'"),
        ('{"image": "a.png", "context_prompt": "x", "target_promt": "y"}\n', "line 1: .*your 'target_promt'"),
        (
            '{"image": "a.png", "context_prompt": "x"}\n{"image": "a.png", "context_prompt": "\\ud800"}\n',
            "row 2: .*half",
        ),
        (
            '{"image": "a.png", "context_prompt": "x"}\n{"image": "\xff.png", "context_prompt": "x"}\n',
            "line 2 is not UTF",
        ),
    ],
)
def test_a_jsonl_catalog_that_is_wrong_says_where(archive, lines, message):
    path = f"{archive.root}/bad.jsonl"
    with open(path, "w", encoding="latin-1") as file:
        file.write(lines)
    with pytest.raises(CatalogError, match=message):
        list(read_catalog(archive, path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["context_prompt", "target_prompt"], "no column 'image'"),
        (["image", "context_prompt", "target_promt"], "your 'target_promt'"),
        (["image", "context_prompt", "image"], "'image' appears twice"),
    ],
)
def test_a_parquet_catalog_that_is_wrong_says_so(archive, names, message):
    path = f"{archive.root}/bad.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * len(names), names), path)
    with pytest.raises(CatalogError, match=message):
        list(read_catalog(archive, path))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_other_columns_are_kept_as_they_are(archive, kind):
    extras = [row.extra for row in read_catalog(archive, write_catalog(archive, kind))]
    assert extras == ['{"source": "x"}', '{"source": "y"}', None]


def test_values_that_are_not_text_are_kept_as_json(archive):
    line = {"image": "a", "context_prompt": "x", "zz": 3, "a": {"box": [1, None, "ü"]}, "n": None, "e": " ", "b": False}
    archive.write("catalog.jsonl", json.dumps(line).encode())
    (row,) = read_catalog(archive, f"{archive.root}/catalog.jsonl")
    assert row.extra == '{"a": {"box": [1, null, "ü"]}, "b": false, "zz": 3}'


def test_the_types_of_a_parquet_catalog_are_kept_as_text_or_json(archive):
    columns = {
        "image": ["0.png"],
        "context_prompt": ["a ball"],
        "accession": pa.array([17], pa.int64()),
        "day": pa.array([datetime(1905, 2, 1)], pa.date32()),
        "far": pa.array([2**62], pa.timestamp("us")),  # no date of Python's
        "insured": pa.array([Decimal("12.50")]),
        "missing": pa.array([float("nan")]),
        "stamp": pa.array([b"\x01\xff"]),
        "tags": [["a", "b"]],
    }
    path = f"{archive.root}/wide.parquet"
    pq.write_table(pa.table(columns), path)
    (row,) = read_catalog(archive, path)
    kept = json.loads(row.extra)
    assert kept.pop("far")
    assert kept == {"accession": 17, "day": "1905-02-01", "insured": "12.50", "stamp": "01ff", "tags": ["a", "b"]}


def test_other_columns_that_are_too_long_are_refused_with_the_row(archive):
    archive.write("catalog.csv", f"image,context_prompt,scan\na,x,y\nb,x,{'z' * 20_001}\n".encode())
    with pytest.raises(CatalogError, match="row 2: .*limit is 20000: leave some out, such as 'scan'"):
        list(read_catalog(archive, None))


def test_a_catalog_inside_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as file:
        file.writestr("catalog.csv", "image,context_prompt,rights\nbox/a.png,a ball,CC0\n")
    (row,) = read_catalog(Store(f"zip://::{tmp_path}/scans.zip"), None)
    assert (row.image, row.extra) == ("box/a.png", '{"rights": "CC0"}')


def test_columns_beside_the_known_ones_are_left_alone():
    check_columns(("image", "context_prompt", "target_prompt", "target_prompt_de", "images", "", ""), COLUMNS[:2])
    check_columns(("image", "context_prompt", "negative_prompt", "target"), COLUMNS[:2])
    check_columns(("image", "target_prompt"), RECOLOR_COLUMNS)
    with pytest.raises(ValueError, match="your 'context_promt'"):
        check_columns(("image", "target_prompt", "context_promt"), RECOLOR_COLUMNS)


def test_who_names_a_catalog_by_a_link_means_the_file(archive, tmp_path):
    (tmp_path / "prompts.csv").write_text("image,context_prompt\na.png,x\n")
    os.symlink(tmp_path / "prompts.csv", f"{archive.root}/named.csv")
    assert [row.image for row in read_catalog(archive, f"{archive.root}/named.csv")] == ["a.png"]


def test_a_catalog_that_is_not_there_or_of_another_kind(archive):
    with pytest.raises(CatalogError, match="no catalog at"):
        read_catalog(archive, f"{archive.root}/none.csv")
    with pytest.raises(CatalogError, match=r"\.csv, \.jsonl or \.parquet"):
        read_catalog(archive, f"{archive.root}/notes.txt")


def test_variants_are_named_by_their_prompts():
    names = {variant_name(c, t) for c in ("a", "b") for t in (None, "x", "y")}
    assert len(names) == 6
    assert variant_name("a", None).startswith("primary-")
    assert variant_name("a", "x").startswith("target-")
