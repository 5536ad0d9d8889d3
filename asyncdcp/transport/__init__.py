"""Live state between ranks: fast recovery of a rank from a healthy peer, without storage."""

from asyncdcp.transport.handle import ReceiveReport, SendHandle, SendReport
from asyncdcp.transport.memory import MemoryHub
from asyncdcp.transport.options import TransportOptions
from asyncdcp.transport.recovery import Recovered, recover
from asyncdcp.transport.transport import PGTransport

__all__ = [
    "MemoryHub",
    "PGTransport",
    "ReceiveReport",
    "Recovered",
    "SendHandle",
    "SendReport",
    "TransportOptions",
    "recover",
]
