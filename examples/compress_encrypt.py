"""Trains a small model in bfloat16, and keeps its checkpoints compressed and encrypted.

    ASYNCDCP_KEY=$(python -c "import os; print(os.urandom(32).hex())") python examples/compress_encrypt.py

It needs asyncdcp[encryption]. Without ASYNCDCP_KEY it makes a key of its own, which is lost when it ends: whoever loses
a key loses what it encrypts. It saves the same state plain, compressed, and compressed and encrypted, says what each
came to, looks for the weights' names in what is on the disk, goes on training from the encrypted checkpoint, and shows
what happens without the key.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from asyncdcp import AESGCM, AsyncCheckpointer, BytePlanes, Extension, RNGState, ZStandard
from asyncdcp.errors import KeyUnavailable

CHAINS: dict[str, Sequence[Extension]] = {
    "plain": (),
    "compressed": (BytePlanes(), ZStandard(level=1)),  # left to right: each number's bytes apart, then compressed
}


class Regression:
    """Learns a random function: enough that its weights are those of something trained."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 8)
        )
        self.model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.progress = {"step": 0}
        self.target = torch.randn(64, 8)

    @property
    def state(self) -> dict[str, object]:
        """What a checkpoint holds."""
        return {"model": self.model, "optimizer": self.optimizer, "rng": RNGState(), "progress": self.progress}

    def train(self, steps: int) -> Tensor:
        """Trains, and returns the last loss."""
        loss = torch.zeros(())
        for _ in range(steps):
            inputs = torch.randn(256, 64)
            loss = (self.model(inputs.bfloat16()).float() - (inputs @ self.target).tanh()).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.progress["step"] += 1
        return loss.detach()


def key_of_environment() -> AESGCM:
    """The key in ASYNCDCP_KEY, or a new one for this run."""
    if not os.environ.get("ASYNCDCP_KEY"):
        os.environ["ASYNCDCP_KEY"] = os.urandom(32).hex()
    return AESGCM.from_environment(hide_metadata=True)


async def save(folder: Path, name: str, training: Regression, extensions: Sequence[Extension]) -> None:
    async with AsyncCheckpointer(extensions=extensions) as checkpointer:
        result = await checkpointer.save(folder / name, training.state, overwrite=True)
    readable = any(b"exp_avg_sq" in file.read_bytes() for file in (folder / name).iterdir())
    part = result.stored_bytes / result.tensor_bytes
    transforms = " then ".join(each.registry_name() for each in extensions) or "nothing"
    print(f"{name}: {part:.0%} of {result.tensor_bytes:,} bytes, transformed by {transforms};", end=" ")
    print(f"names can {'' if readable else 'not '}be read")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    training = Regression(options.width)
    training.train(options.steps)
    cipher = key_of_environment()
    for name, extensions in {**CHAINS, "encrypted": (*CHAINS["compressed"], cipher)}.items():
        await save(options.folder, name, training, extensions)

    unbroken = training.train(5)
    resumed = Regression(options.width)
    async with AsyncCheckpointer(extensions=[cipher]) as checkpointer:
        await checkpointer.load(options.folder / "encrypted", resumed.state)  # what else it needs it finds by name
    print(f"resumed at step {resumed.progress['step']}:", end=" ")
    print(f"five steps on, the loss is {resumed.train(5):.6f}, and without a break {unbroken:.6f}")

    del os.environ["ASYNCDCP_KEY"]
    async with AsyncCheckpointer() as stranger:
        try:
            await stranger.load(options.folder / "encrypted")
        except KeyUnavailable as error:
            print(f"without the key: {error}")


if __name__ == "__main__":
    asyncio.run(main())
