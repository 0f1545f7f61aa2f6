"""A pickle machine that builds descriptions of tensors and nothing else: the half of the .pth reader that faces strangers.

A pickle is a program, which Python's own unpickler runs with all of Python at hand. Here it runs on a small stack machine of
this module, never on `pickle`:

- It has 36 of pickle's 68 opcodes. No other opcode does anything: OBJ, NEWOBJ, EXT, BYTEARRAY8 ... end the reading.
- The names a file may use are looked up in tables of this module (`CALLS`, `STORAGES`); nothing is ever imported by name. Calls
  give descriptions of tensors (storage, offset, shape, strides) and dicts. BUILD sets no attribute.
- Keys of dicts are strings and integers, and no value is compared, hashed or printed, so that a value that holds itself many
  times over costs nothing.
- A pickle has at most 8 MiB and a million opcodes (30,000 tensors): a few seconds and less than 256 MiB.
- A tensor lies within its storage and has no more elements than it.
"""

import io
import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_PICKLE = 8 * 2**20
MAX_OPCODES = 1_000_000
MAX_DIMS = 32

STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}


class Name(NamedTuple):
    """A global that a pickle may use: a key of STORAGES or CALLS."""

    name: str


class Storage(NamedTuple):
    """A row of numbers somewhere in the file."""

    key: str
    dtype: np.dtype
    size: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file and in memory."""
        return self.size * self.dtype.itemsize


class Tensor(NamedTuple):
    """Where a tensor lies in its storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Machine:
    """Pickle's stack machine, reduced to what torch.save writes for tensors in dicts, lists and tuples."""

    def __init__(self, stream: io.BytesIO) -> None:
        self.stream = stream
        self.stack: list[Any] = []
        self.below_marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """Run one pickle to its STOP and return what it built."""
        try:
            for _ in range(MAX_OPCODES):
                code = self.stream.read(1)
                if not code:
                    raise ValueError(f"its pickle is cut off, or longer than {MAX_PICKLE:,} bytes")
                opcode = ALL_OPCODES.get(code)
                if opcode is None:
                    raise ValueError("its pickle is damaged: it has a byte that is no opcode")
                if opcode.name == "STOP":
                    return self.stack.pop()
                if opcode.name not in OPCODES:
                    raise ValueError(f"its pickle uses {opcode.name}, which tensors do not need: refused")
                OPCODES[opcode.name](self, self._argument(opcode))
        except (IndexError, KeyError) as error:
            raise ValueError("its pickle is damaged: it uses what it has not built") from error
        raise ValueError(f"its pickle has more than {MAX_OPCODES:,} steps")

    def _argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        """What follows an opcode; for a global its dotted name, without the escapes that pickletools would interpret."""
        if opcode.name in ("GLOBAL", "INST"):
            module, name = self.stream.readline(), self.stream.readline()
            return f"{module[:-1].decode()}.{name[:-1].decode()}"
        return opcode.arg.reader(self.stream) if opcode.arg else None

    def push(self, value: Any) -> None:
        """Put a value on top of the stack."""
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        """Everything above the topmost mark."""
        items, self.stack = self.stack, self.below_marks.pop()
        return items

    def mark(self) -> None:
        """Set a mark on the stack."""
        self.below_marks.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        """Remember the top of the stack."""
        self.memo[index] = self.stack[-1]

    def push_tuple(self, size: int) -> None:
        """The topmost `size` values become a tuple."""
        values = [self.stack.pop() for _ in range(size)]
        self.push(tuple(reversed(values)))

    def extend(self, items: list[Any]) -> None:
        """Append to the list on top of the stack."""
        if type(self.stack[-1]) is not list:
            raise ValueError(f"its pickle appends to a {kind(self.stack[-1])}")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Keys and values in turn, into the dict on top of the stack."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError(f"its pickle sets items of a {kind(target)}")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if type(name) not in (str, int):
                raise ValueError(f"its pickle has a {kind(name)} as the key of a dict")
            target[name] = value

    def set_item(self) -> None:
        """One key and value."""
        value, name = self.stack.pop(), self.stack.pop()
        self.set_items([name, value])

    def append(self) -> None:
        """One value."""
        value = self.stack.pop()
        self.extend([value])

    def push_name(self, name: str) -> None:
        """A global, if it is one that tensors need."""
        if name not in CALLS and name not in STORAGES:
            raise ValueError(f"its pickle asks for {shown(name)}, which tensors do not need: refused")
        self.push(Name(name))

    def push_stack_name(self) -> None:
        """A global whose module and name are on the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("its pickle asks for a global whose name is not text: refused")
        self.push_name(f"{module}.{name}")

    def instance(self, name: str) -> None:
        """INST: a global is called with what is above the mark. No tensor needs it; the message names the global."""
        self.push_name(name)
        raise ValueError("its pickle uses INST, which tensors do not need: refused")

    def call(self) -> None:
        """Call one of CALLS."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or function.name not in CALLS:
            raise ValueError(f"its pickle calls {kind(function)}, which is not a function: refused")
        if type(arguments) is not tuple:
            raise ValueError(f"its pickle calls {function.name} with arguments that are not a tuple")
        self.push(CALLS[function.name](*_matching(function.name, arguments)))

    def build(self) -> None:
        """State of a dict (`_metadata` of a state_dict) is dropped; nothing else has any."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise ValueError(f"its pickle sets attributes of a {kind(self.stack[-1])}: refused")

    def storage(self) -> None:
        """A persistent id: ("storage", type, key, location, size), and None in the older format."""
        fields = self.stack.pop()
        if type(fields) is tuple and len(fields) == 6 and fields[5] is None:
            fields = fields[:5]
        if (
            type(fields) is not tuple
            or len(fields) != 5
            or [type(field) for field in fields] != [str, Name, str, str, int]
        ):
            raise ValueError("its pickle describes a storage in a way that is not known")
        word, kind, key, _, size = fields
        if word != "storage" or kind.name not in STORAGES or size < 0:
            raise ValueError("its pickle describes a storage in a way that is not known")
        storage = Storage(key, STORAGES[kind.name], size)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"its pickle describes the storage {shown(key)} in two ways")
        self.push(storage)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """A tensor that lies within its storage; what follows (requires_grad, hooks) means nothing here."""
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("its pickle describes a tensor in a way that is not known")
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(strides):
        raise ValueError("its pickle describes a tensor in a way that is not known")
    if len(shape) > MAX_DIMS:
        raise ValueError(f"it has a tensor of {len(shape):,} dimensions; {MAX_DIMS} are the most")
    elements = math.prod(shape)
    last = offset + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    if elements > 0 and (last >= storage.size or elements > storage.size):
        raise ValueError(f"it has a tensor that is larger than its storage {shown(storage.key)}")
    if elements == 0 and max(shape) >= 2**31:
        raise ValueError("it has an empty tensor of an impossible shape")
    return Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Tensor:
    """A parameter is its tensor."""
    if type(tensor) is not Tensor:
        raise ValueError("its pickle describes a parameter in a way that is not known")
    return tensor


def _ordered_dict(items: Any = None) -> dict[Any, Any]:
    """An empty dict; or, as Python 2 wrote it, one of a list of [key, value]."""
    if items is None:
        return {}
    if type(items) is not list or any(type(item) is not list or len(item) != 2 for item in items):
        raise ValueError("its pickle calls collections.OrderedDict with 1 argument that is not a list of items")
    if any(type(item[0]) not in (str, int) for item in items):
        raise ValueError("its pickle has something else than text or a number as the key of a dict")
    made = {item[0]: item[1] for item in items}
    items.clear()  # a list serves once, so that long lists named many times over cost nothing
    return made


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
NUM_ARGUMENTS = {
    "collections.OrderedDict": (0, 1),
    "torch._utils._rebuild_tensor": (4,),
    "torch._utils._rebuild_tensor_v2": (6, 7),
    "torch._utils._rebuild_parameter": (3,),
}


def _matching(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call, if there are as many as torch.save writes."""
    if len(arguments) not in NUM_ARGUMENTS[name]:
        raise ValueError(f"its pickle calls {name} with {len(arguments):,} arguments")
    return arguments


ALL_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
OPCODES: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.mark(),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), Machine.push),
    "SHORT_BINSTRING": Machine.push,  # how Python 2 wrote its text: files of 2017, such as LPIPS's
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "SETITEM": lambda machine, _: machine.set_item(),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "APPEND": lambda machine, _: machine.append(),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Machine.put),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    "GLOBAL": lambda machine, name: machine.push_name(name),
    "STACK_GLOBAL": lambda machine, _: machine.push_stack_name(),
    "INST": lambda machine, name: machine.instance(name),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.storage(),
}


def shown(text: str) -> str:
    """Text of a stranger, for a message of one line."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def kind(value: object) -> str:
    """What a value is called in a message."""
    return value.name if type(value) is Name else type(value).__name__
