"""Functions read and written as C, in floats against the function, in integers against `run`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import COMPILERS, SANITIZED, arguments, assert_same, expected, inputs, run_c
from lowered import deployed

from hybrid_jax import program as p
from hybrid_jax.deploy import c, targets

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C compiler")

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


def conv(x, kernel, strides=1, layout="NHWC"):
    numbers = (layout, "HWIO" if layout == "NHWC" else "OIHW", layout)
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), "SAME", dimension_numbers=numbers
    )


PARAMS = {
    "k": normal(3, 3, 3, 6, scale=0.3),
    "oihw": normal(6, 3, 3, 3, scale=0.3),
    "w": normal(6, 5),
    "heads": normal(6, 8),
    "back": normal(8, 6, scale=0.3),
    "norm": {"scale": normal(6), "bias": normal(6)},
}
IMAGES = normal(4, 6, 5, 3)


def classifier(params, x):
    return nn.softmax(nn.gelu(conv(x, params["k"])).mean((1, 2)) @ params["w"])


def channels_first(params, x):
    return nn.relu(conv(x, params["oihw"], 2, "NCHW")).max((2, 3)) @ params["w"]


def normalized(params, x):
    y = conv(x, params["k"])
    y = nn.LayerNorm().apply({"params": params["norm"]}, y)
    return (jnp.abs(y).sum((1, 2)) / 30) @ params["w"]


def attention(params, x):
    y = conv(x, params["k"], 2)
    t = y.reshape(y.shape[0], -1, 6) @ params["heads"]
    weights = nn.softmax(jnp.einsum("bic,bjc->bij", t, t) / 4)
    return (jnp.einsum("bij,bjc->bic", weights, t) @ params["back"]).mean(1) @ params["w"]


def several_heads(params, x):
    y = nn.hard_swish(conv(x, params["k"]))
    mask = y[..., 0] > 0
    return nn.sigmoid(y[..., :2]) * 640, y, (y.mean((1, 2)) * 100).astype(jnp.int32), mask, y


def returned_as_it_came(params, x):
    return x.reshape(x.shape[0], -1), x


FUNCTIONS = [classifier, channels_first, normalized, attention, several_heads, returned_as_it_came]


def images(fn):
    return IMAGES.transpose(0, 3, 1, 2) if fn is channels_first else IMAGES


@pytest.fixture(scope="module")
def written():
    return {fn.__name__: deployed(fn, PARAMS, images(fn)) for fn in FUNCTIONS}


def test_functions_give_what_they_gave(written, tmp_path):
    given = {}
    for fn in FUNCTIONS:
        for kind in ("floats", "integers"):
            program = getattr(written[fn.__name__], kind)
            given[f"{fn.__name__}_{kind}"] = program, (np.asarray(images(fn)),)
    got = run_c(tmp_path, given, SANITIZED)
    for fn in FUNCTIONS:
        x = images(fn)
        want = [np.asarray(y) for y in jax.tree.leaves(fn(PARAMS, x))]
        assert_same(got[f"{fn.__name__}_floats"], want, given[f"{fn.__name__}_floats"][0])
        name = f"{fn.__name__}_integers"
        assert_same(got[name], expected(given[name][0], (x,)), given[name][0], name)


def test_the_head_states_the_order_of_the_traced_images(written):
    heads = {
        fn.__name__: c.to_c(written[fn.__name__].integers).split("*/")[0]
        for fn in (classifier, channels_first, returned_as_it_came)
    }
    assert "input   6 x 5 x 3 float32, channels last, row by row" in heads["classifier"]
    assert "input   3 x 6 x 5 float32, channels first, row by row" in heads["channels_first"]
    # What nothing takes as an image has no channels.
    assert "input   6 x 5 x 3 float32, row by row" in heads["returned_as_it_came"]


def test_several_ends_are_arguments_named_after_the_edges(written):
    program = written["several_heads"].integers
    taken, made = arguments(program)
    assert [(a.name, a.dtype) for a in taken] == [("input", "float32")]
    assert [a.dtype for a in made] == ["float32", "float32", "int32", "bool", "float32"]
    names = [a.name for a in made]
    assert len(set(names)) == 5
    assert all(name.startswith("output_") for name in names)
    assert f"float *{names[0]}, float *{names[1]}, int32_t *{names[2]}, uint8_t" in c.to_c(program)


def pixels(params, x):
    y = (x.astype(jnp.float32) / 255 - 0.45) / 0.22
    return nn.relu(conv(y, params["k"], 2)).mean((1, 2)) @ params["w"]


def of_two(params, image, other):
    y = nn.relu(conv(image.astype(jnp.float32) / 255, params["k"])).mean((1, 2))
    return jnp.concatenate([y + other, image[:, 0, 0].astype(jnp.float32)], -1)


def test_uint8_images_are_read_where_they_lie(tmp_path):
    x = RNG.integers(0, 256, (4, 6, 5, 3)).astype(np.uint8)
    # Of odd values at the border, too, where the padding is.
    x[0, 0], x[1, :, -1] = 255, 0
    in_floats, in_integers, _ = deployed(pixels, PARAMS, jnp.asarray(x))
    code = c.to_c(in_integers)
    assert "void model_run(const uint8_t *input, float *output)" in code
    assert not [
        line for line in code.splitlines() if "= quantize(" in line or "= input[i0]" in line
    ]
    given = {"floats": (in_floats, (x,)), "integers": (in_integers, (x,))}
    got = run_c(tmp_path, given, SANITIZED)
    assert_same(got["floats"], [np.asarray(pixels(PARAMS, jnp.asarray(x)))], in_floats)
    assert_same(got["integers"], expected(in_integers, (x,)), in_integers)


def test_several_inputs_are_read_by_the_program_and_the_session(tmp_path):
    x, other = RNG.integers(0, 256, (4, 6, 5, 3)).astype(np.uint8), np.asarray(normal(4, 6))
    for program in deployed(of_two, PARAMS, jnp.asarray(x), jnp.asarray(other))[:2]:
        want = expected(program, (x, other))
        got = run_c(tmp_path, {"net": (program, (x, other))}, SANITIZED)["net"]
        assert_same(got, want, program)
        manifest = c.export_c(tmp_path / "net.c", program, "net")
        assert [facts["dtype"] for facts in manifest["inputs"]] == ["uint8", "float32"]
        session = targets.TARGETS["c"].session(tmp_path / "net.c", 4, None)
        assert_same([session(x, other)], want, program)
        head = c.to_c(program)
        assert "(const uint8_t *input_x0, const float *input_x1, float *output)" in head


def test_an_input_that_nothing_reads_is_no_warning(tmp_path):
    program = p.lower(lambda params, x, y: y * 2, PARAMS, IMAGES, normal(4, 3))
    xs = inputs(program)
    assert_same(
        run_c(tmp_path, {"net": (program, xs)}, ["-O1"])["net"], expected(program, xs), program
    )
