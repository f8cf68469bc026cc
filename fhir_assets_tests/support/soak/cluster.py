"""A Postgres server with a synchronous replica, behind one address that follows the primary."""

import os
import pwd
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psycopg

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets_tests.support.soak.proxy import Proxy

_USER = "postgres"
_REPLICA = "replica"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "wal_level": "replica",
    "hot_standby": "on",
    "wal_keep_size": "256MB",
}


class Cluster:
    """Two servers in ``folder``. Clients connect to ``url``. What the primary has acknowledged, the replica has, too.

    As root, the servers run as ``nobody``, since Postgres does not run as root.
    """

    def __init__(self, folder: Path) -> None:
        self._programs = embedded.find_programs(folder)
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._folders = [folder / "server-0", folder / "server-1"]
        self._ports = [find_free_port(), find_free_port()]
        self._primary = 0
        folder.mkdir(mode=0o711, exist_ok=True)
        self._prepare(self._folders[0])
        self._execute("initdb", "-D", self._folders[0], "-U", _USER, "--auth=trust", "--encoding=UTF8", "--locale=C")
        with (self._folders[0] / "pg_hba.conf").open("a") as rules:
            rules.write("host replication all 127.0.0.1/32 trust\n")
        self._start(0)
        self.proxy = Proxy(self._ports[0])
        self.url = f"postgresql://{_USER}@127.0.0.1:{self.proxy.port}/fhir"
        self._ask(0, "CREATE DATABASE fhir")
        self._add_replica()

    def kill(self) -> None:
        """End the primary as ``kill -9`` does."""
        pid = int((self._folders[self._primary] / "postmaster.pid").read_text().split()[0])
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def restart(self) -> None:
        """Start the primary again after it was killed, unless it runs."""
        with suppress(psycopg.OperationalError):
            self._ask(self._primary, "SELECT 1")
            return
        for attempt in range(30):
            try:
                self._start(self._primary)
                return
            except subprocess.CalledProcessError:  # Its processes end only when they see that it was killed.
                if attempt == 29:
                    raise

    def fail_over(self) -> None:
        """Kill the primary, and make the replica the primary. It has no replica until ``rebuild``."""
        self.kill()
        self.proxy.break_connections()
        other = 1 - self._primary
        self._execute("pg_ctl", "promote", "-D", self._folders[other], "-w")
        self._ask(other, "ALTER SYSTEM SET synchronous_standby_names = ''")
        self._ask(other, "SELECT pg_reload_conf()")
        self._primary = other
        self.proxy.target = self._ports[other]

    def rebuild(self) -> None:
        """Make the killed server the replica of the present primary."""
        self._add_replica()

    def stop(self) -> None:
        """Stop both servers."""
        self.proxy.close()
        for folder in self._folders:
            with suppress(subprocess.CalledProcessError):
                self._execute("pg_ctl", "stop", "-D", folder, "-m", "immediate", "-w")

    def _add_replica(self) -> None:
        other = 1 - self._primary
        with suppress(subprocess.CalledProcessError):
            self._execute("pg_ctl", "stop", "-D", self._folders[other], "-m", "immediate", "-w")
        shutil.rmtree(self._folders[other], ignore_errors=True)
        self._prepare(self._folders[other])
        source = f"host=127.0.0.1 port={self._ports[self._primary]} user={_USER} application_name={_REPLICA}"
        self._execute("pg_basebackup", "-D", self._folders[other], "-R", "-X", "stream", "-c", "fast", "-d", source)
        self._start(other)
        self._ask(self._primary, f"ALTER SYSTEM SET synchronous_standby_names = '{_REPLICA}'")
        self._ask(self._primary, "SELECT pg_reload_conf()")

    def _prepare(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        if self._account:
            os.chown(folder, self._account.pw_uid, self._account.pw_gid)

    def _start(self, number: int) -> None:
        settings = _SETTINGS | {"port": str(self._ports[number]), "unix_socket_directories": "''"}
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        folder = self._folders[number]
        self._execute("pg_ctl", "start", "-D", folder, "-l", folder / "server.log", "-o", options, "-w", "-t", "120")

    def _ask(self, number: int, statement: str) -> None:
        server = f"postgresql://{_USER}@127.0.0.1:{self._ports[number]}/postgres"
        with psycopg.connect(server, autocommit=True) as conn:
            conn.execute(statement.encode())

    def _execute(self, program: str, *arguments: str | Path) -> None:
        account = self._account
        subprocess.run(
            [str(self._programs / program), *map(str, arguments)],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            cwd="/",
        )
