"""Processes that decode for the threads of a training, where one interpreter is too few.

Each thread has a socket to one of the processes: it sends the indices of records, and gets their
canvases into the arrays of its batch. Nothing of it depends on how the training was started: a
process runs this file, and gets the records pickled on its standard input.
"""
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from equivariant_ssl.data.decoders import Decoders
from equivariant_ssl.data.source import Decoded, Records, decode_record
from equivariant_ssl.training.stop import SIGNALS, say

LOST = ('a process that decoded images is gone, perhaps for want of memory: '
        'threads of this process decode in its place')


class DecodeProcesses:
  """Processes that decode records, and a connection to one of them for each thread."""

  def __init__(self, children: list[subprocess.Popen], connections: list[Connection | None]):
    self.children, self.connections = children, connections
    self.closed, self.started = False, 0
    self.lock = threading.Lock()

  @classmethod
  def start(cls, canvases: Any, decoders: Decoders, most: int) -> 'DecodeProcesses | None':
    """Start the processes that decode for a stream; None where its records cannot be pickled.

    most: the number of records that a thread asks for at a time, at most.
    """
    try:
      job = pickle.dumps((canvases.records._replace(labels=None, files=None), canvases.side, most))
    except Exception:  # a source that someone has added may hold anything
      return None
    children: list[subprocess.Popen] = []
    connections: list[Connection | None] = [None] * decoders.threads
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(sys.path)}
    for process in range(decoders.processes):
      numbers = range(process, decoders.threads, decoders.processes)
      pairs = [socket.socketpair() for _ in numbers]
      theirs = [remote.detach() for _, remote in pairs]
      children.append(subprocess.Popen(
          [sys.executable, '-m', __name__, *map(str, theirs)], stdin=subprocess.PIPE,
          stdout=subprocess.PIPE, pass_fds=theirs, env=environment))
      for number, (local, _), remote in zip(numbers, pairs, theirs, strict=True):
        os.close(remote)
        connections[number] = Connection(local.detach())
    processes = cls(children, connections)
    for child in children:  # all of them start at the same time
      threading.Thread(target=processes._begin, args=(child, job), daemon=True).start()
    return processes

  def _begin(self, child: subprocess.Popen, job: bytes) -> None:
    """Send a process its records, and wait until it has begun, or is gone.

    Its standard input stays open for as long as this process lives.
    """
    assert child.stdin and child.stdout  # pipes
    with contextlib.suppress(OSError, ValueError):
      child.stdin.write(len(job).to_bytes(8, 'big') + job)
      child.stdin.flush()
      child.stdout.read(1)
    with self.lock:
      self.started += 1

  @property
  def ready(self) -> bool:
    """Whether all processes have begun. Until then threads decode."""
    return self.started == len(self.children)

  def decode(self, number: int, records: list[int], images: np.ndarray) -> list[Decoded] | None:
    """Decode records into `images` [n S S 3], and return what there is to say of each of them.

    number: the number of the thread. None where the process is not there. Raises what it raised.
    """
    connection = self.connections[number] if number < len(self.connections) else None
    if not connection or not self.ready:
      return None
    try:
      connection.send(records)
      answer = connection.recv()
      if isinstance(answer, BaseException):
        raise answer
      connection.recv_bytes_into(images.data.cast('B'))
      return [decoded._replace(canvas=images[i] if decoded.canvas is not None else None)
              for i, decoded in enumerate(answer)]
    except (EOFError, ConnectionError, BrokenPipeError):
      self.connections[number] = None
      if not self.closed:
        self.closed = True
        say(LOST)
      return None

  def close(self) -> None:
    """End the processes."""
    self.closed = True
    for child in self.children:
      child.kill()
    for child in self.children:
      child.wait()
      for pipe in (child.stdin, child.stdout):
        if pipe:
          with contextlib.suppress(OSError):
            pipe.close()


def _answer(connection: Connection, records: Records, side: int, most: int) -> None:
  """Decode what is asked for through a connection, until it ends."""
  canvases = np.zeros((most, side, side, 3), np.uint8)
  with contextlib.suppress(EOFError, OSError):
    while True:
      indices = connection.recv()
      try:
        answer = []
        for i, index in enumerate(indices):
          decoded = decode_record(records, side, index)
          if decoded.canvas is not None:
            canvases[i] = decoded.canvas
            decoded = decoded._replace(canvas=True)
          answer.append(decoded)
      except Exception as error:
        connection.send(error)
        continue
      connection.send(answer)
      connection.send_bytes(canvases[:len(indices)].data.cast('B'))


def main() -> None:
  """Decode for the process that started this one, until it ends."""
  for number in SIGNALS:  # the process that started this one says when it ends
    signal.signal(number, signal.SIG_IGN)
  stdin = sys.stdin.buffer
  size = int.from_bytes(stdin.read(8), 'big')
  records, side, most = pickle.loads(stdin.read(size))
  for descriptor in map(int, sys.argv[1:]):
    threading.Thread(target=_answer, args=(Connection(descriptor), records, side, most),
                     daemon=True).start()
  os.write(1, b'.')
  stdin.read()  # ends with the process that started this one
  os._exit(0)


if __name__ == '__main__':
  main()
