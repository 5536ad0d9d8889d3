"""An Index held against its own numbers, with nothing taken on trust.

Every chunk lies within its tensor, every byte range within its file, the ranges tile the file without overlap or hole,
tables are as long as the file has blocks. All chunks are looked at together; only when something is wrong with them
they are looked at one by one, to say what.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeAlias

from asyncdcp.boxes import Box
from asyncdcp.chunk_table import Listing, Rows, chunk_rows, listing_of
from asyncdcp.errors import CorruptCheckpoint, UnsupportedFormat
from asyncdcp.format.blocks import SLAB_BYTES, block_count, stored_limit
from asyncdcp.metadata import DTYPE_SIZES, FileTable, ImageShape, Index, IndexPlan
from asyncdcp.names import data_name, index_name, is_descriptor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints: TypeAlias = NDArray[np.int64]

_LIMIT = 1 << 62
_MAX_DIMENSIONS = 64
_BLOCK_LIMITS = (4096, SLAB_BYTES)


class Chunks(NamedTuple):
    """The chunks that an Index's rank wrote, checked: as columns, with the number of the file and the first byte there.
    ``placed`` are the numbers of those that are not empty, in the order in which they lie in the files.
    """

    listing: Listing
    rows: Rows
    file: Ints
    begin: Ints
    placed: Ints


class _Chunk(NamedTuple):
    tensor: int
    box: Box
    file: int
    begin: int
    length: int


def check_index(index: Index, *, listing: Listing | None = None) -> Chunks:
    """The chunks of an Index, all its numbers checked against each other; ``CorruptCheckpoint`` otherwise.

    ``listing`` is the list of tensors as columns, if it is known to be sound.
    """
    name, plan = index_name(index.save_id, index.rank), index.plan
    for transform in index.transforms:
        if not is_descriptor(transform):
            raise UnsupportedFormat(
                f"{name}: its data was transformed by {transform[:80]!r}, which is no extension", path=name
            )
    if listing is None:
        _check_list(plan, name)
        listing = listing_of(plan)
    _check_aliases(index, name)
    if len(index.files) != len(plan.images):
        corrupt(name, "files and images differ in number")
    for number in range(len(index.files)):
        check_file(index, number)
    chunks = _written(index, listing)
    if chunks is None:
        _explain(index, name)
    return chunks


def _written(index: Index, listing: Listing) -> Chunks | None:
    """The written chunks, which follow each other in every file from the end of the header to the end of the file;
    None if anything is wrong with them.
    """
    import numpy as np

    columns, images = index.plan.written, index.plan.images
    rows = chunk_rows(columns, listing)
    try:
        file, begin = np.array(columns.file, np.int64), np.array(columns.begin, np.int64)
    except OverflowError:
        return None
    if rows is None or not rows.tensor.size == file.size == begin.size:
        return None
    if ((file < 0) | (file >= len(images)) | (begin < 0) | (begin >= _LIMIT)).any():
        return None
    if (begin % listing.itemsizes[rows.tensor]).any():
        return None
    order = np.lexsort((rows.length, begin, file))
    ordered, begins, ends = file[order], begin[order], (begin + rows.length)[order]
    starts = np.array([image.data_start for image in images], np.int64)
    first = np.searchsorted(ordered, np.arange(len(images) + 1))
    due, there = np.append(0, ends)[: order.size], first[1:] > first[:-1]
    due[first[:-1][there]] = starts[there]
    stop = starts.copy()
    stop[there] = ends[first[1:][there] - 1]
    if (begins != due).any() or (stop != np.array([image.size for image in images], np.int64)).any():
        return None
    return Chunks(listing, rows, file, begin, order[rows.length[order] > 0])


def _explain(index: Index, name: str) -> NoReturn:
    """Something is wrong with an Index's chunks: looks at them one by one, and says what."""
    _check_tiling(index, list(_chunks(index, name)), name)
    corrupt(name, "its chunks make no sense")


def _check_list(plan: IndexPlan, name: str) -> None:
    if not len(plan.names) == len(plan.dtypes) == len(plan.shapes):
        corrupt(name, "names, dtypes and shapes differ in number")
    if len(set(plan.names)) != len(plan.names):
        corrupt(name, "a tensor is listed twice")
    for tensor, dtype, shape in zip(plan.names, plan.dtypes, plan.shapes, strict=True):
        if dtype not in DTYPE_SIZES:
            raise UnsupportedFormat(
                f"{name}: {tensor} has the unknown dtype {dtype[:40]!r}", path=name, tensors=[tensor]
            )
        extent = prod(max(size, 1) for size in shape[:_MAX_DIMENSIONS])  # strides must not overflow in an empty one
        if len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0 or extent * DTYPE_SIZES[dtype] >= _LIMIT:
            corrupt(name, f"{tensor} has the impossible shape {_shown(shape)}", tensor)


def _shown(shape: tuple[int, ...]) -> str:
    return ", ".join(str(size)[:24] for size in shape[:8]) + (" …" if len(shape) > 8 else "")


def _check_aliases(index: Index, name: str) -> None:
    """An alias is of a stored tensor, so there are no chains of them, and no circles. One of what is its rank's own is
    so, too: other ranks see neither.
    """
    known, own = set(index.plan.names), frozenset(index.plan.own)
    for alias, target in index.plan.aliases.items():
        if target not in known or alias in known or alias in index.values:
            corrupt(name, f"the alias {alias} of {target} is not one", alias)
        if target in own and alias not in own:
            corrupt(name, f"the alias {alias} is shared, and {target} is the rank's own", alias)


def _boxes(plan: IndexPlan, name: str) -> Iterator[tuple[int, Box]]:
    """The tensor's number and the box of each row, which lies in the tensor's shape."""
    ndims, columns = [len(shape) for shape in plan.shapes], plan.written
    if any(not 0 <= tensor < len(ndims) for tensor in columns.tensor):
        corrupt(name, "a chunk is of a tensor that is not listed")
    total = sum(ndims[tensor] for tensor in columns.tensor)
    if not len(columns.offsets) == len(columns.sizes) == total:
        corrupt(name, "the chunks' offsets and sizes do not fit their tensors' dimensions")
    position = 0
    for tensor in columns.tensor:
        end = position + ndims[tensor]
        offsets, sizes = tuple(columns.offsets[position:end]), tuple(columns.sizes[position:end])
        position = end
        for start, size, extent in zip(offsets, sizes, plan.shapes[tensor], strict=True):
            if start < 0 or size < 0 or start + size > extent:
                corrupt(name, f"a chunk of {plan.names[tensor]} leaves its shape", plan.names[tensor])
        yield tensor, Box(offsets, sizes)


def _chunks(index: Index, name: str) -> Iterator[_Chunk]:
    plan, columns = index.plan, index.plan.written
    if not len(columns.tensor) == len(columns.file) == len(columns.begin):
        corrupt(name, "the columns of chunks differ in length")
    for (tensor, box), file, begin in zip(_boxes(plan, name), columns.file, columns.begin, strict=True):
        itemsize = DTYPE_SIZES[plan.dtypes[tensor]]
        if not 0 <= file < len(index.files):
            corrupt(name, f"a chunk of {plan.names[tensor]} is in a file that is not listed", plan.names[tensor])
        if begin % itemsize:
            corrupt(name, f"a chunk of {plan.names[tensor]} begins within an element", plan.names[tensor])
        yield _Chunk(tensor, box, file, begin, box.volume * itemsize)


def check_file(index: Index, number: int) -> None:
    """That a data file's name, sizes and blocks fit together; ``CorruptCheckpoint`` otherwise."""
    name, file, image = index_name(index.save_id, index.rank), index.files[number], index.plan.images[number]
    if not _BLOCK_LIMITS[0] <= index.block_bytes <= _BLOCK_LIMITS[1] or index.block_bytes % 4096:
        corrupt(name, f"blocks of {index.block_bytes} bytes are out of range")
    if file.name != data_name(index.save_id, index.rank, number, index.transforms):
        corrupt(name, f"its data file number {number} cannot be named {file.name[:80]!r}")
    if not 8 < image.data_start <= image.size < _LIMIT:
        corrupt(name, f"{file.name} has an impossible size or header")
    _check_lengths(index, file, image, name)
    if len(file.checksums) != 8 * block_count(image.size, index.block_bytes):
        corrupt(name, f"the checksums of {file.name} are not as many as its blocks")


def _check_lengths(index: Index, file: FileTable, image: ImageShape, name: str) -> None:
    """Without transforms blocks are as long as in the image; with them each has a length of its own, within bounds."""
    if (file.lengths is not None) != bool(index.transforms):
        corrupt(name, f"{file.name} has lengths of blocks without transforms, or none with them")
    stored = image.size
    if file.lengths is not None:
        if len(file.lengths) != block_count(image.size, index.block_bytes):
            corrupt(name, f"the lengths of {file.name} are not as many as its blocks")
        limit = stored_limit(index.block_bytes)
        if min(file.lengths) < 1 or max(file.lengths) > limit:
            corrupt(name, f"a block of {file.name} has an impossible length; it takes 1 to {limit} bytes")
        stored = sum(file.lengths)
    if file.stored_size != stored:
        corrupt(name, f"{file.name} is stored in {file.stored_size} bytes, and its blocks have {stored}")


def _check_tiling(index: Index, chunks: list[_Chunk], name: str) -> None:
    """In every file the chunks must follow each other from the end of the header to the end of the file."""
    ends = [image.data_start for image in index.plan.images]
    for chunk in sorted(chunks, key=lambda chunk: (chunk.file, chunk.begin, chunk.length)):
        if chunk.begin != ends[chunk.file]:
            fault = "overlapping chunks" if chunk.begin < ends[chunk.file] else "a hole before a chunk"
            tensor = index.plan.names[chunk.tensor]
            corrupt(name, f"{fault}: {tensor} in {index.files[chunk.file].name}", tensor)
        ends[chunk.file] += chunk.length
    for file, image, end in zip(index.files, index.plan.images, ends, strict=True):
        if end != image.size:
            corrupt(name, f"the chunks of {file.name} end at byte {end} of {image.size}")


def corrupt(name: str, what: str, tensor: str | None = None) -> NoReturn:
    """Raises for the Index of this name, and the tensor that it is about."""
    raise CorruptCheckpoint(f"{name}: {what}", path=name, tensors=[tensor] if tensor else [])
