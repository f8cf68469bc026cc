"""The components of docs/architecture.md: which component may import which, and no import cycle between folders."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fhir_assets.settings import Settings

PACKAGE = Path(__file__).parent.parent / "fhir_assets"

GROUND = {
    "accounts",
    "errors",
    "foreign_errors",
    "process_ends",
    "windows",
    "catalog",
    "sources",
    "retries",
    "notices",
    "atomic_files",
    "file_modes",
    "control_characters",
    "connection_limits",
    "local_files",
}
"""The modules that every component may import."""

MAY_IMPORT: dict[str, set[str]] = {
    "accounts": set(),
    "control_characters": set(),
    "errors": {"control_characters"},
    "process_ends": set(),
    "foreign_errors": {"errors", "process_ends"},
    "file_modes": set(),
    "atomic_files": {"file_modes"},
    "windows": set(),
    "connection_limits": set(),
    "local_files": set(),
    "catalog": set(),
    "sources": set(),
    "notices": {"control_characters"},
    "retries": {"errors"},
    "settings": {"errors", "windows", "catalog", "sources", "file_modes"},
    "logs": {"control_characters", "errors", "foreign_errors"},
    "fhir": GROUND,
    "privacy": GROUND,
    "storage": GROUND | {"privacy"},
    "warehouse": GROUND | {"fhir", "privacy", "storage"},
    "metrics": GROUND | {"settings", "warehouse"},
    "pipeline": GROUND | {"fhir", "privacy", "storage", "warehouse"},
    "delivery": GROUND | {"fhir", "privacy", "storage", "warehouse", "metrics", "pipeline", "settings", "deployment"},
    "deployment": GROUND | {"settings", "fhir", "privacy", "storage", "warehouse", "pipeline"},
    "steps": GROUND | {"settings", "fhir", "storage", "warehouse", "pipeline", "deployment"},
    "sandbox": GROUND | {"fhir"},
    "orchestration": GROUND
    | {"settings", "logs", "fhir", "privacy", "storage", "warehouse", "metrics", "pipeline", "delivery", "deployment"}
    | {"steps"},
    "instance": {"orchestration"},
    "definitions": GROUND
    | {"settings", "logs", "fhir", "storage", "warehouse", "pipeline", "deployment", "steps", "orchestration"},
    "ingestion": GROUND
    | {"settings", "logs", "fhir", "storage", "warehouse", "pipeline", "deployment", "steps", "orchestration"}
    | {"definitions"},
    "api": GROUND
    | {"settings", "logs", "fhir", "privacy", "storage", "warehouse", "metrics", "pipeline", "deployment"}
    | {"orchestration", "definitions"},
    "dashboard": GROUND | {"settings", "warehouse", "deployment"},
    "cli": GROUND
    | {"settings", "logs", "fhir", "privacy", "storage", "warehouse", "metrics", "pipeline", "delivery"}
    | {"deployment", "orchestration", "definitions", "ingestion", "sandbox", "api"},
}
"""The other components that the modules of each component may import."""

WITH_DAGSTER = {"orchestration", "instance", "definitions", "ingestion", "api", "cli"}
"""The components that may import Dagster."""


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(path: Path) -> Iterator[str]:
    """The full names that a module imports, submodules resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(path: Path) -> Iterator[str]:
    """The modules of this package that a module imports, named from the package."""
    for name in _imports(path):
        if name.startswith("fhir_assets."):
            inside = name.removeprefix("fhir_assets.")
            yield inside if inside in MODULES else inside.rpartition(".")[0]


def _folder(module: str) -> str:
    is_package = MODULES[module].name == "__init__.py"
    return module if is_package or "." not in module else module.rpartition(".")[0]


def _folder_graph() -> dict[str, set[str]]:
    graph = defaultdict(set)
    for module, path in MODULES.items():
        for imported in _own_imports(path):
            if imported and _folder(imported) != _folder(module):
                graph[_folder(module)].add(_folder(imported))
    return graph


def _cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """A cycle of the graph as a path that ends where it begins; empty if there is none."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for following in sorted(graph.get(node, ())):
            if cycle := visit(following, [*path, node]):
                return cycle
        finished.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def test_every_component_has_an_import_rule() -> None:
    components = {module.partition(".")[0] for module in MODULES if module}
    assert components == set(MAY_IMPORT)


@pytest.mark.parametrize("component", MAY_IMPORT)
def test_a_component_imports_only_the_components_below_it(component: str) -> None:
    for module, path in MODULES.items():
        if module.partition(".")[0] == component:
            for imported in _own_imports(path):
                other = imported.partition(".")[0]
                assert not other or other == component or other in MAY_IMPORT[component], f"{module} imports {imported}"


def test_the_rules_themselves_contain_no_cycle() -> None:
    assert _cycle(MAY_IMPORT) == []


def test_no_cycle_between_folders() -> None:
    assert _cycle(_folder_graph()) == []


@pytest.mark.parametrize("component", sorted(set(MAY_IMPORT) - WITH_DAGSTER))
def test_the_components_below_do_not_import_dagster(component: str) -> None:
    for module, path in MODULES.items():
        if module.partition(".")[0] == component:
            names = [name for name in _imports(path) if name.split(".")[0].startswith("dagster")]
            assert not names, f"{module} imports {names}"


DAGSTER_INTERNALS = "orchestration.dagster_internals"
"""The one module that may import private names of Dagster."""

PRIVATE_DAGSTER = {
    "dagster._cli.api._execute_run_command_body",
    "dagster._core.definitions.asset_checks.asset_check_evaluation.AssetCheckEvaluationPlanned",
    "dagster._core.definitions.asset_checks.asset_check_evaluation.AssetCheckEvaluationTargetMaterializationData",
    "dagster._core.definitions.assets.definition.asset_spec.AssetExecutionType",
    "dagster._core.definitions.assets.graph.asset_graph.AssetGraph",
    "dagster._core.definitions.job_base.InMemoryJob",
    "dagster._core.definitions.metadata.MetadataFieldSerializer",
    "dagster._core.definitions.unresolved_asset_job_definition.UnresolvedAssetJobDefinition",
    "dagster._core.event_api.EventLogCursor",
    "dagster._core.events.AssetMaterializationPlannedData",
    "dagster._core.events.AssetObservationData",
    "dagster._core.events.EngineEventData",
    "dagster._core.events.JobFailureData",
    "dagster._core.events.RunFailureReason",
    "dagster._core.events.DagsterEventBatchMetadata",
    "dagster._core.events.StepMaterializationData",
    "dagster._core.execution.api.create_execution_plan",
    "dagster._core.execution.api.execute_run_iterator",
    "dagster._core.execution.context.metadata_logging.AssetMetadataHandle",
    "dagster._core.execution.context.metadata_logging.OutputMetadataAccumulator",
    "dagster._core.execution.plan.execute_step._get_output_asset_events",
    "dagster._core.execution.plan.objects.StepFailureData",
    "dagster._core.execution.plan.objects.UserFailureData",
    "dagster._core.instance.ref.InstanceRef",
    "dagster._core.launcher.CheckRunHealthResult",
    "dagster._core.launcher.LaunchRunContext",
    "dagster._core.launcher.WorkerStatus",
    "dagster._core.remote_origin.RegisteredCodeLocationOrigin",
    "dagster._core.remote_origin.RemoteJobOrigin",
    "dagster._core.remote_origin.RemoteRepositoryOrigin",
    "dagster._core.snap.snapshot_from_execution_plan",
    "dagster._core.storage.asset_check_execution_record.AssetCheckExecutionRecordStatus",
    "dagster._core.storage.config.PostgresStorageConfig",
    "dagster._core.storage.event_log.base.EventLogConnection",
    "dagster._core.storage.event_log.migration.ASSET_KEY_INDEX_COLS",
    "dagster._core.storage.event_log.schema.AssetCheckExecutionsTable",
    "dagster._core.storage.event_log.schema.AssetEventTagsTable",
    "dagster._core.storage.event_log.schema.AssetKeyTable",
    "dagster._core.storage.noop_compute_log_manager.NoOpComputeLogManager",
    "dagster._core.storage.tags.EXTERNALLY_MANAGED_ASSETS_TAG",
    "dagster._daemon.types.DaemonHeartbeat",
    "dagster._grpc.types.ExecuteRunArgs",
    "dagster._serdes.ConfigurableClassData",
    "dagster._serdes.unpack_value",
    "dagster_shared.serdes.serdes._WHITELIST_MAP",
}
"""Every private name of Dagster that the project depends on. A new one needs a reason in that module."""


def _private_dagster_names(path: Path) -> set[str]:
    return {
        name
        for name in _imports(path)
        if name.startswith("dagster") and any(part.startswith("_") for part in name.split("."))
    }


def test_private_names_of_dagster_are_imported_in_one_module_only() -> None:
    by_module = {module: names for module, path in MODULES.items() if (names := _private_dagster_names(path))}
    assert by_module == {DAGSTER_INTERNALS: PRIVATE_DAGSTER}


@pytest.mark.parametrize("pattern", ["*.yaml", "*.yml", "deploy/**/*", "sql/**/*"])
def test_no_configuration_names_a_private_module_of_dagster(pattern: str) -> None:
    for path in PACKAGE.parent.glob(pattern):
        if path.is_file() and path.suffix != ".pyc":
            assert not re.findall(r"\bdagster\w*\._\w+", path.read_text()), path


def test_the_pure_layer_names_no_environment_variable_of_the_settings() -> None:
    variables = re.compile(
        rf"\b(?:{'|'.join(name.upper() for name in Settings.model_fields)}|FHIR_AUTH_|FHIR_DELIVERY_)"
    )
    for module, path in MODULES.items():
        if module.partition(".")[0] == "fhir":
            assert variables.findall(path.read_text()) == [], f"{module} names settings: pass ServerLabels instead"


WITHOUT_SQL = {"pipeline", "api", "cli", "orchestration", "deployment", "ingestion", "definitions"}
"""The components that call named functions of the warehouse and execute no SQL themselves."""

SQL_OUTSIDE_THE_WAREHOUSE = {"orchestration.instance.run_page", "orchestration.instance.storage"}
"""Modules of these components with SQL. The event log writes Dagster's tables through Dagster's own SQLAlchemy."""


def test_components_above_the_warehouse_execute_no_sql() -> None:
    for module, path in MODULES.items():
        if module.partition(".")[0] in WITHOUT_SQL and module not in SQL_OUTSIDE_THE_WAREHOUSE:
            assert not [name for name in _imports(path) if name.startswith("psycopg.sql")], f"{module} composes SQL"
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            methods = {call.attr for call in calls if isinstance(call, ast.Attribute)}
            assert not methods & {"execute", "executemany"}, f"{module} executes SQL"


def test_tests_import_from_support_and_the_product_only() -> None:
    for path in sorted((PACKAGE.parent / "fhir_assets_tests").rglob("*.py")):
        for name in _imports(path):
            if name.startswith("fhir_assets_tests."):
                assert name.startswith("fhir_assets_tests.support"), f"{path} imports {name}: move it to support/"
