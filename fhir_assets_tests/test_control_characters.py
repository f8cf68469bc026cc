"""Control characters in names of files and in texts of servers are shown as escapes, never sent to a terminal."""

import json
import logging
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fhir_assets.cli.main import app, main
from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.control_characters import escape_control_characters
from fhir_assets.errors import ConfigurationError
from fhir_assets.logs import JsonFormatter
from fhir_assets.notices import Notices
from fhir_assets.steps.progress import ProgressRelay
from fhir_assets.storage.landing_zone import FolderZone
from fhir_assets.warehouse.ops import landing_files
from fhir_assets.warehouse.postgres.db.connections import Session

HOSTILE = "a\x1b]0;title\x07\r\n\x7f\x9b31m\u202efdp.\u2066\u2028\udcff"
SHOWN = r"a\u001b]0;title\u0007\u000d\u000a\u007f\u009b31m\u202efdp.\u2066\u2028\udcff"


@given(st.text(st.characters(codec=None)))
def test_the_result_has_no_control_character_and_is_the_same_json(text: str) -> None:
    shown = escape_control_characters(text)
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in shown)
    document = json.dumps({"text": text}, ensure_ascii=False)
    assert json.loads(escape_control_characters(document)) == {"text": text}


def test_other_text_is_unchanged_and_lines_can_be_kept() -> None:
    assert escape_control_characters("Zoë 日本 🏥 \u200f עברית") == "Zoë 日本 🏥 \u200f עברית"
    assert escape_control_characters("a\n\tb\x1b", lines=True) == "a\n\tb\\u001b"


def test_an_error_is_one_line_of_visible_characters() -> None:
    assert str(ConfigurationError(f"{HOSTILE} cannot be read")) == f"{SHOWN} cannot be read"


def test_what_a_command_prints_is_visible(capsys: pytest.CaptureFixture[str]) -> None:
    console.print(f"File {HOSTILE}", markup=False, soft_wrap=True)
    assert capsys.readouterr().out == f"File {SHOWN}\n"
    print_table("Files", [{"name": f"{HOSTILE}[/x]:heart:"}], ["name"])
    assert f"{SHOWN}[/x]:heart:" in capsys.readouterr().out
    print_json({"name": "\x9b\u202e\x1b"})
    assert capsys.readouterr().out == '{"name":"\\u009b\\u202e\\u001b"}\n'


def test_the_message_of_a_failed_command_is_visible(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["fhir-assets", "view", "run", "\x1b[2J\nfhir-assets: all is well", "x"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    assert r"\u001b[2J\u000afhir-assets: all is well" in printed


def test_a_landed_file_with_a_hostile_name_is_listed_visibly(
    conn: Session, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DB_URL", database)
    monkeypatch.setenv("FHIR_LANDING_URL", str(tmp_path))
    (tmp_path / "\x1b[").mkdir()
    (tmp_path / "\x1b[" / "red]\r.ndjson").write_bytes(b"")
    zone = FolderZone(tmp_path)
    landing_files.record_listing(conn, zone.url, [(file, True) for file in zone.files()])
    conn.commit()
    for command in (["landing", "list"], ["landing", "list", "--json"]):
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert "\x1b" not in result.output
        assert "\r" not in result.output
    assert json.loads(result.output)[0]["name"] == "\x1b[/red]\r.ndjson"


def test_a_record_of_the_log_is_visible_json() -> None:
    record = logging.LogRecord("fhir_assets.x", logging.INFO, "f", 1, "file \x9b\u202e", None, None)
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert json.loads(line)["message"] == "file \x9b\u202e"


def test_notices_and_progress_are_visible() -> None:
    notices, progress = Notices(), ProgressRelay()
    notices.add("warning", "code", HOSTILE[:-1])
    received: list[str] = []
    with progress.send_to(received.append):
        progress(HOSTILE)
    assert [notice.message for notice in notices.drain()] == [SHOWN[: -len("\\udcff")]]
    assert received == [SHOWN]
