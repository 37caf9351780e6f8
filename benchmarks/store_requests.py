"""How many requests a run makes of an object store, counted by a proxy before a real S3 server.

python -m benchmarks.store_requests --json benchmarks/results/scale.json
"""

import os
import random
import tempfile
from pathlib import Path
from typing import Annotated

import fsspec
import typer

from support.checkpoints import save_tiny_checkpoint
from support.proxy import faulty_proxy
from support.record import record
from support.runs import Bench, make_archive
from support.s3_server import free_port, start, stop


def main(
    images: Annotated[list[int] | None, typer.Option(help="Images of a run; repeat it.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Put the figures here.")] = None,
) -> None:
    """Runs of 8 and of 40 images, unless told otherwise: their difference is what an image costs."""
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = start(folder / "server", free_port())
        os.environ.update(environment)
        sizes = images or [8, 40]
        try:
            fsspec.filesystem("s3").mkdir("requests")
            archive = make_archive(folder / "archive", max(sizes))
            bench = Bench(archive, save_tiny_checkpoint(folder / "model"), folder, "s3://requests", environment)
            for size in sizes:
                with faulty_proxy(environment["AWS_ENDPOINT_URL"], ("500",), 0.0, random.Random(0)) as proxy:
                    options = ("--limit", str(size))
                    with bench.run(
                        f"s3://requests/{size}", *options, environment={"AWS_ENDPOINT_URL": proxy.url}
                    ) as run:
                        assert run.wait(1800) == 0
                figures.append({"images": size, "requests": proxy.calls.total(), "by_method": dict(proxy.calls)})
                print(figures[-1], flush=True)
        finally:
            stop(folder / "server")
    record(json_file, "requests", figures, "s3fs", "prefect", "ray")


if __name__ == "__main__":
    typer.run(main)
