"""The public verbs: save, load, prepare, close."""

from asyncdcp.checkpointer.asynchronous import AsyncCheckpointer
from asyncdcp.checkpointer.handles import SaveHandle
from asyncdcp.checkpointer.synchronous import SyncCheckpointer

__all__ = ["AsyncCheckpointer", "SaveHandle", "SyncCheckpointer"]
