"""The networks that come with the library: as small and as right as what is said beside them."""

import json
import pathlib

import numpy as np
import onnxruntime
import pytest

import configs
from tests import public

FOLDER = pathlib.Path(configs.__file__).parent / "networks"
FILES = sorted(FOLDER.glob("*.onnx"))


def test_they_are_small():
    assert FILES
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1e6


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_has_the_accuracy_that_is_stated(file):
    facts = json.loads(file.with_suffix(".json").read_text())
    images, labels = public.cifar10("test", facts["images"])
    session = onnxruntime.InferenceSession(file)
    name = session.get_inputs()[0].name
    answers = [session.run(None, {name: image[None]})[0].argmax() for image in images]
    # Another processor may round a sum of the last layer otherwise.
    assert np.mean(answers == labels) == pytest.approx(facts["accuracy"], abs=5e-4)
