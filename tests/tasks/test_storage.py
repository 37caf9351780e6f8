import io
import os
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tasks import storage
from tasks.errors import InvalidKeyError, NoConditionalPutError, OversizeError, UnsafeFileError
from tasks.lease import hold_output
from tasks.storage import Store
from tests.conftest import ON_S3_TOO


@ON_S3_TOO
def test_write_read_list(store):
    store.write("a/b.txt", b"one")
    store.write("c.txt", b"two")
    assert store.read("a/b.txt") == b"one"
    assert [key for key, _ in store.list()] == ["a/b.txt", "c.txt"]
    assert [key for key, _ in store.list("a")] == ["a/b.txt"]
    assert store.exists()
    with pytest.raises(FileNotFoundError):
        store.read("nothing")


def test_a_store_that_refuses_the_credentials_is_named_with_its_own_word(s3_url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        with pytest.raises(PermissionError, match=rf"'{s3_url}' refuses a request .*SignatureDoesNotMatch.*clock"):
            Store(s3_url).write("a.txt", b"one")
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@ON_S3_TOO
def test_create_has_one_winner(store):
    assert store.create("part", b"first")
    assert not store.create("part", b"second")
    assert store.read("part") == b"first"


def race(store, key, num_threads):
    """Threads that create `key` all at once, one of which must win; what they leave is their bytes alone."""
    with ThreadPoolExecutor(num_threads) as threads:
        won = list(threads.map(lambda i: store.create(key, b"%d" % i), range(num_threads)))
    assert sum(won) == 1
    assert store.read(key) == b"%d" % won.index(True)
    assert [found for found, _ in store.list()] == [key]


@ON_S3_TOO
def test_create_has_one_winner_among_threads(store):
    race(store, "part", 16)
    if store.is_local:
        assert os.listdir(f"{store.root}/.tmp") == []


class OverwritingFileSystem(MemoryFileSystem):
    """A store that ignores the condition of a PUT."""

    protocol = "overwriting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path, value, mode="overwrite", **options):
        super().pipe_file(path, value, mode="overwrite", **options)


@pytest.fixture
def overwriting():
    fsspec.register_implementation("overwriting", OverwritingFileSystem, clobber=True)
    yield Store("overwriting://archive")
    OverwritingFileSystem.store.clear()


def test_the_probe_tells_who_has_conditional_puts(overwriting):
    assert Store("memory://probed").probe_conditional_put()
    assert not overwriting.probe_conditional_put()
    assert overwriting.list() == []


def test_a_store_without_conditional_puts_is_refused_before_anything_is_written(overwriting):
    with pytest.raises(NoConditionalPutError, match="'overwriting://archive' ignores .*AWS S3"):
        overwriting.create("part", b"")
    with pytest.raises(NoConditionalPutError), hold_output(overwriting, {}):
        pass
    assert overwriting.list() == []


def test_a_store_is_probed_once(monkeypatch):
    probes = []
    monkeypatch.setattr(Store, "probe_conditional_put", lambda self: probes.append(self.url) or True)
    for number in range(3):
        assert Store("memory://probed-once").create(f"part-{number}", b"")
    assert probes == ["memory://probed-once"]


def test_a_probe_outlasts_a_passing_trouble(monkeypatch):
    store, calls = Store("memory://probed-with-trouble"), []
    put = MemoryFileSystem.pipe_file

    def troubled(self, path, value, mode="overwrite", **options):
        if "probed-with-trouble" in path:  # not what threads of other tests write
            calls.append(mode)
            if len(calls) in (1, 3):
                raise OSError("503 Slow Down")
        return put(self, path, value, mode=mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", troubled)
    assert store.probe_conditional_put()
    assert calls == ["overwrite", "overwrite", "create", "create"]


def test_the_version_changes_with_the_content(tmp_path):
    store = Store(str(tmp_path))
    store.write("a", b"one")
    os.utime(tmp_path / "a", ns=(1, 1))
    before = dict(store.list())["a"]
    store.write("a", b"three")
    assert dict(store.list())["a"] != before


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\0b", "a\\b", "x" * 1025])
def test_keys_cannot_leave_the_root(tmp_path, key):
    store = Store(str(tmp_path))
    for call in (store.read, store.uri, lambda k: store.write(k, b""), lambda k: store.create(k, b"")):
        with pytest.raises(InvalidKeyError):
            call(key)


def test_a_name_that_is_not_unicode_is_listed_escaped(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"bad\xff.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this disk has Unicode names only")
    store = Store(str(tmp_path))
    ((key, _),) = store.list()
    assert key == "bad\\udcff.png"
    with pytest.raises(InvalidKeyError, match="rename the file"):
        store.read(key)
    with pytest.raises(InvalidKeyError):
        store.read("bad\udcff.png")


def test_links_do_not_lead_out_of_the_root(tmp_path):
    elsewhere, store = tmp_path / "elsewhere", Store(str(tmp_path / "out"))
    elsewhere.mkdir()
    (elsewhere / "secret").write_bytes(b"secret")
    store.write("here/a", b"a")
    for name, target in (("images", elsewhere), ("link.png", elsewhere / "secret"), ("inside", f"{store.root}/here")):
        os.symlink(target, f"{store.root}/{name}")
    for call in (store.read, store.open, lambda k: store.write(k, b""), lambda k: store.create(k, b""), store.delete):
        for key in ("link.png", "images/secret"):
            with pytest.raises(UnsafeFileError, match="elsewhere"):
                call(key)
    assert os.listdir(elsewhere) == ["secret"]
    assert (elsewhere / "secret").read_bytes() == b"secret"
    assert store.read("inside/a") == b"a"
    assert [key for key, _ in store.list()] == ["here/a", "images", "inside", "link.png"]


def test_temporary_files_do_not_leave_the_root(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out/.tmp")
    with pytest.raises(UnsafeFileError):
        Store(str(tmp_path / "out")).write("a", b"")


def test_what_is_no_file_is_not_read(tmp_path):
    store = Store(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nothing", tmp_path / "dangling")
    os.symlink("loop", tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    os.symlink("folder", tmp_path / "to-folder")
    assert [key for key, _ in store.list()] == ["dangling", "loop", "pipe", "to-folder"]
    for key in ("dangling", "loop", "pipe", "to-folder", "folder"):
        with pytest.raises(UnsafeFileError, match=key):
            store.read(key)
    with pytest.raises(FileNotFoundError):
        store.read("nothing")


def test_a_folder_is_listed_without_holding_it_in_memory(tmp_path, monkeypatch):
    store, stats = Store(str(tmp_path)), []
    for number in range(20):
        store.write(f"{number}", b"")
    info = storage._local_info
    monkeypatch.setattr(storage, "_local_info", lambda entry: stats.append(entry.name) or info(entry))
    next(store.walk())
    assert len(stats) < 20


def test_a_file_that_vanishes_while_it_is_listed_is_left_out(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write("a", b"")
    store.write("b", b"")
    info = storage._local_info

    def after_the_deletion(entry):
        if entry.name == "a":
            os.unlink(entry.path)
        return info(entry)

    monkeypatch.setattr(storage, "_local_info", after_the_deletion)
    assert [key for key, _ in store.list()] == ["b"]


def test_the_probes_of_dead_processes_are_swept():
    store = Store("memory://swept")
    assert store.sweep() == 0
    for key in ("probe-old", "probe-new", "a"):
        store.write(key, b"probe")
    store.fs.store["/swept/probe-old"].modified -= storage.PROBE_LIFE * 2
    store.fs.store["/swept/a"].modified -= storage.PROBE_LIFE * 2
    assert store.sweep() == 1
    assert [key for key, _ in store.list()] == ["a", "probe-new"]


# ------------------------------------------------------------------ large files


@ON_S3_TOO
def test_a_file_is_replaced_as_a_whole(store, monkeypatch):
    monkeypatch.setattr(storage, "SINGLE_PUT_BYTES", 10)
    for data in (b"old", b"new" * 2_000_000):
        with store.replacing("a/file") as file:
            file.write(data)
            assert not store.has("a/file") or store.read("a/file") == b"old"
        assert store.read("a/file") == data
    with pytest.raises(TypeError), store.replacing("a/file") as file:
        file.write("not bytes")
    assert store.size("a/file") == 6_000_000
    assert [key for key, _ in store.list()] == ["a/file"]
    if store.is_local:
        assert os.listdir(f"{store.root}/.tmp") == []


# ------------------------------------------------------------------ archives inside zip and tar files

PACKED = {"a.png": b"first", "box 1/ü, 日.png": b"second", "box 1/inner/c.png": b"third"}


@pytest.fixture(params=["zip", "tar", "tar.gz", "tar with ./"])
def packed(request, tmp_path):
    """The same files packed in several ways."""
    kind, _, with_dot = request.param.partition(" with ")
    path = tmp_path / f"scans.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in PACKED.items():
                file.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as file:
            for name, data in PACKED.items():
                info = tarfile.TarInfo(with_dot + name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


def test_an_archive_file_is_read_like_a_folder(packed):
    kind = packed.name.split(".")[1]
    store = Store(f"{kind}://::{packed}")
    assert store.exists()
    assert [key for key, _ in store.list()] == sorted(PACKED)
    assert {key: store.read(key) for key in PACKED} == PACKED
    with store.open("a.png") as file:
        assert file.read() == b"first"
    assert store.has("box 1/inner/c.png")
    with pytest.raises(FileNotFoundError):
        store.read("none.png")
    with pytest.raises(OversizeError):
        store.read("a.png", max_bytes=4)


def test_a_folder_inside_an_archive_file(packed):
    kind = packed.name.split(".")[1]
    within = "./box 1" if Store(f"{kind}://::{packed}").root == "." else "box 1"
    store = Store(f"{kind}://{within}::{packed}")
    assert [key for key, _ in store.list()] == ["inner/c.png", "ü, 日.png"]
    assert store.read("inner/c.png") == b"third"


def test_the_address_of_an_archive_file_holds_in_every_folder(packed, monkeypatch):
    kind = packed.name.split(".")[1]
    monkeypatch.chdir(packed.parent)
    address = Store(f"{kind}://::{packed.name}").address
    monkeypatch.chdir("/")
    again = Store(address)
    assert again.read("a.png") == b"first"
    with fsspec.open(again.uri("box 1/inner/c.png")) as file:
        assert file.read() == b"third"
    assert again.uri("a.png") == storage.joined(address, "a.png")


def test_an_archive_file_is_no_output(packed):
    with pytest.raises(NoConditionalPutError, match="inside an archive file"):
        Store(f"{packed.name.split('.')[1]}://::{packed}").create("part", b"")


def test_the_version_of_a_packed_file_changes_with_its_content(tmp_path):
    versions = []
    for data in (b"one", b"two"):
        with zipfile.ZipFile(tmp_path / "scans.zip", "w") as file:
            file.writestr("a.png", data)
        versions += [version for _, version in Store(f"zip://::{tmp_path}/scans.zip").list()]
    assert versions[0] != versions[1]


def test_a_damaged_file_in_a_zip_is_the_files_fault(tmp_path):
    path = tmp_path / "scans.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", b"first")
    path.write_bytes(path.read_bytes().replace(b"first", b"fjrst"))
    with pytest.raises(UnsafeFileError, match="'a.png' cannot be unpacked.*CRC"):
        Store(f"zip://::{path}").read("a.png")


def test_links_and_pipes_in_a_tar_are_the_files_fault(tmp_path):
    with tarfile.open(tmp_path / "scans.tar", "w") as file:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("../out.png", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    store = Store(f"tar://::{tmp_path}/scans.tar")
    for key in ("link.png", "pipe.png"):
        with pytest.raises(UnsafeFileError, match="cannot be unpacked"):
            store.read(key)
    with pytest.raises(InvalidKeyError):
        store.read("../out.png")


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        ("/scans", "/scans/a b.png"),
        ("s3://museum/scans/", "s3://museum/scans/a b.png"),
        ("zip://::/x.zip", "zip://a b.png::/x.zip"),
        ("zip://box::s3://museum/x.zip", "zip://box/a b.png::s3://museum/x.zip"),
        ("simplecache::s3://museum/scans", "simplecache::s3://museum/scans/a b.png"),
    ],
)
def test_the_address_of_a_key(address, uri):
    assert storage.joined(address, "a b.png") == uri


def test_what_an_object_store_calls_a_key(s3_url):
    assert Store(s3_url).uri("a.png") == f"{s3_url}/a.png"
    assert Store(s3_url).probe_conditional_put()
