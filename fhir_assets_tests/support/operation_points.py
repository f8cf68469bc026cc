"""The calls at which each operation on the resources of a window can stop while another one runs."""

from fhir_assets.delivery.connector import outcomes
from fhir_assets.pipeline import partition_commit
from fhir_assets.pipeline.load.step import LoadStep
from fhir_assets.pipeline.receive import receiver
from fhir_assets.warehouse.ops import audit_log, consents, corrections, replays, retention
from fhir_assets.warehouse.postgres.db import migrations
from fhir_assets.warehouse.postgres.tables import deletions, reencryption_batches
from fhir_assets_tests.support.interleaving import Point
from fhir_assets_tests.support.source_rows import SourceRows

COMMIT = Point(partition_commit, "rewrite_partitions")
LOAD_POINTS = (COMMIT, Point(partition_commit, "resolve_dead_letters"), Point(LoadStep, "run"))
POINTS = {
    "load": (*LOAD_POINTS, Point(audit_log, "record")),
    "refresh": (*LOAD_POINTS, Point(audit_log, "record")),
    "replay": (Point(replays, "stream_claimed"), COMMIT, Point(replays, "resolve_claimed")),
    "receive": (Point(receiver, "rewrite_partitions"), Point(receiver, "rewrite_partitions", after=True)),
    "edit": (Point(corrections, "record"), Point(corrections, "record", after=True)),
    "discard": (Point(replays, "discard", after=True),),
    "deletion": (Point(deletions, "apply"), Point(deletions, "apply", after=True)),
    "consent": (Point(consents, "update_decisions", after=True),),
    "rotation": (
        Point(reencryption_batches, "lock_resources", after=True),
        Point(reencryption_batches, "reencrypt_rows"),
    ),
    "migration": (Point(migrations, "_create_partitions", after=True),),
    "prune": (Point(retention, "delete_expired_rows"),),
    "row": (Point(SourceRows, "commit"), Point(SourceRows, "commit", after=True)),
    "delivery": (Point(outcomes, "record_sent", after=True), Point(outcomes, "acknowledge")),
}
