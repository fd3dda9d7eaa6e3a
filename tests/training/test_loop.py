"""The loop: law 7 (resume is bit-equal), records, and what happens to a loss that is not finite."""

import itertools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core, pruning, training


@pytest.fixture
def step(tiny):
    return training.make_step(tiny.loss_fn, tiny.augment)


def interrupted(batches, at):
    """The same batches, with Ctrl-C pressed before the batch of step `at`."""

    def start(first):
        for index, batch in enumerate(batches(first), first):
            if index == at:
                raise KeyboardInterrupt
            yield batch

    return start


def test_resume_is_bit_equal(tiny, step, batches, arrays, tmp_path):
    """Stopped in the middle of an epoch and of a record, beyond the last checkpoint."""
    evaluate = lambda state: training.evaluate(  # noqa: E731
        tiny.predict, state.params | state.state, arrays, 8
    )
    settings = dict(steps=11, name="parent", evaluate=evaluate, every=4, record_every=3)

    def make_state(seed):
        """Adam, and a mask drawn from the seed that removes weights of the convolution."""
        params = tiny.make_state(seed).params
        variables = params | tiny.make_state(seed).state
        kernels = core.trace(tiny.predict, variables, arrays.images[:1]).kernels
        scores = pruning.random(kernels, params, jax.random.key(seed))
        tx = pruning.hold_masks(optax.adam(0.01), pruning.masks(scores, 0.5))
        return tiny.make_state(seed, tx)

    whole = training.fit(step, make_state(0), batches, records=tmp_path / "whole.jsonl", **settings)

    checkpoint = training.Checkpoints(tmp_path / "checkpoints")
    records = tmp_path / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        training.fit(
            step,
            make_state(0),
            interrupted(batches, at=7),
            checkpoint=checkpoint,
            records=records,
            **settings,
        )
    assert checkpoint.latest() == 4
    assert [record["step"] for record in training.read_records(records)] == [3, 4, 6]
    # As a process killed while it wrote would leave them.
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    with records.open("a") as file:
        file.write('{"name": "parent", "st')

    # Another start state: all of it comes from the checkpoint.
    resumed = training.fit(
        step,
        make_state(5),
        batches,
        checkpoint=training.Checkpoints(tmp_path / "checkpoints"),
        records=records,
        **settings,
    )
    tiny.assert_equal(resumed, whole)
    assert records.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert [record["step"] for record in training.read_records(records)] == [3, 4, 6, 8, 9, 11]


@pytest.mark.parametrize("names", [(), ("image",)])
def test_steps_as_one_program(tiny, step, batches, arrays, tmp_path, names):
    """A scan up to each record and checkpoint is the loop but for rounding; resumed, to the bit."""
    settings = dict(steps=11, name="parent", every=4, record_every=3)
    loop = training.fit(step, tiny.make_state(), batches, **settings)
    settings["scan"] = True
    settings["resident"] = {name: jnp.asarray(getattr(arrays, f"{name}s")) for name in names}

    def others(first):
        for batch in batches(first):
            yield {key: leaf for key, leaf in batch.items() if key not in names}

    whole, records = (tmp_path / f"{name}.jsonl" for name in ("whole", "records"))
    scanned = training.fit(step, tiny.make_state(), others, records=whole, **settings)
    tiny.assert_close(scanned, loop)
    assert [record["step"] for record in training.read_records(whole)] == [3, 4, 6, 8, 9, 11]
    settings |= {"checkpoint": training.Checkpoints(tmp_path / "checkpoints"), "records": records}
    with pytest.raises(KeyboardInterrupt):
        training.fit(step, tiny.make_state(), interrupted(others, at=7), **settings)
    assert settings["checkpoint"].latest() == 4
    tiny.assert_equal(training.fit(step, tiny.make_state(5), others, **settings), scanned)
    assert records.read_text() == whole.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_waits_for_its_step_to_be_saved(tiny, step, batches, tmp_path, number):
    """In the midst of an interval between checkpoints, and between records."""
    settings = dict(steps=9, name="parent", every=100, record_every=4)
    whole = training.fit(
        step, tiny.make_state(), batches, records=tmp_path / "whole.jsonl", **settings
    )
    settings |= {"records": tmp_path / "records.jsonl"}

    def signalled(first):
        for index, batch in enumerate(batches(first), first):
            if index == 5:
                for _ in range(2):  # as a terminal and its shell may both send it
                    signal.raise_signal(number)
            yield batch

    class Asked(Exception):
        pass

    def stop(number, frame):
        raise Asked

    before = signal.signal(number, stop)
    try:
        with pytest.raises(Asked):
            training.fit(
                step,
                tiny.make_state(),
                signalled,
                checkpoint=training.Checkpoints(tmp_path / "checkpoints"),
                **settings,
            )
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    checkpoint = training.Checkpoints(tmp_path / "checkpoints")
    assert checkpoint.latest() == 6
    resumed = training.fit(step, tiny.make_state(5), batches, checkpoint=checkpoint, **settings)
    tiny.assert_equal(resumed, whole)
    assert (tmp_path / "records.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_checkpoints_come_by_time_too(tiny, step, batches, tmp_path):
    """Every step takes longer than 0 seconds."""
    checkpoint = training.Checkpoints(tmp_path, keep=9)
    settings = dict(steps=3, name="parent", every=100, checkpoint=checkpoint)
    training.fit(step, tiny.make_state(), batches, seconds=0.0, **settings)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [1, 2, 3]


def test_the_host_is_few_steps_ahead_of_the_device(tiny, batches):
    """A signal waits for all steps that were handed over, which may take seconds each."""
    given, done = [], []

    class Loss:
        def __init__(self, number):
            self.number = number
            given.append(number)

        def block_until_ready(self):
            done.append(self.number)
            return self

        def __array__(self, dtype=None, copy=None):
            return np.zeros((), np.float32)

    def step(state, batch):
        assert len(given) - len(done) < 4
        return state, {"loss": Loss(len(given))}

    training.fit(step, tiny.make_state(0), batches, steps=9, name="slow", record_every=100)
    assert given == list(range(9))
    assert done[:6] == list(range(6))


def test_a_signal_that_is_ignored_stays_so(tiny, step, batches):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        with training.signals.Held() as held:
            signal.raise_signal(signal.SIGHUP)
            assert held.came is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_finished_run_is_restored_without_a_step(tiny, step, batches, tmp_path):
    settings = dict(steps=2, name="parent", checkpoint=training.Checkpoints(tmp_path))
    done = training.fit(step, tiny.make_state(), batches, **settings)
    again = training.fit(None, tiny.make_state(seed=1), lambda first: iter(()), **settings)
    tiny.assert_equal(again, done)


def test_stack_resumes_bit_equal(tiny, batches, tmp_path):
    step = training.make_stacked_step(tiny.loss_fn, method="map")
    make = lambda: training.stack_states([tiny.make_state(0), tiny.make_state(1)])  # noqa: E731
    whole = training.fit(step, make(), batches, steps=4, name="experts")
    checkpoint = training.Checkpoints(tmp_path)
    training.fit(step, make(), batches, steps=2, name="experts", checkpoint=checkpoint)
    resumed = training.fit(step, make(), batches, steps=4, name="experts", checkpoint=checkpoint)
    tiny.assert_equal(resumed, whole)


def test_the_state_handed_in_stays_usable(tiny, step, batches):
    state = tiny.make_state()
    first = training.fit(step, state, batches, steps=2, name="parent")
    tiny.assert_equal(training.fit(step, state, batches, steps=2, name="parent"), first)


def constant(first):
    return itertools.repeat({"label": jnp.float32(1)})


def growing(params, state, batch, key):
    return params["w"] ** 2, (state, {})


@pytest.mark.parametrize(("record_every", "every"), [(2, 100), (100, 7), (100, 100)])
def test_a_loss_that_is_not_finite_names_its_step(record_every, every, tmp_path):
    """Gradient 2w, rate 5e9: w is multiplied by about -1e10 each step, from 1.

    The loss w² is 1, 1e20, then 1e40, which float32 cannot hold: infinite at step 3.
    """
    state = training.create_state({"w": 1.0}, {}, optax.sgd(5e9), jax.random.key(0))
    checkpoint = training.Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(
        FloatingPointError,
        match=r"^parent: loss must be finite, got inf at step 3; lower the learning rate",
    ):
        training.fit(
            training.make_step(growing),
            state,
            constant,
            steps=20,
            name="parent",
            checkpoint=checkpoint,
            records=tmp_path / "records.jsonl",
            every=every,
            record_every=record_every,
        )
    assert checkpoint.latest() is None


def test_what_the_last_update_broke_is_not_saved(tmp_path):
    """Each update adds 1e10 w: w is infinite after step 4, which the loss of step 5 would show."""

    def loss_fn(params, state, batch, key):
        return 0 * params["w"], (state, {})

    def update(updates, state, params=None):
        return jax.tree.map(lambda p: p * 1e10, params), state

    tx = optax.GradientTransformation(lambda params: (), update)
    state = training.create_state({"w": 1.0}, {}, tx, jax.random.key(0))
    step = training.make_step(loss_fn)
    checkpoint = training.Checkpoints(tmp_path)
    with pytest.raises(FloatingPointError, match=r"params must be finite.*'w' after step 4; lower"):
        training.fit(step, state, constant, steps=4, name="parent", checkpoint=checkpoint)
    assert checkpoint.latest() is None


def test_a_stack_names_the_expert():
    def make(w):
        return training.create_state({"w": w}, {}, optax.sgd(5e9), jax.random.key(0))

    with pytest.raises(
        FloatingPointError, match="loss of expert 1 must be finite, got inf at step 3"
    ):
        training.fit(
            training.make_stacked_step(growing, method="vmap"),
            training.stack_states([make(0.0), make(1.0)]),
            constant,
            steps=5,
            name="experts",
        )


def test_records_hold_means_and_go_by_name(tmp_path):
    """w moves 0 → 1/2 → 3/4 towards 1: losses (w - 1)² are 1, 1/4, 1/16, mean of two 5/8."""

    def loss_fn(params, state, batch, key):
        return (params["w"] - batch["label"]) ** 2, (state, {})

    state = training.create_state({"w": 0.0}, {}, optax.sgd(0.25), jax.random.key(0))
    path = tmp_path / "deep" / "records.jsonl"
    for name in ("one", "two"):
        training.fit(
            training.make_step(loss_fn),
            state,
            constant,
            steps=3,
            name=name,
            records=path,
            record_every=2,
            evaluate=lambda state: {"accuracy": np.array([0.5, state.params["w"]])},
        )
    expected = [{"step": 2, "loss": 0.625}, {"step": 3, "loss": 0.0625, "accuracy": [0.5, 0.875]}]
    assert training.read_records(path) == [
        {"name": name} | record for name in ("one", "two") for record in expected
    ]
    assert training.read_records(path, "two") == [{"name": "two"} | record for record in expected]


def test_without_a_terminal_it_prints_plain_lines(tiny, step, batches, capsys):
    training.fit(step, tiny.make_state(), batches, steps=3, name="parent")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("parent: 3/3")
    assert "loss" in err
    assert "\x1b" not in err


def test_on_a_terminal_it_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(training.track([1, 2], "calibrate")) == [1, 2]
    err = capsys.readouterr().err
    assert "calibrate" in err
    assert "2/2" in err


def test_errors_name_the_argument(tiny, step, batches, tmp_path):
    fit = lambda **changes: training.fit(  # noqa: E731
        step, tiny.make_state(), batches, **({"steps": 2, "name": "parent"} | changes)
    )
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -1"):
        fit(steps=-1)
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        fit(every=0)
    with pytest.raises(
        ValueError, match="batches must reach step 2 of parent, got no more after 1"
    ):
        training.fit(
            step,
            tiny.make_state(),
            lambda first: itertools.islice(batches(first), 1),
            steps=2,
            name="parent",
        )
    fit(checkpoint=training.Checkpoints(tmp_path))
    with pytest.raises(
        ValueError, match="steps must be at least the 2 that parent has done, got 1"
    ):
        fit(steps=1, checkpoint=training.Checkpoints(tmp_path))
