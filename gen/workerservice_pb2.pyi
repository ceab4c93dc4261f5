from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUNNING: _ClassVar[Status]
    STOPPED: _ClassVar[Status]
    FINISHED: _ClassVar[Status]
RUNNING: Status
STOPPED: Status
FINISHED: Status

class StartJobRequest(_message.Message):
    __slots__ = ("cmd", "args", "id", "cpu", "memory", "pids", "io", "timeout", "max_output", "run_as", "env", "cwd", "name", "split", "input", "confine")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CMD_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    CPU_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    IO_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    RUN_AS_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    CWD_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    CONFINE_FIELD_NUMBER: _ClassVar[int]
    cmd: str
    args: _containers.RepeatedScalarFieldContainer[str]
    id: str
    cpu: float
    memory: int
    pids: int
    io: int
    timeout: float
    max_output: int
    run_as: str
    env: _containers.ScalarMap[str, str]
    cwd: str
    name: str
    split: bool
    input: bool
    confine: bool
    def __init__(self, cmd: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., id: _Optional[str] = ..., cpu: _Optional[float] = ..., memory: _Optional[int] = ..., pids: _Optional[int] = ..., io: _Optional[int] = ..., timeout: _Optional[float] = ..., max_output: _Optional[int] = ..., run_as: _Optional[str] = ..., env: _Optional[_Mapping[str, str]] = ..., cwd: _Optional[str] = ..., name: _Optional[str] = ..., split: _Optional[bool] = ..., input: _Optional[bool] = ..., confine: _Optional[bool] = ...) -> None: ...

class StartJobSizes(_message.Message):
    __slots__ = ("args", "env")
    ARGS_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    args: _containers.RepeatedScalarFieldContainer[bytes]
    env: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, args: _Optional[_Iterable[bytes]] = ..., env: _Optional[_Iterable[bytes]] = ...) -> None: ...

class StartJobResponse(_message.Message):
    __slots__ = ("ID",)
    ID_FIELD_NUMBER: _ClassVar[int]
    ID: str
    def __init__(self, ID: _Optional[str] = ...) -> None: ...

class StopJobRequest(_message.Message):
    __slots__ = ("id", "signal", "grace")
    ID_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    id: str
    signal: str
    grace: float
    def __init__(self, id: _Optional[str] = ..., signal: _Optional[str] = ..., grace: _Optional[float] = ...) -> None: ...

class StopJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ("id", "wait")
    ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    id: str
    wait: bool
    def __init__(self, id: _Optional[str] = ..., wait: _Optional[bool] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("status", "exitcode", "reason", "signal", "stopped_by", "owner", "cmd", "args", "user", "created_ms", "started_ms", "ended_ms", "output_bytes", "cpu_seconds", "memory_peak", "read_bytes", "written_bytes", "cpu_limit", "memory_limit", "pids_limit", "io_limit", "timeout", "max_output", "notes", "id", "name", "cwd", "memory_current", "split", "error_bytes", "input_bytes", "through", "node", "more", "confined")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    EXITCODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    STOPPED_BY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    CMD_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    CREATED_MS_FIELD_NUMBER: _ClassVar[int]
    STARTED_MS_FIELD_NUMBER: _ClassVar[int]
    ENDED_MS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PEAK_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_LIMIT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_FIELD_NUMBER: _ClassVar[int]
    PIDS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    IO_LIMIT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CWD_FIELD_NUMBER: _ClassVar[int]
    MEMORY_CURRENT_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    ERROR_BYTES_FIELD_NUMBER: _ClassVar[int]
    INPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    THROUGH_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    CONFINED_FIELD_NUMBER: _ClassVar[int]
    status: Status
    exitcode: int
    reason: str
    signal: int
    stopped_by: str
    owner: str
    cmd: str
    args: _containers.RepeatedScalarFieldContainer[str]
    user: str
    created_ms: int
    started_ms: int
    ended_ms: int
    output_bytes: int
    cpu_seconds: float
    memory_peak: int
    read_bytes: int
    written_bytes: int
    cpu_limit: float
    memory_limit: int
    pids_limit: int
    io_limit: int
    timeout: float
    max_output: int
    notes: _containers.RepeatedScalarFieldContainer[str]
    id: str
    name: str
    cwd: str
    memory_current: int
    split: bool
    error_bytes: int
    input_bytes: int
    through: str
    node: str
    more: _containers.RepeatedCompositeFieldContainer[GetStatusResponse]
    confined: bool
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., exitcode: _Optional[int] = ..., reason: _Optional[str] = ..., signal: _Optional[int] = ..., stopped_by: _Optional[str] = ..., owner: _Optional[str] = ..., cmd: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., user: _Optional[str] = ..., created_ms: _Optional[int] = ..., started_ms: _Optional[int] = ..., ended_ms: _Optional[int] = ..., output_bytes: _Optional[int] = ..., cpu_seconds: _Optional[float] = ..., memory_peak: _Optional[int] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., cpu_limit: _Optional[float] = ..., memory_limit: _Optional[int] = ..., pids_limit: _Optional[int] = ..., io_limit: _Optional[int] = ..., timeout: _Optional[float] = ..., max_output: _Optional[int] = ..., notes: _Optional[_Iterable[str]] = ..., id: _Optional[str] = ..., name: _Optional[str] = ..., cwd: _Optional[str] = ..., memory_current: _Optional[int] = ..., split: _Optional[bool] = ..., error_bytes: _Optional[int] = ..., input_bytes: _Optional[int] = ..., through: _Optional[str] = ..., node: _Optional[str] = ..., more: _Optional[_Iterable[_Union[GetStatusResponse, _Mapping]]] = ..., confined: _Optional[bool] = ...) -> None: ...

class GetStreamRequest(_message.Message):
    __slots__ = ("id", "offset", "tail", "no_follow", "error_offset")
    ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    NO_FOLLOW_FIELD_NUMBER: _ClassVar[int]
    ERROR_OFFSET_FIELD_NUMBER: _ClassVar[int]
    id: str
    offset: int
    tail: int
    no_follow: bool
    error_offset: int
    def __init__(self, id: _Optional[str] = ..., offset: _Optional[int] = ..., tail: _Optional[int] = ..., no_follow: _Optional[bool] = ..., error_offset: _Optional[int] = ...) -> None: ...

class GetStreamResponse(_message.Message):
    __slots__ = ("result", "error")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    result: bytes
    error: bytes
    def __init__(self, result: _Optional[bytes] = ..., error: _Optional[bytes] = ...) -> None: ...

class RemoveJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class RemoveJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("owner", "everyone", "running", "limit", "prefix", "batches")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EVERYONE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    owner: str
    everyone: bool
    running: bool
    limit: int
    prefix: str
    batches: bool
    def __init__(self, owner: _Optional[str] = ..., everyone: _Optional[bool] = ..., running: _Optional[bool] = ..., limit: _Optional[int] = ..., prefix: _Optional[str] = ..., batches: _Optional[bool] = ...) -> None: ...

class SignalJobRequest(_message.Message):
    __slots__ = ("id", "signal")
    ID_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    id: str
    signal: str
    def __init__(self, id: _Optional[str] = ..., signal: _Optional[str] = ...) -> None: ...

class SignalJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SendInputRequest(_message.Message):
    __slots__ = ("id", "data")
    ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    id: str
    data: bytes
    def __init__(self, id: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class SendInputResponse(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...
