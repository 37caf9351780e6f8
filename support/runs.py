"""Whole runs as processes: start them, disturb them, and count afterwards what became of the archive."""

import contextlib
import hashlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from support.pictures import make_archive
from support.waiting import wait_until
from tasks.errors import ManifestError
from tasks.layout import TEMPORARY, key_of
from tasks.manifest import query
from tasks.storage import Store
from tasks.verify import verify

NUM_IMAGES = 8
RUN_ID = "run"  # a file names its run, so bytes can be compared only between runs of one name
MARK = "DIFFCOLOR_FAULTS_RUN"
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Reckoning:
    """The state of an archive's output after faults and a resume.

    identical: every picture has the same bytes as in the undisturbed run. findings: what `verify` reports.
    litter: temporary files and processes that were left behind. seconds: the time of the resume.
    """

    injected: int
    lost: int
    doubled: int
    identical: bool
    findings: list[str]
    litter: list[str]
    seconds: float = 0.0

    def check(self) -> None:
        """Fail if anything was lost, done twice, changed or left behind."""
        assert self.injected > 0
        assert (self.lost, self.doubled, self.identical, self.findings, self.litter) == (0, 0, True, [], []), self


@dataclass
class Run:
    """A run in progress."""

    process: subprocess.Popen[bytes]
    mark: str

    def processes(self, *words: str) -> list[psutil.Process]:
        """Its living processes."""
        return processes(self.mark, *words)

    def kill(self, *words: str) -> int:
        """SIGKILL its processes whose command line contains one of the words; how many there were."""
        return _kill(self.processes(*words))

    def wait(self, seconds: float = 900) -> int:
        """Its exit code."""
        return self.process.wait(seconds)


@dataclass
class Bench:
    """An archive, its undisturbed outcome, and runs over it into separate outputs.

    outputs: the folder or URL that holds them. environment: variables that runs need to reach it. batch: how many
    photographs runs fit at once. expected: hash of each (image, variant), None for a quarantined one. seconds: the time
    of the undisturbed run.
    """

    archive: Path
    model: Path
    folder: Path
    outputs: str
    environment: dict[str, str]
    batch: int = 1
    expected: dict[tuple[str, str], str | None] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def prepare(
        cls,
        folder: Path,
        model: Path,
        *,
        outputs: str | None = None,
        environment: dict[str, str] | None = None,
        num_images: int = NUM_IMAGES,
        batch: int = 1,
    ) -> "Bench":
        """Make the archive and run it once undisturbed."""
        archive = make_archive(folder / "archive", num_images)
        bench = cls(archive, model, folder, outputs or str(folder), environment or {}, batch)
        start = time.monotonic()
        with bench.run(bench.undisturbed.url) as run:
            assert run.wait() == 3, "the undisturbed run must end with its one quarantined file"
        bench.seconds = time.monotonic() - start
        bench.expected = outcome(bench.undisturbed)
        assert len(bench.expected) == num_images + 2
        return bench

    @property
    def undisturbed(self) -> Store:
        """The output of the run without faults."""
        return Store(f"{self.outputs}/undisturbed")

    @contextlib.contextmanager
    def run(
        self,
        output: str,
        *options: str,
        archive: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator["Run"]:
        """`diffcolor run` in a session of its own; its remaining processes are killed at the end.

        A variable in their environment marks all its processes, Ray's too: see `processes`.
        """
        command = [sys.executable, "-m", "support.driver", "run", str(archive or self.archive), output]
        command += ["--model", str(self.model), "--run-id", RUN_ID, "--commit-every", "2", "--shard-size", "4"]
        if self.batch > 1:
            command += ["--batch", str(self.batch), "--set", "stage1.adapter_rank=2", "--set", "stage2.adapter_rank=2"]
        command += options
        log = self.folder / "runs.log"
        with log.open("ab") as file:
            mark = secrets.token_hex(8)
            variables = os.environ | self.environment | dict(environment or {}) | {MARK: mark}
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True, env=variables
            )
        try:
            yield Run(process, mark)
        finally:
            _kill(processes(mark))
            process.wait()

    def reckon(self, output: str, injected: int, archive: Path | None = None) -> Reckoning:
        """Resume without faults, then count. For another archive than the bench's own, count what both hold."""
        start = time.monotonic()
        with self.run(output, archive=archive) as run:
            code = run.wait()
            orphans = [] if wait_until(lambda: not run.processes(), 20) else [str(p) for p in run.processes()]
        seconds = time.monotonic() - start
        store = Store(output)
        found = {key: sha256 for key, sha256 in outcome(store).items() if archive is None or key in self.expected}
        twice = query(
            store,
            """select count(*) from (select image_key, variant from attempts where status = 'ok'
            group by all having count(*) > 1)""",
        ).fetchall()[0][0]
        litter = list(Path(output, TEMPORARY).glob("*")) if store.is_local else []
        return Reckoning(
            injected=injected,
            lost=len(self.expected.keys() - found.keys()) + (code not in (0, 3)),
            doubled=twice,
            identical=found == self.expected,
            findings=[f"{f.kind} {f.key}" for f in verify(store)],
            litter=[*map(str, litter), *orphans],
            seconds=seconds,
        )


def outcome(store: Store) -> dict[tuple[str, str], str | None]:
    """For each (image, variant) the hash of its picture, or None if it is quarantined."""
    rows = query(store, "select image_key, variant, status, output_sha256, output_uri from results").fetchall()
    for _, _, status, sha256, uri in rows:
        if status == "ok":
            assert hashlib.sha256(store.read(key_of(uri))).hexdigest() == sha256
    return {(image, variant): sha256 for image, variant, _, sha256, _ in rows}


def committed(output: str) -> int:
    """The number of rows that readers see now."""
    try:
        return int(query(Store(output), "select count(*) from attempts").fetchall()[0][0])
    except ManifestError:
        return 0


def processes(mark: str, *words: str) -> list[psutil.Process]:
    """The living processes of a run; with `words`, only those whose command line contains one of them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                line = " ".join(process.cmdline()) + process.name()
                if not words or any(word in line for word in words):
                    found.append(process)
    return found


def _kill(targets: list[psutil.Process]) -> int:
    for process in targets:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(targets)
