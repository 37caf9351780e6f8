import csv
import hashlib
import io
import json

import bagit
import numpy as np
import pytest

from diffcolor_core import Picture
from diffcolor_scans.decoding import decode
from diffcolor_scans.formats import Provenance, encode
from tasks.columns import APPROVALS_SCHEMA
from tasks.errors import ExportError, InvalidKeyError, UnsafeFileError
from tasks.export import export
from tasks.layout import EXPORT_TABLE, approval
from tasks.lease import hold_output
from tasks.manifest import commit_part, encode_rows
from tasks.storage import Store
from tests.conftest import ON_S3_TOO
from tests.tasks.test_manifest import START, row


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    return encode(Picture(pixels), "png", Provenance("DiffColor", "demo", f"prompt {number}"))


def ok_row(store, image, variant="target-1", **values):
    """A row whose picture is written."""
    data = png(len(image) + len(variant))
    key = f"images/{image.replace('/', '-')}-{variant}/target.png"
    store.write(key, data)
    sha256 = hashlib.sha256(data).hexdigest()
    return row(image, variant, generation=1, output_uri=store.uri(key), output_sha256=sha256, **values)


@pytest.fixture
def output(store):
    """An image with two variants, two that differ in their suffix only, one in another folder, one quarantined."""
    catalog = json.dumps({"object id": 7, "rights": "=public, domain", "file": "box 1"})
    rows = [ok_row(store, "a.jpg", f"target-{n}", target_prompt=f"a red, {n}") for n in (1, 2)]
    rows += [ok_row(store, "b.jpg"), ok_row(store, "b.tif"), ok_row(store, "box 1/ünter.tif", catalog_columns=catalog)]
    rows += [row("bad.png", generation=1, status="quarantined", error_class="E", error_message="bad")]
    commit_part(store, "000001-0", rows)
    approved = {"image_key": "b.tif", "variant": "target-1", "output_sha256": rows[3]["output_sha256"]}
    approved |= {"choice": "approved", "choice_note": "", "choice_by": "Ada", "choice_at": START}
    store.create(approval(1), encode_rows([approved], APPROVALS_SCHEMA))
    return store


@pytest.fixture
def destination(store, tmp_path):
    """A folder on the same kind of store."""
    return Store(str(tmp_path / "hand over")) if store.is_local else Store(f"{store.url}-hand over")


NAMES = ["a-target-1.png", "a-target-2.png", "b.jpg.png", "b.tif.png", "box 1/ünter.png"]


def files(destination):
    return {key: destination.read(key) for key, _ in destination.walk()}


def table(destination, key=EXPORT_TABLE):
    return list(csv.DictReader(io.StringIO(destination.read(key).decode())))


def test_pictures_go_under_the_archives_own_names_with_a_table(output, destination):
    done = export(output, destination)
    assert (done.num_written, done.num_there) == (5, 0)
    assert sorted(files(destination)) == sorted([*NAMES, EXPORT_TABLE])
    rows = table(destination)
    assert [r["file"] for r in rows] == NAMES
    assert [r["image"] for r in rows] == ["a.jpg", "a.jpg", "b.jpg", "b.tif", "box 1/ünter.tif"]
    for r in rows:
        assert hashlib.sha256(destination.read(r["file"])).hexdigest() == r["sha256"]
    assert [r["choice"] for r in rows] == ["", "", "", "approved", ""]
    last = rows[-1]
    assert (last["object id"], last["rights"], last["catalog_file"]) == ("7", "=public, domain", "box 1")
    assert rows[0]["target_prompt"] == "a red, 1"


@ON_S3_TOO
def test_an_export_that_was_stopped_goes_on_and_writes_nothing_twice(output, destination, monkeypatch):
    create, put = Store.create, []

    def stop_after_two(self, key, data):
        if self == destination:
            if len(put) == 2:
                raise KeyboardInterrupt
            put.append(key)
        return create(self, key, data)

    monkeypatch.setattr("tasks.export.NUM_TRANSFERS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            export(output, destination)
    assert sorted(files(destination)) == sorted(put), "no table before all pictures are there"
    done = export(output, destination)
    assert (done.num_written, done.num_there) == (3, 2)
    before = files(destination)
    done = export(output, destination)
    assert (done.num_written, done.num_there) == (0, 5)
    assert files(destination) == before


def test_no_other_file_is_overwritten(output, destination):
    destination.write(NAMES[2], b"somebody's own")
    with pytest.raises(ExportError, match=r"1 of 5 pictures .*b\.jpg\.png"):
        export(output, destination)
    found = files(destination)
    assert found.pop(NAMES[2]) == b"somebody's own"
    assert sorted(found) == sorted(name for name in NAMES if name != NAMES[2])  # the others, and no table
    destination.delete(NAMES[2])
    assert export(output, destination).num_written == 1


def test_a_table_that_is_not_ours_is_left_alone(output, destination):
    destination.write(EXPORT_TABLE, b"my,own\n1,2\n")
    with pytest.raises(ExportError, match="is not the table of an export"):
        export(output, destination)
    assert files(destination) == {EXPORT_TABLE: b"my,own\n1,2\n"}


def test_only_what_is_asked_for(output, destination):
    export(output, destination, approved=True)
    assert sorted(files(destination)) == sorted(["b.png", EXPORT_TABLE])
    done = export(output, Store(f"{destination.url} 2"), where="target_prompt like 'a red%' or image_key like 'box%'")
    assert done.num_written == 3
    nothing = Store(f"{destination.url} 3")
    assert export(output, nothing, where="false").num_written == 0
    assert not files(nothing)


HARMFUL = [
    "true; copy (select 1) to '{folder}/stolen.csv'",
    "(select count(*) from read_csv('{folder}/secret.csv')) > 0",
    "(select count(*) from read_text('{folder}/secret.csv')) > 0",
    "(select count(*) from '{folder}/secret.csv') > 0",
    "(select count(*) from glob('{folder}/*')) > 0",
    "true) union all (select * from results",
    "(copy results to '{folder}/stolen.csv')",
    "true, false",
    "(select count(*) from rows) > 0",  # a variable of the function that asks
    "true as x) or (false",
    "nonsense = 1",
    "$suffix is null",
    "",
]


@pytest.mark.parametrize("where", HARMFUL)
def test_a_condition_reads_and_writes_no_file(where, tmp_path):
    output = Store(str(tmp_path / "out"))
    commit_part(output, "000001-0", [ok_row(output, "a.png")])
    (tmp_path / "secret.csv").write_text("a\n1\n")
    with pytest.raises(ExportError, match="--where"):
        export(output, Store(str(tmp_path / "d")), where=where.format(folder=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "secret.csv"]


def test_another_format_has_the_same_pixels_and_metadata(output, destination):
    export(output, destination, image_format="tiff")
    assert "box 1/ünter.tif" in files(destination)
    stored, exported = decode(png(len("b.tif") + len("target-1"))), decode(destination.read("b.tif.tif"))
    np.testing.assert_array_equal(stored.samples, exported.samples)
    assert b"compositeWithTrainedAlgorithmicMedia" in exported.metadata.xmp
    assert export(output, destination, image_format="tiff").num_there == 5


def test_an_access_copy_is_handed_on_as_it_is(store, destination):
    store.write("images/a/copy.jpg", b"small")
    access = {"access_uri": store.uri("images/a/copy.jpg"), "access_sha256": hashlib.sha256(b"small").hexdigest()}
    commit_part(store, "000001-0", [ok_row(store, "a.png", **access)])
    export(store, destination, image_format="jpeg")
    assert files(destination)["a.jpg"] == b"small"


def test_names_stay_apart_even_if_an_image_is_called_like_anothers_picture(store, destination):
    images = ["a.jpg", "a.tif", "a.jpg.jpg", "no suffix", "dir.x/no suffix"]
    commit_part(store, "000001-0", [ok_row(store, image) for image in images])
    export(store, destination)
    names = {r["image"]: r["file"] for r in table(destination)}
    assert names == {
        "a.jpg": "a.jpg.png",
        "a.tif": "a.tif.png",
        "a.jpg.jpg": "a.jpg.jpg.png",
        "no suffix": "no suffix.png",
        "dir.x/no suffix": "dir.x/no suffix.png",
    }


@pytest.mark.parametrize("image", ["../../stolen.png", "/etc/stolen.png", "a/../../../b.png", "a\\b.png"])
def test_a_key_that_leads_out_is_refused_before_anything_is_written(tmp_path, image):
    output, destination = Store(str(tmp_path / "out")), Store(str(tmp_path / "d"))
    rows = [ok_row(output, "good.png"), ok_row(output, "x.png") | {"image_key": image}]
    commit_part(output, "000001-0", rows)
    with pytest.raises(InvalidKeyError):
        export(output, destination)
    assert not destination.exists()


def test_a_link_that_leads_out_is_not_followed(tmp_path):
    output, destination = Store(str(tmp_path / "out")), Store(str(tmp_path / "d"))
    commit_part(output, "000001-0", [ok_row(output, "box/a.png")])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "box").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError):
        export(output, destination)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_picture_that_was_changed_is_not_handed_on(output, destination):
    (key,) = [key for key, _ in output.walk("images") if "b.tif" in key]
    output.write(key, b"changed")
    with pytest.raises(ExportError, match="verify OUTPUT --repair"):
        export(output, destination)
    assert "b.tif.png" not in files(destination)


def test_neither_the_output_nor_the_archive_is_a_destination(tmp_path):
    output, archive = Store(str(tmp_path / "out")), tmp_path / "scans"
    archive.mkdir()
    with hold_output(output, {"run_id": "r", "archive": str(archive), "whole_archive": True}) as lease:
        commit_part(output, "000001-0", [ok_row(output, "a.png")])
        lease.end({})
    for inside in (output.url, f"{output.url}/export", str(archive), str(archive / "colour")):
        with pytest.raises(ExportError, match="name a folder elsewhere"):
            export(output, Store(inside))
    assert not list(archive.iterdir())
    assert export(output, Store(f"{output.url}-2")).num_written == 1


# ------------------------------------------------------------------ bags


@ON_S3_TOO
def test_a_bag_is_valid_and_holds_exactly_what_was_asked_for(output, tmp_path):
    destination = Store(str(tmp_path / "the bag"))
    export(output, destination, bag=True)
    bag = bagit.Bag(destination.url)
    bag.validate()
    assert sorted(bag.payload_entries()) == sorted(f"data/{name}" for name in [*NAMES, EXPORT_TABLE])
    assert bag.algorithms == ["sha256"]
    assert sorted(p.name for p in (tmp_path / "the bag").iterdir()) == [
        "bag-info.txt",
        "bagit.txt",
        "data",
        "manifest-sha256.txt",
        "tagmanifest-sha256.txt",
    ]
    (tmp_path / "the bag/data" / NAMES[0]).write_bytes(b"spoilt")
    with pytest.raises(bagit.BagValidationError):
        bagit.Bag(destination.url).validate()


def test_a_bag_that_was_stopped_is_finished_by_the_same_command(output, tmp_path, monkeypatch):
    destination = Store(str(tmp_path / "bag"))

    def stopped(self, manifests):
        (tmp_path / "bag" / "manifest-sha256.txt").write_text("half a li")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bagit.Bag, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            export(output, destination, bag=True)
    done = export(output, destination, bag=True)
    assert (done.num_written, done.num_there) == (0, 5)
    bagit.Bag(destination.url).validate()


def test_a_bag_takes_in_no_other_file(output, tmp_path):
    destination = Store(str(tmp_path / "bag"))
    export(output, destination, approved=True, bag=True)
    with pytest.raises(ExportError, match=r"1 files .*data/b\.png"):  # b.tif is called b.tif.png beside b.jpg
        export(output, destination, bag=True)
    bagit.Bag(destination.url).validate()
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(ExportError, match="letter.txt"):
        export(output, Store(str(other)), bag=True)
    assert [p.name for p in other.iterdir()] == ["letter.txt"]


def test_a_bag_is_made_in_a_local_folder(output):
    with pytest.raises(ExportError, match="local folder"):
        export(output, Store("memory://bag"), bag=True)
