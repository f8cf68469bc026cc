"""Commands that are killed at any moment, again and again, and in the end give the tables of uninterrupted commands.

KILLS=1000 kills so often; ``make slow`` a few times. KILLS_SEED repeats the moments.
"""

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter

import pytest

from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.settings import SourceKind
from fhir_assets_tests.support.databases import fresh_database
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.interrupted_commands import Commands
from fhir_assets_tests.support.interrupted_commands import commands as commands
from fhir_assets_tests.support.small_population import END, RESOURCE_TYPES, START

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "4"))
SEED = int(os.environ.get("KILLS_SEED", "1"))
KILLS_A_COMMAND = 3
COMMANDS = (("ingest", "--from", "2024-01-01", "--to", "2024-02-01"), ("dead-letters", "replay", "--all"))
SOURCES = (SourceKind.SEARCH, SourceKind.NDJSON, SourceKind.BULK)
PATIENTS = 57
"""Of the sandbox's population; with their encounters and observations they are some 2,000 resources."""


@dataclass(frozen=True)
class Trial:
    """One deployment and its commands."""

    deployment: Deployment
    commands: Commands

    def run(self, *arguments: str, kill_after: float | None = None) -> bool:
        """Run a command, which must succeed unless it was killed. Return whether it was."""
        settings = self.deployment.settings
        folder = settings.home.parent
        ended = self.commands(*arguments, folder=folder, environment=self.environment(), kill_after=kill_after)
        assert ended.code in (0, -9), ended.stderr
        return ended.code != 0

    def environment(self) -> Mapping[str, str]:
        settings = self.deployment.settings
        return {
            "DB_URL": self.deployment.url,
            "FHIR_ASSETS_HOME": str(settings.home),
            "FHIR_BASE_URL": settings.fhir_base_url,
            "FHIR_SOURCE": settings.fhir_source.value,
            "FHIR_PARTITION": settings.fhir_partition.value,
            "FHIR_LAST_UPDATED_GTE": "2024-01-01",
            "FHIR_RESOURCE_TYPES": RESOURCE_TYPES,
            "FHIR_PAGE_SIZE": "100",
        }

    def content(self) -> tuple[object, object, object]:
        """Return the tables, the dead letters, and the runs that seem to be under way."""
        running = self.deployment.query("SELECT count(*) FROM ops.ingestion_runs WHERE status = 'RUNNING'")
        return self.deployment.tables(), self.deployment.count_dead_letters(), running


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SandboxServer, Path]]:
    """A server and a folder with the same resources, some of them invalid."""
    folder = tmp_path_factory.mktemp("population")
    write_population(folder, Population(PATIENTS, 3, 0.02, end=END, start=START))
    with SandboxServer(folder) as server:
        yield server, folder


@pytest.mark.timeout(300 + 60 * KILLS)
def test_commands_that_are_killed_at_any_moment_lose_and_double_nothing(
    deploy: Deploy, commands: Commands, sandbox: tuple[SandboxServer, Path], postgres: str
) -> None:
    server, folder = sandbox
    moments = random.Random(SEED)
    expected: dict[SourceKind, object] = {}
    durations: dict[tuple[SourceKind, tuple[str, ...]], float] = {}
    kills = 0
    for number in count():
        if kills >= KILLS:
            break
        source = SOURCES[number % len(SOURCES)]
        url = str(folder) if source is SourceKind.NDJSON else server.url
        settings = {"fhir_base_url": url, "fhir_source": source, "fhir_partition": "monthly"}
        with fresh_database(postgres) as database:
            trial = Trial(deploy(home=f"{number}", url=database, **settings), commands)
            if source not in expected:
                for command in COMMANDS:
                    started = perf_counter()
                    trial.run(*command)
                    durations[source, command] = perf_counter() - started
                expected[source] = trial.content()
                continue
            for command in COMMANDS:
                killed = [
                    trial.run(*command, kill_after=moments.uniform(0, durations[source, command]))
                    for _ in range(KILLS_A_COMMAND)
                ]
                kills += sum(killed)
                trial.run(*command)
            if source is not SourceKind.BULK:  # An export cannot be compared on demand.
                trial.run("reconcile", "--deep")
            assert trial.content() == expected[source], f"deployment {number}, seed {SEED}"
