"""The store of a deployment, and the other folders and buckets of its settings."""

from functools import partial
from pathlib import Path

from fhir_assets.deployment.encryption import build_store_cipher
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import Settings
from fhir_assets.storage.blobs import Blobs
from fhir_assets.storage.s3 import Bucket, S3Client
from fhir_assets.storage.store import Store, open_blobs, open_store

_ATTEMPTS = 8


def build_store(settings: Settings) -> Store:
    """Return the store at FHIR_STORE_URL; nothing is read or written. Raises ConfigurationError."""
    return open_store(
        settings.store_url, build_store_cipher(settings), bucket=partial(build_bucket, settings), source=settings.source
    )


def build_blobs(settings: Settings, url: str) -> Blobs:
    """Return the files at ``url``, a folder or ``s3://bucket/prefix``. Raises ConfigurationError."""
    return open_blobs(url, bucket=partial(build_bucket, settings))


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
        folder.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise ConfigurationError(f"{url} cannot be created ({error.strerror}): create the folder") from None
    return True


def build_bucket(settings: Settings, url: str) -> Bucket:
    """Return the bucket at ``s3://bucket/prefix``. Credentials, region and endpoint come from the AWS variables."""
    encryption = {
        "ServerSideEncryption": settings.fhir_s3_encryption,
        "SSEKMSKeyId": settings.fhir_s3_kms_key_id,
    }
    return Bucket(url, _client, {name: value for name, value in encryption.items() if value})


def _client() -> S3Client:
    # Imported here, because the import of boto3 takes longer than that of the project.
    from dagster_aws.s3 import S3Resource

    return S3Resource(max_attempts=_ATTEMPTS).get_client()
