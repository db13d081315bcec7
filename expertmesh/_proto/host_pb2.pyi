from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
FLOAT16: DType

class ExchangeRequest(_message.Message):
    __slots__ = ("id", "layer", "dtype", "num_rows", "rows", "experts", "counts", "pair_rows")
    ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    PAIR_ROWS_FIELD_NUMBER: _ClassVar[int]
    id: int
    layer: int
    dtype: DType
    num_rows: int
    rows: bytes
    experts: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    pair_rows: bytes
    def __init__(self, id: _Optional[int] = ..., layer: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., num_rows: _Optional[int] = ..., rows: _Optional[bytes] = ..., experts: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., pair_rows: _Optional[bytes] = ...) -> None: ...

class ExchangeReply(_message.Message):
    __slots__ = ("id", "rows", "error", "compute_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    id: int
    rows: bytes
    error: Error
    compute_s: float
    def __init__(self, id: _Optional[int] = ..., rows: _Optional[bytes] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., compute_s: _Optional[float] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Error.Code]
        INVALID: _ClassVar[Error.Code]
        NOT_READY: _ClassVar[Error.Code]
        FAILED: _ClassVar[Error.Code]
    UNSPECIFIED: Error.Code
    INVALID: Error.Code
    NOT_READY: Error.Code
    FAILED: Error.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: Error.Code
    message: str
    def __init__(self, code: _Optional[_Union[Error.Code, str]] = ..., message: _Optional[str] = ...) -> None: ...

class ExpertSpec(_message.Message):
    __slots__ = ("hidden", "intermediate", "gated", "bias", "activation", "limit", "alpha", "dtype", "weight_format", "portable")
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_FIELD_NUMBER: _ClassVar[int]
    GATED_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    PORTABLE_FIELD_NUMBER: _ClassVar[int]
    hidden: int
    intermediate: int
    gated: bool
    bias: bool
    activation: str
    limit: float
    alpha: float
    dtype: DType
    weight_format: str
    portable: bool
    def __init__(self, hidden: _Optional[int] = ..., intermediate: _Optional[int] = ..., gated: bool = ..., bias: bool = ..., activation: _Optional[str] = ..., limit: _Optional[float] = ..., alpha: _Optional[float] = ..., dtype: _Optional[_Union[DType, str]] = ..., weight_format: _Optional[str] = ..., portable: bool = ...) -> None: ...

class ConfigureRequest(_message.Message):
    __slots__ = ("checkpoint", "specs", "layer_specs", "layer_experts")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    SPECS_FIELD_NUMBER: _ClassVar[int]
    LAYER_SPECS_FIELD_NUMBER: _ClassVar[int]
    LAYER_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    specs: _containers.RepeatedCompositeFieldContainer[ExpertSpec]
    layer_specs: _containers.RepeatedScalarFieldContainer[int]
    layer_experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, checkpoint: _Optional[str] = ..., specs: _Optional[_Iterable[_Union[ExpertSpec, _Mapping]]] = ..., layer_specs: _Optional[_Iterable[int]] = ..., layer_experts: _Optional[_Iterable[int]] = ...) -> None: ...

class ConfigureReply(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slots: _Optional[_Iterable[int]] = ...) -> None: ...

class TensorSource(_message.Message):
    __slots__ = ("file", "name", "index", "parts")
    FILE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    file: str
    name: str
    index: int
    parts: int
    def __init__(self, file: _Optional[str] = ..., name: _Optional[str] = ..., index: _Optional[int] = ..., parts: _Optional[int] = ...) -> None: ...

class TensorRecipe(_message.Message):
    __slots__ = ("sources", "transpose", "deinterleave")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    TRANSPOSE_FIELD_NUMBER: _ClassVar[int]
    DEINTERLEAVE_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedCompositeFieldContainer[TensorSource]
    transpose: bool
    deinterleave: bool
    def __init__(self, sources: _Optional[_Iterable[_Union[TensorSource, _Mapping]]] = ..., transpose: bool = ..., deinterleave: bool = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("layer", "index", "w_in", "w_out", "b_in", "b_out")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    W_IN_FIELD_NUMBER: _ClassVar[int]
    W_OUT_FIELD_NUMBER: _ClassVar[int]
    B_IN_FIELD_NUMBER: _ClassVar[int]
    B_OUT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    index: int
    w_in: TensorRecipe
    w_out: TensorRecipe
    b_in: TensorRecipe
    b_out: TensorRecipe
    def __init__(self, layer: _Optional[int] = ..., index: _Optional[int] = ..., w_in: _Optional[_Union[TensorRecipe, _Mapping]] = ..., w_out: _Optional[_Union[TensorRecipe, _Mapping]] = ..., b_in: _Optional[_Union[TensorRecipe, _Mapping]] = ..., b_out: _Optional[_Union[TensorRecipe, _Mapping]] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: ReplicaDigest
    def __init__(self, digest: _Optional[_Union[ReplicaDigest, _Mapping]] = ...) -> None: ...

class ReplicaDigest(_message.Message):
    __slots__ = ("weights", "answer")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    weights: bytes
    answer: bytes
    def __init__(self, weights: _Optional[bytes] = ..., answer: _Optional[bytes] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("layer", "index")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    layer: int
    index: int
    def __init__(self, layer: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: ReplicaDigest
    def __init__(self, digest: _Optional[_Union[ReplicaDigest, _Mapping]] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("kind", "share", "factor", "seconds")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Fault.Kind]
        SLOW: _ClassVar[Fault.Kind]
        DROP_REQUEST: _ClassVar[Fault.Kind]
        DROP_REPLY: _ClassVar[Fault.Kind]
        DUPLICATE_REPLY: _ClassVar[Fault.Kind]
        CORRUPT: _ClassVar[Fault.Kind]
        NOT_FINITE: _ClassVar[Fault.Kind]
        FAIL_LOAD: _ClassVar[Fault.Kind]
        SILENCE: _ClassVar[Fault.Kind]
        PAUSE: _ClassVar[Fault.Kind]
        KILL: _ClassVar[Fault.Kind]
        KILL_NODE: _ClassVar[Fault.Kind]
    UNSPECIFIED: Fault.Kind
    SLOW: Fault.Kind
    DROP_REQUEST: Fault.Kind
    DROP_REPLY: Fault.Kind
    DUPLICATE_REPLY: Fault.Kind
    CORRUPT: Fault.Kind
    NOT_FINITE: Fault.Kind
    FAIL_LOAD: Fault.Kind
    SILENCE: Fault.Kind
    PAUSE: Fault.Kind
    KILL: Fault.Kind
    KILL_NODE: Fault.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    kind: Fault.Kind
    share: float
    factor: float
    seconds: float
    def __init__(self, kind: _Optional[_Union[Fault.Kind, str]] = ..., share: _Optional[float] = ..., factor: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...

class InjectRequest(_message.Message):
    __slots__ = ("faults", "seed")
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    faults: _containers.RepeatedCompositeFieldContainer[Fault]
    seed: int
    def __init__(self, faults: _Optional[_Iterable[_Union[Fault, _Mapping]]] = ..., seed: _Optional[int] = ...) -> None: ...

class InjectReply(_message.Message):
    __slots__ = ("fired",)
    FIRED_FIELD_NUMBER: _ClassVar[int]
    fired: _containers.RepeatedCompositeFieldContainer[Fired]
    def __init__(self, fired: _Optional[_Iterable[_Union[Fired, _Mapping]]] = ...) -> None: ...

class Fired(_message.Message):
    __slots__ = ("kind", "times")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    kind: Fault.Kind
    times: int
    def __init__(self, kind: _Optional[_Union[Fault.Kind, str]] = ..., times: _Optional[int] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("layer", "index", "not_after_s")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    layer: int
    index: int
    not_after_s: float
    def __init__(self, layer: _Optional[int] = ..., index: _Optional[int] = ..., not_after_s: _Optional[float] = ...) -> None: ...

class DropReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatisticsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("layer", "index", "rows")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    index: int
    rows: int
    def __init__(self, layer: _Optional[int] = ..., index: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class StatisticsReply(_message.Message):
    __slots__ = ("slots", "memory_bytes", "replicas", "done", "streams", "process_id", "at_s")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    memory_bytes: int
    replicas: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    done: LaunchSums
    streams: int
    process_id: int
    at_s: float
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., memory_bytes: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ..., done: _Optional[_Union[LaunchSums, _Mapping]] = ..., streams: _Optional[int] = ..., process_id: _Optional[int] = ..., at_s: _Optional[float] = ...) -> None: ...

class LaunchSums(_message.Message):
    __slots__ = ("launches", "experts", "rows", "busy_s", "experts_squared", "experts_rows", "rows_squared", "experts_busy_s", "rows_busy_s")
    LAUNCHES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_SQUARED_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROWS_SQUARED_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_BUSY_S_FIELD_NUMBER: _ClassVar[int]
    ROWS_BUSY_S_FIELD_NUMBER: _ClassVar[int]
    launches: float
    experts: float
    rows: float
    busy_s: float
    experts_squared: float
    experts_rows: float
    rows_squared: float
    experts_busy_s: float
    rows_busy_s: float
    def __init__(self, launches: _Optional[float] = ..., experts: _Optional[float] = ..., rows: _Optional[float] = ..., busy_s: _Optional[float] = ..., experts_squared: _Optional[float] = ..., experts_rows: _Optional[float] = ..., rows_squared: _Optional[float] = ..., experts_busy_s: _Optional[float] = ..., rows_busy_s: _Optional[float] = ...) -> None: ...

class Optimizer(_message.Message):
    __slots__ = ("name", "momentum", "beta1", "beta2", "epsilon", "weight_decay")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    name: str
    momentum: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    def __init__(self, name: _Optional[str] = ..., momentum: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., epsilon: _Optional[float] = ..., weight_decay: _Optional[float] = ...) -> None: ...

class BeginRequest(_message.Message):
    __slots__ = ("session", "step", "optimizer")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    session: int
    step: int
    optimizer: Optimizer
    def __init__(self, session: _Optional[int] = ..., step: _Optional[int] = ..., optimizer: _Optional[_Union[Optimizer, _Mapping]] = ...) -> None: ...

class BeginReply(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: int
    def __init__(self, experts: _Optional[int] = ...) -> None: ...

class BackwardRequest(_message.Message):
    __slots__ = ("session", "step", "part", "pairs", "grad_rows")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    GRAD_ROWS_FIELD_NUMBER: _ClassVar[int]
    session: int
    step: int
    part: int
    pairs: ExchangeRequest
    grad_rows: bytes
    def __init__(self, session: _Optional[int] = ..., step: _Optional[int] = ..., part: _Optional[int] = ..., pairs: _Optional[_Union[ExchangeRequest, _Mapping]] = ..., grad_rows: _Optional[bytes] = ...) -> None: ...

class BackwardReply(_message.Message):
    __slots__ = ("grad_rows",)
    GRAD_ROWS_FIELD_NUMBER: _ClassVar[int]
    grad_rows: bytes
    def __init__(self, grad_rows: _Optional[bytes] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("session", "step", "parts", "learning_rate")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    session: int
    step: int
    parts: int
    learning_rate: float
    def __init__(self, session: _Optional[int] = ..., step: _Optional[int] = ..., parts: _Optional[int] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class SaveRequest(_message.Message):
    __slots__ = ("session", "step", "folder")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    session: int
    step: int
    folder: str
    def __init__(self, session: _Optional[int] = ..., step: _Optional[int] = ..., folder: _Optional[str] = ...) -> None: ...

class SaveReply(_message.Message):
    __slots__ = ("files",)
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, files: _Optional[_Iterable[str]] = ...) -> None: ...
