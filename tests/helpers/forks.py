"""The command in processes that start at once: one process imports everything, and forks a child for each run.

A process of its own spends two seconds on importing torch. `Forks` is for tests; below it is what runs in the other
process, which computes nothing itself, so that a fork is safe.
"""

import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Done(NamedTuple):
    """Of all children of a run: exit codes (-9 where SIGKILL ended one), and what they printed together."""

    codes: list[int]
    out: str
    err: str


class Forks:
    """A process that forks children, which run `merge-engine` with other arguments each time."""

    def __init__(self, *modules: str) -> None:
        """modules: what is imported beside the command, before a child is forked."""
        self._modules = modules

    def __enter__(self) -> "Forks":
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, __file__, *self._modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._receive() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def start(
        self, *commands: list[object], environments: tuple[dict[str, str], ...] = ({},), first: str = ""
    ) -> list[int]:
        """A child for each environment, which runs the commands one after the other; the ids of their processes.

        first: Python that a child runs before, as to plant a fault.
        """
        files = [str(Path(self._folder.name, name)) for name in ("out", "err")]
        for file in files:
            Path(file).write_bytes(b"")
        lines = [[os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in line] for line in commands]
        self._send([{"commands": lines, "environment": each, "files": files, "first": first} for each in environments])
        return self._receive()

    def wait(self) -> Done:
        """Until all children have ended."""
        self._send("wait")
        codes = self._receive()
        return Done(codes, *(Path(self._folder.name, name).read_text(errors="replace") for name in ("out", "err")))

    def run(self, *commands: list[object], **options: object) -> Done:
        self.start(*commands, **options)
        return self.wait()

    def ranks(self, count: int, *commands: list[object], **options: object) -> Done:
        """The commands by so many processes together, with the environment that torchrun gives them."""
        return self.run(*commands, environments=self.environments(count), **options)

    @staticmethod
    def environments(count: int) -> tuple[dict[str, str], ...]:
        """What torchrun sets for each of so many processes."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
        return tuple({**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))

    def _send(self, message: object) -> None:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> object:
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Read runs from standard input, a line each, and write the ids of the children; "wait" writes their exit codes."""
    for module in ("merge_engine.cli.main", "merge_engine.engine.merge", "merge_engine.into.merge", *sys.argv[1:]):
        importlib.import_module(module)
    importlib.import_module("merge_engine.loops.door").load()
    gc.freeze()  # or each child would go through all of it at its end
    print('"ready"', flush=True)
    pids: list[int] = []
    for line in sys.stdin:
        message = json.loads(line)
        if message == "wait":  # only now, so that the id of a child that has ended is still its own
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            print(json.dumps(codes), flush=True)
            continue
        pids = []
        for child in message:
            pid = os.fork()
            if pid == 0:
                sys.exit(_run(**child))
            pids.append(pid)
        print(json.dumps(pids), flush=True)


def _run(commands: list[list[str]], environment: dict[str, str], files: list[str], first: str) -> int:
    """In a child: the commands up to the first that fails; its exit code."""
    import torch

    from merge_engine.cli.main import command

    for number, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
    os.environ.update(environment)
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        torch.set_num_threads(1)  # as torchrun has it
    exec(first, {})
    for words in commands:
        sys.argv = ["merge-engine", *words]
        if code := command():
            return code
    return 0


if __name__ == "__main__":
    serve()
