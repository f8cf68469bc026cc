"""The deployment of a soak: its processes, its Postgres, its source and what stands between them."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

import boto3
import psutil
import requests

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.settings import load_settings
from fhir_assets_tests.support.api import TOKENS, Api, api_environment, api_process
from fhir_assets_tests.support.dev_processes import PARTS, find, find_url, is_up, running_dev, wait_until
from fhir_assets_tests.support.soak.clock import SteppedClock
from fhir_assets_tests.support.soak.cluster import Cluster
from fhir_assets_tests.support.soak.disk import SmallDisk
from fhir_assets_tests.support.soak.proxy import Proxy
from fhir_assets_tests.support.soak.source import Source

_EMBEDDED = "The embedded Postgres"
_DISK_MEGABYTES = 512


class Deployment:
    """`fhir-assets dev`, the API and a source in ``folder``.

    ``exposed``: behind proxies, with a Postgres cluster in place of the embedded one, the store in a bucket or, as
    root, on a small disk, and a clock that others do not share.
    """

    def __init__(self, folder: Path, *, exposed: bool, in_bucket: bool) -> None:
        self.folder = folder
        self.landing = folder / "landing"
        self.landing.mkdir()
        self.source = Source(folder / "source")
        self._stack = ExitStack()
        self._stack.callback(self.source.kill)
        self.cluster: Cluster | None = None
        self.disk: SmallDisk | None = None
        self.clock: SteppedClock | None = None
        self.proxies: Sequence[Proxy] = ()
        self.parts = dict(PARTS)
        values: dict[str, object] = {
            "fhir_assets_home": str(folder / "home"),
            "fhir_landing_url": str(self.landing),
            "fhir_base_url": self.source.url,
            "fhir_resource_types": "Patient,Encounter,Consent",
            "fhir_last_updated_gte": "2024-01-01",
            "fhir_partition": "monthly",
            "fhir_schedule": "* * * * *",
            "checks_minutes": 1,
            "consent_policy": "opt-out",
            "api_tokens": TOKENS,
            "api_rate_limit": 100_000,
            "metrics_port": 0,
        }
        if exposed:
            values |= self._expose()
            values |= self._use_bucket() if in_bucket else self._use_small_disk()
        self.values = values
        self.settings = load_settings(**{name: str(value) for name, value in values.items()})

    def _expose(self) -> dict[str, object]:
        self.clock = SteppedClock(self.folder)
        self.cluster = Cluster(self.folder / "cluster")
        self._stack.callback(self.cluster.stop)
        to_source = Proxy(self.source.port)
        self._stack.callback(to_source.close)
        self.proxies = (to_source, self.cluster.proxy)
        del self.parts[_EMBEDDED]
        return {"db_url": self.cluster.url, "fhir_base_url": f"http://127.0.0.1:{to_source.port}/fhir"}

    def _use_small_disk(self) -> dict[str, object]:
        try:
            self.disk = SmallDisk(self.folder / "disk", _DISK_MEGABYTES)
        except subprocess.CalledProcessError:
            return {}
        self._stack.callback(self.disk.close)
        return {"fhir_store_url": str(self.folder / "disk" / "store")}

    def _use_bucket(self) -> dict[str, object]:
        port = find_free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._stack.callback(server.kill)
        proxy = Proxy(port)
        self._stack.callback(proxy.close)
        self.proxies = (*self.proxies, proxy)
        # Every process of the deployment inherits these.
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
            "AWS_ACCESS_KEY_ID": "soak",
            "AWS_SECRET_ACCESS_KEY": "soak",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        wait_until(lambda: _answers(port), "the S3 server does not start")
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="store")
        return {"fhir_store_url": "s3://store/fhir"}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _start(self) -> None:
        self.source.start()
        if self.cluster:
            with self.command("migrate") as process:
                output, _ = process.communicate()
            assert not process.returncode, output
        environment = {**self._clock_environment, **{name.upper(): str(value) for name, value in self.values.items()}}
        self._dev, text = self._stack.enter_context(running_dev(self.folder, **environment))
        url = find_url(text)
        wait_until(lambda: is_up(url), "`fhir-assets dev` does not start")
        self.api = self._start_api()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def _clock_environment(self) -> Mapping[str, str]:
        return self.clock.environment if self.clock else {}

    def find(self, part: str) -> psutil.Process | None:
        """Return the process of a part, unless it does not run."""
        return find(psutil.Process(self._dev.pid), self.folder / "home", self.parts[part])

    def restart_api(self) -> None:
        """Kill the API, whose workers must end by themselves, and start it again on its port."""
        assert self.api.process is not None
        workers = psutil.Process(self.api.process.pid).children()
        self.api.process.kill()
        psutil.wait_procs(workers, timeout=60)
        self.api = self._start_api(int(self.api.url.rsplit(":", 1)[1]))

    def _start_api(self, port: int | None = None) -> Api:
        process = api_process(self.values, self.folder, workers=2, port=port, environment=self._clock_environment)
        return self._stack.enter_context(process)

    def find_processes(self) -> Iterator[tuple[str, list[psutil.Process]]]:
        """Yield each part, without Postgres, with its process and the workers of the API; none if it does not run."""
        for part in self.parts:
            if part != _EMBEDDED:
                process = self.find(part)
                yield part, [process] if process else []
        api = psutil.Process(self.api.process.pid) if self.api.process else None
        yield "The API", [api, *api.children()] if api else []

    @contextmanager
    def command(self, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
        """Run `fhir-assets` with arguments beside the block; its output is text."""
        process = subprocess.Popen(
            [sys.executable, "-c", "from fhir_assets.cli import main; main()", *arguments],
            env={**api_environment(self.values), **self._clock_environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    with suppress(requests.ConnectionError):
        return requests.get(f"http://127.0.0.1:{port}", timeout=10).ok
    return False


def judge_command(arguments: Sequence[str], code: int, output: str) -> list[str]:
    """Return what is wrong with the end of a command beside faults: it may fail, with a sentence and no traceback."""
    if code < 0 or re.search(r"Traceback|defect", output):
        return [f"`fhir-assets {' '.join(arguments)}` ended with {code}: {output[-2000:]}"]
    return []
