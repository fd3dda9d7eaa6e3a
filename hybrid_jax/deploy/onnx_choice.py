"""A choice in ONNX: the graph of what it makes of one image, with the parts in branches of `If`."""

from typing import Any

import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy.onnx_graph import file_dtype
from hybrid_jax.deploy.onnx_operations import written


def of_an_image(onnx: Any, choice: p.Choice, options: dict[str, Any]) -> Any:
    """The graph of what a choice makes of 'image', without a batch; `options` are of `Graph`."""
    first = choice.parts[0]
    image, result = first.tensors[first.input], _answer(choice)
    made = CHOICES[type(choice)](onnx, choice, options)
    reshape = onnx.helper.make_node("Reshape", [made.output[0].name, "shape"], ["result"])
    constants = [*made.initializer, *_constants(onnx, {"shape": np.int64(result.shape)})]
    ends = [[value_info(onnx, "image", image)], [value_info(onnx, "result", result)]]
    return onnx.helper.make_graph([*made.node, reshape], "choice", *ends, constants)


def value_info(onnx: Any, name: str, tensor: p.Tensor, batch: tuple = ()) -> Any:
    """What a file says of an input or output."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(file_dtype(tensor.dtype))
    return onnx.helper.make_tensor_value_info(name, kind, (*batch, *tensor.shape))


def _answer(choice):
    program = choice.answering[0]
    return program.tensors[program.output]


def _graph(onnx, choice, nodes, y, constants):
    """What makes the answer 'y', with a batch of one."""
    ends = [], [value_info(onnx, y, _answer(choice), (1,))]
    return onnx.helper.make_graph(nodes, y, *ends, constants)


def _mixture(onnx, choice, options):
    """Gate, choice, one expert; a NaN among the scores chooses nobody."""
    make = onnx.helper.make_node
    nodes, constants = _part(onnx, choice, 0, ["scores"], options)
    expert = _one_of(onnx, choice, 0, len(choice.experts), options)
    nodes = [
        *nodes,
        make("ArgMax", ["scores"], ["choice"], axis=1, keepdims=0),
        *expert.node,
        make("IsNaN", ["scores"], ["are_nan"]),
        make("Cast", ["are_nan"], ["count"], to=onnx.TensorProto.FLOAT),
        make("ReduceMax", ["count"], ["most"], keepdims=0),
        make("Cast", ["most"], ["is_nan"], to=onnx.TensorProto.BOOL),
        make("Where", ["is_nan", "nan", expert.output[0].name], ["checked"]),
    ]
    constants = [*constants, *expert.initializer, *_constants(onnx, {"nan": np.float32(np.nan)})]
    return _graph(onnx, choice, nodes, "checked", constants)


def _one_of(onnx, choice, first, stop, options):
    """The graph of what expert number 'choice', in [first, stop), makes of 'image'."""
    make, y = onnx.helper.make_node, f"y_{first}_{stop}"
    if stop - first == 1:
        nodes, constants = _part(onnx, choice, 1 + first, [y], options)
        return _graph(onnx, choice, nodes, y, constants)
    middle = (first + stop) // 2
    halves = (first, middle), (middle, stop)
    low, high = (_one_of(onnx, choice, *ends, options) for ends in halves)
    number, under = f"middle_{first}_{stop}", f"under_{first}_{stop}"
    nodes = [
        make("Less", ["choice", number], [under]),
        make("If", [under], [y], then_branch=low, else_branch=high),
    ]
    return _graph(onnx, choice, nodes, y, _constants(onnx, {number: np.int64([middle])}))


def _cascade(onnx, choice, options, first=0):
    """The graph of what the stages from one on make of 'image'."""
    make, y = onnx.helper.make_node, f"y_{first}"
    before = [f"own_{first - 1}"] if choice.share and first else []
    if first == len(choice.stages) - 1:
        nodes, constants = _part(onnx, choice, first, [y], options, before)
        return _graph(onnx, choice, nodes, y, constants)
    own, unsure, same = f"own_{first}", f"unsure_{first}", f"same_{first}"
    nodes, constants = _part(onnx, choice, first, [own, unsure], options, before)
    rest = _cascade(onnx, choice, options, first + 1)
    here = _graph(onnx, choice, [make("Identity", [own], [same])], same, [])
    nodes = [*nodes, make("If", [unsure], [y], then_branch=rest, else_branch=here)]
    return _graph(onnx, choice, nodes, y, constants)


CHOICES = {p.Mixture: _mixture, p.Cascade: _cascade}
"""{class of choice: what makes the graph of its answer}."""


def _part(onnx, choice, number, outputs, options, before=()):
    """Nodes and constants of a part of 'image' with a batch of one around it, and of `before`.

    Each part puts it around for itself: if they shared that reshape, ONNX Runtime would move the
    QuantizeLinear of one before it, and the others would see what that one sees.
    """
    program, prefix = choice.written[number], f"p{number}_"
    x, shape = f"{prefix}x", f"{prefix}x_shape"
    nodes, constants = written(onnx, program, [x, *before], outputs, prefix, **options)
    sizes = {shape: np.int64([1, *choice.input_shape])}
    reshape = onnx.helper.make_node("Reshape", ["image", shape], [x])
    return [reshape, *nodes], [*constants, *_constants(onnx, sizes)]


def _constants(onnx, values):
    return [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
