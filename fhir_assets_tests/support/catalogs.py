"""The catalog of a database: its relations, columns, indexes, constraints, functions and triggers, for comparison."""

from fhir_assets.warehouse.postgres.db.connections import connect

_SCHEMAS = "('fhir', 'ops', 'fhir_partitions', 'marts')"
_QUERIES = (
    f"""
    SELECT c.oid::regclass::text, c.relkind::text, obj_description(c.oid, 'pg_class'), c.reloptions::text,
        c.relacl::text
    FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname IN {_SCHEMAS} AND c.relkind NOT IN ('i', 'I')
    """,
    f"""
    SELECT c.oid::regclass::text, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
        pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum), a.attidentity::text || a.attgenerated::text
    FROM pg_attribute a
    JOIN pg_class c ON c.oid = a.attrelid
    JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE n.nspname IN {_SCHEMAS} AND a.attnum > 0 AND NOT a.attisdropped AND c.relkind NOT IN ('i', 'I')
    """,
    rf"""
    SELECT tablename, regexp_replace(indexdef, 'INDEX \S+ ON', 'INDEX ON')
    FROM pg_indexes
    WHERE schemaname IN {_SCHEMAS}
    """,
    f"""
    SELECT k.conrelid::regclass::text, pg_get_constraintdef(k.oid)
    FROM pg_constraint k
    JOIN pg_namespace n ON n.oid = k.connamespace
    WHERE n.nspname IN {_SCHEMAS}
    """,
    f"""
    SELECT p.oid::regprocedure::text, pg_get_functiondef(p.oid), p.proacl::text
    FROM pg_proc p
    JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname IN {_SCHEMAS}
    """,
    """
    SELECT tgrelid::regclass::text, pg_get_triggerdef(oid)
    FROM pg_trigger
    WHERE NOT tgisinternal
    """,
)


def read_catalog(url: str) -> set[tuple[object, ...]]:
    """Return one tuple for each object of the schemas of the project. Names of indexes and constraints do not count."""
    with connect(url) as conn:
        return {tuple(row) for query in _QUERIES for row in conn.execute(query.encode())}
