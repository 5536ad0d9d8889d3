"""Slabs hold what the plan says, byte for byte: gathered, copied whole, cut at slab edges and at file limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from torch import Tensor

from asyncdcp.planning import SavePlan, plan_save
from asyncdcp.staging import SlabCopier
from asyncdcp.staging.accelerator import DeviceFence
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.structure import describe

KIB = 1 << 10


def images(state: dict[str, Tensor], slab_bytes: int, file_limit: int = 1 << 30) -> list[bytes]:
    """The data files of ``state`` as slabs make them up."""
    described = describe(flatten(state))
    plan = plan_save(described.structure, slab_bytes=slab_bytes, file_limit=file_limit)
    copier = SlabCopier(plan, described.sources, DeviceFence(described.sources))
    files = [bytearray(image.size) for image in plan.images]
    for slab in reversed(plan.slabs):  # in any order
        into = torch.full((slab_bytes,), 0xAA, dtype=torch.uint8)
        copier.copy(slab, into)
        files[slab.file][slab.begin : slab.begin + slab.length] = bytes(into[: slab.length].numpy())
        assert bool((into[slab.length :] == 0xAA).all()), "written beyond the slab"
    return [bytes(file) for file in files]


def same(files: list[bytes], state: dict[str, Tensor]) -> bool:
    found = {name: tensor for file in files for name, tensor in load_safetensors(file).items()}
    return set(found) == set(state) and all(torch.equal(found[name], stored(tensor)) for name, tensor in state.items())


def stored(tensor: Tensor) -> Tensor:
    """What a safetensors reader makes of it: complex numbers are bytes to it."""
    return tensor.resolve_conj().reshape(-1).view(torch.uint8) if tensor.is_complex() else tensor


@pytest.mark.parametrize("slab_bytes", [4 * KIB, 12 * KIB, 64 * KIB, 1 << 20])
def test_tensors_cut_at_slab_edges(slab_bytes: int) -> None:
    torch.manual_seed(0)
    state = {
        "contiguous": torch.randn(9_000),
        "transposed": torch.randn(70, 110).t(),
        "strided": torch.randn(40, 50, 30)[::2, 3:40, ::3],
        "expanded": torch.randn(70, 1, 3).expand(70, 40, 3),
        "permuted": torch.randn(8, 9, 10, 11).permute(3, 1, 0, 2),
        "conj": torch.randn(50, 60, dtype=torch.complex64).conj(),
        "negative": torch.randn(50, 60, dtype=torch.complex64).conj().imag,
        "bytes": torch.arange(10_007).to(torch.uint8),
        **{f"small{n}": torch.full((n,), n, dtype=torch.int16) for n in range(60)},
        **{f"scalar{n}": torch.tensor(float(n)) for n in range(5)},
    }
    assert same(images(state, slab_bytes), state)


def test_a_header_longer_than_a_slab() -> None:
    state = {f"{'name' * 20}{n}": torch.tensor([n]) for n in range(100)}
    assert same(images(state, 4 * KIB), state)


def test_a_tensor_larger_than_a_file_is_stored_in_parts() -> None:
    big = torch.arange(6_000, dtype=torch.float32).reshape(60, 100)
    files = images({"big": big.t(), "small": torch.ones(3)}, 4 * KIB, file_limit=5_000)
    parts = {name: tensor for file in files for name, tensor in load_safetensors(file).items()}
    together = torch.zeros(100, 60)
    for name, part in parts.items():
        if name.startswith("big["):
            rows, columns = (slice(*map(int, span.split(":"))) for span in name[4:-1].split(","))
            together[rows, columns] = part
    assert len(files) > 4
    assert torch.equal(together, big.t())


def test_sources_are_kept_though_the_caller_drops_them() -> None:
    described = describe(flatten({"w": torch.arange(100)}))
    plan: SavePlan = plan_save(described.structure, slab_bytes=8 * KIB)
    copier = SlabCopier(plan, described.sources, DeviceFence(described.sources))
    described.sources.clear()
    into = torch.zeros(8 * KIB, dtype=torch.uint8)
    copier.copy(plan.slabs[0], into)
    assert torch.equal(into[4096 : 4096 + 800].view(torch.int64), torch.arange(100))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 40), max_size=3),
            st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool]),
            st.booleans(),
        ),
        max_size=12,
    ),
    st.sampled_from([4 * KIB, 8 * KIB, 256 * KIB]),
)
def test_any_state(entries: list[tuple[list[int], torch.dtype, bool]], slab_bytes: int) -> None:
    state = {}
    for number, (shape, dtype, transposed) in enumerate(entries):
        tensor = torch.randint(0, 2 if dtype is torch.bool else 100, shape).to(dtype)
        state[f"t{number}"] = tensor.transpose(0, -1) if transposed and shape else tensor
    assert same(images(state, slab_bytes), state)
