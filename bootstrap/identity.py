"""A member's identity: an RSA key in hivemind's file format (libp2p's `PrivateKey` protobuf), and what it signs."""

import fcntl
import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

import base58
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from google.protobuf.message import DecodeError
from hivemind.proto import crypto_pb2

from protocol.errors import BadUsage
from protocol.machine.private_files import create_private
from protocol.name import NAME

KEY_BITS = 2048
MAX_KEY_BITS = 4096
MAX_FILE_BYTES = 8192
_HASH = hashes.SHA256()
_PADDING = padding.PSS(mgf=padding.MGF1(_HASH), salt_length=padding.PSS.DIGEST_LENGTH)
_SHA256_MULTIHASH = b"\x12\x20"


class Identity:
    """An RSA private key and the peer ID that follows from it. Its file is locked until `close`."""

    def __init__(self, path: Path, file: BinaryIO, temporary: bool = False):
        self.path = path
        self._file = file
        self.is_temporary = temporary
        self._key = _read_key(path, file)
        self.public_key: bytes = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        """DER, SubjectPublicKeyInfo."""
        self.peer_id: str = peer_id_of(self.public_key)

    @classmethod
    def load_or_create(cls, path: Path | None) -> Self:
        """The identity in the file `path`, made there when there is none.

        With None: a new one in a temporary file, which `close` deletes. Raises `BadUsage` for a file that cannot be
        read or written, that holds no RSA identity, or that another process is using.
        """
        if path is None:
            return cls._create_temporary()
        try:
            if not path.exists():
                with suppress(FileExistsError):  # another process was faster
                    create_private(path, _new_key())
            file = path.open("rb")
        except OSError as error:
            raise BadUsage(f"The identity file {path} cannot be used: {error.strerror or error}.") from error
        try:
            _lock(path, file)
            return cls(path, file)
        except BaseException:
            file.close()
            raise

    def sign(self, data: bytes) -> bytes:
        """An RSA-PSS signature (SHA-256, salt as long as the digest) of `data`."""
        return self._key.sign(data, _PADDING, _HASH)

    def close(self) -> None:
        """Unlock the file, and delete it if it is a temporary one. The object can still sign; may be called again."""
        self._file.close()
        if self.is_temporary:
            self.path.unlink(missing_ok=True)

    @classmethod
    def _create_temporary(cls) -> Self:
        descriptor, name = tempfile.mkstemp(prefix=f"{NAME}-{os.getpid()}-", suffix=".id")
        file = open(descriptor, "w+b")  # noqa: SIM115 (kept open)
        file.write(_new_key())
        file.seek(0)
        return cls(Path(name), file, temporary=True)


def verify(peer_id: str, public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is one of `data` by the owner of `public_key`, and `peer_id` is that key's."""
    if peer_id != peer_id_of(public_key):
        return False
    try:
        key = serialization.load_der_public_key(public_key)
        if not isinstance(key, rsa.RSAPublicKey) or not KEY_BITS <= key.key_size <= MAX_KEY_BITS:
            return False
        key.verify(signature, data, _PADDING, _HASH)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def signer_of(public_key: bytes, data: bytes, signature: bytes) -> str | None:
    """The peer ID of `public_key`, if `signature` is one of `data` by its owner."""
    peer_id = peer_id_of(public_key)
    return peer_id if verify(peer_id, public_key, data, signature) else None


def peer_id_of(public_key: bytes) -> str:
    """The peer ID of an RSA key (DER, SubjectPublicKeyInfo): base58 of the SHA-256 multihash of its protobuf.

    See libp2p's peer-ids specification.
    """
    message = crypto_pb2.PublicKey(key_type=crypto_pb2.RSA, data=public_key).SerializeToString()
    return base58.b58encode(_SHA256_MULTIHASH + hashlib.sha256(message).digest()).decode()


def _new_key() -> bytes:
    """The content of a new identity file."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=KEY_BITS)
    der = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    content: bytes = crypto_pb2.PrivateKey(key_type=crypto_pb2.RSA, data=der).SerializeToString()
    return content


def _read_key(path: Path, file: BinaryIO) -> rsa.RSAPrivateKey:
    try:
        message = crypto_pb2.PrivateKey.FromString(file.read(MAX_FILE_BYTES))
        key = serialization.load_der_private_key(message.data, password=None)
    except (DecodeError, UnsupportedAlgorithm, OSError, ValueError, TypeError) as error:
        raise BadUsage(f"{path} is not an identity file; name another, or one that does not exist yet.") from error
    if not isinstance(key, rsa.RSAPrivateKey) or not KEY_BITS <= key.key_size <= MAX_KEY_BITS:
        raise BadUsage(f"The identity in {path} is not an RSA key of {KEY_BITS} to {MAX_KEY_BITS} bits.")
    return key


def _lock(path: Path, file: BinaryIO) -> None:
    """Lock the file until this process ends: two members with one identity would get each other's messages."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadUsage(f"Another process is using the identity {path}; every member needs its own.") from error
    except OSError:
        # A file system without locks.
        return
