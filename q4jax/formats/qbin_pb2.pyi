from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class QType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNSPECIFIED: _ClassVar[QType]
    INT4: _ClassVar[QType]
    INT8: _ClassVar[QType]
    INT2: _ClassVar[QType]
    INT3: _ClassVar[QType]
    INT5: _ClassVar[QType]
    INT6: _ClassVar[QType]
    INT7: _ClassVar[QType]
    UINT2: _ClassVar[QType]
    UINT3: _ClassVar[QType]
    UINT4: _ClassVar[QType]
    UINT5: _ClassVar[QType]
    UINT6: _ClassVar[QType]
    UINT7: _ClassVar[QType]
    UINT8: _ClassVar[QType]
UNSPECIFIED: QType
INT4: QType
INT8: QType
INT2: QType
INT3: QType
INT5: QType
INT6: QType
INT7: QType
UINT2: QType
UINT3: QType
UINT4: QType
UINT5: QType
UINT6: QType
UINT7: QType
UINT8: QType

class Header(_message.Message):
    __slots__ = ("q4jax_version", "metadata", "tensors", "records")
    Q4JAX_VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    q4jax_version: str
    metadata: _containers.RepeatedCompositeFieldContainer[Entry]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    def __init__(self, q4jax_version: _Optional[str] = ..., metadata: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: Value
    def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "boolean", "text", "array", "u64", "i64", "f64")
    U8_FIELD_NUMBER: _ClassVar[int]
    I8_FIELD_NUMBER: _ClassVar[int]
    U16_FIELD_NUMBER: _ClassVar[int]
    I16_FIELD_NUMBER: _ClassVar[int]
    U32_FIELD_NUMBER: _ClassVar[int]
    I32_FIELD_NUMBER: _ClassVar[int]
    F32_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ARRAY_FIELD_NUMBER: _ClassVar[int]
    U64_FIELD_NUMBER: _ClassVar[int]
    I64_FIELD_NUMBER: _ClassVar[int]
    F64_FIELD_NUMBER: _ClassVar[int]
    u8: int
    i8: int
    u16: int
    i16: int
    u32: int
    i32: int
    f32: float
    boolean: bool
    text: str
    array: Array
    u64: int
    i64: int
    f64: float
    def __init__(self, u8: _Optional[int] = ..., i8: _Optional[int] = ..., u16: _Optional[int] = ..., i16: _Optional[int] = ..., u32: _Optional[int] = ..., i32: _Optional[int] = ..., f32: _Optional[float] = ..., boolean: bool = ..., text: _Optional[str] = ..., array: _Optional[_Union[Array, _Mapping]] = ..., u64: _Optional[int] = ..., i64: _Optional[int] = ..., f64: _Optional[float] = ...) -> None: ...

class Array(_message.Message):
    __slots__ = ("type", "numbers", "strings")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    type: int
    numbers: bytes
    strings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, type: _Optional[int] = ..., numbers: _Optional[bytes] = ..., strings: _Optional[_Iterable[str]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "shape", "format", "layout", "offset", "nbytes", "checksum")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    format: str
    layout: str
    offset: int
    nbytes: int
    checksum: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., format: _Optional[str] = ..., layout: _Optional[str] = ..., offset: _Optional[int] = ..., nbytes: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("layer_name", "target", "dtype", "axis", "group_size", "method", "shape", "scale", "zero_point", "minimum", "statistics")
    LAYER_NAME_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    AXIS_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    ZERO_POINT_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FIELD_NUMBER: _ClassVar[int]
    layer_name: str
    target: str
    dtype: QType
    axis: int
    group_size: int
    method: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    scale: _containers.RepeatedScalarFieldContainer[float]
    zero_point: _containers.RepeatedScalarFieldContainer[int]
    minimum: _containers.RepeatedScalarFieldContainer[float]
    statistics: _containers.RepeatedCompositeFieldContainer[Statistic]
    def __init__(self, layer_name: _Optional[str] = ..., target: _Optional[str] = ..., dtype: _Optional[_Union[QType, str]] = ..., axis: _Optional[int] = ..., group_size: _Optional[int] = ..., method: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., scale: _Optional[_Iterable[float]] = ..., zero_point: _Optional[_Iterable[int]] = ..., minimum: _Optional[_Iterable[float]] = ..., statistics: _Optional[_Iterable[_Union[Statistic, _Mapping]]] = ...) -> None: ...

class Statistic(_message.Message):
    __slots__ = ("name", "values", "scalar")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SCALAR_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _containers.RepeatedScalarFieldContainer[float]
    scalar: bool
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Iterable[float]] = ..., scalar: bool = ...) -> None: ...
