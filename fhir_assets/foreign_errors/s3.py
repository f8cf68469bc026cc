"""Errors of S3 and of its client, by their code (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html).

Servers that speak the protocol of S3 add codes of their own, such as those of MinIO.
"""

from fhir_assets.errors import (
    ConfigurationError,
    FhirAssetsError,
    FileMissing,
    StoreError,
    StoreForbidden,
    StoreFull,
    StoreUnavailable,
)

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}
_NO_REGION = {"NoRegionError", "InvalidRegionError"}
_UNREACHABLE = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ConnectionError",
    "ReadTimeoutError",
    "ResponseStreamingError",
    "IncompleteReadError",
    "SSLError",
    "ProxyConnectionError",
    "HTTPClientError",
}
_BAD_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidToken",
    "TokenRefreshRequired",
    "UnrecognizedClientException",
    "AccountProblem",
    "NotSignedUp",
}
_BAD_CLOCK = {"RequestTimeTooSkewed", "RequestExpired", "InvalidSignatureTime"}
_BAD_REGION = {
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "IllegalLocationConstraintException",
    "301",
    "307",
}
_BUSY = {
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "OperationAborted",
    "ConditionalRequestConflict",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XMinioServerNotInitialized",
    "XMinioReadQuorum",
    "XMinioWriteQuorum",
    "500",
    "502",
    "503",
    "504",
}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage", "507"}
_FORBIDDEN = {"AccessDenied", "AllAccessDisabled", "Forbidden", "403"}
_RIGHTS = "grant the credentials s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket there"


def translate_s3_error(
    error: BaseException, *, action: str = "use an object", url: str = "S3", bucket: str = ""
) -> FhirAssetsError | None:
    """Return the error of the project for an error of boto3 or botocore; None for other errors.

    ``action`` is what was tried, such as "write a part", ``url`` the place. The text of S3 is left out, because it may
    contain keys and addresses.
    """
    if type(error).__module__.partition(".")[0] not in ("botocore", "boto3", "s3transfer"):
        return None
    name = type(error).__name__
    response = getattr(error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return (
        _translate_settings(name, code, url, bucket)
        or _translate_state(name, code, status, action, url)
        or StoreError(f"cannot {action} in {url}: {code or name}. Run it again; committed partitions are unchanged")
    )


def _translate_settings(name: str, code: str, url: str, bucket: str) -> FhirAssetsError | None:
    """Return the error for wrong credentials, clock, region or bucket, if it is one of them."""
    if name in _NO_CREDENTIALS:
        return ConfigurationError(
            f"no credentials are configured for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
            "or assign a role to the machine"
        )
    if name in _NO_REGION:
        return ConfigurationError(f"no region is configured for {url}: set AWS_DEFAULT_REGION")
    if name in ("ParamValidationError", "InvalidEndpointConfigurationError") or code == "InvalidBucketName":
        return ConfigurationError(f"{url} is not an address of S3 ({code or name}): correct it")
    if code in _BAD_CREDENTIALS:
        return ConfigurationError(f"{url} refuses the credentials ({code}): correct or renew them")
    if code in _BAD_CLOCK:
        return ConfigurationError(
            f"{url} refuses the time of the request ({code}): the clock of this machine differs from that of S3 by "
            "more than 15 minutes. Set the clock (NTP), then run it again"
        )
    if code in _BAD_REGION:
        return ConfigurationError(
            f"{url} belongs to another region or address ({code}): set AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL"
        )
    if code == "NoSuchBucket":
        return ConfigurationError(f"there is no bucket {bucket}: create it, or correct {url}")
    if code.startswith("KMS"):
        return ConfigurationError(f"{url} cannot use its encryption key ({code}): enable the key, or grant its use")
    return None


def _translate_state(name: str, code: str, status: object, action: str, url: str) -> FhirAssetsError | None:
    """Return the error for an object or a server that is missing, closed, busy or full, if it is one of them."""
    if code in ("NoSuchKey", "404") or (status == 404 and not code):
        return FileMissing(f"cannot {action} in {url}: it does not exist")
    if code in _FORBIDDEN or (status == 403 and not code):
        return StoreForbidden(f"no permission to {action} in {url}: {_RIGHTS}")
    if code == "InvalidObjectState":
        return StoreError(f"cannot {action} in {url}: the object is archived. Restore it, then run it again")
    if code in _FULL or status == 507:
        return StoreFull(f"cannot {action} in {url}: the storage is full ({code}). Free space, then run it again")
    if code in _BUSY or status in (429, 500, 502, 503, 504):
        return StoreUnavailable(f"cannot {action} in {url}: the server is busy or down ({code}). Run it again later")
    if name in _UNREACHABLE:
        return StoreUnavailable(f"{url} cannot be reached ({name}): check AWS_ENDPOINT_URL and the network")
    if status == 403:
        return StoreError(f"{url} refuses to {action} ({code}): see the documentation of the server for the code")
    return None
