"""The ciphers of a deployment, from PHI_ENCRYPTION_KEYS or its file."""

from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.keys import parse_keys
from fhir_assets.settings import Settings


def build_cipher(settings: Settings) -> Cipher:
    """Return the cipher of the patient data in the database. Without keys it returns data unchanged.

    With PHI_BOUND_ONLY=1 it refuses what is not bound to its place. Raises ConfigurationError if a key is malformed,
    weak or given twice.
    """
    return Cipher(parse_keys(settings.encryption_keys), bound_only=settings.phi_bound_only)


def build_store_cipher(settings: Settings) -> Cipher:
    """Return the cipher of the store's parts. Raises as ``build_cipher`` does.

    With PHI_ENCRYPT_STORE=0 it decrypts encrypted parts and writes clear text.
    """
    cipher = build_cipher(settings)
    return cipher if settings.phi_encrypt_store else cipher.reading_only()
