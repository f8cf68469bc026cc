"""Parts sealed anew where they lie, each in one step: name and content stay, and so does all that names them."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from fhir_assets.errors import EncryptionError, FhirAssetsError, StoreError
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.storage.encrypted_parts import FRAME_BYTES, MARK, frames, key_of, opened
from fhir_assets.storage.store import LAYERS, Store

AT_ONCE = 64
"""Parts whose outcome is told together."""

_CALLS_AT_ONCE = 8


def sealed_parts(store: Store) -> Iterator[tuple[str, str | None]]:
    """Every part of the store, whether a manifest names it or not, with the id of the key that seals it; None: it is
    in the clear. Reads the first bytes of each. Raises StoreError.
    """
    names = (
        name for layer in LAYERS for name in store.blobs.names(layer) if name.rpartition("/")[2].startswith("part-")
    )
    with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
        while group := list(islice(names, 16 * _CALLS_AT_ONCE)):
            yield from (found for found in pool.map(lambda name: _key(store, name), group) if found)


def reencrypt(
    store: Store, parts: Iterable[tuple[str, str | None]], cipher: Cipher
) -> Iterator[tuple[str, str | None, FhirAssetsError | None]]:
    """Seal parts with the newest key; each comes back with what went wrong, None if nothing did. Parts that are gone
    count as done. Those that cannot be read stay as they are.
    """
    with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
        rest = iter(parts)
        while group := list(islice(rest, AT_ONCE)):
            errors = pool.map(lambda part: _try_to_reseal(store, part[0], cipher), group)
            yield from ((*part, error) for part, error in zip(group, errors, strict=True))


def _try_to_reseal(store: Store, name: str, cipher: Cipher) -> FhirAssetsError | None:
    path = store.blobs.spool() / f"reseal-{os.urandom(8).hex()}.tmp"
    try:
        with store.blobs.open(name) as file, path.open("wb") as target:
            target.write(MARK)
            content = opened(file, cipher)
            while chunk := content.read(FRAME_BYTES):
                target.writelines(frames(chunk, cipher))
        store.blobs.put_file(name, path)
    except EOFError:
        return StoreError(f"{store.blobs.url}/{name} is incomplete: materialize its raw partition again, in full")
    except EncryptionError as error:
        return EncryptionError(f"{store.blobs.url}/{name}: {error}")
    except StoreError as error:
        return error if _there(store, name) else None
    except OSError as error:
        return StoreError(
            f"cannot write to {store.blobs.spool()}: {error.strerror or type(error).__name__}: free space"
        )
    finally:
        path.unlink(missing_ok=True)
    return None


def _key(store: Store, name: str) -> tuple[str, str | None] | None:
    try:
        with store.blobs.open(name) as file:
            return name, key_of(file)
    except StoreError:
        if _there(store, name):
            raise
        return None  # taken away since it was listed


def _there(store: Store, name: str) -> bool:
    return any(each == name for each in store.blobs.names(name.rpartition("/")[0]))
