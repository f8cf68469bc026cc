"""The deployment files of the repository name settings, commands and configuration that exist."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster_k8s import K8sRunLauncher, k8s_job_executor
from dagster_k8s.container_context import K8sContainerContext
from typer.main import get_command

from fhir_assets.cli.main import app
from fhir_assets.definitions import build_definitions
from fhir_assets.orchestration.instance.config import render_dagster_yaml
from fhir_assets.orchestration.jobs import INCREMENTAL_LOAD
from fhir_assets.settings import Executor, Settings, load_settings
from fhir_assets.warehouse.postgres.db.process_roles import LOGINS
from fhir_assets.warehouse.postgres.db.role_rights import API, CONNECTOR, DAGSTER, LOADER, OPERATOR
from fhir_assets_tests.support.dagster_internals import (
    InstigatorType,
    TickStatus,
    load_command,
    process_config,
)

ROOT = Path(__file__).parent.parent
FOREIGN = re.compile(r"(AWS|DAGSTER|POSTGRES|GF|GRAFANA|CELERY|MINIO)_[A-Z_]+|PGPASSWORD")
"""Variables of other software in the deployments. FHIR_DAGSTER_HOME is used by docker-compose.yml only."""


def compose() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return services


def values() -> dict[str, Any]:
    chart_values: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "k8s" / "values.yaml").read_text())
    return chart_values


def snake(value: Any) -> Any:
    """Return a name as the chart writes it to dagster.yaml. Names below these are Kubernetes' own."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", value).lower()


def known(name: str) -> bool:
    return name.lower() in Settings.model_fields or bool(FOREIGN.fullmatch(name)) or name == "FHIR_DAGSTER_HOME"


def commands(text: str | list[str]) -> Iterator[list[str]]:
    words = shlex.split(text) if isinstance(text, str) else text
    for n, word in enumerate(words):
        if word == "fhir-assets":
            yield words[n + 1 :]
        elif "fhir-assets " in word:
            for part in re.split(r"&&|;", word):
                yield from commands(part)


def exists(command: list[str]) -> bool:
    group: Any = get_command(app)
    for word in command:
        if not hasattr(group, "commands"):
            break
        if word.startswith("-"):
            break
        if word not in group.commands:
            return False
        group = group.commands[word]
    return True


def test_compose_names_settings_and_commands_that_exist() -> None:
    services = compose()["services"]
    names = {name for service in services.values() for name in service.get("environment", {})}
    text = (ROOT / "docker-compose.yml").read_text()
    names |= set(re.findall(r"\$\{(\w+)", text)) | set(re.findall(r"\b(FHIR_[A-Z_]+)=", text))
    assert [name for name in sorted(names) if not known(name)] == []
    own_commands = [command for service in services.values() for command in commands(service.get("command", ""))]
    assert ["worker"] in own_commands
    assert [command for command in own_commands if not exists(command)] == []


def test_the_commands_of_dagster_in_the_deployment_have_the_options_that_they_name() -> None:
    texts = [str(service.get("command", "")) for service in compose()["services"].values()]
    (code,) = values()["dagster-user-deployments"]["deployments"]
    texts.append("dagster api grpc " + " ".join(code["dagsterApiGrpcArgs"]))
    found = [shlex.split(text) for text in texts if text.startswith("dagster")]
    assert {program for program, *_ in found} == {"dagster", "dagster-daemon", "dagster-webserver"}
    for program, *words in found:
        command: Any = load_command(program)
        while words and hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        assert [word for word in words if word.startswith("-") and word not in options] == []


def test_compose_starts_every_service_again_that_ends() -> None:
    policies = {name: service.get("restart") for name, service in compose()["services"].items()}
    assert [policies.pop(name) for name in ("migrate", "s3_bucket", "connector_install")] == ["on-failure"] * 3
    assert set(policies.values()) == {"unless-stopped"}, policies


OWNER = "fhir"
"""The superuser that the image of Postgres creates."""

PASSWORDS = re.compile(r"\$\{((?:POSTGRES|GRAFANA)_(?:\w+_)?PASSWORD)[^}]*\}")


def find_logins(environment: dict[str, str]) -> set[str]:
    urls = (environment.get(name) or "" for name in ("DB_URL", "DAGSTER_POSTGRES_URL"))
    return {match[1] for url in urls if (match := re.search(r"//(\w+)@", url))}


def test_each_service_of_compose_has_its_own_login_and_only_those_that_create_something_the_owners() -> None:
    loader, dagster = LOGINS[LOADER], LOGINS[DAGSTER]
    environments = {name: service.get("environment") or {} for name, service in compose()["services"].items()}
    assert {name: logins for name, environment in environments.items() if (logins := find_logins(environment))} == {
        "migrate": {OWNER},
        "connector_install": {OWNER},
        **{name: {loader, dagster} for name in ("code_location", "post_loader", "worker")},
        **{name: {dagster} for name in ("webserver", "daemon")},
        "api": {LOGINS[API]},
        "connector": {LOGINS[CONNECTOR]},
        "metrics": {LOGINS[OPERATOR], dagster},
    }
    for name in ("migrate", "connector_install"):
        assert compose()["services"][name]["restart"] == "on-failure"


def test_no_service_of_compose_gets_the_password_of_another() -> None:
    services = compose()["services"]
    text = (ROOT / "docker-compose.yml").read_text()
    passwords = {match[1] for match in PASSWORDS.finditer(text)}
    assert len(passwords) == 8
    for name, service in services.items():
        environment = service.get("environment") or {}
        logins = find_logins(environment)
        allowed = {f"POSTGRES_{login.removeprefix('fhir_assets_').upper()}_PASSWORD" for login in logins - {OWNER}}
        allowed |= {"POSTGRES_PASSWORD"} if OWNER in logins or name == "postgres" else set()
        allowed |= {"GRAFANA_PASSWORD"} if name in ("grafana", "s3") else set()
        allowed |= passwords - {"GRAFANA_PASSWORD"} if name == "migrate" else set()
        given = {match[1] for value in environment.values() for match in PASSWORDS.finditer(str(value))}
        assert given <= allowed, name
        # .env has them all, and what the file sets counts more.
        if "env_file" in service:
            assert passwords - {key for key, value in environment.items() if not value} <= allowed, name
    for password in passwords - {"POSTGRES_AUDITOR_PASSWORD"}:
        assert re.search(rf"\$\{{{password}:\?", text), f"{password} has a default"


def test_what_connects_to_the_database_waits_for_the_service_that_creates_the_logins() -> None:
    services = compose()["services"]

    def waits_for(name: str) -> set[str]:
        needed = set(services[name].get("depends_on", {}))
        return needed.union(*(waits_for(each) for each in needed))

    assert [
        name
        for name, service in services.items()
        if find_logins(service.get("environment") or {}) and name != "migrate" and "migrate" not in waits_for(name)
    ] == []
    wanted = {"condition": "service_completed_successfully"}
    assert services["code_location"]["depends_on"]["migrate"] == wanted
    assert services["connector"]["depends_on"]["connector_install"] == wanted
    assert "fhir-assets roles --logins --password-env 'POSTGRES_{}_PASSWORD'" in services["migrate"]["command"]


def run_make(folder: Path, *, target: str = "passwords", **variables: str) -> str:
    command = ["make", "-f", str(ROOT / "Makefile"), target]
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def test_make_writes_the_passwords_that_are_missing_and_keeps_the_others(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("FHIR_SOURCE=search\nPOSTGRES_PASSWORD='kept'\n#POSTGRES_API_PASSWORD=x\nGRAFANA_PASSWORD=")
    file.chmod(0o644)
    run_make(tmp_path, POSTGRES_LOADER_PASSWORD="of the shell")
    text = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    written = dict(re.findall(r"^(\w+)=([0-9a-f]{48})$", text, re.MULTILINE))
    required = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text()))
    assert set(written) == required - {"POSTGRES_PASSWORD", "POSTGRES_LOADER_PASSWORD"}
    assert len(set(written.values())) == len(written)
    assert "POSTGRES_PASSWORD='kept'\n" in text
    assert run_make(tmp_path, POSTGRES_LOADER_PASSWORD="of the shell") == ""
    assert file.read_text() == text


def test_compose_starts_redis_and_two_workers_in_profile_celery() -> None:
    celery = {name: service for name, service in compose()["services"].items() if service.get("profiles") == ["celery"]}
    assert sorted(celery) == ["redis", "worker"]
    assert celery["worker"]["deploy"]["replicas"] == 2


def test_compose_starts_an_s3_server_and_makes_the_buckets_before_they_are_used() -> None:
    services = compose()["services"]
    server, buckets = services["s3"], services["s3_bucket"]
    assert server["profiles"] == buckets["profiles"] == ["s3"]
    assert server["image"] == "minio/minio:RELEASE.2025-09-07T16-13-09Z"
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    assert buckets["depends_on"]["s3"] == {"condition": "service_healthy"}
    assert server["healthcheck"]["test"]
    # Compose refuses a service that requires another one whose profile is not active.
    wanted = {"condition": "service_completed_successfully", "required": False}
    assert [services[name]["depends_on"]["s3_bucket"] for name in ("code_location", "post_loader")] == [wanted] * 2


def test_every_variable_of_the_example_file_is_a_setting() -> None:
    names = re.findall(r"^#?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert "FHIR_MAX_LOADERS" in names
    assert [name for name in names if not known(name)] == []


def read_values(container: dict[str, Any]) -> dict[str, str]:
    """Return the variables of a container that are no secrets."""
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


def read_secrets(container: dict[str, Any]) -> dict[str, str]:
    """Return the name of the Secret of each variable of a container that comes from one."""
    references = {
        entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if "valueFrom" in entry
    }
    return {name: reference["name"] for name, reference in references.items()}


def test_each_pod_gets_the_secret_of_its_login_by_reference_and_only_the_migration_the_owners() -> None:
    secrets = {name: read_secrets(container) for name, _, container in pods() if "env" in container}
    loader = {
        "DB_URL": "fhir-assets-loader",
        "DB_PASSWORD": "fhir-assets-loader",
        "DAGSTER_POSTGRES_URL": "dagster-postgresql-secret",
        "DAGSTER_POSTGRES_PASSWORD": "dagster-postgresql-secret",
    }
    migrate = secrets.pop("migrate.yaml")
    # Runs have the variables of the code location (includeConfigInLaunchedRuns); the UI and the daemon have no DB_URL.
    assert secrets == {"post-loader.yaml": loader, "code": loader}
    assert {migrate.pop(name) for name in ("DB_URL", "DB_PASSWORD")} == {"fhir-assets-owner"}
    assert migrate == {
        f"POSTGRES_{login.removeprefix('fhir_assets_').upper()}_PASSWORD": (
            "dagster-postgresql-secret" if role == DAGSTER else login.replace("_", "-")
        )
        for role, login in LOGINS.items()
    }
    texts = [path.read_text() for path in (ROOT / "deploy" / "k8s").glob("*.yaml")]
    assert sum(text.count("name: fhir-assets-owner") for text in texts) == 2
    assert values()["postgresql"]["postgresqlUsername"] == LOGINS[DAGSTER]
    (code,) = values()["dagster-user-deployments"]["deployments"]
    assert code["includeConfigInLaunchedRuns"] == {"enabled": True}
    run = K8sContainerContext.create_from_config({"k8s": {"env": code["env"]}}).run_k8s_config.container_config["env"]
    assert {entry["name"] for entry in run if "value_from" in entry} == set(loader)


def test_the_values_of_the_chart_name_settings_that_load() -> None:
    (code,) = values()["dagster-user-deployments"]["deployments"]
    assert [entry["name"] for entry in code["env"] if not known(entry["name"])] == []
    chosen = {name.lower(): value for name, value in read_values(code).items() if name.lower() in Settings.model_fields}
    loaded = load_settings(**{**chosen, "phi_required": False})
    assert loaded.fhir_executor is Executor.K8S
    named = re.findall(r"\b[A-Z]+_[A-Z_]+\b", (ROOT / "deploy" / "k8s" / "values.yaml").read_text())
    assert [name for name in named if not known(name)] == []


def test_the_job_that_migrates_is_a_command_that_exists() -> None:
    job = yaml.safe_load((ROOT / "deploy" / "k8s" / "migrate.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert [exists(command) for command in commands(container["command"])] == [True, True]


def test_the_deployment_of_the_post_loader_names_a_command_and_settings_that_exist() -> None:
    deployment = yaml.safe_load((ROOT / "deploy" / "k8s" / "post-loader.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert [exists(command) for command in commands(container["command"])] == [True]
    assert [entry["name"] for entry in container["env"] if not known(entry["name"])] == []
    (code,) = values()["dagster-user-deployments"]["deployments"]
    shared, of_code = read_values(container), read_values(code)
    assert {name: value for name, value in shared.items() if of_code.get(name, value) != value} == {}


def manifests(name: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((ROOT / "deploy" / "k8s" / name).read_text()) if each]


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield each workload of deploy/k8s with the specification of its pod and of its container."""
    for name in ("migrate.yaml", "post-loader.yaml"):
        (workload,) = manifests(name)
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        yield name, pod, container
    chart = values()
    (code,) = chart["dagster-user-deployments"]["deployments"]
    for name, part in (("code", code), ("ui", chart["dagsterWebserver"]), ("daemon", chart["dagsterDaemon"])):
        yield name, part | {"securityContext": part["podSecurityContext"]}, part
    launcher = chart["runLauncher"]["config"]["k8sRunLauncher"]
    run = launcher["runK8sConfig"]
    shared = {name: code[name] for name in ("volumes", "volumeMounts")}
    yield "run", run["podSpecConfig"] | shared, run["containerConfig"] | shared | {"resources": launcher["resources"]}


def test_no_pod_runs_as_root_with_privileges_or_on_a_root_that_it_can_write() -> None:
    names = []
    for name, pod, container in pods():
        names.append(name)
        user = pod["securityContext"]
        assert (user["runAsNonRoot"], user["runAsUser"]) == (True, 10001), name
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}, name
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True, name
        assert rights["allowPrivilegeEscalation"] is rights["privileged"] is False, name
        assert rights["capabilities"] == {"drop": ["ALL"]}, name
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/tmp", "/var/lib/fhir_assets"} <= mounts, name
        assert {mount["name"] for mount in container["volumeMounts"]} <= {each["name"] for each in pod["volumes"]}, name
        assert container["resources"]["limits"]["memory"], name
        assert container["resources"]["requests"]["cpu"], name
    assert len(names) == 6
    assert "useradd --create-home --uid 10001 " in (ROOT / "deploy" / "Dockerfile").read_text()


def test_secrets_reach_a_pod_by_reference_only() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "deploy" / "k8s").glob("*.yaml")}
    secrets = [name for name in Settings.model_fields if re.search("key|token|secret|password|db_url", name)]
    for file, text in texts.items():
        given = set(re.findall(r"(?:name: |^\s*)([A-Z_]+)(?:, value)?: *\S", text, re.MULTILINE))
        assert not {name.lower() for name in given} & set(secrets), file
        assert "FHIR_STORE_URL" in given or file in ("migrate.yaml", "network-policy.yaml")


def test_the_network_policy_closes_the_namespace_and_opens_what_is_named() -> None:
    closed, *opened = manifests("network-policy.yaml")
    assert closed["spec"]["podSelector"] == {}
    assert "ingress" not in closed["spec"]
    assert sorted(closed["spec"]["policyTypes"]) == ["Egress", "Ingress"]
    assert {policy["kind"] for policy in (closed, *opened)} == {"NetworkPolicy"}
    (code,) = values()["dagster-user-deployments"]["deployments"]
    ports = {
        port["port"]
        for policy in opened
        for rule in policy["spec"].get("ingress", [])
        for port in rule.get("ports", [])
    }
    assert ports == {code["port"]}


def test_the_run_launcher_of_the_values_keeps_its_schema() -> None:
    launcher = values()["runLauncher"]["config"]["k8sRunLauncher"]
    config = {snake(name): value for name, value in launcher.items()}
    job = config["run_k8s_config"]
    config["run_k8s_config"] = {snake(name): value for name, value in job.items()}
    # Values that the chart adds.
    config |= {
        "service_account_name": "dagster",
        "job_namespace": "default",
        "dagster_home": "/opt/dagster/dagster_home",
        "instance_config_map": "dagster-instance",
        "postgres_password_secret": values()["global"]["postgresqlSecretName"],
    }
    schema = K8sRunLauncher.config_type()  # type: ignore[no-untyped-call]
    result = process_config(schema, config)
    assert result.success, [error.message for error in result.errors or []]
    assert not process_config(schema, {**config, "no_such_thing": 1}).success


def test_with_kubernetes_selected_assets_run_in_one_job_for_each_step_and_loads_in_one_process() -> None:
    settings = load_settings(fhir_executor="k8s", fhir_base_url="https://fhir.example.org/fhir")
    definitions = build_definitions(settings)
    assert definitions.executor is k8s_job_executor
    definitions.get_repository_def().load_all_definitions()
    assert definitions.resolve_job_def(INCREMENTAL_LOAD).executor_def is dg.in_process_executor
    config = {"config": {"job_image": "registry.example.org/fhir_assets:0.1.0", "max_concurrent": 4}}
    job = definitions.resolve_implicit_global_asset_job_def()
    assert dg.validate_run_config(job, {"execution": config})["execution"]


@pytest.mark.parametrize("executor", [Executor.MULTIPROCESS, Executor.CELERY])
def test_dagster_opens_the_instance_of_every_executor(
    executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://localhost:6379/0")
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", database.replace("postgresql://", "postgresql+psycopg2://"))
    monkeypatch.setenv("FHIR_MAX_RUNS", "7")
    (tmp_path / "dagster.yaml").write_text(render_dagster_yaml(load_settings(fhir_executor=executor)))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        queue = instance.get_concurrency_config().run_queue_config
        assert queue
        assert queue.max_concurrent_runs == 7
        celery = executor is Executor.CELERY
        assert (
            type(instance.run_launcher).__module__ == "fhir_assets.orchestration.instance.celery_launcher"
        ) == celery
        assert (instance.run_monitoring_start_timeout_seconds > 86_400) == celery


def test_dagster_deletes_ticks_after_30_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", database.replace("postgresql://", "postgresql+psycopg2://"))
    (tmp_path / "dagster.yaml").write_text(render_dagster_yaml(load_settings()))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        for instigator in (InstigatorType.SCHEDULE, InstigatorType.SENSOR):
            days = instance.get_tick_retention_settings(instigator)
            assert days[TickStatus.SUCCESS] == days[TickStatus.FAILURE] == 30
            assert days[TickStatus.STARTED] == -1
        assert instance.get_tick_retention_settings(InstigatorType.SENSOR)[TickStatus.SKIPPED] == 7
