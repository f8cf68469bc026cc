"""Faults of the sandbox server that several tests inject."""

from fhir_assets.sandbox.faults import Fault, FaultKind

ALL_FAULTS = (
    Fault(kind=FaultKind.THROTTLE, every=17, retry_after=0),
    Fault(kind=FaultKind.ERROR, every=13, status=503),
    Fault(kind=FaultKind.RESET, every=19),
    Fault(kind=FaultKind.DROP, every=23),
    Fault(kind=FaultKind.TRUNCATE, every=11),
    Fault(kind=FaultKind.EXPIRE, every=4),
    Fault(kind=FaultKind.DUPLICATE, every=3),
)
"""Every transient fault of a server that returns correct data."""
