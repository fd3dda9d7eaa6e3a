"""A second C file beside a network's: a few examples with the answers that are right."""

import os

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.deploy import artifact, c_arguments, c_text


def export_c_test(
    path: str | os.PathLike, program: p.Program | p.Choice, *inputs: np.ndarray, name: str = "model"
) -> None:
    """Writes a C file by which a user checks that a network answers on his board as it does here.

    `path` is usually '…_test.c'; `inputs` are (n, …) of the shapes and dtypes of the program, a few
    examples: they are constants of the file. It has `int <name>_test(void)`, to be linked with the
    file that `to_c(program, name)` is: 0 where every answer is what `program.run` gives, in
    integers to the bit, with floats between within 1e-5 of the largest value, or else the number
    of the first example that is not, from 1 on. With `<NAME>_TEST_MAIN` defined it is a program
    that returns this.

    Raises:
      ValueError: If the inputs are not as said.
    """
    taken = c_arguments.inputs(program.parts[0])
    made = c_arguments.outputs(program.parts[-1])
    facts = [artifact.described((1, *argument.shape), argument.dtype) for argument in taken]
    given = artifact.examples(inputs, facts)
    count = len(given[0])
    run = jax.jit(p.run(program))
    rows = [jax.tree.leaves(run(*(x[i : i + 1] for x in given))) for i in range(count)]
    right = [np.concatenate([np.asarray(y) for y in ys]) for ys in zip(*rows, strict=True)]
    text = _text(name, taken, made, given, right, _exact(program))
    core.write_atomically({path: text.encode()})


def _exact(program):
    """Whether nothing but what enters and leaves is in floats."""
    return all(
        isinstance(op, p.Convert | p.Constant) or not part.in_floats(op)
        for part in program.parts
        for op in part.operations
    )


def _text(name, taken, made, given, right, exact):
    constants = c_text.Constants()
    rows = [
        f"{constants.array('given', x.astype(argument.dtype))} + i * {argument.size}"
        for argument, x in zip(taken, given, strict=True)
    ]
    declared, checks = [], []
    for argument, y in zip(made, right, strict=True):
        y = y.astype(np.uint8 if argument.dtype == "bool" else argument.dtype)
        within = 0.0 if exact else 1e-5 * np.abs(y[np.isfinite(y)], dtype=np.float32).max(initial=0)
        array = f"{constants.array('right', y)}[i * {argument.size} + k]"
        declared.append(f"static {argument.type} {argument.name}[{argument.size}];")
        checks.append(_CHECK.format(
            size=argument.size, got=f"{argument.name}[k]", array=array,
            within=c_text.literal(np.float32(within)),
        ))  # fmt: skip
    signature = c_arguments.signature(taken, made)
    return _FILE.format(
        name=name,
        upper=name.upper(),
        count=len(given[0]),
        signature=signature,
        constants="\n".join(text for _, text in constants.declarations.values()),
        declared="\n    ".join(declared),
        call=", ".join([*rows, *(argument.name for argument in made)]),
        checks="\n".join(checks),
    )


_CHECK = """\
        for (int32_t k = 0; k < {size}; k++) {{
            const float off = (float){got} - (float){array};
            if (!(off <= {within} && off >= -{within})) {{
                return i + 1;
            }}
        }}"""

_FILE = """\
/* {name}_test: 0 where {count} examples have the answers that they should have, or else the number
   of the first that has not, from 1 on. With {upper}_TEST_MAIN defined it is a program. */

#include <stdint.h>

void {name}_run({signature});
int {name}_test(void);

{constants}

int {name}_test(void)
{{
    {declared}
    for (int i = 0; i < {count}; i++) {{
        {name}_run({call});
{checks}
    }}
    return 0;
}}

#ifdef {upper}_TEST_MAIN
int main(void)
{{
    return {name}_test();
}}
#endif
"""
