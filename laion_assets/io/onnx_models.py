"""Write small ONNX models; their format is the protocol buffers of onnx.proto."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

OPERATORS = 13  # version of the operators
FORMAT = 8  # version of the format
FLOAT, UINT8, INT8, INT32, INT64, FLOAT16 = 1, 2, 3, 6, 7, 10  # types of elements
TYPES = {
    np.dtype(kind): number
    for kind, number in {
        np.float32: FLOAT, np.uint8: UINT8, np.int8: INT8, np.int32: INT32, np.int64: INT64,
        np.float16: FLOAT16,
    }.items()
}  # fmt: skip
AN_INT, A_GRAPH, INTS = 2, 5, 7  # types of attributes
Shape: TypeAlias = Sequence[int | str]
Attribute: TypeAlias = int | bytes | Sequence[int]


def model(graph: bytes) -> bytes:
    """Return a model of a graph."""
    return field(1, FORMAT) + field(7, graph) + field(8, field(2, OPERATORS))


def graph(
    nodes: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    constants: Mapping[str, NDArray[Any]] | None = None,
) -> bytes:
    """Return a graph."""
    parts = [field(1, each) for each in nodes] + [field(2, "graph")]
    parts += [field(5, _constant(name, values)) for name, values in (constants or {}).items()]
    parts += [field(11, each) for each in inputs] + [field(12, each) for each in outputs]
    return b"".join(parts)


def node(
    kind: str, inputs: Sequence[str], output: str, **attributes: int | bytes | Sequence[int]
) -> bytes:
    """Return a node with one output; an attribute of bytes is a graph."""
    named = [field(1, name) for name in inputs] + [field(2, output), field(4, kind)]
    return b"".join([*named, *(field(5, _attribute(*each)) for each in attributes.items())])


def value(name: str, kind: int, shape: Shape | None = None) -> bytes:
    """Return an input or output of a graph; names in a shape stand for any length, None for any shape."""
    tensor = field(1, kind)
    if shape is not None:
        edges = [field(1, field(1, edge) if isinstance(edge, int) else field(2, edge)) for edge in shape]
        tensor += field(2, b"".join(edges))
    return field(1, name) + field(2, field(1, tensor))


def field(number: int, content: int | bytes | str) -> bytes:
    """Return a field of a protocol buffer."""
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    body = content.encode() if isinstance(content, str) else content
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _attribute(name: str, content: Attribute) -> bytes:
    if isinstance(content, int):
        return field(1, name) + field(3, content) + field(20, AN_INT)
    if isinstance(content, bytes):
        return field(1, name) + field(6, content) + field(20, A_GRAPH)
    return field(1, name) + b"".join(field(8, number) for number in content) + field(20, INTS)


def _constant(name: str, values: NDArray[Any]) -> bytes:
    edges = b"".join(field(1, edge) for edge in values.shape)
    return edges + field(2, TYPES[values.dtype]) + field(8, name) + field(9, values.tobytes())


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])
