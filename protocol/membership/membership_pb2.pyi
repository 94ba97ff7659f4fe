from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NO_ROLE: _ClassVar[Role]
    USE: _ClassVar[Role]
    SERVE: _ClassVar[Role]
    ADMIN: _ClassVar[Role]
NO_ROLE: Role
USE: Role
SERVE: Role
ADMIN: Role

class Signed(_message.Message):
    __slots__ = ("statement", "signature", "issuer")
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    statement: bytes
    signature: bytes
    issuer: Signed
    def __init__(self, statement: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., issuer: _Optional[_Union[Signed, _Mapping]] = ...) -> None: ...

class Statement(_message.Message):
    __slots__ = ("member", "process", "revocation", "invitation")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    REVOCATION_FIELD_NUMBER: _ClassVar[int]
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    member: Member
    process: Process
    revocation: Revocation
    invitation: Invitation
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., process: _Optional[_Union[Process, _Mapping]] = ..., revocation: _Optional[_Union[Revocation, _Mapping]] = ..., invitation: _Optional[_Union[Invitation, _Mapping]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("key", "role", "name", "issued", "expires", "admitted", "invitation")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ISSUED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    role: Role
    name: str
    issued: int
    expires: int
    admitted: int
    invitation: bytes
    def __init__(self, key: _Optional[bytes] = ..., role: _Optional[_Union[Role, str]] = ..., name: _Optional[str] = ..., issued: _Optional[int] = ..., expires: _Optional[int] = ..., admitted: _Optional[int] = ..., invitation: _Optional[bytes] = ...) -> None: ...

class Process(_message.Message):
    __slots__ = ("peer_id",)
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    def __init__(self, peer_id: _Optional[str] = ...) -> None: ...

class Revocation(_message.Message):
    __slots__ = ("key", "time")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    time: int
    def __init__(self, key: _Optional[bytes] = ..., time: _Optional[int] = ...) -> None: ...

class Invitation(_message.Message):
    __slots__ = ("id", "role", "uses", "expires", "lifetime", "cancelled")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    role: Role
    uses: int
    expires: int
    lifetime: int
    cancelled: bool
    def __init__(self, id: _Optional[bytes] = ..., role: _Optional[_Union[Role, str]] = ..., uses: _Optional[int] = ..., expires: _Optional[int] = ..., lifetime: _Optional[int] = ..., cancelled: _Optional[bool] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("statements",)
    STATEMENTS_FIELD_NUMBER: _ClassVar[int]
    statements: _containers.RepeatedCompositeFieldContainer[Signed]
    def __init__(self, statements: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ...) -> None: ...

class Sync(_message.Message):
    __slots__ = ("digest", "news")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NEWS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    news: Roster
    def __init__(self, digest: _Optional[bytes] = ..., news: _Optional[_Union[Roster, _Mapping]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("process",)
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    process: Signed
    def __init__(self, process: _Optional[_Union[Signed, _Mapping]] = ...) -> None: ...

class Renewed(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: Signed
    def __init__(self, certificate: _Optional[_Union[Signed, _Mapping]] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("version", "invitation", "time", "redeem")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    REDEEM_FIELD_NUMBER: _ClassVar[int]
    version: int
    invitation: bytes
    time: float
    redeem: Redeem
    def __init__(self, version: _Optional[int] = ..., invitation: _Optional[bytes] = ..., time: _Optional[float] = ..., redeem: _Optional[_Union[Redeem, _Mapping]] = ...) -> None: ...

class Redeem(_message.Message):
    __slots__ = ("secret", "key", "signature", "name")
    SECRET_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    secret: bytes
    key: bytes
    signature: bytes
    name: str
    def __init__(self, secret: _Optional[bytes] = ..., key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., name: _Optional[str] = ...) -> None: ...

class Joined(_message.Message):
    __slots__ = ("version", "process", "refusal", "admins", "grant")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ADMINS_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    version: int
    process: Signed
    refusal: str
    admins: _containers.RepeatedScalarFieldContainer[str]
    grant: Grant
    def __init__(self, version: _Optional[int] = ..., process: _Optional[_Union[Signed, _Mapping]] = ..., refusal: _Optional[str] = ..., admins: _Optional[_Iterable[str]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("swarm", "secret", "certificate", "roster", "addresses")
    SWARM_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    swarm: str
    secret: bytes
    certificate: Signed
    roster: Roster
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, swarm: _Optional[str] = ..., secret: _Optional[bytes] = ..., certificate: _Optional[_Union[Signed, _Mapping]] = ..., roster: _Optional[_Union[Roster, _Mapping]] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...
