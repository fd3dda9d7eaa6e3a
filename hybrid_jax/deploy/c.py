"""A program as one dependency-free C99 file for microcontrollers.

Weights, tables and other constants are in flash; the tensors between inputs and outputs lie in one
static block (RAM) that `memory.plan` lays out; large ones are there some rows at a time, as
`bands.in_bands` says. Operations in integers give what `program.run` gives bit for bit, those in
floats to 1e-5 of the largest value, with the C library's functions.
"""

import importlib.resources
import math
import os
import re
import textwrap
from typing import Any, NamedTuple

import jinja2

from hybrid_jax import program as p
from hybrid_jax.deploy import artifact, c_arguments, c_statements, c_text


def export_c(
    path: str | os.PathLike,
    program: p.Program | p.Choice,
    name: str = "model",
    pack: bool = True,
) -> dict[str, Any]:
    """Writes `to_c(program, name, pack)` to a file, usually '….c'; returns the manifest beside it.

    `flash` and `ram` are the bytes that the file needs on a 32-bit microcontroller, as `to_c`
    counts them, `kernel_bits` the bits in which its kernels lie there.
    """
    code = _write(program, name, pack)
    facts = {
        "kind": "c",
        "name": name,
        "flash": code.flash,
        "ram": code.ram,
        "kernel_bits": code.kernel_bits,
        "inputs": [artifact.described((1, *end.shape), end.dtype) for end in code.inputs],
        "outputs": [artifact.described((1, *end.shape), end.dtype) for end in code.outputs],
    }
    return artifact.write(path, code.text.encode(), facts)


def to_c(program: p.Program | p.Choice, name: str = "model", pack: bool = True) -> str:
    """The C99 text of `void <name>_run(const float *input, float *output)`.

    It takes one example: an array for each input, `const uint8_t *` where the traced function takes
    uint8, then one for each output; of several `input_<edge>`, `output_<edge>`. It needs <stdint.h>
    and <float.h>, for functions of floats <math.h>. Flash is what its constants take, equal arrays
    once; RAM is the block of memory for what lies between inputs and outputs, and for the windows
    of a layer; an image's layers are computed some rows at a time where that saves more RAM than it
    takes flash. Code, stack, inputs and outputs come on top. The file states all of it in its head,
    the sizes also as `<NAME>_FLASH` and `<NAME>_RAM`.

    That block is static. `<name>_run_in(void *memory, …)` works in the caller's instead, at a
    multiple of four, so that networks share it, or threads have their own; with `<NAME>_SHARED`
    defined there is no other. Included in C++ the file declares both. Compiled with `<NAME>_MAIN`
    defined it is a program that maps inputs on its standard input to outputs on its standard
    output, and prints what it needs. `export_c_test` writes a check of it.

    The parts of a choice run one after another in the same memory. With `pack` the integer weights
    of a layer of up to 4 bits lie two to a byte, and are read there. A layer is computed for two
    pixels and two features at a time, on a Cortex-M4, M7 or M33 by the DSP extension.

    Example:
      >>> import numpy as np
      >>> weights = p.Weights(np.int8([[2], [3]]), np.float32([0.5]), np.float32([1.0]), 8)
      >>> tensors = {'x': p.Tensor((2,)), 'q': p.Tensor((2,), p.Encoding(0.25, 128))}
      >>> tensors['y'] = p.Tensor((1,))
      >>> steps = (p.Convert(('x',), 'q'), p.Dense(('q',), 'y', 'dense', weights))
      >>> code = to_c(p.Program('x', 'y', tensors, steps))
      >>> [line for line in code.splitlines() if line.startswith(('#define', 'void'))][:2]
      ['#define MODEL_FLASH 122', '#define MODEL_RAM 4']
      >>> print(code[code.index('    /* Convert') : code.index('    /* Dense')])
          /* Convert q */
          quantize_all(input, arena->bytes, 2, 0x1p+2f, &result_0);
      <BLANKLINE>
    """
    return _write(program, name, pack).text


class _Code(NamedTuple):
    text: str
    flash: int
    ram: int
    kernel_bits: list[int]
    inputs: list[c_arguments.Argument]
    outputs: list[c_arguments.Argument]


def _write(program, name, pack):
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(
            f"name must be a C identifier that starts with a letter, got {name!r}: "
            "letters without accents, digits and underscores"
        )
    constants = c_text.Constants()
    parts = program.written
    bodies = [c_statements.body(part, constants, pack) for part in parts]
    ends = [(c_arguments.inputs(part), c_arguments.outputs(part)) for part in parts]
    (inputs, _), (_, outputs) = ends[0], ends[-1]
    choice = _CHOICES[type(program)](program) if len(parts) > 1 else ""
    statements = "".join([*(body.text for body in bodies), choice])
    kernels = _called(statements)
    ram = -(-max(body.ram for body in bodies) // 4) * 4  # it is aligned to floats
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hybrid_jax.deploy", ""),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("model.c.jinja").render(
        name=name,
        upper=name.upper(),
        names=", ".join(argument.name for argument in (*inputs, *outputs)),
        inputs=inputs,
        outputs=outputs,
        signature=c_arguments.signature(inputs, outputs),
        signatures=[c_arguments.signature(*pair) for pair in ends],
        choice=choice,
        flash=constants.flash,
        ram=ram,
        math=re.search(_MATH, "".join([statements, *kernels])),
        kernels=kernels,
        constants=[text for _, text in constants.declarations.values()],
        bodies=[body.text for body in bodies],
    )
    bits = sorted(set().union(*(body.kernel_bits for body in bodies)))
    return _Code(text, constants.flash, ram, bits, inputs, outputs)


def _mixture(program):
    """The part that the gate's scores choose; NaN where one of them is."""
    count, size = len(program.experts), math.prod(program.output_shape)
    cases = [
        f"case {i}:\n    part_{i + 1}(arena, input, output);\n    break;" for i in range(count)
    ]
    nan = f"for (int32_t k = 0; k < {size}; k++) {{\n    output[k] = NAN;\n}}"
    return "\n".join(
        [
            f"float scores[{count}];",
            "part_0(arena, input, scores);",
            f"switch (best(scores, {count})) {{",
            *cases,
            f"default:\n{textwrap.indent(nan, '    ')}",
            "}",
        ]
    )


def _cascade(program):
    """The stages up to one that is sure; with a share later ones take the answer before."""
    last, size = len(program.stages) - 1, math.prod(program.output_shape)
    ask = "if (!unsure) {\n    return;\n}"
    lines = ["uint8_t unsure;"]
    if program.share and last:
        lines.append(f"float before[{size}];")
        ask += f"\nfor (int32_t k = 0; k < {size}; k++) {{\n    before[k] = output[k];\n}}"
    for i in range(last + 1):
        given = ["arena", "input", *(["before"] if program.share and i else []), "output"]
        lines.append(f"part_{i}({', '.join([*given, *(['&unsure'] if i < last else [])])});")
        lines += [ask] if i < last else []
    return "\n".join(lines)


_CHOICES = {p.Mixture: _mixture, p.Cascade: _cascade}


# What <math.h> defines, of all that is written.
_MATH = r"\b(?:[a-z]+[0-9]*[a-z]*f\(|INFINITY|NAN)"


# What a part of kernels.c defines: a type or a word, or else a macro or a function.
_NAMES = r"^(?:(?:\} |#define )(\w+)(?:;| |$)|(?:#define|(?:APART )?static .*?) ?\*?(\w+)\()"


def _called(code):
    """The parts of kernels.c that the code needs, in order: compilers warn of any other."""
    source = importlib.resources.files("hybrid_jax.deploy").joinpath("kernels.c").read_text()
    found = []
    for part in reversed(source.strip().split("\n\n")):
        names = re.findall(_NAMES, part, re.M)
        if any(re.search(rf"\b{kind}\b" if kind else rf"\b{name}\(", code) for kind, name in names):
            found.append(part)
            code += part
    return found[::-1]
