"""The format's page is enough to write a reader: here is one that knows nothing else, and uses nothing of asyncdcp."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM as Cipher
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from asyncdcp import AESGCM, BytePlanes, Extension, PerRank, SyncCheckpointer, ZStandard

KEY = bytes(range(32))
ITEM = {"float64": 8, "int64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "bool": 1, "uint8": 1, "float8_e5m2": 1}


def derived(save_id: str, use: str) -> Cipher:
    info = f"asyncdcp encrypt.aesgcm/1 {use}".encode()
    return Cipher(HKDF(SHA256(), 32, save_id.encode(), info).derive(KEY))


def body(path: Path, kind: str) -> Any:
    """The body of a Record or an Index."""
    data = path.read_bytes()
    envelope = json.loads(data)
    assert (envelope["format"], envelope["version"], envelope["kind"]) == ("asyncdcp", 1, kind)
    head, _, rest = data.partition(b',"digest":"')
    sealed = head.partition(b'"seal":')[1:]
    content = rest[len(envelope["digest"]) + len(b'","body":') : -1]
    assert xxhash.xxh3_128_hexdigest(b"".join(sealed) + (b"," if sealed[0] else b"") + content) == envelope["digest"]
    if "seal" not in envelope:
        return json.loads(content)
    cipher, bound = derived(path.name[:20], "bodies"), path.name.encode() + b"\0"
    if envelope["seal"]["hidden"]:
        hidden = base64.b64decode(json.loads(content))
        return json.loads(cipher.decrypt(hidden[:12], hidden[12:], bound))
    token = bytes.fromhex(envelope["seal"]["token"])
    assert cipher.decrypt(token[:12], token[12:], bound + content) == b""
    return json.loads(content)


def image(path: Path, index: Any, file: Any) -> bytes:
    """A data file, decoded."""
    stored, size = path.read_bytes(), index["block_bytes"]
    assert len(stored) == file["stored_size"]
    lengths = file["lengths"] or [min(size, len(stored) - begin) for begin in range(0, len(stored), size)]
    sums = base64.b64decode(file["checksums"])
    assert len(sums) == 8 * len(lengths)
    blocks = []
    for number, (begin, end) in enumerate(itertools.pairwise(itertools.accumulate(lengths, initial=0))):
        block = stored[begin:end]
        assert xxhash.xxh3_64_intdigest(block) == int.from_bytes(sums[8 * number :][:8], "little")
        place = f"{index['save_id']}/{path.name}/{number}/{len(lengths)}".encode()
        for transform in reversed(index["transforms"]):
            block = decoded(transform, block, index["save_id"], place)
        blocks.append(block)
    return b"".join(blocks)


def decoded(transform: str, block: bytes, save_id: str, place: bytes) -> bytes:
    if transform == "stream.zstd/1":
        return zstandard.ZstdDecompressor().stream_reader(block, read_across_frames=True).read()
    if transform == "block.planes/1":
        data, planes = block[:-1], block[-1]
        length = len(data) // planes
        numbers = zip(*(data[n * length : (n + 1) * length] for n in range(planes)), strict=True)
        return bytes(itertools.chain.from_iterable(numbers)) + data[planes * length :]
    assert transform.startswith("encrypt.aesgcm/1.")
    return derived(save_id, "blocks").decrypt(block[:12], block[12:], place)


def read(folder: Path) -> tuple[dict[str, bytes], dict[str, Any], Any]:
    """The tensors' bytes by name, aliases too; the values; the tree. Of one rank, whose tensors are each one chunk."""
    records = {path.name[:-5]: body(path, "record") for path in folder.glob("????????????????????.json")}
    commits = {name: record for name, record in records.items() if record["outcome"] == "commit"}
    replaced = {name for record in commits.values() for name in record["replaces"]}
    (record,) = (record for name, record in commits.items() if name not in replaced)
    (listed,) = record["indexes"]
    data = (folder / listed["name"]).read_bytes()
    assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (listed["size"], listed["digest"])
    index = body(folder / listed["name"], "index")
    images = [image(folder / file["name"], index, file) for file in index["files"]]
    plan, found = index["plan"], {}
    sizes = iter(plan["written"]["sizes"])
    for tensor, file, begin in zip(*(plan["written"][column] for column in ("tensor", "file", "begin")), strict=True):
        shape = list(itertools.islice(sizes, len(plan["shapes"][tensor])))
        assert shape == plan["shapes"][tensor]
        length = ITEM[plan["dtypes"][tensor]]
        for extent in shape:
            length *= extent
        found[plan["names"][tensor]] = images[file][begin : begin + length]
    found |= {alias: found[name] for alias, name in plan["aliases"].items()}
    return found, index["values"], plan["tree"]


def of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize(
    "extensions",
    [
        lambda: [],
        lambda: [ZStandard()],
        lambda: [BytePlanes(), ZStandard(), AESGCM(KEY)],
        lambda: [AESGCM(KEY, hide_metadata=True)],
    ],
    ids=["plain", "zstd", "planes, zstd, encrypted", "hidden"],
)
def test_a_reader_made_from_the_page_reads_what_was_saved(
    tmp_path: Path, extensions: Callable[[], Sequence[Extension]]
) -> None:
    model = torch.nn.Linear(700, 600)
    tensors = {
        "half": torch.randn(3, 100_001).bfloat16(),
        "mask": torch.rand(77) > 0.5,
        "empty": torch.empty(0, 5),
        "double": torch.randn(130_000, dtype=torch.float64),
        "eight": torch.ones(9).to(torch.float8_e5m2),
    }
    state = {
        "model": model,
        "tied": model.weight,
        **tensors,
        "own": PerRank(7),
        "rates": {1: 0.5, None: (1, {2.0, 3.0})},
    }
    with SyncCheckpointer(process=False, extensions=extensions()) as checkpointer:
        checkpointer.save(tmp_path, {"of": "an older one"})
        checkpointer.save(tmp_path, state, overwrite=True)
    found, values, tree = read(tmp_path)
    expected = {"model.weight": model.weight, "model.bias": model.bias, "tied": model.weight, **tensors}
    assert {name: of(tensor) for name, tensor in expected.items()} == found
    assert values == {"own": 7, "rates.1": 0.5, "rates.None": {"tuple": [1, {"set": [2.0, 3.0]}]}}
    keys, nodes = tree["dict"]
    assert keys == list(state)
    assert nodes[1:3] == [{"t": "tied"}, {"t": "half"}]
    assert nodes[-2:] == [{"per_rank": {"v": "own"}}, {"dict": [[1, None], [{"v": "rates.1"}, {"v": "rates.None"}]]}]
