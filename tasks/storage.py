"""A folder on any filesystem that fsspec knows: local, S3, GCS, ..."""

import errno
import hashlib
import os
import posixpath
import re
import socket
import stat
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
import psutil
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

T = TypeVar("T")
NUM_TRIES = 6
CLAIM_SECONDS = 2.0
"""How long a claim on a key stands before it is used, on stores without a conditional PUT."""
TEMPORARY = ".tmp"
"""Folder of a local store for files that are not whole yet."""
PROBE = "probe-"
"""How keys begin that are written only to see what a store does with them."""
PROBE_LIFE = timedelta(hours=1)
"""A probe that is older was left by a process that is dead: all its tries take minutes."""
_LASTING = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_LASTING_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTSUP}


class InvalidKeyError(ValueError):
    """A key that would leave the store's root, or that no store can hold."""


class UnsafeFileError(PermissionError):
    """What lies at a key of a local store leads out of its root, or is no file that can be read to its end."""


class OversizeError(ValueError):
    """A file larger than what is read at once."""


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
    """`name` itself, or, if it is not Unicode, escaped: with backslashes, so that no file is taken for it."""
    return name.encode(errors="backslashreplace").decode()


def this_machine() -> str:
    """What must be equal for a process number to mean the same process: machine, its start, container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: no containers
        return socket.gethostname()


def slug(text: str, limit: int = 60) -> str:
    """`text` as a file name part: ASCII letters, digits, '.', '_' and '-', never empty or starting with '.'."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip(".-_")[:limit].rstrip(".-_") or "image"


@dataclass(frozen=True)
class Store:
    """The folder `root` on the filesystem `fs`; keys are relative paths below it, with "/"."""

    url: str

    @cached_property
    def _located(self) -> tuple[Any, str]:
        fs, root = fsspec.core.url_to_fs(self.url)
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
    def address(self) -> str:
        """The folder's own full address: a local one's path from the root of the file system."""
        return self.root if self.is_local else self.url

    def uri(self, key: str) -> str:
        """The full address of a key: a path for a local folder, else a URL."""
        path = posixpath.join(self.root, check_key(key))
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The bytes at `key`. Raises FileNotFoundError; OversizeError, without reading, if there are too many."""
        path = self._readable(key)
        if max_bytes is not None and (size := self.size(key)) > max_bytes:
            raise OversizeError(f"{key!r} has {size} bytes, the limit is {max_bytes}")
        return self.patiently(lambda: bytes(self.fs.cat_file(path)))

    def size(self, key: str) -> int:
        """Bytes of the file at `key`. Raises FileNotFoundError."""
        path = self._path(key)
        return self.patiently(lambda: int(self.fs.info(path)["size"]))

    def open(self, key: str) -> IO[bytes]:
        """The file at `key` for reading as a stream. Raises FileNotFoundError."""
        path = self._readable(key)
        return self.patiently(lambda: cast(IO[bytes], self.fs.open(path, "rb")))

    def write(self, key: str, data: bytes) -> None:
        """Put `data` at `key` as a whole: a reader sees the old bytes or the new ones, never a part."""
        path = self._path(key)
        if not self.is_local:
            self.patiently(lambda: self.fs.pipe_file(path, data))
            return
        temporary = self._write_temporary(path, data)
        os.replace(temporary, path)

    def create(self, key: str, data: bytes) -> bool:
        """Put `data` at `key` only if nothing is there; whether it was put.

        One conditional PUT on object stores that have it, else a claim that costs `CLAIM_SECONDS`. A
        PUT whose answer was lost and that is sent again finds its own bytes there: that counts as put.
        """
        path = self._path(key)
        if self.is_local:
            temporary = self._write_temporary(path, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            return True
        if not _has_conditional_put(self.url):
            return self._create_by_claim(key, data)
        tries = 0

        def put() -> bool:
            nonlocal tries
            tries += 1
            return self._put_if_absent(path, data)

        won = self.patiently(put)
        return won or (tries > 1 and self.read(key) == data)

    def probe_conditional_put(self) -> bool:
        """Whether this object store refuses a second PUT to a key on demand: found out by two that must differ."""
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

    def _create_by_claim(self, key: str, data: bytes) -> bool:
        """For stores without a conditional PUT: of those who claim the key at one time the first by name puts.

        Holds as long as a PUT and a listing take less than `CLAIM_SECONDS`. Claims that a killed
        process has left are known by outliving twice that.
        """
        old = self._claims(key)
        if old:
            time.sleep(2 * CLAIM_SECONDS)
            for claim in old & self._claims(key):
                self.delete(claim)
        mine = f"{key}.claim-{uuid.uuid4().hex}"
        if self.has(key):
            return False
        self.write(mine, b"")
        try:
            time.sleep(CLAIM_SECONDS)
            if self.has(key) or min(self._claims(key), default=None) != mine:
                return False
            self.write(key, data)
            return True
        finally:
            self.delete(mine)

    def _claims(self, key: str) -> set[str]:
        return {found for found, _ in self.walk(posixpath.dirname(key)) if found.startswith(f"{key}.claim-")}

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

    def _path(self, key: str) -> str:
        """Where `key` is. Raises UnsafeFileError if symbolic links of a local store lead out of its root."""
        path = posixpath.join(self.root, check_key(key))
        if self.is_local:
            root, real = os.path.realpath(self.root), os.path.realpath(path)
            if os.path.commonpath([root, real]) != root:
                raise UnsafeFileError(
                    f"a symbolic link leads from {path!r} to {real!r}, out of {root!r}: remove the link"
                )
        return path

    def _readable(self, key: str) -> str:
        """Where the file `key` is. A pipe or device could be read for ever: raises UnsafeFileError."""
        path = self._path(key)
        if not self.is_local:
            return path
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):
                raise UnsafeFileError(f"{path!r} is a symbolic link to nothing: remove it, or mend it") from error
            raise
        if not stat.S_ISREG(mode):
            raise UnsafeFileError(f"{path!r} is no file but a folder (or a link to one), a pipe, a socket or a device")
        return path

    def patiently(self, call: Callable[[], T]) -> T:
        """`call()`, tried again with growing random pauses while the store has trouble that may pass.

        An object store's PermissionError is raised anew, with the server's own word for it and what to check.
        """
        if self.is_local:
            return call()
        pause = wait_random_exponential(multiplier=0.5, max=20)
        tries = Retrying(
            retry=retry_if_exception(is_transient), stop=stop_after_attempt(NUM_TRIES), wait=pause, reraise=True
        )
        try:
            return tries(call)
        except PermissionError as error:
            raise PermissionError(
                f"{self.url!r} refuses a request ({error.__cause__ or error}): check the credentials, what they "
                "allow, and this machine's clock"
            ) from error

    def _write_temporary(self, path: str, data: bytes) -> str:
        """`data` in a file of its own on the same disk, named after this process: see `sweep`."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(self._path(f"{TEMPORARY}/{_machine_digest()}~{os.getpid()}~{uuid.uuid4().hex}"))
        temporary.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return str(temporary)

    def sweep(self) -> int:
        """Delete what dead processes have left: of this machine on a local disk, else probes; how many there were."""
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
        except FileNotFoundError:  # there is nothing yet, or another sweeps too
            return []

    def _age(self, key: str) -> timedelta:
        path = self._path(key)
        return datetime.now(UTC) - self.patiently(lambda: cast(datetime, self.fs.modified(path)))

    def walk(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """(key, version token) of every file below `prefix`, a folder at a time, in no promised order.

        The token changes when the file's content does: an ETag where the store has one, else size
        and time of last change. Links to folders are not followed: they are listed like files, as are
        pipes. A name that is not Unicode is listed as `printable`, which is no valid key.
        """
        self.fs.invalidate_cache()
        folders = [posixpath.join(self.root, prefix) if prefix else self.root]
        while folders:
            folder = folders.pop()
            if folder == posixpath.join(self.root, TEMPORARY):
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
                    yield printable(path[len(self.root) + 1 :]), _version(info)

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


@cache
def _has_conditional_put(url: str) -> bool:
    """What the probe says, once a process."""
    return Store(url).probe_conditional_put()


def _machine_digest() -> str:
    return hashlib.sha256(this_machine().encode()).hexdigest()[:16]


def is_transient(error: BaseException) -> bool:
    """Whether a store's error may pass: anything but "not there", "not allowed", "full" and the like."""
    if isinstance(error, _LASTING) or not isinstance(error, Exception):
        return False
    return not (isinstance(error, OSError) and error.errno in _LASTING_ERRNO)


def _is_precondition(error: OSError) -> bool:
    """Whether a conditional PUT lost: s3fs turns the server's 412 into EINVAL."""
    cause = repr(error.__cause__)
    return (error.errno == errno.EINVAL and "412" in cause) or "PreconditionFailed" in cause


def _local_info(entry: os.DirEntry[str]) -> dict[str, Any] | None:
    """What is listed of a file; None if it is gone meanwhile."""
    try:
        try:
            status = entry.stat()
        except OSError:  # a link to nothing
            status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    kind = "directory" if entry.is_dir(follow_symlinks=False) else "file"
    return {"name": entry.path, "type": kind, "size": status.st_size, "mtime": status.st_mtime}


def _version(info: dict[str, Any]) -> str:
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    changed = info.get("mtime") or info.get("LastModified") or info.get("updated") or info.get("last_modified") or ""
    return str(tag).strip('"') if tag else f"{info.get('size')}-{changed}"
