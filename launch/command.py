"""What commands share: one parser of flags, one line for a user's error, and one entry for all."""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from absl import flags

COMMANDS = ("compress", "export", "report", "benchmark")


class Told(Exception):
    """What a user is told in one line, though it could not be known at the start."""


def parse(argv: list[str], define: Callable[[flags.FlagValues], None]) -> flags.FlagValues:
    """Returns the flags of a command line, whose first entry is the program's name.

    `define(values)` adds the flags that there are.

    Raises:
      ValueError: If one is unknown or of another type, or something is no flag.
    """
    values = flags.FlagValues()
    define(values)
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"arguments must be flags, got {rest[0]!r}; write --name=value")
    return values


def define_cache(values: flags.FlagValues) -> None:
    """Adds the flag --compilation_cache."""
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Folder of compiled programs; empty to keep none.",
        flag_values=values,
    )


def define_distributed(values: flags.FlagValues) -> None:
    """Adds the flag --distributed."""
    flags.DEFINE_string(
        "distributed",
        None,
        "auto, or HOST:PORT,PROCESSES,NUMBER, where this is one of several processes.",
        flag_values=values,
    )


def connect(told: str | None) -> None:
    """Joins the other processes that the flag --distributed speaks of; before JAX computes.

    `auto` is what JAX finds out: of a TPU pod, of SLURM, of Open MPI or of Kubernetes.

    Raises:
      ValueError: If the flag is neither that nor an address and two numbers, or JAX finds nothing.
    """
    if told is None:
        return
    import jax

    arguments = () if told == "auto" else _process(told)
    # It would take SIGTERM, at which training saves and ends.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(*arguments)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--distributed={told}: {error}") from error


def _process(told: str) -> tuple[str, int, int]:
    """The address of the first process, how many there are, and the number of this one."""
    address, *numbers = told.split(",")
    if ":" not in address or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"--distributed must be auto or HOST:PORT,PROCESSES,NUMBER, got {told!r}")
    count, number = map(int, numbers)
    if number >= count:
        raise ValueError(f"--distributed must have a NUMBER below {count}, got {number}")
    return address, count, number


def required(values: flags.FlagValues, *names: str) -> None:
    """Raises ValueError unless these flags are given."""
    for name in names:
        if not values[name].value:
            raise ValueError(f"--{name} must be given, got nothing")


def run(
    argv: list[str],
    doc: str | Callable[[], str],
    act: Callable[[list[str]], Callable[[], None] | None],
) -> int:
    """Acts on a command line; a user's error is one line on stderr and an exit code of 2.

    `doc` is what `--help` prints, or makes it.

    What `act` raises is a user's error. What it returns is called after it, and what that raises is
    a fault of ours, with a traceback, but for a loss that is not finite, what cannot be read or
    written, and `Told`. SIGTERM, SIGINT and SIGHUP end it in one line, with 128 and their number as
    the exit code, as of a shell.
    """
    if {"-h", "--help"} & set(argv):
        try:
            print(doc() if callable(doc) else doc)
        except ValueError as error:
            return _fail(error)
        return 0
    with _stoppable():
        try:
            left = act(argv)
        except (ValueError, TypeError, OSError) as error:
            return _fail(error)
        try:
            if left is not None:
                left()
        except (FloatingPointError, OSError, Told) as error:
            return _fail(error)
        return 0


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Signals that ask to end do so at once: what is on disk is whole, as it is after a kill.

    An exception would be lost where it comes in the midst of a callback, of which tracing has many.
    While training is under way signals are held back until it is saved.
    """

    def stop(number, frame):
        cursor = "\033[?25h" if sys.stderr.isatty() else ""  # which a progress bar hides
        name = signal.Signals(number).name
        text = f"{cursor}stopped by {name}: to go on, run the same command again\n"
        os.write(sys.__stderr__.fileno(), text.encode())
        os._exit(128 + number)

    ending = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in ending}
    before = {n: own for n, own in handlers.items() if own is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(error):
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """The installed command: `hybrid-jax compress --config=digits --workdir=run`, and so on."""
    argv = sys.argv if argv is None else argv
    name = argv[1] if len(argv) > 1 else "--help"
    if name in COMMANDS:
        return importlib.import_module(f"launch.{name}").cli([f"hybrid-jax {name}", *argv[2:]])
    if name in ("-h", "--help"):
        print(f"hybrid-jax {{{','.join(COMMANDS)}}} --flag=value …; each has --help")
        return 0
    print(f"error: command must be one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
    return 2
