from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_NONE: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT64: _ClassVar[DType]
    INT64: _ClassVar[DType]
    INT32: _ClassVar[DType]
    BOOL: _ClassVar[DType]
    UINT8: _ClassVar[DType]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RAW: _ClassVar[Codec]
    BF16: _ClassVar[Codec]
    F16: _ClassVar[Codec]
    INT8: _ClassVar[Codec]
    LOSSLESS: _ClassVar[Codec]

class Factorization(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NO_FACTORIZATION: _ClassVar[Factorization]
    SVD: _ClassVar[Factorization]
    LOW_RANK_SVD: _ClassVar[Factorization]
    QR: _ClassVar[Factorization]
DTYPE_NONE: DType
FLOAT32: DType
FLOAT16: DType
BFLOAT16: DType
FLOAT64: DType
INT64: DType
INT32: DType
BOOL: DType
UINT8: DType
RAW: Codec
BF16: Codec
F16: Codec
INT8: Codec
LOSSLESS: Codec
NO_FACTORIZATION: Factorization
SVD: Factorization
LOW_RANK_SVD: Factorization
QR: Factorization

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "codec", "nbytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    codec: Codec
    nbytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., codec: _Optional[_Union[Codec, str]] = ..., nbytes: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("hello", "welcome", "failure", "result", "forward", "backward", "open_session", "step", "fork_session", "put_adapter", "read_weight", "ping", "working", "factorize", "push", "read_manifest", "read_holdings", "read_piece", "knock", "proof", "tensors")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    OPEN_SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FORK_SESSION_FIELD_NUMBER: _ClassVar[int]
    PUT_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    READ_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    WORKING_FIELD_NUMBER: _ClassVar[int]
    FACTORIZE_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    READ_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    READ_HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    READ_PIECE_FIELD_NUMBER: _ClassVar[int]
    KNOCK_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    failure: Failure
    result: Result
    forward: Forward
    backward: Backward
    open_session: OpenSession
    step: Step
    fork_session: ForkSession
    put_adapter: PutAdapter
    read_weight: ReadWeight
    ping: Ping
    working: Working
    factorize: Factorize
    push: Push
    read_manifest: ReadManifest
    read_holdings: ReadHoldings
    read_piece: ReadPiece
    knock: Knock
    proof: Proof
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., open_session: _Optional[_Union[OpenSession, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., fork_session: _Optional[_Union[ForkSession, _Mapping]] = ..., put_adapter: _Optional[_Union[PutAdapter, _Mapping]] = ..., read_weight: _Optional[_Union[ReadWeight, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., working: _Optional[_Union[Working, _Mapping]] = ..., factorize: _Optional[_Union[Factorize, _Mapping]] = ..., push: _Optional[_Union[Push, _Mapping]] = ..., read_manifest: _Optional[_Union[ReadManifest, _Mapping]] = ..., read_holdings: _Optional[_Union[ReadHoldings, _Mapping]] = ..., read_piece: _Optional[_Union[ReadPiece, _Mapping]] = ..., knock: _Optional[_Union[Knock, _Mapping]] = ..., proof: _Optional[_Union[Proof, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Knock(_message.Message):
    __slots__ = ("nonce", "mac")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    mac: bytes
    def __init__(self, nonce: _Optional[bytes] = ..., mac: _Optional[bytes] = ...) -> None: ...

class Proof(_message.Message):
    __slots__ = ("nonce", "certificate", "mac")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    certificate: bytes
    mac: bytes
    def __init__(self, nonce: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., mac: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "config_hash", "weights")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_HASH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    version: int
    config_hash: str
    weights: _containers.ScalarMap[str, str]
    def __init__(self, version: _Optional[int] = ..., config_hash: _Optional[str] = ..., weights: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "weights", "start", "end", "dtype", "max_length", "max_frame", "codecs")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    version: int
    weights: _containers.ScalarMap[str, str]
    start: int
    end: int
    dtype: DType
    max_length: int
    max_frame: int
    codecs: _containers.RepeatedScalarFieldContainer[Codec]
    def __init__(self, version: _Optional[int] = ..., weights: _Optional[_Mapping[str, str]] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., max_length: _Optional[int] = ..., max_frame: _Optional[int] = ..., codecs: _Optional[_Iterable[_Union[Codec, str]]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("kind", "message", "retry_after")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    retry_after: float
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., retry_after: _Optional[float] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("call_id", "token", "leaving", "pushed", "holder")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    token: bytes
    leaving: bool
    pushed: bool
    holder: str
    def __init__(self, call_id: _Optional[int] = ..., token: _Optional[bytes] = ..., leaving: _Optional[bool] = ..., pushed: _Optional[bool] = ..., holder: _Optional[str] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Working(_message.Message):
    __slots__ = ("waiting",)
    WAITING_FIELD_NUMBER: _ClassVar[int]
    waiting: bool
    def __init__(self, waiting: _Optional[bool] = ...) -> None: ...

class Context(_message.Message):
    __slots__ = ("start", "end", "adapter", "training", "dropout_seed", "autocast", "answer")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_SEED_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    adapter: bytes
    training: bool
    dropout_seed: int
    autocast: DType
    answer: Codec
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., adapter: _Optional[bytes] = ..., training: _Optional[bool] = ..., dropout_seed: _Optional[int] = ..., autocast: _Optional[_Union[DType, str]] = ..., answer: _Optional[_Union[Codec, str]] = ...) -> None: ...

class HandOver(_message.Message):
    __slots__ = ("awaits", "to", "token", "copy")
    AWAITS_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    awaits: bytes
    to: str
    token: bytes
    copy: bool
    def __init__(self, awaits: _Optional[bytes] = ..., to: _Optional[str] = ..., token: _Optional[bytes] = ..., copy: _Optional[bool] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    def __init__(self, token: _Optional[bytes] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("context", "keep", "hand_over")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    context: Context
    keep: bool
    hand_over: HandOver
    def __init__(self, context: _Optional[_Union[Context, _Mapping]] = ..., keep: _Optional[bool] = ..., hand_over: _Optional[_Union[HandOver, _Mapping]] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("context", "call_id", "hand_over")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    context: Context
    call_id: int
    hand_over: HandOver
    def __init__(self, context: _Optional[_Union[Context, _Mapping]] = ..., call_id: _Optional[int] = ..., hand_over: _Optional[_Union[HandOver, _Mapping]] = ...) -> None: ...

class OpenSession(_message.Message):
    __slots__ = ("start", "end", "fork_of")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    FORK_OF_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    fork_of: bytes
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., fork_of: _Optional[bytes] = ...) -> None: ...

class IndexList(_message.Message):
    __slots__ = ("index",)
    INDEX_FIELD_NUMBER: _ClassVar[int]
    index: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, index: _Optional[_Iterable[int]] = ...) -> None: ...

class CacheEdit(_message.Message):
    __slots__ = ("crop", "reorder", "repeat_interleave", "select")
    CROP_FIELD_NUMBER: _ClassVar[int]
    REORDER_FIELD_NUMBER: _ClassVar[int]
    REPEAT_INTERLEAVE_FIELD_NUMBER: _ClassVar[int]
    SELECT_FIELD_NUMBER: _ClassVar[int]
    crop: int
    reorder: IndexList
    repeat_interleave: int
    select: IndexList
    def __init__(self, crop: _Optional[int] = ..., reorder: _Optional[_Union[IndexList, _Mapping]] = ..., repeat_interleave: _Optional[int] = ..., select: _Optional[_Union[IndexList, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("context", "number", "edits", "keep_past", "hand_over")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    KEEP_PAST_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    context: Context
    number: int
    edits: _containers.RepeatedCompositeFieldContainer[CacheEdit]
    keep_past: bool
    hand_over: HandOver
    def __init__(self, context: _Optional[_Union[Context, _Mapping]] = ..., number: _Optional[int] = ..., edits: _Optional[_Iterable[_Union[CacheEdit, _Mapping]]] = ..., keep_past: _Optional[bool] = ..., hand_over: _Optional[_Union[HandOver, _Mapping]] = ...) -> None: ...

class ForkSession(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PutAdapter(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    def __init__(self, manifest: _Optional[str] = ...) -> None: ...

class ReadWeight(_message.Message):
    __slots__ = ("names", "transposed", "norm_dims", "dtype")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    TRANSPOSED_FIELD_NUMBER: _ClassVar[int]
    NORM_DIMS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    transposed: bool
    norm_dims: _containers.RepeatedScalarFieldContainer[int]
    dtype: DType
    def __init__(self, names: _Optional[_Iterable[str]] = ..., transposed: _Optional[bool] = ..., norm_dims: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class Factorize(_message.Message):
    __slots__ = ("name", "transposed", "factorization", "rank", "iterations")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRANSPOSED_FIELD_NUMBER: _ClassVar[int]
    FACTORIZATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    transposed: bool
    factorization: Factorization
    rank: int
    iterations: int
    def __init__(self, name: _Optional[str] = ..., transposed: _Optional[bool] = ..., factorization: _Optional[_Union[Factorization, str]] = ..., rank: _Optional[int] = ..., iterations: _Optional[int] = ...) -> None: ...

class ReadManifest(_message.Message):
    __slots__ = ("version", "manifest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    manifest: bytes
    def __init__(self, version: _Optional[int] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class ReadHoldings(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    def __init__(self, manifest: _Optional[bytes] = ...) -> None: ...

class ReadPiece(_message.Message):
    __slots__ = ("manifest", "number", "shares", "insists")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    INSISTS_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    number: int
    shares: bool
    insists: bool
    def __init__(self, manifest: _Optional[bytes] = ..., number: _Optional[int] = ..., shares: _Optional[bool] = ..., insists: _Optional[bool] = ...) -> None: ...
