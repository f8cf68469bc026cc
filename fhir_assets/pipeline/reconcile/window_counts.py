"""Does every resource of a window stand somewhere? The counts of each layer, held against each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fhir_assets.fhir.record import parse_instant, read_header
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import corrections
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of
from fhir_assets.warehouse.postgres.queries import reconciliation
from fhir_assets.warehouse.postgres.queries.reconciliation import AbsentCounts
from fhir_assets.warehouse.postgres.tables.encoding import NULL, escape_text

STAGES = ("transform", "load")


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """The counts of one window of one type.

    ``server_total`` is what the source said it has, over all fetches of the window (None: it cannot say), and
    ``matched`` what it gave; ``received`` what came by other doors; ``raw`` what is in the store, ``valid`` and
    ``dead`` what validation made of it; ``undone`` the dead letters of transform and load; ``deleted`` the valid
    resources that the source deleted since; ``withheld`` those that keep every rule but that consent keeps out of the
    tables; ``missing`` those that are neither in the tables, in this version or a newer one, nor among those.
    """

    partition_key: str
    server_total: int | None
    matched: int
    repeated: int
    rejected: int
    raw: int
    validated: int
    valid: int
    dead: int
    not_loaded: int
    missing: int
    withheld: int = 0
    received: int = 0
    deleted: int = 0

    @property
    def loaded(self) -> int:
        """The valid resources that are in the tables."""
        return self.valid - self.not_loaded - self.missing - self.deleted

    @property
    def faults(self) -> list[str]:
        """What does not add up, each with what to do; empty if all does."""
        faults = []
        again = f"materialize raw, validated and normalized of {self.partition_key} again"
        if self.server_total is not None and self.server_total != self.matched:
            faults.append(f"the server counts {self.server_total} but gave {self.matched}: {again}")
        came = self.matched + self.received - self.repeated - self.rejected
        if self.raw != came:
            faults.append(f"{came} were received but raw holds {self.raw}: {again}")
        if self.raw != self.validated:
            faults.append(f"raw holds {self.raw} but {self.validated} were validated: materialize validated again")
        if self.validated != self.valid + self.dead + self.withheld:
            faults.append(
                f"{self.validated} were validated but {self.valid} are valid, {self.dead} dead and "
                f"{self.withheld} withheld: materialize validated again"
            )
        if self.missing:
            faults.append(f"{self.missing} valid resources are not in the tables: materialize normalized again")
        return faults


def reconcile(
    conn: Session,
    store: Store,
    resource_type: str,
    partition_keys: Sequence[str],
    *,
    main_view: str | None,
) -> list[WindowCounts]:
    """The balance of each window that was fetched or received something. Holds the ids of validated partitions
    against the tables, in the database: ``fhir.resource``, and ``main_view`` where every resource has a row there.
    """
    raw = {m.partition_key: m for m in store.manifests("raw", resource_type, partition_keys)}
    validated = {m.partition_key: m for m in store.manifests("validated", resource_type, raw)}
    undone = reconciliation.count_unloaded(conn, resource_type, partition_keys)
    absent = _absent(conn, store, resource_type, list(validated.values()), main_view)
    return [
        _balance(m, validated.get(key), undone.get(key, 0), absent.get(key, AbsentCounts())) for key, m in raw.items()
    ]


def _balance(raw: Manifest, validated: Manifest | None, undone: int, absent: AbsentCounts) -> WindowCounts:
    fetches = raw.fetched.fetches if raw.fetched else ()
    totals = [fetch.server_total for fetch in fetches]
    known = [total for total in totals if total is not None]
    state = validated.validated if validated else None
    return WindowCounts(
        raw.partition_key,
        sum(known) if known and len(known) == len(totals) else None,
        sum(fetch.matched for fetch in fetches),
        sum(fetch.repeated for fetch in fetches),
        sum(fetch.rejected for fetch in fetches) + sum(receipt.rejected for receipt in raw.receipts),
        raw.rows,
        state.rows_in if state else 0,
        (validated.rows if validated else 0) - absent.withheld,
        sum(state.dead.values()) if state else 0,
        undone,
        absent.missing,
        withheld=absent.withheld,
        received=sum(receipt.rows + receipt.rejected for receipt in raw.receipts),
        deleted=absent.deleted,
    )


def _absent(
    conn: Session, store: Store, resource_type: str, validated: Sequence[Manifest], main_view: str | None
) -> dict[str, AbsentCounts]:
    """By partition key, how many validated resources the tables lack, less those that are dead letters."""
    if not any(manifest.parts for manifest in validated):
        return {}
    keys = [manifest.partition_key for manifest in validated]
    corrected = corrections.by_fingerprint(conn, resource_type, STAGES, keys)
    expected = _expected(store, validated, corrected, cipher_of(conn))
    return reconciliation.count_absent(conn, resource_type, expected, main_view=main_view)


def _expected(
    store: Store, validated: Sequence[Manifest], corrected: Mapping[str, Mapping[bytes, bytes]], cipher: Cipher
) -> Iterator[str]:
    """What the tables should hold, as lines for COPY: of resources that were corrected on their way the correction."""
    for manifest in validated:
        key = escape_text(manifest.partition_key)
        instead = corrected.get(manifest.partition_key, {})
        for batch in store.batches(manifest.parts):
            for line in batch:
                if instead:
                    places = (_fingerprint(manifest, stage, line, cipher) for stage in STAGES)
                    line = next((instead[place] for place in places if place in instead), line)
                header = read_header(line)
                moment = parse_instant(header.meta.lastUpdated) if header.meta else None
                identity = NULL if header.id is None else escape_text(header.id)
                yield f"{key}\t{identity}\t{moment.isoformat() if moment else NULL}\n"


def _fingerprint(manifest: Manifest, stage: str, line: bytes, cipher: Cipher) -> bytes:
    letter = DeadLetter(manifest.resource_type, None, stage, "", "", "", line, manifest.partition_key)
    return letter.fingerprint(cipher)
