"""Measure a bulk export from the sandbox server to validated: speed, peak memory and the cost of small files.

``python -m benchmarks.bulk [observations]`` serves that many Observations from a sandbox server in a process of its
own, which exports them in files of 50,000; they are downloaded and validated. Then 200,000 of them are exported twice,
in 20 large files and in files of 10.
"""

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter

from benchmarks import population
from benchmarks.machine import peak_mib, scratch
from fhir_assets.deployment.source import open_source
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.validation import Validator
from fhir_assets.pipeline.fetch.step import FetchStep
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.validate.step import ValidateStep
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.settings import load_settings
from fhir_assets.windows import WindowRange

COUNT = 1_000_000
SMALL = 200_000
LIMIT_MIB = 500


def main(count: int = COUNT) -> None:
    """Print the figures. Exit with 1 if the peak exceeds the limit."""
    peak, seconds, download = _run(count, 50_000)
    print(f"{count:>12,} Observations, downloaded and validated {peak:>6.0f} MiB {count / seconds:>9,.0f} resources/s")
    print(f"{'':>12} of which the download {count / download:>9,.0f} resources/s")
    small = min(SMALL, count)
    _, few, few_download = _run(small, small // 20)
    _, many, many_download = _run(small, 10)
    print(f"{small:>12,} Observations, {small // 10:,} files at {few / many:.2f} of the speed of 20 files")
    print(f"{'':>12} of which the download {few_download / many_download:.2f}")
    print(f"limit {LIMIT_MIB} MiB: {'exceeded' if peak >= LIMIT_MIB else 'kept'}")
    if peak >= LIMIT_MIB:
        raise SystemExit(1)


def _run(count: int, file_resources: int) -> tuple[float, float, float]:
    """Return the peak MiB of the loading process, its seconds, and the seconds of the download."""
    with scratch() as home:
        data = home / "data"
        data.mkdir()
        population.write_observations(data / "Observation.ndjson.gz", count)
        with SandboxProcess(data, options=("--export-file-resources", str(file_resources))) as server:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.bulk", "--load", str(home), server.url],
                stdout=subprocess.PIPE,
                check=True,
            )
    figures = json.loads(done.stdout.splitlines()[-1])
    return figures["peak_mib"], figures["seconds"], figures["download"]


def _load(home: Path, url: str) -> None:
    settings = load_settings(
        fhir_source="bulk",
        fhir_base_url=url,
        fhir_partition="monthly",
        fhir_assets_home=home,
        fhir_resource_types="Observation",
        db_url=None,
    )
    warehouse, store = Warehouse(settings), build_store(settings)
    warehouse.url()
    source = open_source(settings, store=store, warehouse=warehouse)
    now = datetime.now(UTC)
    started = perf_counter()
    extent = source.find_extent(["Observation"])
    download = perf_counter() - started
    assert extent is not None
    windows = WindowRange(list(settings.window_scheme.between(extent.start or now, extent.end)), from_first=True)
    fetcher = FetchStep(
        source,
        store,
        run_id="benchmark",
        now=now,
        overlap=timedelta(0),
        refresh=Refresh.FULL,
        write_dead_letters=lambda dead_letters: None,
    )
    [update] = fetcher.run(["Observation"], windows)
    validation = ValidateStep(
        store,
        Validator(),
        warehouse.connect,
        run_id="benchmark",
        now=now,
        refresh=Refresh.FULL,
        workers=WorkerPool(settings.workers),
    )
    store.commit(update.manifests)
    validation.run("Observation", [manifest.partition_key for manifest in update.manifests])
    print(json.dumps({"peak_mib": peak_mib(), "seconds": perf_counter() - started, "download": download}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("observations", type=int, nargs="?", default=COUNT)
    parser.add_argument("--load", nargs=2, metavar=("HOME", "URL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        _load(Path(arguments.load[0]), arguments.load[1])
    else:
        main(arguments.observations)
