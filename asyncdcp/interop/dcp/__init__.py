"""``torch.distributed.checkpoint`` with asyncdcp underneath: readers and writers to be used in the place of torch's.

import torch.distributed.checkpoint as dcp
from asyncdcp.interop.dcp import FileSystemReader, FileSystemWriter

dcp.save(state, storage_writer=FileSystemWriter(path))
dcp.load(state, storage_reader=FileSystemReader(path))
"""

from asyncdcp.interop.dcp.reader import FileSystemReader
from asyncdcp.interop.dcp.writer import FileSystemWriter

__all__ = ["FileSystemReader", "FileSystemWriter"]
