"""A short run that kills itself, as kill -9 does, at one of the changes that it makes on disk.

`at` starts it in a process of its own.
"""

import os
import pathlib
import signal
import subprocess
import sys

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def hook(folder, number):
    """Kills before the change of this number, of files that are opened, moved or removed below."""
    seen = 0

    def changed(event, arguments):
        nonlocal seen
        wrote = event in CHANGES or (event == "open" and (arguments[2] or 0) & os.O_ACCMODE)
        if wrote and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(changed)
    return lambda: seen


def at(folder, number):
    """The process when it has ended; it says how many changes there were."""
    root = str(pathlib.Path(__file__).parents[2])
    command = [sys.executable, "-m", "tests.recipes.killed", str(folder), str(number)]
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    from tests import conftest  # noqa: F401
    from tests.recipes.short import go_on, prepared

    folder, number = sys.argv[1:]
    run = prepared(pathlib.Path(folder))
    count = hook(folder, int(number))
    go_on(run)
    print(count())
