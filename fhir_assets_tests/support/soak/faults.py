"""The faults of a soak: what each does to the deployment, and how it ends."""

import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from fhir_assets.sandbox.faults import FaultPlan
from fhir_assets_tests.support.faults import ALL_FAULTS

if TYPE_CHECKING:
    from fhir_assets_tests.support.soak.deployment import Deployment

Act = Callable[["Deployment", int], None]


@dataclass(frozen=True)
class Fault:
    """``begin`` and ``end`` get the number that picks the victim. A fault without a duration has no end."""

    begin: Act
    end: Act | None = None


def _kill(deployment: "Deployment", choice: int) -> None:
    victims = [*deployment.parts, "The API", "The source", *(["Postgres"] if deployment.cluster else [])]
    match victims[choice % len(victims)]:
        case "The API":
            deployment.restart_api()
        case "The source":
            deployment.source.kill()
            deployment.source.start()
        case "Postgres":
            assert deployment.cluster
            deployment.cluster.kill()
            deployment.cluster.restart()
        case part:
            if process := deployment.find(part):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def _send(deployment: "Deployment", choice: int, number: signal.Signals) -> None:
    parts = list(deployment.parts)
    if process := deployment.find(parts[choice % len(parts)]):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _fail_over(deployment: "Deployment", _: int) -> None:
    assert deployment.cluster
    deployment.cluster.fail_over()


def _rebuild(deployment: "Deployment", _: int) -> None:
    assert deployment.cluster
    deployment.cluster.rebuild()


def _misbehave(deployment: "Deployment", choice: int) -> None:
    deployment.source.kill()
    deployment.source.start(FaultPlan(faults=ALL_FAULTS, seed=choice))


def _behave(deployment: "Deployment", _: int) -> None:
    deployment.source.kill()
    deployment.source.start()


def _cut(deployment: "Deployment", choice: int) -> None:
    deployment.proxies[choice % len(deployment.proxies)].cut = True


def _mend(deployment: "Deployment", _: int) -> None:
    for proxy in deployment.proxies:
        proxy.cut, proxy.delay = False, 0.0


def _delay(deployment: "Deployment", choice: int) -> None:
    deployment.proxies[choice % len(deployment.proxies)].delay = 0.05


_CLOCK_STEPS = (-7200, -90, 30, 90)
"""Seconds by which the clock of the deployment is set, while Postgres, the source and the bucket keep the true time.

When a clock that was ahead is set right, Dagster's schedules and sensors pause until it is again at that time.
"""


def _step_clock(deployment: "Deployment", choice: int) -> None:
    if deployment.clock:
        deployment.clock.step(_CLOCK_STEPS[choice % len(_CLOCK_STEPS)])


def _set_clock_right(deployment: "Deployment", _: int) -> None:
    if deployment.clock:
        deployment.clock.step(0)


KILLS: Mapping[str, Fault] = {
    "kill": Fault(_kill),
    "outage": Fault(lambda deployment, _: deployment.source.kill(), lambda deployment, _: deployment.source.start()),
}
"""What every deployment can be tried with."""

FAULTS: Mapping[str, Fault] = {
    **KILLS,
    "pause": Fault(
        lambda deployment, choice: _send(deployment, choice, signal.SIGSTOP),
        lambda deployment, choice: _send(deployment, choice, signal.SIGCONT),
    ),
    "misbehaving source": Fault(_misbehave, _behave),
    "network cut": Fault(_cut, _mend),
    "slow network": Fault(_delay, _mend),
    "connections lost": Fault(lambda deployment, choice: _break(deployment, choice)),
    "clock step": Fault(_step_clock, _set_clock_right),
    "failover": Fault(_fail_over, _rebuild),
    "disk full": Fault(
        lambda deployment, _: deployment.disk.fill() if deployment.disk else None,
        lambda deployment, _: deployment.disk.free() if deployment.disk else None,
    ),
}
"""What a deployment behind proxies, with a replica and a small disk, can be tried with."""


def _break(deployment: "Deployment", choice: int) -> None:
    deployment.proxies[choice % len(deployment.proxies)].break_connections()
