"""The store of a deployment, and the other folders and buckets of its settings."""

import os
import stat
from functools import partial
from pathlib import Path

from fhir_assets.deployment.encryption import build_store_cipher
from fhir_assets.errors import ConfigurationError
from fhir_assets.file_modes import create_folders, create_home, narrow_folder
from fhir_assets.privacy.audit import MARK as AUDIT_MARK
from fhir_assets.settings import Settings
from fhir_assets.storage import aside
from fhir_assets.storage.blobs import SPOOL_FOLDER, Blobs, LocalBlobs
from fhir_assets.storage.marker import MARKER
from fhir_assets.storage.s3 import Bucket, S3Client
from fhir_assets.storage.s3_limits import S3Limits
from fhir_assets.storage.store import LAYERS, SOURCES_FOLDER, Store, open_blobs, open_store


def build_store(settings: Settings) -> Store:
    """Return the store at FHIR_STORE_URL. Raises ConfigurationError.

    No file is read or written. Permissions of group and others, of an earlier version, are taken from its folders.
    """
    store = open_store(
        settings.store_url, build_store_cipher(settings), bucket=partial(build_bucket, settings), source=settings.source
    )
    if isinstance(store.blobs, LocalBlobs):
        _narrow_store(store.blobs.root)
    return store


def build_root(settings: Settings) -> Store:
    """Return the store at FHIR_STORE_URL as that of the default source, for files that all sources share.

    Raises ConfigurationError.
    """
    return open_store(settings.store_url, build_store_cipher(settings), bucket=partial(build_bucket, settings))


def _narrow_store(root: Path) -> None:
    """Take the permissions of group and others from the folder of a store, so that no file in it can be reached.

    If the folder contains something else, or everybody may create files in it, only the folders of the store in it are
    narrowed.
    """
    folders = (*LAYERS, SOURCES_FOLDER, SPOOL_FOLDER, aside.FOLDER)
    try:
        entries = os.listdir(root)
    except OSError:
        return
    if set(entries) <= {*folders, MARKER, AUDIT_MARK} and not root.stat().st_mode & stat.S_ISVTX:
        narrow_folder(root)
    else:
        for name in folders:
            narrow_folder(root / name)


def build_blobs(settings: Settings, url: str) -> Blobs:
    """Return the files of a lake or an export at ``url``, a folder or ``s3://bucket/prefix``.

    Files in a folder have the permissions of FHIR_FILE_MODE. Raises ConfigurationError.
    """
    return open_blobs(url, bucket=partial(build_bucket, settings), mode=settings.fhir_file_mode)


def create_place(settings: Settings, url: str) -> bool:
    """Create the folder, which only this user may read, or the bucket at ``url``. Return whether it was created.

    Raises ConfigurationError or StoreError.
    """
    if url.startswith("s3://"):
        return build_bucket(settings, url).create()
    folder = Path(url)
    if folder.is_dir():
        return False
    try:
        if folder.absolute().is_relative_to(settings.home):
            create_home(settings.home)
        create_folders(folder)
    except OSError as error:
        raise ConfigurationError(f"{url} cannot be created ({error.strerror}): create the folder") from None
    return True


def build_bucket(settings: Settings, url: str) -> Bucket:
    """Return the bucket at ``s3://bucket/prefix``. Credentials, region and endpoint come from the AWS variables."""
    encryption = {
        "ServerSideEncryption": settings.fhir_s3_encryption,
        "SSEKMSKeyId": settings.fhir_s3_kms_key_id,
    }
    limits = S3Limits(
        settings.fhir_s3_seconds,
        settings.fhir_s3_object_seconds,
        settings.fhir_s3_object_bytes,
        settings.fhir_s3_max_objects,
    )
    return Bucket(url, _connect, {name: value for name, value in encryption.items() if value}, limits=limits)


def _connect(limits: S3Limits) -> S3Client:
    # Imported here, because the import of boto3 takes longer than that of the project.
    from fhir_assets.deployment.s3_client import connect_s3

    return connect_s3(limits)
