"""A real S3 server on loopback: Ceph's object gateway with one monitor and one object store in memory.

python -m support.s3_server FOLDER [--port 19092]      start it and print the variables that clients need
python -m support.s3_server FOLDER --stop

As root on Debian, the packages are installed on first use. Elsewhere ceph-mon, ceph-osd, ceph-common and
radosgw must be installed already.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import fsspec
import psutil
import typer

from support import debian

PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin", "ceph-authtool", "monmaptool")
PACKAGES = ("ceph-mon", "ceph-osd", "ceph-common", "radosgw")
ACCESS_KEY = "tests"
SECRET_KEY = "loopback-only"

CONFIGURATION = """
[global]
fsid = {fsid}
keyring = {folder}/keyring
mon host = [v2:127.0.0.1:{monitor_port}]
public network = 127.0.0.0/8
run dir = {folder}
admin socket = {folder}/$name-$pid.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
setuser match path =
osd objectstore = memstore
memstore device bytes = 1073741824
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 1000
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
[client.admin]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
rgw run sync thread = false
"""


class NoServerError(RuntimeError):
    """The reason why no S3 server can be started here."""


def start(folder: Path, port: int, *, install: bool = True) -> dict[str, str]:
    """Start the server and return the environment variables that clients need.

    install: install missing packages (Debian, root). Raises NoServerError, with the reason.
    """
    if not all(map(shutil.which, PROGRAMS)):
        if not install:
            raise NoServerError(f"no {PACKAGES[-1]} here: set DIFFCOLOR_TEST_S3=1 to have it installed (Debian, root)")
        debian.install(PACKAGES, NoServerError)
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    fsid = str(uuid.uuid4())
    config = folder / "ceph.conf"
    config.write_text(CONFIGURATION.format(fsid=fsid, folder=folder, port=port, monitor_port=free_port()))
    keyring, monmap = folder / "keyring", folder / "monmap"
    ceph = ("--conf", str(config))
    admin = " ".join(f"--cap {daemon} 'allow *'" for daemon in ("mon", "osd", "mgr", "mds"))
    try:
        for line in (
            f"ceph-authtool --create-keyring {keyring} --gen-key -n mon. --cap mon 'allow *'",
            f"ceph-authtool {keyring} --gen-key -n client.admin {admin}",
            f"ceph-authtool {keyring} --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'",
            f"monmaptool --create --fsid {fsid} --addv a {_monitor(config)} {monmap}",
            f"ceph-mon --conf {config} --mkfs -i a --monmap {monmap} --keyring {keyring}",
            f"ceph-mon --conf {config} -i a",
            f"ceph --conf {config} osd create",
            f"ceph-osd --conf {config} -i 0 --mkfs",
            f"ceph-osd --conf {config} -i 0",
            f"ceph --conf {config} osd crush add osd.0 1.0 root=default host=here",
        ):
            subprocess.run(["sh", "-c", line], check=True, capture_output=True, timeout=60)
        with (folder / "radosgw.out").open("wb") as log:
            gateway = subprocess.Popen(
                ["radosgw", *ceph, "-n", "client.admin", "-f"], stdout=log, stderr=log, start_new_session=True
            )
        (folder / "radosgw.pid").write_text(str(gateway.pid))
        _wait_for(port)
        user = ("user", "create", "--uid=tests", "--display-name=tests")
        keys = (f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
        subprocess.run(
            ["radosgw-admin", *ceph, "-n", "client.admin", *user, *keys], check=True, capture_output=True, timeout=120
        )
    except (subprocess.SubprocessError, OSError) as error:
        stop(folder)
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace")[-500:]
        raise NoServerError(f"radosgw did not start: {error} {said}") from error
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def stop(folder: Path) -> None:
    """End the processes that `start` has started in this folder, if any."""
    for file in folder.glob("*.pid"):
        number = int(file.read_text().strip() or 0)
        if number and psutil.pid_exists(number):
            os.kill(number, signal.SIGKILL)  # its data is in memory only, so there is nothing to flush


@contextmanager
def serving(folder: Path, bucket: str) -> Iterator[None]:
    """A server with one empty bucket. Its variables are set in this process."""
    os.environ.update(start(folder, free_port()))
    try:
        fsspec.filesystem("s3").mkdir(bucket)
        yield
    finally:
        stop(folder)


def _monitor(config: Path) -> str:
    line = next(line for line in config.read_text().splitlines() if line.startswith("mon host"))
    return f"'{line.partition('= ')[2]}'"


def free_port() -> int:
    """A TCP port on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for its files; must not exist.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 19092,
    end: Annotated[bool, typer.Option("--stop", help="Stop the server that was started in FOLDER.")] = False,
) -> None:
    """Start or stop the server."""
    if end:
        stop(folder)
        return
    try:
        variables = start(folder.absolute(), port)
    except NoServerError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error
    for name, value in variables.items():
        typer.echo(f"{name}={value}")


if __name__ == "__main__":
    typer.run(main)
