"""The Lightning plugin in a real, tiny ``Trainer``."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from asyncdcp import Options, SyncCheckpointer
from asyncdcp.errors import AsyncDCPError, CheckpointNotFound, InvalidOption, StorageError, UnseenFailure
from asyncdcp.interop.convert import convert
from asyncdcp.names import record_save_id
from asyncdcp.storage import LocalStorage
from tests.interop.page import example

if find_spec("lightning") is None:
    pytest.skip("needs Lightning", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, about everything a tiny trainer lacks


@cache
def net_class() -> Any:
    """Lightning is imported by the test that needs it: it takes three seconds."""
    from lightning import LightningModule

    class Net(LightningModule):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 1)
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.layer(batch).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    return Net


def plugin_of() -> Any:
    from asyncdcp.interop.lightning import AsyncDCPCheckpointIO

    return AsyncDCPCheckpointIO(process=False)


def data() -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(torch.randn(16, 4, generator=generator), batch_size=4)  # type: ignore[arg-type]  # a tensor has len and items


def trainer(root: Path, epochs: int, keep: int = 1) -> Any:
    from lightning import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    return Trainer(
        max_epochs=epochs,
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(root / "kept", filename="{epoch}", save_top_k=keep, monitor="epoch", mode="max")],
        plugins=[plugin_of()],
    )


def test_a_fit_resumes_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning

    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # it sets them, for every fit after it and every program that is started
    lightning.seed_everything(0, verbose=False)
    net = net_class()
    whole = net()
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    trainer(tmp_path / "whole", 3).fit(whole, data())
    first, second = net(), net()
    first.load_state_dict(start)
    trainer(tmp_path / "parts", 2).fit(first, data())
    (kept,) = (tmp_path / "parts" / "kept").iterdir()
    assert kept.is_dir(), "of the two checkpoints the first was removed"
    trainer(tmp_path / "parts", 3).fit(second, data(), ckpt_path=kept)
    assert first.losses + second.losses == whole.losses
    assert torch.equal(second.layer.weight, whole.layer.weight)


def test_removed_only_once_the_newer_one_is_committed(tmp_path: Path) -> None:
    plugin = plugin_of()
    for number in range(2):
        plugin.save_checkpoint({"w": torch.full((3,), number)}, tmp_path / str(number))
    plugin.remove_checkpoint(tmp_path / "0")
    assert torch.equal(plugin.load_checkpoint(tmp_path / "1")["w"], torch.ones(3, dtype=torch.int64))
    plugin.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_failed_save_is_raised_though_an_older_one_was_to_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: Any) -> None:
        raise StorageError("the disk is gone", path=str(tmp_path))

    plugin, kept = plugin_of(), threading.Event()
    plugin.save_checkpoint({"w": torch.ones(3)}, tmp_path / "0")
    assert plugin.load_checkpoint(tmp_path / "0")
    monkeypatch.setattr(LocalStorage, "put", full)
    plugin.save_checkpoint({"w": torch.ones(3)}, tmp_path / "1")
    plugin.remove_checkpoint(tmp_path / "0")
    plugin._last.committed.add_done_callback(lambda _: kept.set())
    assert kept.wait(30)
    with pytest.raises(UnseenFailure, match="the disk is gone"):
        plugin.teardown()
    assert torch.equal(plugin.load_checkpoint(tmp_path / "0")["w"], torch.ones(3))
    plugin.teardown()


def test_of_several_processes_the_first_saves_by_itself(tmp_path: Path) -> None:
    """As Lightning has it, whatever the strategy: a save of all of them would wait for the others."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from asyncdcp.interop.lightning import AsyncDCPCheckpointIO

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        plugin = AsyncDCPCheckpointIO(Options(agreement_deadline=2), process=False)
        plugin.save_checkpoint({"w": torch.ones(3)}, tmp_path / "0")
        assert torch.equal(plugin.load_checkpoint(tmp_path / "0")["w"], torch.ones(3))
        plugin.teardown()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("times", [1, 2])
def test_what_is_saved_anew_is_not_removed_by_an_earlier_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    plugin, slow = plugin_of(), threading.Event()
    plugin.save_checkpoint({"w": torch.zeros(3)}, tmp_path / "again")
    assert plugin.load_checkpoint(tmp_path / "again")
    real = LocalStorage.claim

    async def late(storage: LocalStorage, name: str, data: bytes) -> bool:
        if storage.info.location.endswith("other"):
            await anyio.to_thread.run_sync(slow.wait, 30)
        return await real(storage, name, data)

    monkeypatch.setattr(LocalStorage, "claim", late)
    plugin.save_checkpoint({"w": torch.zeros(3)}, tmp_path / "other")
    for _ in range(times):
        plugin.remove_checkpoint(tmp_path / "again")
    plugin.save_checkpoint({"w": torch.ones(3)}, tmp_path / "again")
    slow.set()
    assert torch.equal(plugin.load_checkpoint(tmp_path / "again")["w"], torch.ones(3))
    plugin.teardown()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_what_a_crash_leaves_of_a_removal_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, left = plugin_of(), list[str]()
    plugin.save_checkpoint({"w": torch.ones(3)}, tmp_path / "0")
    plugin.teardown()
    monkeypatch.setattr("shutil.rmtree", lambda path: left.extend(path.name for path in Path(path).iterdir()))
    plugin.remove_checkpoint(tmp_path / "0")
    assert left and not any(record_save_id(name) for name in left)
    with pytest.raises(CheckpointNotFound):
        plugin.load_checkpoint(tmp_path / "0")
    plugin.teardown()


def test_removed_from_an_object_store(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    plugin, folder = plugin_of(), f"memory://{tmp_path.name}/kept"
    for number in range(2):
        plugin.save_checkpoint({"w": torch.full((3,), number)}, f"{folder}/{number}")
    plugin.remove_checkpoint(f"{folder}/0")
    plugin.teardown()
    assert torch.equal(plugin.load_checkpoint(f"{folder}/1")["w"], torch.ones(3, dtype=torch.int64))
    with pytest.raises(CheckpointNotFound):
        plugin.load_checkpoint(f"{folder}/0")
    plugin.teardown()

    async def in_a_notebook() -> None:
        plugin.remove_checkpoint(f"{folder}/1")

    anyio.run(in_a_notebook)
    with pytest.raises(CheckpointNotFound, match="there is no memory://"):
        plugin.remove_checkpoint(f"{folder}/1")


def test_the_example_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    monkeypatch.chdir(tmp_path)
    short = partial(Trainer, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False)
    exec(
        example("lightning"),
        {"Trainer": short, "ModelCheckpoint": ModelCheckpoint, "model": net_class()(), "data": data()},
    )
    with SyncCheckpointer(process=False) as checkpointer:
        assert checkpointer.load(tmp_path / "checkpoints" / "last.ckpt", keys=["epoch"]) == {"epoch": 0}
    anyio.run(partial(convert, "checkpoints/last.ckpt", "last.pt", "torch"))
    assert isinstance(net_class().load_from_checkpoint("last.pt"), net_class())  # which takes no directory


def test_a_save_after_the_fit_that_fails_is_raised_by_the_plugin(tmp_path: Path) -> None:
    one = trainer(tmp_path, 1)
    one.fit(net_class()(), data())
    (tmp_path / "file").touch()
    one.save_checkpoint(tmp_path / "good.ckpt")
    one.strategy.checkpoint_io.teardown()
    assert (tmp_path / "good.ckpt").is_dir()
    with pytest.raises(AsyncDCPError, match="Not a directory"), ExitStack() as stack:
        stack.callback(one.strategy.checkpoint_io.teardown)  # by which it is raised at the latest
        one.save_checkpoint(tmp_path / "file" / "bad.ckpt")


def test_a_link_to_the_last_one_can_be_made_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = plugin_of()
    made = list[Path]()
    opened = plugin._checkpointer
    save = opened.save

    def late(path: Path, *args: Any, **kwargs: Any) -> Any:
        made.extend(tmp_path.iterdir())  # before anything of the save is on the disk
        return save(path, *args, **kwargs)

    monkeypatch.setattr(opened, "save", late)
    plugin.save_checkpoint({"w": torch.ones(3)}, tmp_path / "kept" / "first")
    (tmp_path / "kept" / "last").symlink_to("first")
    assert made == [tmp_path / "kept"]
    assert torch.equal(plugin.load_checkpoint(tmp_path / "kept" / "last")["w"], torch.ones(3))
    plugin.teardown()


def test_wrong_words(tmp_path: Path) -> None:
    plugin = plugin_of()
    with pytest.raises(InvalidOption, match="storage_options"):
        plugin.save_checkpoint({}, tmp_path / "a", storage_options={})
    with pytest.raises(CheckpointNotFound, match="there is no"):
        plugin.remove_checkpoint(tmp_path / "a")
    with pytest.raises(CheckpointNotFound):
        plugin.load_checkpoint(tmp_path / "a")
    plugin.teardown()
