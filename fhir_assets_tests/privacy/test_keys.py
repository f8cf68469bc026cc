"""Parsing of encryption keys: valid keys are accepted, others are refused without being shown."""

import base64
import os
from collections.abc import Callable

import pytest

from fhir_assets.deployment.encryption import build_cipher
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.settings import Settings, load_settings


def encode(secret: bytes) -> str:
    return base64.urlsafe_b64encode(secret).decode()


@pytest.mark.parametrize(
    "text",
    [
        "secret",
        "",
        pytest.param(encode(os.urandom(16)), id="too-short"),
        pytest.param(encode(os.urandom(33)), id="too-long"),
        pytest.param(new_key()[:-1], id="cut-off"),
        pytest.param("é" * 44, id="no-ascii"),
        encode(bytes(32)),
        encode(b"0123456789abcdef" * 2),
        encode(bytes(range(32))),
        encode(b"this is my very secret password!"),
        encode(b"\x01\xfe" * 16),
    ],
)
def test_a_malformed_or_weak_key_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_keys([new_key(), text])
    assert "key 2 of PHI_ENCRYPTION_KEYS" in str(refused.value)
    assert not text or text not in str(refused.value)


def test_every_new_key_is_accepted() -> None:
    keys = parse_keys([new_key() for _ in range(200)])
    assert len({key.id for key in keys}) == 200
    assert all(len(key.id) == 8 for key in keys)


def test_the_same_key_twice_is_refused() -> None:
    key = new_key()
    with pytest.raises(ConfigurationError, match="twice"):
        parse_keys([key, key])


def test_keys_come_from_the_environment_or_from_a_file(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = new_key(), new_key()
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", f"{first},{second}")
    from_environment = load_settings()
    monkeypatch.delenv("PHI_ENCRYPTION_KEYS")
    file = f"{tmp_path}/keys"
    with open(file, "w") as out:
        out.write(f"# newest first\n{first}\n{second}\n")
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS_FILE", file)
    assert build_cipher(load_settings()).keys == build_cipher(from_environment).keys == parse_keys([first, second])
    assert first not in repr(from_environment)
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", first)
    with pytest.raises(ConfigurationError, match="mutually exclusive"):
        load_settings()


def test_missing_keys_are_refused_if_keys_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI_REQUIRED", "1")
    with pytest.raises(ConfigurationError, match="PHI_REQUIRED"):
        load_settings()
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS_FILE", "/nowhere/keys")
    with pytest.raises(ConfigurationError, match="PHI_ENCRYPTION_KEYS_FILE cannot be read"):
        load_settings()


@pytest.mark.parametrize("build", [Warehouse, build_store])
def test_a_malformed_key_is_refused_before_anything_is_opened(
    build: Callable[[Settings], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", "not-a-key")
    with pytest.raises(ConfigurationError, match="key 1 of PHI_ENCRYPTION_KEYS is malformed"):
        build(load_settings())
