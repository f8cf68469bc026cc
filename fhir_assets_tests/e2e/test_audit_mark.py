"""The mark of the audit log in the store follows commits, shows a log that lost its end, and never moves backwards."""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.deployment.sources import build_binding
from fhir_assets.deployment.store import build_root
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.privacy.audit import MARK, AuditRecord
from fhir_assets.privacy.audit_mark import decode_mark
from fhir_assets.privacy.keys import new_key
from fhir_assets.settings import load_settings
from fhir_assets.storage.blobs import Blobs
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.postgres.db.connections import connect


class Site:
    """A deployment whose store belongs to its database, and five audit records that its mark vouches for."""

    def __init__(self, url: str, home: Path, *, key: str = "", store: str = "") -> None:
        self.url = url
        self.environment = {"DB_URL": url, "FHIR_ASSETS_HOME": str(home), "PHI_ENCRYPTION_KEYS": key}
        if store:
            self.environment["FHIR_STORE_URL"] = store
        settings = load_settings(**{name.lower(): value or None for name, value in self.environment.items()})
        self.warehouse = Warehouse(settings)
        self.blobs: Blobs = build_root(settings).blobs
        build_binding(settings, self.warehouse).require()
        self.record(5)

    def record(self, count: int) -> None:
        with self.warehouse.connect() as conn:
            audit_log.record(conn, *(AuditRecord("read", f"test {number}") for number in range(count)))
        self.warehouse.audit_marker.finish()

    def marked(self) -> int:
        return decode_mark(self.blobs.get(MARK) or b"").seq

    def cut(self, seq: int) -> None:
        """Make ``seq`` the last record, as a crash, an older backup or the owner of the tables can."""
        with connect(self.url) as conn:
            conn.execute("ALTER TABLE ops.audit_log DISABLE TRIGGER USER")
            conn.execute("DELETE FROM ops.audit_log WHERE seq > %s", [seq])
            conn.execute("ALTER TABLE ops.audit_log ENABLE TRIGGER USER")
            conn.execute(
                "UPDATE ops.audit_head h SET seq = l.seq, link = l.link FROM ops.audit_log l WHERE l.seq = %s", [seq]
            )

    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["audit", *arguments], env=self.environment)

    def verify(self, *arguments: str) -> tuple[int, Any]:
        """Return the exit code of `fhir-assets audit verify` and the fault that it found."""
        result = self.run("verify", "--json", *arguments)
        return result.exit_code, json.loads(result.stdout)["fault"]


@pytest.fixture(params=["without keys", "with keys"])
def site(request: pytest.FixtureRequest, database: str, tmp_path: Path) -> Site:
    key = new_key() if request.param == "with keys" else ""
    return Site(database, tmp_path, key=key)


def test_a_log_that_lost_its_end_contradicts_the_mark_also_after_further_records(site: Site) -> None:
    assert (site.verify(), site.marked()) == ((0, None), 5)
    site.cut(3)
    assert site.verify() == (1, {"seq": 4, "what": "missing"})
    assert site.verify("--no-mark") == (0, None)
    assert "vouches for 5 records" in site.run("verify").stderr
    site.record(1)
    assert site.verify() == (1, {"seq": 5, "what": "missing"})
    site.record(4)
    assert site.verify() == (1, {"seq": 5, "what": "altered"})
    assert site.marked() == 5


def test_a_mark_that_is_gone_or_was_changed_is_a_fault_and_is_not_written_again(site: Site) -> None:
    content = site.blobs.get(MARK)
    assert content
    site.blobs.put(MARK, content.replace(b'"seq": 5', b'"seq": 2'))
    assert site.verify() == (1, {"seq": 2, "what": "mark altered"})
    site.blobs.put(MARK, b"{")
    assert site.verify() == (1, {"seq": 0, "what": "mark altered"})
    site.blobs.delete(MARK)
    site.record(1)
    assert site.verify() == (1, {"seq": 6, "what": "unmarked"})
    site.blobs.put(MARK, content)
    site.record(1)
    assert (site.verify(), site.marked()) == ((0, None), 7)


def test_a_mark_is_forged_with_the_keys_only(database: str, tmp_path: Path) -> None:
    site = Site(database, tmp_path, key=new_key())
    content = json.loads(site.blobs.get(MARK) or b"")
    site.cut(3)
    with connect(database) as conn:
        (link,) = conn.execute("SELECT encode(link, 'hex') FROM ops.audit_log WHERE seq = 3").fetchone() or ("",)
    site.blobs.put(MARK, json.dumps({**content, "seq": 3, "link": link, "keyed": False}).encode())
    assert site.verify() == (1, {"seq": 3, "what": "mark altered"})


def test_a_loss_that_is_explained_is_accepted_once_and_recorded(site: Site) -> None:
    assert "nothing to accept" in str(site.run("accept", "--reason", "none").exception)
    site.cut(3)
    result = site.run("accept", "--reason", "the backup of Monday was restored")
    assert result.exit_code == 0, result.output
    assert (site.verify(), site.marked()) == ((0, None), 4)
    (entry, *_) = json.loads(site.run("list", "--json", "--limit", "1").stdout)
    assert (entry["action"], entry["detail"]["marked"]) == ("accept a loss", 5)
    mark = decode_mark(site.blobs.get(MARK) or b"")
    assert [loss.seq for loss in mark.losses] == [5]
    assert "Accepted losses: 1" in site.run("verify").stdout
    site.record(2)
    assert (site.verify(), site.marked()) == ((0, None), 6)


def test_a_process_that_records_marks_at_its_end_and_its_actor_is_the_account_not_what_it_claims(
    database: str, tmp_path: Path
) -> None:
    site = Site(database, tmp_path)
    subprocess.run(
        [sys.executable, "-c", "from fhir_assets.cli import main; main()", "patient", "show", "a"],
        env={**os.environ, **site.environment, "LOGNAME": "mallory", "USER": "mallory"},
        check=False,
        capture_output=True,
    )
    (entry, *_) = json.loads(site.run("list", "--json", "--limit", "1").stdout)
    account = pwd.getpwuid(os.getuid()).pw_name
    assert (entry["seq"], entry["actor"], entry["account"]) == (6, f"cli:{account}", account)
    assert (entry["database_user"], entry["claim"]) == ("postgres", "mallory")
    assert site.marked() == 6


def test_the_mark_is_in_the_bucket_of_the_store(database: str, tmp_path: Path, s3_url: str) -> None:
    site = Site(database, tmp_path, store=s3_url)
    assert (site.verify(), site.marked()) == ((0, None), 5)
    site.cut(1)
    assert site.verify() == (1, {"seq": 2, "what": "missing"})


def test_a_store_of_another_database_gets_no_mark(database: str, tmp_path: Path) -> None:
    site = Site(database, tmp_path / "site")
    laptop = load_settings(db_url=database, fhir_assets_home=tmp_path / "laptop")
    warehouse = Warehouse(laptop)
    with warehouse.connect() as conn:
        audit_log.record(conn, AuditRecord("read", "test"))
    warehouse.audit_marker.finish()
    assert build_root(laptop).blobs.get(MARK) is None
    assert (site.verify(), site.marked()) == ((0, None), 5)
    site.record(1)
    assert site.marked() == 7
