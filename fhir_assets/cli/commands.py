"""The commands of `fhir-assets`, in the order of `fhir-assets --help`, and the modules that define them."""

from fhir_assets.cli.lazy_commands import CommandSource

COMMANDS = {
    "demo": CommandSource(
        "fhir_assets.cli.demo",
        "demo",
        "Load a synthetic population from a sandbox FHIR server, then serve the Dagster UI.",
    ),
    "dev": CommandSource(
        "fhir_assets.cli.dev",
        "dev",
        "Serve the Dagster UI and the dashboard on 127.0.0.1 and run the Dagster daemon, until Ctrl-C.",
    ),
    "migrate": CommandSource(
        "fhir_assets.cli.migrate",
        "migrate",
        "Create or upgrade the schemas, the tables of all ViewDefinitions, and Dagster's database.",
    ),
    "ingest": CommandSource(
        "fhir_assets.cli.ingest",
        "ingest",
        "Load the windows from the checkpoint to now, or the windows of a date range.",
    ),
    "reconcile": CommandSource(
        "fhir_assets.cli.reconcile",
        "reconcile",
        "Compare the resources of the source with the store and the tables, and list missing ones. Nothing is changed.",
    ),
    "status": CommandSource(
        "fhir_assets.cli.status",
        "status",
        "Print the state of the daemons, the last ticks, the last load of each type, types that are behind, open "
        "incidents and free disk space.",
    ),
    "psql": CommandSource(
        "fhir_assets.cli.psql",
        "psql",
        "Open psql on the database of DB_URL, or on the embedded one.",
    ),
    "dashboard": CommandSource(
        "fhir_assets.cli.dashboard",
        "dashboard",
        "Serve a page on 127.0.0.1 with population, conditions, encounters, results, completeness and freshness.",
    ),
    "reader": CommandSource(
        "fhir_assets.cli.reader",
        "reader",
        "Print the host, port, login and password that BI tools connect with to the embedded Postgres.",
    ),
    "roles": CommandSource(
        "fhir_assets.cli.roles",
        "roles",
        "Create the roles of all processes and grant each its rights, here and in Dagster's database; revoke all "
        "others.",
    ),
    "sources": CommandSource(
        "fhir_assets.cli.sources",
        "app",
        "List the settings that the loaded data belongs to, and carry it over to other settings or start over.",
    ),
    "landing": CommandSource(
        "fhir_assets.cli.landing",
        "app",
        "List and load the files of the landing zone (FHIR_LANDING_URL).",
    ),
    "runs": CommandSource(
        "fhir_assets.cli.runs",
        "app",
        "List runs and show their counts.",
    ),
    "dead-letters": CommandSource(
        "fhir_assets.cli.dead_letters",
        "app",
        "List, correct, replay or discard resources that failed.",
    ),
    "missing-references": CommandSource(
        "fhir_assets.cli.missing",
        "app",
        "List and fetch resources that loaded resources refer to but that are not loaded.",
    ),
    "patient": CommandSource(
        "fhir_assets.cli.patient",
        "app",
        "Print patient data, decrypted with the keys of this deployment. Every access is recorded in the audit log.",
    ),
    "consents": CommandSource(
        "fhir_assets.cli.consents",
        "app",
        "List the consent decisions of patients and apply them to the tables.",
    ),
    "audit": CommandSource(
        "fhir_assets.cli.audit",
        "app",
        "List the audit log of accesses to patient data, and verify that it is unaltered.",
    ),
    "keys": CommandSource(
        "fhir_assets.cli.keys",
        "app",
        "Create, inspect and rotate the keys that encrypt patient data.",
    ),
    "export": CommandSource(
        "fhir_assets.cli.export",
        "export",
        "Write resources and tables to files: by default the valid resources and the tables.",
    ),
    "lake": CommandSource(
        "fhir_assets.cli.lake",
        "lake",
        "Write the tables as Parquet files to FHIR_LAKE_URL. Only windows whose rows changed are written.",
    ),
    "dbt": CommandSource(
        "fhir_assets.cli.dbt",
        "app",
        "Write a dbt package over the tables.",
    ),
    "validate": CommandSource(
        "fhir_assets.cli.validate",
        "validate",
        "Validate every resource against the rules of FHIR R4.",
    ),
    "view": CommandSource(
        "fhir_assets.cli.view",
        "app",
        "List and check ViewDefinitions of SQL on FHIR, and run them over files.",
    ),
    "upload": CommandSource(
        "fhir_assets.cli.upload",
        "upload",
        "Send every resource of a folder with its own id. Referenced types are sent first.",
    ),
    "connector": CommandSource(
        "fhir_assets.cli.connector",
        "app",
        "Deliver changes of the tables in schema health to a FHIR server.",
    ),
    "worker": CommandSource(
        "fhir_assets.cli.worker",
        "worker",
        "Execute Dagster runs from the queue at CELERY_BROKER_URL until stopped; for FHIR_EXECUTOR=celery.",
    ),
    "metrics": CommandSource(
        "fhir_assets.cli.metrics",
        "metrics",
        "Serve the metrics of windows, runs, checks, dead letters and the outbox until SIGTERM or Ctrl-C.",
    ),
    "prune": CommandSource(
        "fhir_assets.cli.prune",
        "prune",
        "Count old data, or remove it with --apply: Dagster's events, runs and ticks, resolved dead letters, ended "
        "incidents, and files of the store that no partition refers to.",
    ),
    "api": CommandSource(
        "fhir_assets.cli.api",
        "app",
        "Serve the HTTP API (intake of records, patient look-ups, runs) and create tokens for it.",
    ),
    "post-loader": CommandSource(
        "fhir_assets.cli.post_loader",
        "post_loader",
        "Load posts to the HTTP API within seconds, until SIGTERM or Ctrl-C; a load in progress is completed first.",
    ),
    "sandbox": CommandSource(
        "fhir_assets.cli.sandbox",
        "sandbox",
        "Run a small FHIR R4 server at http://127.0.0.1:PORT/fhir until Ctrl-C.",
    ),
    "generate": CommandSource(
        "fhir_assets.cli.sandbox",
        "generate",
        "Write a synthetic population: valid, linked resources of all 30 types. Equal seeds give equal resources.",
    ),
}
"""Each command or group of commands by its name. A test compares these help texts with those of the commands."""
