"""Asset checks, by factory: what turns red when a resource is unaccounted for."""

from collections.abc import Sequence

import dagster as dg

from fhir_assets.catalog import ResourceType
from fhir_assets.pipeline.reconcile import Balance

SAMPLE = 20
"""How many windows a check's table shows at most; it says how many there are."""

_COLUMNS = ("server_total", "matched", "rejected", "raw", "valid", "dead", "withheld", "undone", "loaded", "missing")


def reconciles_spec(
    resource_type: ResourceType, partitions: dg.PartitionsDefinition[str] | None = None
) -> dg.AssetCheckSpec:
    """``reconciles``: server count = raw; raw = valid + dead + withheld; valid = loaded."""
    return dg.AssetCheckSpec(
        "reconciles",
        asset=dg.AssetKey(["normalized", resource_type.key]),
        description="Every resource of the window stands in the tables, in the dead letters or is withheld: server "
        "count = raw; raw = valid + dead + withheld; valid = loaded.",
        partitions_def=partitions,
    )


def reconciliation(
    context: dg.AssetExecutionContext, spec: dg.AssetCheckSpec, balances: Sequence[Balance]
) -> dg.AssetCheckResult:
    """The result of ``reconciles`` for the run; in a range run each partition's evaluation is logged as well."""
    if not context.has_partition_key_range or len(context.partition_keys) == 1:
        return _result(spec, balances)
    for balance in balances:
        result = _result(spec, [balance])
        context.log_event(
            dg.AssetCheckEvaluation(
                asset_key=spec.asset_key,
                check_name=spec.name,
                passed=result.passed,
                metadata=result.metadata,
                description=result.description,
                partition=balance.partition_key,
            )
        )
    return _result(spec, balances)


def _result(spec: dg.AssetCheckSpec, balances: Sequence[Balance]) -> dg.AssetCheckResult:
    faulty = [balance for balance in balances if balance.faults]
    shown = faulty or balances
    said = f"{len(faulty)} of {len(balances)} windows do not reconcile" if faulty else "every resource is accounted for"
    faults = "; ".join(fault for balance in faulty[:3] for fault in balance.faults)
    return dg.AssetCheckResult(
        passed=not faulty,
        check_name=spec.name,
        asset_key=spec.asset_key,
        description=f"{said}: {faults}" if faults else said,
        metadata={
            "windows": len(balances),
            "unreconciled_windows": len(faulty),
            **{name: sum(getattr(balance, name) or 0 for balance in balances) for name in _COLUMNS},
            "by_window": dg.MetadataValue.table(
                [
                    dg.TableRecord(
                        {
                            "window": balance.partition_key,
                            **{name: _shown(getattr(balance, name)) for name in _COLUMNS},
                            "what_to_do": "; ".join(balance.faults),
                        }
                    )
                    for balance in shown[:SAMPLE]
                ],
                schema=dg.TableSchema(
                    [
                        dg.TableColumn("window"),
                        *(dg.TableColumn(name, "int") for name in _COLUMNS),
                        dg.TableColumn("what_to_do"),
                    ]
                ),
            ),
        },
    )


def _shown(value: int | None) -> int | str:
    return "not said" if value is None else value
