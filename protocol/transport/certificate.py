"""TLS for direct connections: a certificate of one process's own, which its peer's record names by its hash."""

import asyncio
import hashlib
import ssl
import tempfile
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from protocol.name import NAME

_NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
_SINCE, _LONG = datetime(2000, 1, 1), timedelta(days=365 * 500)
"""The certificate's validity. Nobody checks it: the record that names the certificate expires in a minute."""


class Certificate:
    """A new P-256 key and a certificate signed by itself."""

    def __init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            x509.CertificateBuilder(_NAME, _NAME, key.public_key(), x509.random_serial_number(), _SINCE, _SINCE + _LONG)
            .sign(key, hashes.SHA256())
        )  # fmt: skip
        self.fingerprint: bytes = certificate.fingerprint(hashes.SHA256())
        """SHA-256 of the certificate (DER)."""
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        """The TLS context of the listening side."""
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.num_tickets = 0
        pem = serialization.Encoding.PEM
        with tempfile.NamedTemporaryFile(prefix=f"{NAME}-") as file:  # ssl reads files only; only its owner can read it
            file.write(
                key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
                + certificate.public_bytes(pem)
            )
            file.flush()
            self.context.load_cert_chain(file.name)


def caller_context() -> ssl.SSLContext:
    """The TLS context of the calling side. It accepts any certificate: `has_fingerprint` must check it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def has_fingerprint(transport: asyncio.BaseTransport, fingerprint: bytes) -> bool:
    """Whether the other end of a TLS connection has shown the certificate with the SHA-256 `fingerprint`.

    TLS itself has checked that the other end holds the certificate's private key; who signed it does not matter.
    """
    tls: Any = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert(binary_form=True)
    return certificate is not None and hashlib.sha256(certificate).digest() == fingerprint
