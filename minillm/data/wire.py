"""Values as bytes and back, for messages between a program and its workers: what they are is said in JSON.

    [tree of JSON] [buffer] [buffer] ...

The tree has what is small; text, bytes and arrays lie in buffers, which are copied as they are. Of classes it names
only those made of fields (named tuples and dataclasses) and those that say what they are made from with `arguments()`,
as tokenizers do. Nothing that is read is a program.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

SHORT = 200  # characters that are not worth a buffer
Frames = list[bytes | memoryview]


def pack(value: object) -> Frames:
    """A value as a tree and its buffers. Raises ValueError for one that cannot be spelled."""
    buffers: Frames = []
    tree = json.dumps(spell(value, buffers)).encode()
    return [tree, *buffers]


def unpack(frames: Sequence[bytes]) -> Any:
    """The value that was packed; its arrays are not to be changed."""
    return build(json.loads(frames[0]), frames[1:])


def send(connection: Connection, frames: Frames) -> None:
    """Write what was packed."""
    connection.send_bytes(len(frames).to_bytes(4, "little"))
    for frame in frames:
        connection.send_bytes(frame)


def receive(connection: Connection) -> Sequence[bytes]:
    """What was sent at the other end."""
    return [connection.recv_bytes() for _ in range(int.from_bytes(connection.recv_bytes(), "little"))]


def spell(value: Any, buffers: Frames) -> Any:
    """The tree of a value; what is large is put into the buffers. A list in the tree begins with what it spells."""
    kind = type(value)
    if value is None or kind in (bool, int, float) or (kind is str and len(value) <= SHORT and value.isascii()):
        return value
    if kind is str:
        return ["text", put(value.encode("utf-8", "surrogatepass"), buffers)]
    if kind is bytes:
        return ["bytes", put(value, buffers)]
    if kind is list:
        kinds = set(map(type, value))
        if kinds <= {int, bool}:
            return ["numbers", value]
        if kinds == {str}:
            joined = "".join(value).encode("utf-8", "surrogatepass")
            return ["texts", put(joined, buffers), list(map(len, value))]
        if kinds == {bytes}:
            return ["blobs", put(b"".join(value), buffers), list(map(len, value))]
        return ["list", [spell(one, buffers) for one in value]]
    if kind is tuple:
        return ["tuple", [spell(one, buffers) for one in value]]
    if kind is dict:
        return ["dict", [[spell(key, buffers), spell(one, buffers)] for key, one in value.items()]]
    if kind is np.ndarray and not value.dtype.hasobject:
        place = put(memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8)), buffers)
        return ["array", place, np.lib.format.dtype_to_descr(value.dtype), list(value.shape)]
    if isinstance(value, np.dtype) and not value.hasobject:
        return ["dtype", np.lib.format.dtype_to_descr(value)]
    if isinstance(value, partial):
        parts = [value.func, list(value.args), value.keywords]
        return ["partial", [spell(part, buffers) for part in parts]]
    if hasattr(value, "__qualname__"):
        return ["named", name_of(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return ["made", name_of(kind), [spell(one, buffers) for one in value]]
    if dataclasses.is_dataclass(value):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return ["made", name_of(kind), [spell(one, buffers) for one in fields]]
    if hasattr(value, "arguments"):
        return ["made", name_of(kind), [spell(one, buffers) for one in value.arguments()]]
    raise ValueError(
        f"a {kind.__name__} cannot be sent to a worker process: give it a method `arguments`, which returns what its "
        "class makes the same one from, or set data.workers to 1"
    )


def put(data: bytes | memoryview, buffers: Frames) -> int:
    """Append a buffer; its place among them."""
    buffers.append(data)
    return len(buffers) - 1


def build(tree: Any, buffers: Sequence[bytes]) -> Any:
    """The value of a tree."""
    if not isinstance(tree, list):
        return tree
    kind, what, *more = tree
    match kind:
        case "text":
            return buffers[what].decode("utf-8", "surrogatepass")
        case "bytes":
            return buffers[what]
        case "numbers":
            return what
        case "texts":
            return cut(buffers[what].decode("utf-8", "surrogatepass"), more[0])
        case "blobs":
            return cut(buffers[what], more[0])
        case "list":
            return [build(one, buffers) for one in what]
        case "tuple":
            return tuple(build(one, buffers) for one in what)
        case "dict":
            return {build(key, buffers): build(one, buffers) for key, one in what}
        case "array":
            descr, shape = more
            return np.frombuffer(buffers[what], dtype_of(descr)).reshape(shape)
        case "dtype":
            return dtype_of(what)
        case "partial":
            function, args, keywords = (build(part, buffers) for part in what)
            return partial(function, *args, **keywords)
        case "named":
            return find(what)
        case "made":
            return find(what)(*[build(one, buffers) for one in more[0]])
    raise ValueError(f"{kind!r} is no kind of value")


def cut(joined: Any, lengths: list[int]) -> list:
    """Parts of a text, or of bytes, that were joined."""
    ends = list(accumulate(lengths))
    return [joined[end - length : end] for end, length in zip(ends, lengths)]


def dtype_of(descr: Any) -> np.dtype:
    """The dtype of a description, whose pairs JSON has made lists."""
    return np.dtype([tuple(field) for field in descr] if isinstance(descr, list) else descr)


def name_of(thing: Callable) -> str:
    """By what name `find` finds a function or class."""
    return f"{thing.__module__}:{thing.__qualname__}"


def find(name: str) -> Callable:
    """The function or class of a module."""
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found
