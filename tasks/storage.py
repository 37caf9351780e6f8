"""A folder on any filesystem that fsspec knows: local, S3, GCS, the inside of a zip or tar file, ..."""

import errno
import hashlib
import lzma
import mimetypes
import os
import posixpath
import socket
import stat
import tarfile
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
import psutil
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from tasks.errors import InvalidKeyError, NoConditionalPutError, OversizeError, UnsafeFileError
from tasks.layout import PROBE, TEMPORARY

mimetypes.add_type("image/webp", ".webp")  # which Python 3.11 and 3.12 do not know
T = TypeVar("T")
NUM_TRIES = 6
SINGLE_PUT_BYTES = 64 * 2**20
"""A larger file is uploaded in parts, so that it is not held in memory."""
PROBE_LIFE = timedelta(hours=1)
"""An older probe belongs to a dead process: a living one needs minutes at most, retries included."""
_PERMANENT = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_PERMANENT_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTSUP}
_DAMAGED_MEMBER = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    KeyError,  # a link in a tar file to nothing
    AttributeError,  # a pipe or device in a tar file: tarfile returns None
    NotImplementedError,  # a compression that zipfile does not know
    RuntimeError,  # an encrypted member
)
"""What zipfile, tarfile and fsspec raise when one file inside an archive file cannot be read."""


def check_key(key: str) -> str:
    """`key` itself, if it is a plain relative path below the root. Raises InvalidKeyError."""
    size = len(key.encode(errors="surrogatepass"))
    parts = key.split("/")
    if size > 1024 or "\0" in key or "\\" in key or printable(key) != key or any(p in ("", ".", "..") for p in parts):
        raise InvalidKeyError(
            f"not a key below the root: {key[:200]!r}. A key is a relative path in UTF-8, of at most 1024 bytes, "
            "without a backslash, NUL, and empty, '.' or '..' parts: rename the file"
        )
    return key


def printable(name: str) -> str:
    """`name` itself; a name that is not Unicode, escaped with backslashes, so that it cannot pass for another file."""
    return name.encode(errors="backslashreplace").decode()


def joined(address: str, key: str) -> str:
    """The address of `key` below the folder `address`: in "zip://folder::scans.zip" the key goes before the "::"."""
    head, chained, rest = address.partition("::")
    if not chained or "://" not in head:
        return f"{address.rstrip('/')}/{key}"
    return f"{head if head.endswith('://') else head.rstrip('/') + '/'}{key}::{rest}"


def folder_of(address: str, key: str) -> str:
    """The folder below which `key` lies at `address`: the inverse of `joined`. Raises ValueError if it does not."""
    head, chained, rest = address.partition("::")
    if chained and "://" in head and head.endswith(key):
        return f"{head.removesuffix(key)}::{rest}"
    if chained or not address.endswith(f"/{key}"):
        raise ValueError(f"{address!r} is no address of {key!r}")
    return address.removesuffix(key).rstrip("/") or "/"


def locate(address: str) -> tuple["Store", str]:
    """The folder of one file, by its path or URL, and the file's key there. A local link stands for its file."""
    where = address if "://" in address else os.path.realpath(address)
    folder, _, name = where.rpartition("/")
    return Store(folder or "/"), name


def this_machine() -> str:
    """Names this machine, its last boot and its container: within them a process number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: no containers
        return socket.gethostname()


@dataclass(frozen=True)
class Store:
    """The folder `root` on the filesystem `fs`; keys are relative paths below it, with "/".

    url: a path or any fsspec URL; "zip://::scans.zip" and "tar://folder::s3://museum/scans.tar" are the
    inside of archive files, which are read-only.
    """

    url: str

    @cached_property
    def _located(self) -> tuple[Any, str]:
        fs, root = fsspec.core.url_to_fs(self.url)
        if isinstance(fs, AbstractArchiveFileSystem) and not root and fs.isdir("."):
            root = "."  # as `tar -c .` names its files
        return fs, root.rstrip("/")

    @property
    def fs(self) -> Any:
        """The fsspec filesystem."""
        return self._located[0]

    @property
    def root(self) -> str:
        """The folder's path on `fs`."""
        return str(self._located[1])

    @property
    def is_local(self) -> bool:
        """Whether the folder is on this machine's filesystem."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def is_archive_file(self) -> bool:
        """Whether the folder is inside a zip or tar file."""
        return isinstance(self.fs, AbstractArchiveFileSystem)

    @property
    def address(self) -> str:
        """The folder's full address, which holds in every working directory of this machine."""
        if self.is_local:
            return self.root
        if not self.is_archive_file:
            return self.url
        _, *chain = self.url.split("::")
        if "://" not in chain[-1]:
            chain[-1] = os.path.abspath(chain[-1])
        return "::".join((f"{self.url.partition('://')[0]}://{self.root}", *chain))

    def below(self, outer: "Store") -> str | None:
        """This folder's path below `outer`, as in "out/", "" if it is the same; None if it lies elsewhere."""
        if type(self.fs) is not type(outer.fs):
            return None
        mine, its = (f"{os.path.realpath(s.root) if s.is_local else s.root}/" for s in (self, outer))
        return mine[len(its) :] if mine.startswith(its) else None

    def uri(self, key: str) -> str:
        """The full address of a key: a path for a local folder, else a URL."""
        path = self._join(check_key(key))
        if self.is_archive_file:
            return joined(self.address, key)
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The bytes at `key`. Raises FileNotFoundError; OversizeError, without reading, if there are too many."""
        path = self._readable(key)
        if max_bytes is not None and (size := self.size(key)) > max_bytes:
            raise OversizeError(f"{key!r} has {size} bytes, the limit is {max_bytes}")
        return self.patiently(lambda: self._unpacked(key, lambda: bytes(self.fs.cat_file(path))))

    def sha256(self, key: str) -> str | None:
        """Hash of the file at `key`; None if there is no file that can be read."""
        try:
            return hashlib.sha256(self.read(key)).hexdigest()
        except (FileNotFoundError, UnsafeFileError):
            return None

    def size(self, key: str) -> int:
        """Bytes of the file at `key`. Raises FileNotFoundError."""
        path = self._path(key)
        return self.patiently(lambda: int(self.fs.info(path)["size"]))

    def open(self, key: str, *, block_bytes: int | None = None) -> IO[bytes]:
        """The file at `key` for reading as a stream. Raises FileNotFoundError.

        block_bytes: what is fetched at a time from an object store; by default the filesystem's own, several megabytes.
        """
        path = self._readable(key)
        self.fs.invalidate_cache()  # of sizes and ETags: the file may have been replaced
        return self.patiently(
            lambda: self._unpacked(key, lambda: cast(IO[bytes], self.fs.open(path, "rb", block_size=block_bytes)))
        )

    def _unpacked(self, key: str, call: Callable[[], T]) -> T:
        """`call()`. A file of a zip or tar that cannot be read raises UnsafeFileError: trying again does not help."""
        try:
            return call()
        except _DAMAGED_MEMBER as error:
            encrypted = "encrypted" in str(error)
            if not self.is_archive_file or (type(error) is RuntimeError and not encrypted):
                raise
            raise UnsafeFileError(
                f"{key!r} cannot be unpacked from {self.url!r} ({type(error).__name__}: {error}): pack it anew"
            ) from error

    def write(self, key: str, data: bytes) -> None:
        """Put `data` at `key` as a whole: a reader sees the old bytes or the new ones, never a part."""
        path = self._path(key)
        if not self.is_local:
            self.patiently(lambda: self.fs.pipe_file(path, data))
            return
        with self._temporary_file(path) as file:
            file.write(data)
            _flush(file)
            os.replace(file.name, path)

    def write_for_browsers(self, key: str, data: bytes) -> None:
        """`write`, but an object store also learns the file's type from its suffix: without it a browser shows nothing.

        fsspec's filesystems guess a type only where they upload a file from this machine.
        """
        path = self._path(key)
        if self.is_local:
            self.write(key, data)
            return
        with tempfile.NamedTemporaryFile(prefix="diffcolor-", suffix=posixpath.splitext(key)[1]) as file:
            file.write(data)
            file.flush()
            self.patiently(lambda: self.fs.put_file(file.name, path))

    @contextmanager
    def replacing(self, key: str) -> Iterator[IO[bytes]]:
        """A file to write to, which takes the place of `key` as a whole when the context ends without an error.

        It is written to a disk of this machine first, so it may be larger than memory.
        """
        path = self._path(key)
        if self.is_local:
            with self._temporary_file(path) as file:
                yield file
                _flush(file)
                os.replace(file.name, path)
            return
        with tempfile.NamedTemporaryFile(prefix="diffcolor-") as file:
            yield file
            file.flush()
            if os.path.getsize(file.name) <= SINGLE_PUT_BYTES:
                self.write(key, Path(file.name).read_bytes())
            else:  # a multipart upload, which also appears as a whole
                self.patiently(lambda: self.fs.put_file(file.name, path))

    def create(self, key: str, data: bytes) -> bool:
        """Put `data` at `key` only if nothing is there; whether it was put.

        One conditional PUT on an object store, a hard link on a local disk. A PUT whose answer was lost and
        that is sent again finds its own bytes there: that counts as put. Raises NoConditionalPutError, before
        anything is written, on a store that ignores the condition.
        """
        path = self._path(key)
        if self.is_local:
            with self._temporary_file(path) as file:
                file.write(data)
                _flush(file)
                try:
                    os.link(file.name, path)
                except FileExistsError:
                    return False
                return True
        _require_conditional_put(self.url)
        tries = 0

        def put() -> bool:
            nonlocal tries
            tries += 1
            return self._put_if_absent(path, data)

        won = self.patiently(put)
        return won or (tries > 1 and self.read(key) == data)

    def probe_conditional_put(self) -> bool:
        """Whether this object store refuses a second PUT to a key on demand. Costs two PUTs and a DELETE."""
        key = f"{PROBE}{uuid.uuid4().hex}"
        self.write(key, b"probe")
        try:
            return not self.patiently(lambda: self._put_if_absent(self._path(key), b"again"))
        except (TypeError, NotImplementedError):  # the filesystem does not know the mode
            return False
        finally:
            self.delete(key)

    def _put_if_absent(self, path: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(path, data, mode="create")
        except OSError as error:
            if isinstance(error, FileExistsError) or _is_precondition(error):
                return False
            raise
        return True

    def delete(self, key: str) -> None:
        """Remove the file at `key`, if it is there."""
        path = self._path(key)
        try:
            self.patiently(lambda: self.fs.rm_file(path))
        except FileNotFoundError:
            return
        self.fs.invalidate_cache()

    def has(self, key: str) -> bool:
        """Whether there is a file at `key` now."""
        path = self._path(key)
        self.fs.invalidate_cache()
        return self.patiently(lambda: bool(self.fs.exists(path)))

    def _join(self, key: str) -> str:
        return posixpath.join(self.root, key)

    def _path(self, key: str) -> str:
        """Where `key` is. Raises UnsafeFileError if symbolic links of a local store lead out of its root."""
        path = self._join(check_key(key))
        if self.is_local:
            root, real = os.path.realpath(self.root), os.path.realpath(path)
            if os.path.commonpath([root, real]) != root:
                raise UnsafeFileError(
                    f"a symbolic link leads from {path!r} to {real!r}, out of {root!r}: remove the link"
                )
        return path

    def _readable(self, key: str) -> str:
        """Where the file `key` is. Raises UnsafeFileError for a pipe or device, which has no end."""
        path = self._path(key)
        if not self.is_local:
            return path
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):
                raise UnsafeFileError(f"{path!r} is a broken symbolic link: remove it, or mend it") from error
            raise
        if not stat.S_ISREG(mode):
            raise UnsafeFileError(f"{path!r} is not a file but a folder (or a link to one), a pipe, socket or device")
        return path

    def patiently(self, call: Callable[[], T]) -> T:
        """`call()`, retried with growing random pauses while the store has trouble that may pass.

        When an object store denies access, the PermissionError gives the server's reason and what to check.
        """
        if self.is_local:
            return call()
        pause = wait_random_exponential(multiplier=0.5, max=20)
        tries = Retrying(
            retry=retry_if_exception(is_transient), stop=stop_after_attempt(NUM_TRIES), wait=pause, reraise=True
        )
        try:
            return tries(call)
        except UnsafeFileError:
            raise
        except PermissionError as error:
            raise PermissionError(
                f"{self.url!r} refuses a request ({error.__cause__ or error}): check the credentials, what they "
                "allow, and this machine's clock"
            ) from error

    @contextmanager
    def _temporary_file(self, path: str) -> Iterator[IO[bytes]]:
        """A new file on the disk of `path`, named after this process (see `sweep`); gone when the context ends."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(self._path(f"{TEMPORARY}/{_machine_digest()}~{os.getpid()}~{uuid.uuid4().hex}"))
        temporary.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
        finally:
            temporary.unlink(missing_ok=True)

    def sweep(self) -> int:
        """Delete what dead processes have left; how many files there were.

        On a local disk those are the temporary files of this machine's processes, elsewhere old probes.
        """
        stale = self._stale_temporaries() if self.is_local else self._stale_probes()
        for key in stale:
            self.delete(key)
        return len(stale)

    def _stale_temporaries(self) -> list[str]:
        found = Path(self.root, TEMPORARY).glob(f"{_machine_digest()}~*~*")
        return [f"{TEMPORARY}/{p.name}" for p in found if not psutil.pid_exists(int(p.name.split("~")[1]))]

    def _stale_probes(self) -> list[str]:
        try:
            names = [posixpath.basename(str(info["name"])) for info in self._list_folder(self.root)]
            return [name for name in names if name.startswith(PROBE) and self._age(name) > PROBE_LIFE]
        except FileNotFoundError:  # nothing is there yet, or another process sweeps too
            return []

    def _age(self, key: str) -> timedelta:
        path = self._path(key)
        return datetime.now(UTC) - self.patiently(lambda: cast(datetime, self.fs.modified(path)))

    def walk(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """(key, version token) of every file below `prefix`, a folder at a time, in no particular order.

        The token changes with the file's content: an ETag or checksum where the store has one, else size and
        time of last change. Links to folders are listed like files, not followed; pipes are listed too. A name
        that is not Unicode is listed as `printable`, which is no valid key.
        """
        self.fs.invalidate_cache()
        start = len(self.root) + 1 if self.root else 0
        folders = [self._join(prefix) if prefix else self.root]
        while folders:
            folder = folders.pop()
            if folder == self._join(TEMPORARY):
                continue
            try:
                infos = self._list_folder(folder)
            except (FileNotFoundError, NotADirectoryError):
                continue
            for info in infos:
                path = str(info["name"]).rstrip("/")
                if info["type"] == "directory":
                    if path != folder:
                        folders.append(path)
                elif len(path) > len(self.root):
                    yield printable(path[start:]), _version(info)

    def _list_folder(self, folder: str) -> Iterable[dict[str, Any]]:
        if self.is_local:  # fsspec would hold a whole folder in memory
            return filter(None, map(_local_info, os.scandir(folder)))
        return self.patiently(lambda: cast(Iterable[dict[str, Any]], self.fs.ls(folder, detail=True)))

    def list(self, prefix: str = "") -> list[tuple[str, str]]:
        """(key, version token) of every file below `prefix`, sorted by key."""
        return sorted(self.walk(prefix))

    def exists(self) -> bool:
        """Whether the folder is there. (On an object store: whether anything is below it.)"""
        return os.path.isdir(self.root) if self.is_local else bool(self.fs.exists(self.root))


def _require_conditional_put(url: str) -> None:
    """Raise NoConditionalPutError for a store on which two runs could both create the same file."""
    if Store(url).is_archive_file:
        raise NoConditionalPutError(f"{url!r} is inside an archive file, which is read-only: name another output")
    if not _has_conditional_put(url):
        raise NoConditionalPutError(
            f"the store of {url!r} ignores the condition of a conditional PUT (If-None-Match): two runs could "
            "overwrite each other's rows, so nothing is written there. Use a store that honours it, such as AWS S3 or "
            "Ceph's radosgw, or a local disk, and copy the finished output"
        )


@cache
def _has_conditional_put(url: str) -> bool:
    """The probe's answer, once per process."""
    return Store(url).probe_conditional_put()


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _machine_digest() -> str:
    return hashlib.sha256(this_machine().encode()).hexdigest()[:16]


def is_transient(error: BaseException) -> bool:
    """Whether a store's error may pass: anything but "not there", "not allowed", "full" and the like."""
    if isinstance(error, _PERMANENT) or not isinstance(error, Exception):
        return False
    return not (isinstance(error, OSError) and error.errno in _PERMANENT_ERRNO)


def _is_precondition(error: OSError) -> bool:
    """Whether a conditional PUT lost: s3fs turns the server's 412 into EINVAL."""
    cause = repr(error.__cause__)
    return (error.errno == errno.EINVAL and "412" in cause) or "PreconditionFailed" in cause


def _local_info(entry: os.DirEntry[str]) -> dict[str, Any] | None:
    """What a listing says of a file; None if the file is gone by now."""
    try:
        try:
            status = entry.stat()
        except OSError:  # a broken link
            status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    kind = "directory" if entry.is_dir(follow_symlinks=False) else "file"
    return {"name": entry.path, "type": kind, "size": status.st_size, "mtime": status.st_mtime}


def _version(info: dict[str, Any]) -> str:
    """The version token of a listed file. (CRC: of a file in a zip.)"""
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    changed = info.get("mtime") or info.get("LastModified") or info.get("updated") or info.get("last_modified")
    return str(tag).strip('"') if tag else f"{info.get('size')}-{changed or info.get('CRC') or ''}"
