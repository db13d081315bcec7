"""The trace file: msgpack objects one after the other, a header and then records.

    header   {"format": "expertmesh-trace", "version": 1, "model": ..., "fingerprint": ..., "num_experts": [per layer],
              "top_k": ..., "content": "choices" | "rows", "time_unit": "s", "origin": {...}}
    record   [time_s, layer, bytes]
    gap      [time_s, nil, n]: n exchanges before this moment were not recorded

With content "choices" a record is one exchange, and its bytes are the tokens' experts [T, K], one byte each, or two
little-endian ones for a layer of more than 256 experts. With content "rows" a record is the load of one window that
begins at time_s, and its bytes are the rows of each expert [E], little-endian in the least width of 1, 2, 4 or 8 bytes
that holds them. Times count from the start of the trace and need not be in order, for several routers may write.

Every record stands alone: a file can be appended to, and read while it is written; one that was cut off has lost only
its last record. Knows nothing of how traces are made or used. Its invariant: what comes from a file is checked before
it is believed, and nothing is allocated from a length that was not.

Shapes: T tokens, K experts per token, E experts of the layer.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import closing
from dataclasses import asdict, dataclass, field
from reprlib import repr as shown  # of bounded length and depth
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import msgpack
import numpy as np

from expertmesh.errors import TraceError
from expertmesh.ids import MAX_EXPERTS, MAX_LAYERS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

FORMAT, VERSION, TIME_UNIT = "expertmesh-trace", 1, "s"
MAX_RECORD_BYTES = 2**24
_MAX_ITEM_BYTES = MAX_RECORD_BYTES + 2**16
_MAX_CONTAINERS = 256
"""Lists and maps in one object: a byte of the file can be a list, which takes many in memory."""
_CHUNK_BYTES = 2**16

Content = Literal["choices", "rows"]
_Container = TypeVar("_Container")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What a trace is of."""

    model: str
    fingerprint: str = ""
    """Of the checkpoint that the gates came from; empty when they came from none."""
    num_experts: tuple[int, ...]
    """Per MoE layer."""
    top_k: int
    content: Content
    origin: Mapping[str, Any] = field(default_factory=dict)
    """How the trace came to be: "recorded", or the generator with all its parameters."""

    def check_fits(self, *, num_experts: Sequence[int], fingerprint: str, of: str) -> None:
        """Raise TraceError unless this is a trace of a model with these experts (and of that checkpoint, if known)."""
        if self.num_experts != tuple(num_experts):
            raise TraceError(
                f"the trace is of {self.model!r} with {_shape(self.num_experts)}, {of} has "
                f"{_shape(num_experts)}: use a trace of the same model"
            )
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise TraceError(
                f"the trace is of {self.model!r} with fingerprint {self.fingerprint}, {of} has {fingerprint}: "
                "use a trace of the same model"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One exchange, or one window, of one layer."""

    time_s: float
    layer: int
    rows_E: NDArray[np.int64]
    index_TK: NDArray[np.int64] | None
    """The tokens' choices; None in a trace of rows."""


def fingerprint(config: bytes) -> str:
    """Names a checkpoint by its config.json: what decides which experts there are and how the gate picks them."""
    return hashlib.sha256(config).hexdigest()[:16]


def encode_header(header: TraceHeader) -> bytes:
    fixed = {"format": FORMAT, "version": VERSION, "time_unit": TIME_UNIT}
    return _pack(fixed | asdict(header) | {"num_experts": list(header.num_experts)})


def encode_choices(header: TraceHeader, time_s: float, layer: int, index_TK: NDArray[np.integer]) -> bytes:
    """One exchange. The indices must be below the layer's number of experts."""
    return _pack((float(time_s), layer, index_TK.astype(_index_dtype(header.num_experts[layer])).tobytes()))


def encode_rows(time_s: float, layer: int, rows_E: NDArray[np.integer]) -> bytes:
    """The rows of one window, none of them negative."""
    width = next(width for width in (1, 2, 4, 8) if int(rows_E.max(initial=0)) < 1 << 8 * width)
    return _pack((float(time_s), layer, rows_E.astype(f"<u{width}").tobytes()))


def encode_gap(time_s: float, num_exchanges: int) -> bytes:
    return _pack((float(time_s), None, num_exchanges))


class TraceDecoder:
    """Turns the bytes of a trace, in whatever pieces they come, into its header and records."""

    def __init__(self, name: str) -> None:
        """`name` says in errors which trace it is."""
        self.name = name
        self.header: TraceHeader | None = None
        self.num_records = 0
        self.num_dropped = 0
        """Exchanges that the trace says it has not got."""
        self._fed = 0
        self._whole = 0  # the unpacker's own count runs ahead, into an object that is not there in full
        self._containers = 0  # of the object that is being read
        self._unpacker = msgpack.Unpacker(
            list_hook=self._contain,
            object_hook=self._contain,
            max_buffer_size=2 * MAX_RECORD_BYTES,
            max_bin_len=MAX_RECORD_BYTES,
            max_str_len=4096,
            max_array_len=MAX_LAYERS,
            max_map_len=64,
            max_ext_len=0,
        )

    @property
    def num_bytes_left(self) -> int:
        """Bytes of a record that is not there in full."""
        return self._fed - self._whole

    def feed(self, data: bytes) -> Iterator[Record]:
        """The records that `data` completes. Raises TraceError for anything that is no trace of this version."""
        try:
            self._unpacker.feed(data)
            self._fed += len(data)
            for item in self._unpacker:
                self._containers = 0
                self._whole = int(self._unpacker.tell())
                if self.header is None:
                    self.header = self._header(item)
                elif (record := self._record(self.header, item)) is not None:
                    self.num_records += 1
                    yield record
            if self.num_bytes_left > _MAX_ITEM_BYTES:
                raise self._error(f"a record of more than {MAX_RECORD_BYTES:,} bytes")
        except (ValueError, msgpack.UnpackException) as error:
            raise self._error(str(error) or type(error).__name__) from error

    def finish(self) -> TraceHeader:
        """The header, once all bytes were fed. Raises TraceError when they did not even hold that."""
        if self.header is None:
            raise TraceError(f"{self.name}: " + ("it ends within its header" if self._fed else "it is empty"))
        return self.header

    def _contain(self, container: _Container) -> _Container:
        self._containers += 1
        if self._containers > _MAX_CONTAINERS:
            raise ValueError(f"an object of more than {_MAX_CONTAINERS} lists and maps")
        return container

    def _error(self, problem: str) -> TraceError:
        if self.header is None:
            return TraceError(f"{self.name}: not an expertmesh trace: {problem}")
        at = f"after {self.num_records} records, at byte {self._whole}"
        return TraceError(f"{self.name}: damaged {at}: {problem}")

    def _header(self, item: object) -> TraceHeader:
        if not isinstance(item, dict) or item.get("format") != FORMAT:
            raise self._error(f'it does not begin with a header of format "{FORMAT}"')
        if item.get("version") != VERSION:
            version = shown(item.get("version"))
            raise TraceError(f"{self.name}: a trace of version {version}; this reads version {VERSION}")
        try:
            if item["time_unit"] != TIME_UNIT:
                raise self._error(f"time_unit: {shown(item['time_unit'])} is not {TIME_UNIT!r}")
            num_experts = tuple(_integer(count, 1, MAX_EXPERTS) for count in _list(item["num_experts"]))
            top_k = _integer(item["top_k"], 1, min(num_experts, default=0))
            content, origin = item["content"], item["origin"]
            if content not in ("choices", "rows") or not isinstance(origin, dict):
                raise ValueError("content or origin")
            return TraceHeader(
                model=_text(item["model"]),
                fingerprint=_text(item["fingerprint"]),
                num_experts=num_experts,
                top_k=top_k,
                content=cast("Content", content),
                origin=origin,
            )
        except (KeyError, ValueError) as error:
            raise self._error(f"its header has no valid {error}") from error

    def _record(self, header: TraceHeader, item: object) -> Record | None:
        """The record, or None for a gap."""
        if not isinstance(item, list) or len(item) != 3:
            raise self._error("something else than a record")
        time_s, layer, data = item
        if not isinstance(time_s, float) or not math.isfinite(time_s) or time_s < 0:
            raise self._error(f"a record at the time {shown(time_s)}")
        if layer is None:
            self.num_dropped += _integer(data, 1, 2**63)
            return None
        if type(layer) is not int or not 0 <= layer < len(header.num_experts) or not isinstance(data, bytes):
            raise self._error(f"a record of the layer {shown(layer)}")
        num_experts = header.num_experts[layer]
        if header.content == "rows":
            return Record(time_s=time_s, layer=layer, rows_E=self._rows(data, num_experts), index_TK=None)
        index_TK = self._choices(data, num_experts, header.top_k)
        rows_E = np.bincount(index_TK.reshape(-1), minlength=num_experts)
        return Record(time_s=time_s, layer=layer, rows_E=rows_E, index_TK=index_TK)

    def _rows(self, data: bytes, num_experts: int) -> NDArray[np.int64]:
        width, rest = divmod(len(data), num_experts)
        if rest or width not in (1, 2, 4, 8):
            raise self._error(f"a record of {len(data)} bytes for {num_experts} experts")
        rows_E = np.frombuffer(data, f"<u{width}").astype(np.int64)
        if (rows_E < 0).any():
            raise self._error("a record of absurdly many rows")
        return rows_E

    def _choices(self, data: bytes, num_experts: int, top_k: int) -> NDArray[np.int64]:
        dtype = _index_dtype(num_experts)
        if not data or len(data) % (top_k * dtype.itemsize):
            raise self._error(f"a record of {len(data)} bytes for {top_k} experts per token")
        index_TK = np.frombuffer(data, dtype).astype(np.int64).reshape(-1, top_k)
        if int(index_TK.max()) >= num_experts:
            raise self._error(f"a record that chooses expert {index_TK.max()} of {num_experts}")
        return index_TK


class TraceReader:
    """A trace file. Iterating reads it from the start, as far as it has been written."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises TraceError."""
        self._path = path
        self.decoder = TraceDecoder(str(path))
        """Of the latest iteration: it knows how many records there were, and how many are missing."""
        with closing(iter(self)) as records:
            next(records, None)  # the header comes before the first record
        self.header = self.decoder.finish()

    def __iter__(self) -> Generator[Record, None, None]:
        decoder = self.decoder = TraceDecoder(str(self._path))
        try:
            with self._path.open("rb") as file:
                while data := file.read(_CHUNK_BYTES):
                    yield from decoder.feed(data)
        except OSError as error:
            raise TraceError(f"{self._path}: {error.strerror or error}") from error
        decoder.finish()


def _pack(item: object) -> bytes:
    return cast("bytes", msgpack.packb(item))


def _index_dtype(num_experts: int) -> np.dtype[Any]:
    return np.dtype("<u1" if num_experts <= 256 else "<u2")


def _integer(value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"count {shown(value)}")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list) or not value:
        raise ValueError("num_experts")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("model or fingerprint")
    return value


def _shape(num_experts: Sequence[int]) -> str:
    """In words: "61 layers of 256 experts"."""
    counts = sorted(set(num_experts))
    return f"{len(num_experts)} layers of {' or '.join(map(str, counts))} experts"
