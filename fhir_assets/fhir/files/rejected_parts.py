"""The limit of the dead letters of one file, so that a file without any resource is not kept in millions of pieces."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from fhir_assets.fhir.lines import FileLimits
from fhir_assets.fhir.record import RejectedInput

Item = TypeVar("Item")

RULE = "too-many"
"""The rule of the rejected input that counts the parts beyond the limit."""


def limit_rejected(items: Iterable[Item], limits: FileLimits) -> Iterator[Item | RejectedInput]:
    """Yield the items of a file, but of the rejected inputs of a type only as many as ``limits.rejected``.

    The others are counted by one more rejected input at the end, at the place of the last of them.
    """
    counts: Counter[str] = Counter()
    last: dict[str, RejectedInput] = {}
    for item in items:
        if isinstance(item, RejectedInput):
            counts[item.resource_type] += 1
            if counts[item.resource_type] > limits.rejected:
                last[item.resource_type] = item
                continue
        yield item
    for name, rejected in last.items():
        count = counts[name] - limits.rejected
        yield replace(
            rejected,
            resource_id=None,
            rule=RULE,
            message=f"{count:,} more parts of the file, up to this one, cannot be used. Each would be a dead letter "
            f"({limits.rejected_name}): correct the file, and give it again",
            body=b"",
            issues=(),
        )
