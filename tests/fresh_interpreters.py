"""Interpreters that have imported torch and nothing of ours, forked from one that waits: torch is read only once."""

import json
import os
import subprocess
import sys

WAITS = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    script, environment, output = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
            os.dup2(os.open(os.devnull if number == 0 else output, flags | os.O_APPEND), number)
        os.environ.update(environment)
        code = 1
        try:
            exec(compile(script, "script", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.stdout.write(f"{os.waitpid(child, 0)[1]}\\n")
    sys.stdout.flush()
"""


class FreshInterpreters:
    """`run` gives what a script writes in an interpreter of its own; AssertionError with its words where it fails."""

    def __init__(self, folder):
        self._folder, self._runs, self._waiting = folder, 0, None

    def run(self, script, **environment):
        if os.name != "posix":
            whole = {**os.environ, **environment}
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=whole)
            assert done.returncode == 0, done.stderr
            return done.stdout
        if self._waiting is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._waiting = subprocess.Popen([sys.executable, "-c", WAITS], text=True, **pipes)
        self._runs += 1
        output = self._folder / str(self._runs)
        output.touch()
        self._waiting.stdin.write(json.dumps([script, environment, str(output)]) + "\n")
        self._waiting.stdin.flush()
        status = self._waiting.stdout.readline().strip()
        said = output.read_text(encoding="utf-8")
        assert status == "0", said
        return said

    def close(self):
        if self._waiting is not None:
            self._waiting.communicate()  # closes its input, which ends it
