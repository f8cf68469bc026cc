"""Re-encryption of parts in place: each file is replaced atomically, its name and content stay the same."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from fhir_assets.errors import EncryptionError, FhirAssetsError, StoreError
from fhir_assets.foreign_errors import choose_store_error
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.storage.encrypted_parts import FRAME_BYTES, MARK, FrameEncryptor, decrypt_stream, read_key_id
from fhir_assets.storage.store import LAYERS, Store

BATCH_PARTS = 64
"""The number of parts that are re-encrypted before their outcomes are returned."""

_THREADS = 8


def list_part_keys(store: Store) -> Iterator[tuple[str, str | None]]:
    """Yield every part of the store with the id of the key that it is encrypted with, or None for clear text.

    Parts that no manifest names are included. Read only the first bytes of each part. Raises StoreError.
    """
    names = (
        name for layer in LAYERS for name in store.blobs.names(layer) if name.rpartition("/")[2].startswith("part-")
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        while group := list(islice(names, 16 * _THREADS)):
            yield from (entry for entry in pool.map(lambda name: _read_part_key(store, name), group) if entry)


def reencrypt(
    store: Store, parts: Iterable[tuple[str, str | None]], cipher: Cipher
) -> Iterator[tuple[str, str | None, FhirAssetsError | None]]:
    """Re-encrypt parts with the newest key. Yield each part with its error, or None if it succeeded.

    A part that was deleted in the meantime counts as done. A part that cannot be read stays unchanged.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        rest = iter(parts)
        while group := list(islice(rest, BATCH_PARTS)):
            errors = pool.map(lambda part: _try_to_reencrypt(store, part[0], cipher), group)
            yield from ((*part, error) for part, error in zip(group, errors, strict=True))


def _try_to_reencrypt(store: Store, name: str, cipher: Cipher) -> FhirAssetsError | None:
    path = store.blobs.spool() / f"reencrypt-{os.urandom(8).hex()}.tmp"
    try:
        with store.blobs.open(name) as file, path.open("wb") as target:
            target.write(MARK)
            content = decrypt_stream(file, cipher, store.place(name))
            encryptor = FrameEncryptor(cipher, store.place(name))
            while chunk := content.read(FRAME_BYTES):
                target.writelines(encryptor.encrypt(chunk))
        store.blobs.put_file(name, path)
    except EOFError:
        return StoreError(f"{store.blobs.url}/{name} is incomplete: materialize its raw partition again, in full")
    except EncryptionError as error:
        return EncryptionError(f"{store.blobs.url}/{name}: {error}")
    except StoreError as error:
        return error if _exists(store, name) else None
    except OSError as error:
        return choose_store_error(error)(
            f"cannot write to {store.blobs.spool()}: {error.strerror or type(error).__name__}: free space"
        )
    finally:
        path.unlink(missing_ok=True)
    return None


def _read_part_key(store: Store, name: str) -> tuple[str, str | None] | None:
    try:
        with store.blobs.open(name) as file:
            return name, read_key_id(file)
    except StoreError:
        if _exists(store, name):
            raise
        return None  # deleted since it was listed


def _exists(store: Store, name: str) -> bool:
    return any(other == name for other in store.blobs.names(name.rpartition("/")[0]))
