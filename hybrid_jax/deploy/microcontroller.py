"""What a C file takes on a Cortex-M: compiled by Clang, and run in an emulator.

Instructions are counted, and they are no cycles: how long one takes depends on the processor, its
flash and its caches. Other compilers make other code of a file; this one is Clang, as Zig has it.
"""

import ctypes
import importlib.resources
import itertools
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
from typing import NamedTuple

import numpy as np

from hybrid_jax import core
from hybrid_jax.deploy import artifact
from hybrid_jax.deploy.extras import require


class Processor(NamedTuple):
    """A Cortex-M as the compiler and the emulator know it."""

    target: str  # of Zig: 'eabi' computes floats by software
    cpu: str  # with its floating-point unit, of which Unicorn knows no more than FPv4
    model: str  # of Unicorn


PROCESSORS = {
    "Cortex-M4F": Processor("eabihf", "cortex_m4+vfp4d16sp", "CORTEX_M4"),
    "Cortex-M7": Processor("eabihf", "cortex_m7+vfp4d16sp", "CORTEX_M7"),
    "Cortex-M33": Processor("eabihf", "cortex_m33+vfp4d16sp", "CORTEX_M33"),
    "Cortex-M3": Processor("eabi", "cortex_m3", "CORTEX_M3"),
    # The instructions of an M0+ are those of an M0.
    "Cortex-M0+": Processor("eabi", "cortex_m0plus", "CORTEX_M0"),
}
"""Those that both know; of an M55 Unicorn does not."""

OPTIMIZATIONS = ("-O1", "-O2", "-O3", "-Os", "-Oz")


class Emulation(NamedTuple):
    """What a file takes on a microcontroller, in bytes, and what it answers there."""

    code: int  # of the file
    library: int  # code and constants that the compiler adds: memset, floats by software
    constants: int
    ram: int  # static; inputs and outputs come on top
    stack: int  # the deepest of all examples
    instructions: tuple[int, ...]  # of each example
    accesses: tuple[int, int] | None  # loads and stores of the first example, of a word at most
    outputs: tuple[np.ndarray, ...]  # (n, …) each

    @property
    def flash(self) -> int:
        """Bytes of all that is not in RAM."""
        return self.code + self.library + self.constants


def emulate(
    path: str | os.PathLike,
    *inputs: np.ndarray,
    processor: str = "Cortex-M4F",
    optimize: str = "-O2",
    accesses: bool = False,
) -> Emulation:
    """Compiles a C file for a microcontroller and runs it there on some examples.

    `path` is what `export_to('c', …)` wrote, `inputs` are (n, …) of the shapes and dtypes of its
    manifest, `processor` is one of `PROCESSORS`. It takes a second for 50 million instructions, and
    for the first example five if its loads and stores are counted as well, with `accesses`.

    Raises:
      ImportError: If ziglang or unicorn is not installed; names the extra.
      ValueError: If an argument is not as said, or the file does not compile: Zig's own library has
        expf and sqrtf, but no tanhf.
    """
    core.check_choice("processor", processor, PROCESSORS)
    core.check_choice("optimize", optimize, OPTIMIZATIONS)
    _, manifest = artifact.read(path, "c")
    examples = artifact.examples(inputs, manifest["inputs"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            elf = _compiled(path, manifest["name"], PROCESSORS[processor], optimize, folder)
        except ValueError as error:
            raise ValueError(f"{path} must compile for {processor}, got {error}") from error
        model, counting = PROCESSORS[processor].model, _counting(folder)
        first, later = (_Board(elf, model, counting, counted) for counted in (accesses, False))
        rows = zip(*examples, strict=True)
        boards = itertools.chain([first], itertools.repeat(later))
        runs = [board.run(row, manifest["outputs"]) for board, row in zip(boards, rows)]
    sizes = {name: elf.size(name) for name in (".text", ".library", ".rodata", ".data", ".bss")}
    instructions, stacks, outputs = zip(*runs, strict=True)
    return Emulation(
        sizes[".text"],
        sizes[".library"],
        sizes[".rodata"] + sizes[".data"],
        sizes[".data"] + sizes[".bss"],
        max(stacks),
        instructions,
        (first.loads.value, first.stores.value) if accesses else None,
        tuple(np.stack(rows) for rows in zip(*outputs, strict=True)),
    )


def _zig(*arguments):
    require("ziglang", "microcontroller")
    command = [sys.executable, "-m", "ziglang", "cc", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())


def _compiled(path, name, processor, optimize, folder):
    zig = pathlib.Path(require("ziglang", "microcontroller").__file__).parent
    headers = zig / "lib" / "libc" / "include"
    script, board = (_beside(f"board.{kind}", folder) for kind in ("ld", "c"))
    file = pathlib.Path(folder, "model.elf")
    _zig(
        *(os.fspath(path), board, "-o", file, optimize, "-std=c99", "-g0", "-fno-unwind-tables"),
        *("-target", f"thumb-freestanding-{processor.target}", f"-mcpu={processor.cpu}"),
        # For <math.h>, which the compiler does not have without an operating system.
        *("-isystem", headers / "generic-musl", "-isystem", headers / "arm-linux-musl"),
        *("-ffunction-sections", "-Wl,--gc-sections", f"-Wl,-T,{script}", f"-Wl,-e,{name}_run"),
    )
    return _read_elf(file.read_bytes())


def _counting(folder):
    library = pathlib.Path(folder, "counting.so")
    _zig(_beside("counting.c", folder), "-O2", "-shared", "-fPIC", "-o", library)
    return ctypes.CDLL(str(library))


def _beside(name, folder):
    """A copy of a file of this package."""
    copy = pathlib.Path(folder, name)
    copy.write_text(importlib.resources.files("hybrid_jax.deploy").joinpath(name).read_text())
    return copy


class _Section(NamedTuple):
    address: int
    size: int
    data: bytes  # none of .bss


class _Elf(NamedTuple):
    entry: int
    sections: dict[str, _Section]

    def size(self, name):
        return self.sections[name].size if name in self.sections else 0


def _read_elf(data):
    """The sections of a 32-bit executable, of which those with an address are loaded."""
    (entry,), (table,) = struct.unpack_from("<I", data, 24), struct.unpack_from("<I", data, 32)
    _, count, names = struct.unpack_from("<3H", data, 46)
    headers = [struct.unpack_from("<10I", data, table + 40 * i) for i in range(count)]
    start, sections = headers[names][4], {}
    for name, kind, flags, address, offset, size, *_ in headers:
        if flags & 2:  # it is in memory
            text = data[start + name : data.index(b"\0", start + name)].decode()
            bits = b"" if kind == 8 else data[offset : offset + size]  # 8: all zeros
            sections[text] = _Section(address, size, bits)
    return _Elf(entry, sections)


_SPACE, _STACK_SIZE = 1 << 24, 1 << 16
_FLASH, _RAM, _ENDS, _STACK = 0, 0x20000000, 0x30000000, 0x38000000
_RETURN = _FLASH + _SPACE - 16  # where code may be: RAM of peripherals is never executed
_PAINT = np.uint32(0xA5C3F00D)


class _Board:
    """A processor with a program in its memory."""

    def __init__(self, elf, model, counting, accesses):
        self.u = u = require("unicorn", "microcontroller")
        self.registers = u.arm_const
        self.entry = elf.entry
        self.counts, self.loads, self.stores = (ctypes.c_uint64() for _ in range(3))
        cpu = getattr(self.registers, f"UC_CPU_ARM_{model}")
        self.engine = u.Uc(u.UC_ARCH_ARM, u.UC_MODE_THUMB | u.UC_MODE_MCLASS, cpu)
        for start in (_FLASH, _RAM, _ENDS):
            self.engine.mem_map(start, _SPACE)
        self.engine.mem_map(_STACK, _STACK_SIZE)
        for section in elf.sections.values():
            self.engine.mem_write(section.address, section.data)
        self._hook(u.UC_HOOK_CODE, counting.at_instruction, self.counts)
        if accesses:
            self._hook(u.UC_HOOK_MEM_READ, counting.at_access, self.loads)
            self._hook(u.UC_HOOK_MEM_WRITE, counting.at_access, self.stores)

    def _hook(self, kind, function, count):
        """Adds a compiled function: a Python one takes a microsecond for each instruction."""
        handle, whole = ctypes.c_size_t(), (ctypes.c_uint64(1), ctypes.c_uint64(0))
        library = require("unicorn.unicorn_py3.unicorn", "microcontroller").uclib
        status = library.uc_hook_add(
            self.engine._uch, ctypes.byref(handle), kind, function, ctypes.byref(count), *whole
        )
        if status:
            raise self.u.UcError(status)

    def run(self, inputs, made):
        """(instructions, bytes of stack, outputs) of one example."""
        outputs = [np.empty(facts["shape"][1:], facts["dtype"]) for facts in made]
        places, at = [], _ENDS
        for array in (*inputs, *outputs):
            places.append(at)
            self.engine.mem_write(at, array.tobytes())
            at += -(-array.nbytes // 8) * 8
        # Four arguments are in registers, the others on the stack.
        beyond = np.array(places[4:] + [0] * (len(places[4:]) % 2), np.uint32)
        words = np.full(_STACK_SIZE // 4, _PAINT)
        top = _STACK + _STACK_SIZE - beyond.nbytes
        self.engine.mem_write(_STACK, words.tobytes())
        self.engine.mem_write(top, beyond.tobytes())
        names = self.registers
        self.engine.reg_write(names.UC_ARM_REG_SP, top)
        self.engine.reg_write(names.UC_ARM_REG_LR, _RETURN | 1)
        for i, place in enumerate(places[:4]):
            self.engine.reg_write(names.UC_ARM_REG_R0 + i, place)
        self.counts.value = 0
        self.engine.emu_start(self.entry | 1, _RETURN)
        left = np.frombuffer(self.engine.mem_read(_STACK, top - _STACK), np.uint32)
        untouched = int((left != _PAINT).argmax()) if (left != _PAINT).any() else len(left)
        for array, place in zip(outputs, places[len(inputs) :], strict=True):
            array[...] = np.frombuffer(
                self.engine.mem_read(place, array.nbytes), array.dtype
            ).reshape(array.shape)
        return self.counts.value, left.nbytes - 4 * untouched, outputs
