"""Encryption: content round-trips with each key; altered content and content of a missing key are refused."""

import io
import pickle
from typing import BinaryIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.errors import EncryptionError
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher, as_json, from_json, is_token, key_id_of, new_secret
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.privacy.places import Place
from fhir_assets.storage.encrypted_parts import MARK, FrameEncryptor, decrypt_stream, read_key_id

OLD, NEW = new_key(), new_key()
SECRET = new_secret()
CIPHER = Cipher(parse_keys([OLD]), SECRET)
BOTH = Cipher(parse_keys([NEW, OLD]), SECRET)
PLACE = Place("ops.things", "content", "default", "1")
ONLY_NEW = Cipher(parse_keys([NEW]), SECRET)


@given(st.binary(max_size=5000))
def test_bytes_round_trip(content: bytes) -> None:
    encrypted = CIPHER.compress_and_encrypt(content, PLACE)
    assert CIPHER.decrypt_and_decompress(encrypted, PLACE) == BOTH.decrypt_and_decompress(encrypted, PLACE) == content
    assert from_json(as_json(encrypted).decode().strip('"')) == encrypted
    assert key_id_of(encrypted) == CIPHER.key_id
    assert NO_ENCRYPTION.compress_and_encrypt(content, PLACE) == content


@given(st.text())
def test_values_round_trip_as_tokens(value: str) -> None:
    if any("\ud800" <= c < "\ue000" for c in value):
        return
    token = CIPHER.encrypt_token(value, PLACE)
    assert is_token(token)
    assert BOTH.decrypt_token(token, PLACE) == value
    assert CIPHER.encrypt_token(value, PLACE) != token


def test_a_missing_key_is_named() -> None:
    with pytest.raises(EncryptionError, match=f"encrypted with key {CIPHER.keys[0].id}, which PHI_ENCRYPTION_KEYS"):
        ONLY_NEW.decrypt_and_decompress(CIPHER.compress_and_encrypt(b"x", PLACE), PLACE)
    with pytest.raises(EncryptionError, match="it holds no key"):
        NO_ENCRYPTION.decrypt_and_decompress(CIPHER.compress_and_encrypt(b"x", PLACE), PLACE)
    with pytest.raises(EncryptionError, match="add it as the last key"):
        ONLY_NEW.decrypt_token(CIPHER.encrypt_token("x", PLACE), PLACE)
    with pytest.raises(EncryptionError, match="it holds no key"):
        NO_ENCRYPTION.decrypt_token(CIPHER.encrypt_token("x", PLACE), PLACE)


@pytest.mark.parametrize("position", [8, 20, -1])
def test_altered_bytes_are_refused(position: int) -> None:
    encrypted = bytearray(CIPHER.compress_and_encrypt(b"a resource", PLACE))
    encrypted[position] ^= 1
    with pytest.raises(EncryptionError, match="damaged"):
        CIPHER.decrypt_and_decompress(bytes(encrypted), PLACE)


def test_hashes_survive_key_rotations_and_differ_by_purpose_and_deployment() -> None:
    other = Cipher(parse_keys([OLD]), new_secret())
    assert CIPHER.index("MRN-1") == BOTH.index("MRN-1") == ONLY_NEW.index("MRN-1") != other.index("MRN-1")
    assert CIPHER.subject("Patient", "1") == ONLY_NEW.subject("Patient", "1") != other.subject("Patient", "1")
    assert CIPHER.fingerprint(b"x") == ONLY_NEW.fingerprint(b"x")
    assert CIPHER.fingerprint(b"x") not in (other.fingerprint(b"x"), NO_ENCRYPTION.fingerprint(b"x"))
    assert CIPHER.index("x")[:32] != CIPHER.subject("x", "")[:32]


def test_a_cipher_is_pickled_with_its_keys_and_its_repr_shows_only_ids() -> None:
    unpickled = pickle.loads(pickle.dumps(BOTH))
    assert unpickled.decrypt_and_decompress(CIPHER.compress_and_encrypt(b"x", PLACE), PLACE) == b"x"
    assert unpickled.index("x") == BOTH.index("x")
    for text in (repr(BOTH), str(BOTH.keys)):
        assert NEW not in text
        assert str(BOTH.keys[0].secret)[2:20] not in text


def build_part(content: bytes, cipher: Cipher) -> BinaryIO:
    return io.BytesIO(MARK + b"".join(FrameEncryptor(cipher, PLACE).encrypt(content)))


@pytest.mark.parametrize("size", [0, 1, 1 << 18, (1 << 18) + 1, 3 << 18])
def test_parts_round_trip_frame_by_frame(size: int) -> None:
    content = bytes(n % 251 for n in range(size))
    assert decrypt_stream(build_part(content, CIPHER), BOTH, PLACE).read() == content
    assert read_key_id(build_part(content, CIPHER)) == (CIPHER.key_id if size else None)


class UnseekableStream(io.BytesIO):
    def seekable(self) -> bool:
        return False


def test_parts_are_read_from_unseekable_streams() -> None:
    encrypted = cast(io.BytesIO, build_part(b"x" * 1000, CIPHER)).getvalue()
    assert decrypt_stream(UnseekableStream(encrypted), CIPHER, PLACE).read() == b"x" * 1000
    assert decrypt_stream(UnseekableStream(b"clear" * 200), CIPHER, PLACE).read() == b"clear" * 200


def test_a_truncated_part_is_refused() -> None:
    encrypted = cast(io.BytesIO, build_part(b"x" * 1000, CIPHER)).getvalue()
    with pytest.raises(EOFError):
        decrypt_stream(io.BytesIO(encrypted[:-1]), CIPHER, PLACE).read()


def test_encrypted_parts_are_read_when_the_store_is_not_encrypted() -> None:
    cipher = CIPHER.reading_only()
    assert not cipher.encrypts
    assert cipher.encrypt(b"x", PLACE) == b"x"
    assert cipher.decrypt_and_decompress(CIPHER.compress_and_encrypt(b"x", PLACE), PLACE) == b"x"
