"""A server that sends the bytes of an answer one after another, or without end, until the client hangs up."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from itertools import chain, repeat
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fhir_assets_tests.support.listener import listening

Answer = Callable[[], Iterable[bytes]]


@contextmanager
def serve_bytes(answer: Answer, *, pause: float = 0.0, certificate: Path | None = None) -> Iterator[str]:
    """Run a server that sends the pieces of ``answer()``, with a pause before each, and yield its base URL.

    The request is read up to the end of its headers only. With a ``certificate`` the server speaks TLS.
    """
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    stopped = threading.Event()

    def serve(accepted: socket.socket) -> None:
        with context.wrap_socket(accepted, True) if context else accepted as connection:
            request = b""
            while b"\r\n\r\n" not in request:
                piece = connection.recv(65536)
                if not piece:
                    return
                request += piece
            for content in answer():
                if stopped.wait(pause) if pause else stopped.is_set():
                    return
                connection.sendall(content)

    try:
        with listening(serve) as port:
            yield f"{'https' if context else 'http'}://127.0.0.1:{port}/fhir"
    finally:
        stopped.set()


def one_by_one(content: bytes) -> Answer:
    """Return an answer of single bytes, which never ends: its last byte is repeated."""
    return lambda: chain((content[n : n + 1] for n in range(len(content))), repeat(content[-1:]))


def endless(start: bytes, piece: bytes) -> Answer:
    """Return an answer that begins with ``start`` and repeats ``piece`` without end."""
    return lambda: chain([start], repeat(piece))


def create_certificate(folder: Path) -> Path:
    """Create a file with a key and its certificate for 127.0.0.1, which is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(private + certificate.public_bytes(pem))
    return file
