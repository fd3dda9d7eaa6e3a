"""Marked functions as one flatbuffer whose batch can be resized.

A function is lowered for a batch of a prime number of examples, so large that no other number in a
shape is a multiple of it. Whatever the converter makes of the batch then shows: where a shape is
stated LiteRT derives it instead, and a constant that holds it is refused.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hybrid_jax.deploy.extras import require
from hybrid_jax.deploy.litert_marks import MARK


class Signature(NamedTuple):
    """A function of a file."""

    function: Callable[..., Any]  # marked, fn(*inputs) -> outputs
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]  # {name: dtype and shape of an example}
    outputs: Sequence[str]
    longest: int  # the largest number in a shape of an example


class RefusalError(Exception):
    """What the converter says against a function."""


def to_flatbuffer(signatures: Mapping[str, Signature]) -> bytes:
    """The file of these functions, or a RefusalError if the converter takes one of them not."""
    ir, passes, api = (
        require(f"litert_converter.{name}", "litert")
        for name in ("mlir.ir", "mlir.passmanager", "converter_api_ext")
    )
    config = api.ConvertToTFLConfig()
    config.model_origin_framework = "JAX"
    config.qdq_conversion_mode = "STATIC"
    config.strict_qdq_mode = True
    texts = {name: _stablehlo(signature) for name, signature in signatures.items()}
    context = ir.Context()
    api.prepare_mlir_context(context)

    def converted(name, text):
        signature = signatures[name]
        module = ir.Module.parse(text)
        for operation in _all(ir, module):
            _attach(ir, operation)
        api.set_signature(
            module.operation,
            signature_name=name,
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
        )
        api.run_convert_to_tfl_passes(module, passes.PassManager(), config)
        _Opening(ir, _batch(signature)).open(module)
        for operation in _all(ir, module):
            _name(ir, operation)
        return module

    with context, ir.Location.unknown():
        try:
            modules = [converted(*item) for item in texts.items()]
            return api.export_flatbuffer_to_bytes(api.merge_modules(modules).operation)
        except (ValueError, RuntimeError, ir.MLIRError) as error:
            found = re.search("error: (.*)", str(error))
            raise RefusalError(found[1] if found else str(error).strip()) from error


def _batch(signature):
    """A prime that no sum of a few lengths and no product of lengths is a multiple of."""
    count = max(100, 4 * signature.longest)
    return next(n for n in itertools.count(count) if all(n % d for d in range(2, int(n**0.5) + 1)))


def _stablehlo(signature):
    batch = _batch(signature)
    inputs = [
        jax.ShapeDtypeStruct((batch, *shape), dtype) for dtype, shape in signature.inputs.values()
    ]
    traced = jax.jit(signature.function, keep_unused=True).trace(*inputs)
    return traced.lower(lowering_platforms=("cpu",)).as_text(debug_info=True)


def _all(ir, module):
    found = []

    def visit(operation):
        found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def _attach(ir, operation):
    """Moves what a mark says from the call's options to where the converter looks for it."""
    attributes = operation.attributes
    if (
        operation.name != "stablehlo.custom_call"
        or ir.StringAttr(attributes["call_target_name"]).value != MARK
    ):
        return
    for option in ir.DictAttr(attributes["mhlo.backend_config"]):
        attributes[option.name] = option.attr
    for name in ("mhlo.backend_config", "backend_config", "operand_layouts", "result_layouts"):
        del attributes[name]


class _Opening:
    """Makes a module of one batch one of any: shapes that are stated first, then types."""

    def __init__(self, ir, batch):
        self.ir, self.batch = ir, batch

    def open(self, module):
        """Changes the module."""
        rules = {
            "tfl.reshape": self._reshape,
            "tfl.broadcast_to": self._broadcast,
            "tfl.slice": self._slice,
            "tfl.strided_slice": self._slice,
            "tfl.padv2": self._pad,
            "tfl.select": self._select,
        }
        for operation in _all(self.ir, module):
            if operation.name in rules:
                rules[operation.name](operation)
        for operation in _all(self.ir, module):
            if operation.name == "tfl.cast":
                self._take_bytes(operation)
        for operation in _all(self.ir, module):
            if "const" in operation.name and not list(operation.result.uses):
                operation.erase()
            else:
                self._check(operation)
        for operation in _all(self.ir, module):
            self._retype(operation)

    def _reshape(self, operation):
        shape = _constant(operation.operands[1])
        operation.operands[1] = self._vector(operation, np.where(self._open(shape), -1, shape))

    def _broadcast(self, operation):
        """As copies, which are counted and not stated by a shape."""
        x, shape = operation.operands
        shape, sizes = _constant(shape), np.array(x.type.shape)
        if len(shape) == len(sizes):
            counts = self._vector(operation, shape // sizes)
            self._replace(operation, "tfl.tile", [x, counts])

    def _slice(self, operation):
        """As one with strides: XNNPACK takes an open axis only by the masks of those."""
        x, *vectors = operation.operands
        starts, stops, *strides = map(_constant, vectors)
        if not strides:
            stops, strides = starts + stops, [np.ones_like(starts)]
        whole = self._open(stops) & (starts == 0) & (stops == x.type.shape)
        vectors = [
            self._vector(operation, v) for v in (starts, np.where(whole, 0, stops), *strides)
        ]
        mask = int((1 << np.arange(len(whole))) @ whole)
        masks = ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
        options = {"begin_mask": mask, "end_mask": mask, **dict.fromkeys(masks, 0)}
        self._replace(operation, "tfl.strided_slice", [x, *vectors], options)

    def _pad(self, operation):
        """By int32: TFLite Micro reads nothing else."""
        operation.operands[1] = self._vector(operation, _constant(operation.operands[1]))

    def _select(self, operation):
        """As its second version, which TFLite Micro has alone."""
        self._replace(operation, "tfl.select_v2", list(operation.operands))

    def _take_bytes(self, cast):
        """Has QUANTIZE take a uint8 as it is, in steps of 1, which else is cast to floats first."""
        ir, (x,), readers = self.ir, cast.operands, [use.owner for use in cast.result.uses]
        given = str(x.type.element_type) == "ui8" and isinstance(x.owner, ir.Block)
        if not given or not all(_in_steps_of_1(reader) for reader in readers):
            return
        if len(list(x.uses)) > 1:
            return
        kind = ir.Type.parse("!quant.uniform<u8:f32, 1.0>")
        x.set_type(ir.RankedTensorType.get(x.type.shape, kind))
        for reader in readers:
            reader.operands[0] = x
        cast.erase()

    def _open(self, lengths):
        return (np.array(lengths) > 0) & (np.array(lengths) % self.batch == 0)

    def _vector(self, operation, values):
        ir = self.ir
        value = ir.DenseElementsAttr.get(np.ascontiguousarray(values, np.int32))
        return self._create(operation, "arith.constant", value.type, [], {"value": value})

    def _replace(self, operation, name, operands, integers=None):
        ir = self.ir
        kind = ir.IntegerType.get_signless(32)
        options = {key: ir.IntegerAttr.get(kind, n) for key, n in (integers or {}).items()}
        if integers:
            options["offset"] = ir.BoolAttr.get(False)
        new = self._create(operation, name, operation.result.type, operands, options)
        operation.result.replace_all_uses_with(new)
        operation.erase()

    def _create(self, before, name, kind, operands, attributes):
        place, at = self.ir.InsertionPoint(before), before.location
        create = self.ir.Operation.create
        return create(name, [kind], operands, attributes, loc=at, ip=place).result

    def _check(self, operation):
        """Raises ValueError if a constant depends on how many examples there are."""
        for value in operation.operands:
            made = value.owner
            if isinstance(made, self.ir.Block) or "const" not in made.name:
                continue
            kind, sizes = value.type, value.type.shape
            if kind.rank == 1 and str(kind.element_type) in ("i32", "i64"):
                sizes = [*sizes, *_constant(value)]
            if self._open(sizes).any():
                raise ValueError(f"error: {operation.name} holds the number of examples")

    def _retype(self, operation):
        """Leaves open how many examples there are."""
        ir, attributes = self.ir, operation.attributes
        blocks = [block for region in operation.regions for block in region]
        values = [value for block in blocks for value in block.arguments]
        for value in (*operation.results, *values):
            value.set_type(self._any(value.type))
        if "function_type" in attributes:
            results = ir.FunctionType(ir.TypeAttr(attributes["function_type"]).value).results
            kind = ir.FunctionType.get([v.type for v in values], [self._any(r) for r in results])
            attributes["function_type"] = ir.TypeAttr.get(kind)
        if "qtype" in attributes:
            kind = ir.TypeAttr(attributes["qtype"]).value
            attributes["qtype"] = ir.TypeAttr.get(self._any(kind))

    def _any(self, kind):
        if not isinstance(kind, self.ir.RankedTensorType):
            return kind
        unknown = self.ir.ShapedType.get_dynamic_size()
        sizes = [unknown if self._open(n) else n for n in kind.shape]
        return self.ir.RankedTensorType.get(sizes, kind.element_type)


def _in_steps_of_1(operation):
    return operation.name == "tfl.quantize" and "f32, 1.000000e+00:-128>" in str(
        operation.result.type
    )


def _constant(value):
    return np.array(value.owner.attributes["value"])


def _name(ir, operation):
    """Names a tensor as the program does, and a constant "#"; long names are a share of a file."""
    found = re.search(r'"jit\(fn\)/([^"]+)/', str(operation.location))  # by its `named_scope`
    if "const" in operation.name:
        operation.location = ir.Location.name("#")
    elif found:
        operation.location = ir.Location.name(found[1])
