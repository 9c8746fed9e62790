"""Processes that start at once: one that has imported everything forks them, each with its own exit code and output.

    with Forks() as forks:
        ranks = forks.start(2, "train:main", ["small.toml"])
        ranks.signal(1, signal.SIGTERM)
        assert ranks.wait() == [0, 0]

Unlike the workers of ranks.py these may die.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ranks import free_port

SECONDS = 120  # what takes longer hangs


class Forks:
    """A process that forks others; `folder` gets what they print."""

    def __init__(self, folder):
        self.folder, self.count = Path(folder), 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()  # which it reads to the end
        self.process.wait()
        self.process.stdout.close()

    def start(self, n, function, *args, **environment):
        """n ranks of a function "module:name", which gets `args` and returns the exit code."""
        self.count += 1
        output = self.folder / f"output-{self.count}"
        output.mkdir(parents=True)
        where = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank, **where, **environment} for rank in range(n if n > 1 else 0)]
        asked = {
            "function": function,
            "args": args,
            "directory": os.getcwd(),
            "outputs": [str(output / str(rank)) for rank in range(n)],
            "environments": [{name: str(value) for name, value in one.items()} for one in ranks or [environment]],
        }
        self.say(asked)
        return Ranks(self, json.loads(self.process.stdout.readline()), output)

    def say(self, message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()


class Ranks:
    """Forked processes."""

    def __init__(self, forks, processes, output):
        self.forks, self.processes, self.output = forks, processes, output
        self.start, self.seconds = time.monotonic(), [None] * len(processes)

    def signal(self, rank, number):
        if not self.ended(rank):
            os.kill(self.processes[rank], number)

    def ended(self, rank):
        return (self.output / f"{rank}.code").exists()

    def said(self, rank):
        """What a rank has printed so far."""
        return (self.output / str(rank)).read_text()

    def wait(self, seconds=SECONDS):
        """The exit codes; `seconds` of each rank tells when it ended. Fails where they take longer."""
        codes, end = [None] * len(self.processes), time.monotonic() + seconds
        while None in codes:
            for rank in (rank for rank, code in enumerate(codes) if code is None):
                found = self.output / f"{rank}.code"
                if found.exists():
                    codes[rank], self.seconds[rank] = int(found.read_text()), time.monotonic() - self.start
            if time.monotonic() > end:
                for rank, code in enumerate(codes):
                    if code is None:
                        self.signal(rank, signal.SIGKILL)
                said = "\n".join(f"rank {rank}: {self.said(rank)}" for rank in range(len(codes)))
                raise TimeoutError(f"exit codes {codes} after {seconds:g} s\n{said}")
            time.sleep(0.02)
        return codes


def serve():
    """What the process does: fork what it is told to, and write down how each ends."""
    import torch

    import train  # noqa: F401 (imported once for all)

    torch.set_num_threads(1)
    waiting = {}
    signal.signal(signal.SIGCHLD, lambda *_: reap(waiting))
    for line in sys.stdin:
        asked = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # nobody is reaped before we know them
        processes = []
        for output, environment in zip(asked["outputs"], asked["environments"]):
            process = os.fork()
            if process == 0:
                run(asked, output, environment)
            waiting[process] = output
            processes.append(process)
        print(json.dumps(processes), flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def reap(waiting):
    """Write down who has ended; the signal that calls it may come while it runs."""
    for process, output in list(waiting.items()):
        try:
            found, status = os.waitpid(process, os.WNOHANG)
        except ChildProcessError:
            continue
        if found:
            waiting.pop(process)
            temporary = Path(f"{output}.part")
            temporary.write_text(str(os.waitstatus_to_exitcode(status)))
            temporary.rename(f"{output}.code")


def run(asked, output, environment):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment)
    os.chdir(asked["directory"])
    code = 1
    try:
        from minillm.log import run_command

        module, _, name = asked["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        code = run_command(function, *asked["args"])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
