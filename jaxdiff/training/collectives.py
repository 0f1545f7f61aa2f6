"""What devices send each other in one run of a compiled program, read from its text (`compiled.as_text()`).

The text is HLO after partitioning, so shapes are those of one device. Operations inside a loop count as often as the loop turns
where the compiler knows how often that is, else once; every branch of a conditional counts.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_GROUPS = re.compile(r"replica_groups=(\{\{[^}]*\}|\[[\d,]+\]<=|mesh\[[^\]]*\][^{]*\{[^}]*\})")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one kind of collective in one run of a program: how many there are, and the bytes of the whole arrays concerned."""

    count: int
    bytes: int


class Collective(NamedTuple):
    """One instruction. `bytes`: of the array before it is scattered, or after it is gathered; `group`: devices, 0 = all."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    group: int
    times: int
    source: str  # the operation of the model that it belongs to, as JAX names it

    def sent(self, devices: int) -> int:
        """Bytes that each of so many devices sends, and receives, by the ring algorithm, over all `times`."""
        group = self.group or devices
        if self.kind.startswith("collective-"):
            return self.bytes * self.times
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (group - 1) // group * self.times


def collectives(text: str) -> dict[str, Traffic]:
    """Count and bytes of each kind of collective in one run of the program, kinds that do not occur left out."""
    found = instructions(text)
    return {
        kind: Traffic(sum(one.times for one in of_kind), sum(one.times * one.bytes for one in of_kind))
        for kind in KINDS
        if (of_kind := [one for one in found if one.kind == kind])
    }


def sent(text: str, devices: int) -> int:
    """Bytes that each device sends, and receives, in one run of the program on so many."""
    return sum(one.sent(devices) for one in instructions(text))


def instructions(text: str) -> list[Collective]:
    """Each collective of a compiled program. Raises ValueError if the text is not one's."""
    found: dict[str, list[Collective]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = here = None
    types: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            here, types = header[2], {}
            found[here], calls[here] = [], []
            entry = here if header[1] else entry
        elif here is not None and (instruction := _INSTRUCTION.match(line)):
            name, rest = instruction.groups()
            kind, operation = _split(rest)
            types[name] = kind
            if one := _collective(kind, operation, types, here):
                # A TPU's compiler fuses pieces of one collective into several computations: its channel tells.
                channel = _CHANNEL.search(operation)
                if channel is None or (one.kind, channel[1]) not in seen:
                    found[here].append(one)
                seen |= {(one.kind, channel[1])} if channel else set()
            turns = _TURNS.search(operation) if operation.startswith("while(") else None
            called = _CALLED.findall(operation) + [n for b in _BRANCHES.findall(operation) for n in _names(b)]
            calls[here] += [(other, int(turns[1]) if turns else 1) for other in called]
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    times = _times(entry, calls)
    return [one._replace(times=times[where]) for where, ones in found.items() for one in ones if times[where]]


def _split(rest: str) -> tuple[str, str]:
    """The type and the operation of `TYPE operation(...), ...`, where the type may be a tuple."""
    depth = 0
    for place, letter in enumerate(rest):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def _collective(kind: str, operation: str, types: dict[str, str], computation: str) -> Collective | None:
    name, _, arguments = operation.partition("(")
    plain = name.removesuffix("-start")
    if plain not in KINDS:
        return None
    if name != plain and name != "all-reduce-start":  # (operands, results, ...)
        operands, results = _parts(kind)[:2]
        kind = operands if plain == "reduce-scatter" else results
    elif plain == "reduce-scatter":
        kind = " ".join(types.get(n, n) for n in _names(arguments.split(")")[0]))
    if plain == "all-reduce" and "all-reduce-scatter" in computation:  # a TPU's compiler fuses it with a slice
        plain = "reduce-scatter"
    arrays = _ARRAY.findall(kind)
    shapes = tuple(tuple(int(n) for n in re.findall(r"\d+", dimensions)) for _, dimensions in arrays)
    size = sum(math.prod(shape) * _bits(dtype) for shape, (dtype, _) in zip(shapes, arrays, strict=True)) // 8
    source = re.search(r'op_name="([^"]*)"', operation)
    return Collective(plain, shapes, size, _group(operation), 1, source[1] if source else "")


def _parts(kind: str) -> list[str]:
    """The elements of a tuple's type."""
    parts, inside = [], kind[1:-1]
    while inside:
        part, inside = _split(inside.lstrip(", ") + " ")
        parts.append(part.rstrip(","))
    return parts


def _names(listed: str) -> list[str]:
    return re.findall(r"%?([\w.-]+)(?:,|$)", listed.replace(" ", ""))


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    digits = re.search(r"\d+", dtype)  # f32, bf16, f8e4m3fn, s4, pred
    return int(digits[0]) if digits else 8


def _group(operation: str) -> int:
    """How many devices take part together; 0 where all do or nobody says."""
    if not (groups := _GROUPS.search(operation)):
        return 0
    written = groups[1]
    if written.startswith("{{"):  # {{0,1,2,3},{4,5,6,7}}: the first of them
        return written.count(",") + 1
    if written.startswith("["):  # [2,4]<=[8]: two of four
        return int(re.findall(r"\d+", written)[-1])
    mesh, _, axes = written.partition("{")  # mesh['a'=2,'b'=4] {'b'}: along that axis
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
    used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes)
    return math.prod(int(part or sizes[axis]) for axis, part in used)


def _times(entry: str, calls: dict[str, list[tuple[str, int]]]) -> collections.Counter[str]:
    """How often each computation runs. The text defines a computation before those that call it."""
    times = collections.Counter({entry: 1})
    for name in reversed(calls):
        for other, turns in calls[name]:
            times[other] += times[name] * turns
    return times
