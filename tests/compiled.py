"""C files compiled and run, as tests of that target need them."""

import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy import c, c_arguments

STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
# Not optimized, which takes gcc twice as long: tests of the long run are.
SANITIZED = [
    "-O0",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
]
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]


def arguments(program):
    """(inputs, outputs) of the C function."""
    parts = program.parts
    return c_arguments.inputs(parts[0]), c_arguments.outputs(parts[-1])


def run_c(folder, programs, flags, compiler="gcc", pack=False, rewrite=str):
    """{name: a tuple of outputs} in one process, of {name: (program, a tuple of inputs)}.

    `rewrite` makes another text of each file.
    """
    folder = pathlib.Path(folder)
    main = [_calls(name, program, xs) for name, (program, xs) in programs.items()]
    for name, (program, _) in programs.items():
        (folder / f"{name}.c").write_text(rewrite(c.to_c(program, name, pack)))
    text = "#include <stdint.h>\n#include <stdio.h>\nint main(void) {\n" + "\n".join(main)
    (folder / "all.c").write_text(text + "\nreturn 0; }\n")
    files = [f"{name}.c" for name in (*programs, "all")]
    compiled([compiler, *STRICT, *flags, "-o", "all", *files, "-lm"], folder)
    examples = (rows for _, xs in programs.values() for rows in zip(*xs, strict=True))
    fed = b"".join(row.tobytes() for rows in examples for row in rows)
    done = subprocess.run([folder / "all"], input=fed, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found, start = {}, 0
    for name, (program, xs) in programs.items():
        _, made = arguments(program)
        row = np.dtype([(f"y{i}", a.dtype, a.shape) for i, a in enumerate(made)])
        rows = np.frombuffer(done.stdout, row, len(xs[0]), start)
        found[name] = tuple(np.ascontiguousarray(rows[field]) for field in row.names)
        start += rows.nbytes
    return found


def _calls(name, program, xs):
    taken, made = arguments(program)
    types = ", ".join([f"const {a.type} *" for a in taken] + [f"{a.type} *" for a in made])
    statics = [f"static {a.type} a{i}[{a.size}];" for i, a in enumerate(taken + made)]
    reads = [f"if (!fread(a{i}, sizeof a{i}, 1, stdin)) return 1;" for i in range(len(taken))]
    places = range(len(taken), len(taken) + len(made))
    writes = [f"if (!fwrite(a{i}, sizeof a{i}, 1, stdout)) return 1;" for i in places]
    call = f"{name}_run({', '.join(f'a{i}' for i in range(len(statics)))});"
    inside = " ".join([*statics, *reads, call, *writes])
    return f"void {name}_run({types}); for (int i = 0; i < {len(xs[0])}; i++) {{ {inside} }}"


def compiled(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def inputs(program, count=3, seed=1, finite=False):
    """Normal values, and with them what is beyond every range; integers of all sizes."""
    rng, found = np.random.default_rng(seed), []
    for argument in arguments(program)[0]:
        shape = (count, *argument.shape)
        if argument.dtype == "uint8":
            found.append(rng.integers(0, 256, shape).astype(np.uint8))
            continue
        x = rng.normal(scale=1 if finite else 3, size=shape).astype(np.float32)
        if not finite:
            x.reshape(-1)[: min(x.size, 4)] = [np.nan, np.inf, -np.inf, 3e38][: min(x.size, 4)]
        found.append(x)
    return tuple(found)


def expected(program, xs):
    """What `program.run` makes of one example at a time, as the C function runs."""
    fn = jax.jit(p.run(program))
    rows = [
        jax.tree.leaves(fn(*(jnp.asarray(x[i : i + 1]) for x in xs))) for i in range(len(xs[0]))
    ]
    return tuple(np.concatenate([np.asarray(y) for y in ys]) for ys in zip(*rows, strict=True))


def in_integers(program):
    """Whether all but conversions is computed in integers."""
    return all(
        isinstance(op, p.Convert | p.Constant)
        or any(part.encoding(name) is not None for name in (*op.inputs, op.output))
        for part in program.parts
        for op in part.operations
    )


def assert_same(got, want, program, name="", within=1e-5):
    """Of integers every bit; of floats 1e-5 of the largest value, and NaN where it is.

    Where all that is left is what cancelled, it is the rounding of numbers of about 1.
    """
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        if in_integers(program):
            np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8), name)
            continue
        finite = theirs[np.isfinite(theirs)].astype(np.float64)
        room = within * max(np.abs(finite).max(initial=0), 1e-2)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=room, err_msg=name)
