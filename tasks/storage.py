"""A folder on any filesystem that fsspec knows: local, S3, GCS, ..."""

import errno
import os
import posixpath
import re
import unicodedata
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class InvalidKeyError(ValueError):
    """A key that would leave the store's root, or that no store can hold."""


def check_key(key: str) -> str:
    """`key` itself, if it is a plain relative path below the root.

    Raises InvalidKeyError for an empty, absolute, over-long or NUL-holding key and for "." or ".." parts.
    """
    parts = key.split("/")
    if not key or len(key.encode()) > 1024 or "\0" in key or "\\" in key or any(p in ("", ".", "..") for p in parts):
        raise InvalidKeyError(f"not a key below the root: {key[:200]!r}")
    return key


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

    def uri(self, key: str) -> str:
        """The full address of a key: a path for a local folder, else a URL."""
        path = posixpath.join(self.root, check_key(key))
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    def read(self, key: str) -> bytes:
        """The bytes at `key`. Raises FileNotFoundError."""
        return bytes(self.fs.cat_file(posixpath.join(self.root, check_key(key))))

    def write(self, key: str, data: bytes) -> None:
        """Put `data` at `key` as a whole: a reader sees the old bytes or the new ones, never a part."""
        path = posixpath.join(self.root, check_key(key))
        if not self.is_local:
            self.fs.pipe_file(path, data)
            return
        temporary = self._write_temporary(path, data)
        os.replace(temporary, path)

    def create(self, key: str, data: bytes) -> bool:
        """Put `data` at `key` only if nothing is there; whether it was put. One conditional PUT on object stores."""
        path = posixpath.join(self.root, check_key(key))
        if self.is_local:
            temporary = self._write_temporary(path, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            return True
        try:
            self.fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:  # s3fs turns the server's 412 into EINVAL
            if (error.errno == errno.EINVAL and "412" in repr(error.__cause__)) or "PreconditionFailed" in repr(
                error.__cause__
            ):
                return False
            raise
        return True

    def _write_temporary(self, path: str, data: bytes) -> str:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def list(self, prefix: str = "") -> list[tuple[str, str]]:
        """(key, version token) of every file below `prefix`, sorted by key.

        The token changes when the file's content does: an ETag where the store has one, else size
        and time of last change.
        """
        self.fs.invalidate_cache()
        base = posixpath.join(self.root, prefix) if prefix else self.root
        found = self.fs.find(base, detail=True)
        return sorted((path[len(self.root) + 1 :], _version(info)) for path, info in found.items())

    def exists(self) -> bool:
        """Whether the folder is there. (On an object store: whether anything is below it.)"""
        return bool(self.fs.exists(self.root))


def _version(info: dict[str, Any]) -> str:
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    changed = info.get("mtime") or info.get("LastModified") or info.get("updated") or info.get("last_modified") or ""
    return str(tag).strip('"') if tag else f"{info.get('size')}-{changed}"
