"""Any function with its convolutions in the forms that are the fastest on a CPU."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax.core import interpreter, measure
from hybrid_jax.core.convolution import GRADIENT, RESULT, Conv, last_numbers, neighbours

# Below so many multiply-accumulates a form is not worth the second that measuring it takes.
_WORTH_MEASURING = 2**26


def fast_convolutions(
    fn: Callable[..., Any], *, loop: bool = False, choices: measure.Choices | None = None
) -> Callable[..., Any]:
    """Makes `fn` with every convolution in its fastest form, those of derivatives included.

    XLA is slow on a CPU at depthwise and grouped convolutions and at the gradients of kernels, and
    in loops (`lax.scan`, `lax.map`) at all gradients. What is the fastest is measured, once for
    each shape, and kept in `choices`, by default `measure.CHOICES`. On other backends `fn` runs as
    it is. The results are those of `fn` up to rounding, in the same dtypes. Hand in what already
    holds its derivative, a whole training step or `jax.grad(loss)`, and what is mapped over
    experts. `loop` says that the result will run in a loop; those inside of `fn` are seen.
    """
    choices = measure.CHOICES if choices is None else choices

    @functools.wraps(fn, updated=())
    def fast(*args):
        if jax.default_backend() != "cpu":
            return fn(*args)
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        loops = set(interpreter.places(closed.jaxpr, _is_loop))

        def rule(path, eqn, values):
            looped = loop or any(path[:n] in loops for n in range(len(path)))
            return [_convolve(choices, looped, eqn, eqn.params, *values)], {}

        outputs, _ = interpreter.evaluate(
            closed.jaxpr,
            closed.consts,
            jax.tree.leaves(args),
            rule,
            interpreter.containing(interpreter.places(closed.jaxpr, _is_ours)),
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return fast


def _is_loop(eqn):
    return eqn.primitive.name in ("scan", "while")


def _is_ours(eqn):
    """Whether an equation is a convolution of one floating dtype and of known shapes."""
    avals = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
    return (
        eqn.primitive is lax.conv_general_dilated_p
        and len({aval.dtype for aval in avals}) == 1
        and jnp.issubdtype(avals[0].dtype, jnp.floating)
        and all(isinstance(size, int) and size for aval in avals for size in aval.shape)
    )


def _convolve(choices, loop, eqn, params, x, kernel):
    """One convolution in its fastest form; its arguments have the layout of the equation."""
    forms = _forms(choices, loop, eqn, params, x.shape, kernel.shape)
    name = next(iter(forms))
    result = jax.eval_shape(forms[name], x, kernel)
    inner = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    if len(forms) > 1 and result.size * inner >= _WORTH_MEASURING:
        name = _measured(choices, loop, forms, params, x, kernel)
    return forms[name](x, kernel)


def _forms(choices, loop, eqn, params, shape, kernel_shape):
    """{name: form(x, kernel)} of what may be the fastest; the first is taken unmeasured."""

    def as_it_stands(x, kernel):
        return interpreter.bind(eqn, [x, kernel], **params)[0]

    groups = params["feature_group_count"], params["batch_group_count"]
    # XLA computes every product between groups, to throw it away.
    forms = {} if loop or groups != (1, 1) else {"as it stands": as_it_stands}
    if groups[0] > 1:
        forms["group by group"] = functools.partial(_group_by_group, choices, eqn, params)
    numbers = params["dimension_numbers"]
    window = [kernel_shape[axis] for axis in numbers.rhs_spec[2:]]
    spatial = [shape[axis] for axis in numbers.lhs_spec[2:]]
    conv = Conv(
        params["window_strides"],
        tuple(params["padding"]),
        params["lhs_dilation"],
        params["rhs_dilation"],
        groups[0],
        params["precision"],
    )
    places = conv.places(spatial, window)
    if groups[1] > 1 or math.prod(window) > math.prod(places):
        if groups[0] > 1:
            return forms
        conv = conv._replace(strides=conv.dilation, dilation=conv.strides, groups=groups[1])
        if groups[1] == shape[numbers.lhs_spec[0]] == kernel_shape[numbers.rhs_spec[0]]:
            return {"taps": _gradient(GRADIENT["taps"], conv, places, numbers)}
        if math.prod(places) == 1:  # of a window of one entry: one matrix product
            return {"tall": _gradient(GRADIENT["tall"], conv, places, numbers)}
        names = ("tall", "wide")
        return forms | {name: _gradient(GRADIENT[name], conv, places, numbers) for name in names}
    if conv.groups == 1:
        # Products of halves may have a unit of their own, which convolutions do not use.
        half = eqn.invars[0].aval.dtype.itemsize < 4
        names = ("channels last", "patches") if half else ("channels last",)
        if numbers == last_numbers(len(shape)) and not loop:
            names = names[1:]
        outputs, inner = (kernel_shape[axis] for axis in numbers.rhs_spec[:2])
        if neighbours(conv, (*window, inner, outputs), places) > 1:
            names += ("together",)
    elif groups[0] == shape[numbers.lhs_spec[1]] == kernel_shape[numbers.rhs_spec[0]]:
        return {"taps": _result(RESULT["taps"], conv, numbers)}
    else:
        names = ("patches", "channels last")
    return forms | {name: _result(RESULT[name], conv, numbers) for name in names}


def _result(form, conv, numbers):
    """The form in the layout of the equation."""

    def run(x, kernel):
        (batch, channels, *space), (outputs, inner, *window) = numbers.lhs_spec, numbers.rhs_spec
        x = jnp.transpose(x, (batch, *space, channels))
        y = form(conv, x, jnp.transpose(kernel, (*window, inner, outputs)))
        batch, channels, *space = numbers.out_spec
        return jnp.moveaxis(y, range(y.ndim), (batch, *space, channels))

    return run


def _gradient(form, conv, window, numbers):
    """The form of a kernel's gradient: there images are summed over, as input channels are."""

    def run(x, dy):
        (channels, batch, *space), (outputs, images, *places) = numbers.lhs_spec, numbers.rhs_spec
        x = jnp.transpose(x, (batch, *space, channels))
        gradient = form(conv, window, x, jnp.transpose(dy, (images, *places, outputs)))
        inner, outputs, *taps = numbers.out_spec
        return jnp.moveaxis(gradient, range(gradient.ndim), (*taps, inner, outputs))

    return run


def _group_by_group(choices, eqn, params, x, kernel):
    """A loop over the groups, each of which is a convolution of its own."""
    groups, numbers = params["feature_group_count"], params["dimension_numbers"]
    alone = params | {"feature_group_count": 1}

    def split(array, axis):
        array = array.reshape(*array.shape[:axis], groups, -1, *array.shape[axis + 1 :])
        return jnp.moveaxis(array, axis, 0)

    parts = split(x, numbers.lhs_spec[1]), split(kernel, numbers.rhs_spec[0])
    ys = lax.map(lambda part: _convolve(choices, True, eqn, alone, *part), parts)
    axis = numbers.out_spec[1]
    ys = jnp.moveaxis(ys, 0, axis)
    return ys.reshape(*ys.shape[:axis], -1, *ys.shape[axis + 2 :])


def _measured(choices, loop, forms, params, x, kernel):
    """The name of the fastest form: in a loop if it will run in one, where others are."""
    numbers = params["dimension_numbers"]
    described = {
        name: value
        for name, value in params.items()
        if name not in ("dimension_numbers", "preferred_element_type", "out_sharding")
    }
    layout = "".join(f"{spec}" for spec in numbers)
    question = f"convolution {'in a loop' if loop else 'alone'}: {x.dtype} {x.shape} by "
    question += f"{kernel.shape}, {layout}, {described}"
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel)]
    if loop:
        forms = {name: functools.partial(_looped, form) for name, form in forms.items()}
        arrays = [jax.ShapeDtypeStruct((2, *a.shape), a.dtype) for a in arrays]
    return choices.choose(question, forms, *arrays)


def _looped(form, *arrays):
    return lax.map(lambda parts: form(*parts), arrays)
