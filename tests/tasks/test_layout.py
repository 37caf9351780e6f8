import pytest
from hypothesis import given, strategies as st

from diffcolor_scans.formats import SUFFIX
from tasks import layout
from tasks.layout import key_of, picture_stem, slug
from tasks.storage import check_key


@given(st.text(max_size=200))
def test_a_slug_is_always_a_safe_part_of_a_key(text):
    part = slug(text)
    assert check_key(part) == part
    assert len(part) <= 60
    assert part.isascii()
    assert "/" not in part
    assert not part.startswith(".")


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("/a/images/out/images/x-1/p.png", "images/x-1/p.png"),
        ("s3://bucket/run/fits/ab/c", "fits/ab/c"),
    ],
)
def test_the_key_in_a_uri(uri, key):
    assert key_of(uri) == key


def test_keys_are_found_again_in_their_addresses():
    stem = picture_stem("box 1/a.tif", "1" * 64, "2" * 64, primary=False)
    for key in (*(f"{stem}{suffix}" for suffix in SUFFIX.values()), layout.fit_folder("1" * 64, "3" * 64)):
        assert key_of(f"s3://museum/out/{key}") == check_key(key)


def test_a_picture_has_a_key_of_its_own_for_each_image_content_and_configuration():
    asked = [
        ("a", "1", "2", True),
        ("b", "1", "2", True),
        ("a", "3", "2", True),
        ("a", "1", "4", True),
        ("a", "1", "2", False),
    ]
    stems = {picture_stem(image, sha256 * 64, config * 64, primary=primary) for image, sha256, config, primary in asked}
    assert len(stems) == len(asked)


def test_what_a_run_writes_beside_pictures_and_fits_is_recognised():
    records = [layout.run_record(7), layout.run_beat(7), layout.run_end(7), layout.RESULTS, layout.pointer(3)]
    records += [
        layout.approval(7),
        layout.part(layout.part_name(7, 0, 8)),
        layout.part(layout.repair_name(8)),
        layout.damaged("images/a.png"),
    ]
    for key in records:
        assert layout.is_record(key), key
    for key in ("images/a/b.png", "fits/ab/c/fit.json", "letter.txt", "manifest/sub/x.parquet", "runs/notes"):
        assert not layout.is_record(key), key
    compacted = f"{layout.compaction(3, 'ab12')}/latest-00000.parquet"
    assert layout.COMPACTED_PART.fullmatch(compacted).group(1) == "000003"
    assert not layout.LOOSE_PART.fullmatch(compacted)
    assert layout.POINTER.fullmatch(layout.pointer(3)).group(1) == "000003"
    assert layout.RUN_RECORD.fullmatch(layout.run_record(7)).group(1) == "000007"
