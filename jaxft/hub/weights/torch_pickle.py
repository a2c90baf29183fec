"""The pickle inside a PyTorch file, read by an interpreter that cannot run anything.

Python's unpickler imports and calls what the file says. This one knows only the instructions and the few names that
``torch.save`` writes for a dict of plain tensors, and builds descriptions (:class:`TensorRef`) from them: there is no
path from the file to an import, a call or an attribute. Everything else is refused by name.
"""

from __future__ import annotations

import io
import json
import pickletools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

import numpy as np

from jaxft.errors import UserError
from jaxft.hub.weights.contract import check_name, check_shape, corrupt, quoted
from jaxft.hub.weights.dtypes import TORCH_STORAGES

_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_TENSOR_V1 = "torch._utils._rebuild_tensor"  # torch before 0.4
_PARAMETER = "torch._utils._rebuild_parameter"
_STORAGES = {f"torch.{name}": dtype for name, dtype in TORCH_STORAGES.items()}
_ALLOWED = frozenset((_ORDERED_DICT, _TENSOR, _TENSOR_V1, _PARAMETER, *_STORAGES))
MAX_PICKLE_BYTES = 100_000_000

# Instructions that push their own argument, or a constant.
_PUSH_ARGUMENT = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT")
)
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class StorageRef:
    """A storage: ``length`` elements of ``dtype``; where it lies is found by its key (``data/<key>`` in an archive)."""

    key: str
    dtype: np.dtype
    length: int


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a storage; ``offset`` and ``stride`` count elements. Bounds are not checked yet."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: str


class _OrderedDict(dict):
    """Marks the dicts that BUILD may follow."""


class _Refused(Exception):
    """The pickle is well-formed but is not a dict of plain tensors."""


class _Malformed(Exception):
    """The pickle is not well-formed."""


class Stream(Protocol):
    """Where a pickle is read from, and how far."""

    def read(self, count: int, /) -> bytes:
        """The next bytes; fewer at the end."""
        ...

    def readline(self) -> bytes:
        """The rest of the line."""
        ...

    def tell(self) -> int:
        """Bytes read so far."""
        ...


@dataclass(frozen=True)
class Pickled:
    """What a pickle describes."""

    value: object
    storages: dict[str, StorageRef]
    """The storages that it names, by key."""


def read_state_dict(raw: bytes, path: Path) -> dict[str, TensorRef]:
    """The tensors that ``data.pkl`` of the archive ``path`` describes.

    Raises:
      UserError: the pickle asks for anything but plain tensors in one dict, or is malformed.
    """
    stream = io.BytesIO(raw)
    pickled = read_pickle(stream, path, archive=True)
    if stream.tell() != len(raw):
        raise corrupt(path, "its pickle has something left over at its end")
    return state_dict_of(pickled.value, path)


def read_pickle(stream: Stream, path: Path, *, archive: bool = False) -> Pickled:
    """The next pickle of a stream, of inert values alone.

    Args:
      stream: is left behind the pickle's end.
      path: the file's, for messages.
      archive: whether it is of an archive, or of the format before (which Python 2 wrote, too).

    Raises:
      UserError: the pickle asks for anything but plain values and tensors, or is malformed.
    """
    interpreter = _Interpreter(archive)
    try:
        return Pickled(interpreter.run(stream), interpreter.storages)
    except _Refused as refused:
        raise UserError(
            f"{path} {refused}: jaxft refuses to run code from a file; use the model's safetensors file, or save a "
            "plain state_dict again where you trust the file"
        ) from None
    except (_Malformed, ValueError, IndexError, KeyError) as error:  # from pickletools, the stack, the memo
        reason = str(error) if isinstance(error, _Malformed) else "its pickle is not a valid one"
        raise corrupt(path, reason) from None


def state_dict_of(value: object, path: Path) -> dict[str, TensorRef]:
    """The tensors of a pickled value.

    Raises:
      UserError: it is anything but a dict of plain tensors.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no dict of tensors at its top level; save model.state_dict() instead")
    for name, tensor in value.items():
        if not isinstance(tensor, TensorRef):
            inner = [key for key, entry in value.items() if _holds_tensors(entry) and len(key) < 40]
            how = f": {how_to_save_again(path, f'[{json.dumps(inner[0])}]')}" if len(inner) == 1 else ""
            raise UserError(
                f"{path}: the entry {quoted(name)} is not a tensor; save the state_dict itself, not a dict around it{how}"
            )
        check_name(name, path)
        check_shape(tensor.shape, name, path)
    return dict(value)


class _Interpreter:
    """A pickle stack machine over inert values: dict, list, tuple, str, int, float, bool, None and the refs above."""

    def __init__(self, archive: bool) -> None:
        self.storages: dict[str, StorageRef] = {}
        self._archive = archive
        self._stack: list[object] = []
        self._outer: list[list[object]] = []  # stacks set aside by MARK
        self._memo: dict[object, object] = {}

    def run(self, stream: Stream) -> object:
        # Typed for whole files; it asks for no more than a Stream has.
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
            if opcode.name == "STOP":
                if len(self._stack) != 1 or self._outer:
                    raise _Malformed("its pickle has something left over at its end")
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise _Malformed("its pickle has no end")

    def _step(self, name: str, argument: object) -> None:
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._outer.append(stack)
            self._stack = []
        elif name == "GLOBAL":
            stack.append(_allowed_global(str(argument).replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_allowed_global(f"{_text(module)}.{_text(attribute)}"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_reduced(function, arguments))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("BINSTRING", "SHORT_BINSTRING") and not self._archive:
            stack.append(str(argument).encode("latin-1").decode("utf-8"))  # Python 2's text
        else:
            self._step_container(name, argument)

    def _step_container(self, name: str, argument: object) -> None:
        if name == "EMPTY_DICT":
            self._stack.append({})
        elif name == "EMPTY_LIST":
            self._stack.append([])
        elif name == "TUPLE":
            items = self._pop_mark()
            self._stack.append(tuple(items))
        elif name in _TUPLE_SIZES:
            items = [self._stack.pop() for _ in range(_TUPLE_SIZES[name])]
            self._stack.append(tuple(reversed(items)))
        elif name == "SETITEM":
            value, key = self._stack.pop(), self._stack.pop()
            _set_items(self._stack[-1], [key, value])
        elif name == "SETITEMS":
            items = self._pop_mark()
            _set_items(self._stack[-1], items)
        elif name == "APPEND":
            item = self._stack.pop()
            _extend(self._stack[-1], [item])
        elif name == "APPENDS":
            items = self._pop_mark()
            _extend(self._stack[-1], items)
        elif name == "BUILD":
            # A state_dict carries its modules' version numbers as an attribute (`_metadata`); no tensor needs them.
            state = self._stack.pop()
            if not isinstance(self._stack[-1], _OrderedDict) or not isinstance(state, dict):
                raise _Refused("sets attributes of an object (pickle instruction BUILD)")
        else:
            shown = f" {quoted(str(argument))}" if argument is not None else ""
            raise _Refused(f"uses the pickle instruction {name}{shown}, which no dict of plain tensors needs")

    def _storage(self, identity: object) -> StorageRef:
        if not self._archive:
            # The sixth says which part of another storage this one is; files with such parts are older than 1.0.
            if not isinstance(identity, tuple) or len(identity) != 6 or identity[5] is not None:
                raise _Malformed("a storage is not identified the way torch does it")
            identity = identity[:5]
        storage = _storage(identity)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise _Malformed(f"the storage {quoted(storage.key)} is described twice, differently")
        return storage

    def _pop_mark(self) -> list[object]:
        items = self._stack
        self._stack = self._outer.pop()
        return items


def _allowed_global(name: str) -> _Global:
    if name not in _ALLOWED:
        raise _Refused(f"asks for the Python object {quoted(name)}")
    return _Global(name)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _Malformed("its pickle names an object by something that is not text")
    return value


def _set_items(target: object, items: list[object]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise _Malformed("its pickle sets items of something that is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Text only: hashing anything else (nested tuples) could be made to take for ever.
        if not isinstance(key, str):
            raise _Refused(f"has a dict key of type {type(key).__name__}, not text")
        if key in target:
            raise _Malformed(f"the key {quoted(key)} appears twice")
        target[key] = value


def _extend(target: object, items: list[object]) -> None:
    if not isinstance(target, list):
        raise _Malformed("its pickle appends to something that is not a list")
    target.extend(items)


def _storage(identity: object) -> StorageRef:
    """torch's persistent id: ("storage", class, key, device, number of elements)."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise _Malformed("a storage is not identified the way torch does it")
    _, kind, key, device, length = identity
    if not isinstance(kind, _Global) or kind.name not in _STORAGES:
        raise _Malformed("a storage has no known element type")
    if not isinstance(key, str) or not isinstance(device, str) or type(length) is not int:
        raise _Malformed("a storage is not identified the way torch does it")
    return StorageRef(key, _STORAGES[kind.name], length)


def _reduced(function: object, arguments: object) -> object:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise _Refused("calls something that is not a known function")
    if function.name == _ORDERED_DICT and arguments == ():
        return _OrderedDict()
    if function.name == _PARAMETER and len(arguments) == 3 and isinstance(arguments[0], TensorRef):
        return arguments[0]  # the rest: requires_grad and backward hooks
    if (function.name == _TENSOR and len(arguments) in (6, 7)) or (function.name == _TENSOR_V1 and len(arguments) == 4):
        return _tensor(*arguments[:4])
    raise _Refused(f"calls {quoted(function.name)} with unexpected arguments")


def _tensor(storage: object, offset: object, shape: object, stride: object) -> TensorRef:
    if not isinstance(storage, StorageRef) or type(offset) is not int:
        raise _Malformed("a tensor is not described the way torch does it")
    return TensorRef(storage, offset, _sizes(shape), _sizes(stride))


def _sizes(stored: object) -> tuple[int, ...]:
    if not isinstance(stored, tuple) or not all(type(size) is int for size in stored):
        raise _Malformed("a tensor's shape or stride is not a tuple of integers")
    return stored


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, TensorRef) for entry in value.values())


def how_to_save_again(path: Path, change: str = "") -> str:
    """A command line, to be pasted as it is, that saves a file anew where torch is installed, and keeps the old one.

    Args:
      path: the file.
      change: Python behind the loaded object, for instance ``["model"]``.
    """
    name = json.dumps(str(path.absolute()))
    script = (
        f'import os, torch; p = {name}; s = torch.load(p, map_location="cpu", weights_only=True){change}; '
        'os.rename(p, p + ".old"); torch.save(s, p)'
    )
    return f"python -c {shlex.quote(script)}"
