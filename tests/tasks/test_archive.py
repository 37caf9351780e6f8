import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.archive import (
    CatalogError,
    is_image_key,
    read_catalog,
    variant_name,
)
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,prompt\na.png,x\n", "no column 'context_prompt'.*did you mean your 'prompt'"),
        ("file,context_prompt\na.png,x\n", "no column 'image'"),
        ("image,context_prompt\na.png,x\n,y\n", "row 2: no image"),
        (f"image,context_prompt\na.png,{'x' * 5000}\n", "row 1: context_prompt has 5000 characters, the limit is 4000"),
        (f"image,context_prompt\na.png,{'x' * 10_000_000}\n", "field larger than field limit"),
        ('image,context_prompt\n"a.png,x\n', "unexpected end of data"),
        ("image,context_prompt\na\xff.png,x\n", "utf-8"),
    ],
)
def test_a_catalog_that_is_wrong_says_where(archive, text, message):
    path = f"{archive.root}/bad.csv"
    with open(path, "w", encoding="latin-1") as file:
        file.write(text)
    with pytest.raises(CatalogError, match=message):
        list(read_catalog(archive, path))


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
