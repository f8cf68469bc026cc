"""Gives the database of a test the schema of an earlier revision."""

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection, connect


def restore_partitions(conn: Connection) -> None:
    """Move the partitions of fhir.resource to where they were before revision 0043."""
    partitions = conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'fhir_partitions'").fetchall()
    for (name,) in partitions:
        conn.execute(sql.SQL("ALTER TABLE {} SET SCHEMA fhir").format(sql.Identifier("fhir_partitions", name)))
    conn.execute("DROP SCHEMA fhir_partitions")


def restore_revision_0042(url: str) -> None:
    """Give a database of this version the schema of revision 0042."""
    with connect(url) as conn:
        restore_partitions(conn)
        conn.execute("UPDATE ops.alembic_version SET version_num = '0042'")
