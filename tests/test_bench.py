"""The benchmarks run, each figure has its baseline, and the page shows them. What they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from deploy.bench import finetune
from deploy.bench.__main__ import NAMES, RESULTS
from deploy.bench.measure import Row, Section, interleaved
from deploy.bench.report import page, split, written

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = {
    "wrapper": 3, "swap": 25, "plateau": 5, "startup": 10, "store": 2, "memory": 7, "delta": 17, "poll": 6,
    "signing": 3, "wire": 4, "guards": 15, "fleet": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    """A process of its own: settings, a database and a web server that are no test's."""
    command = [sys.executable, "-m", "deploy.bench", "--tiny", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_stands_beside_a_baseline(measured, name):
    section = measured[name]
    assert len(section["rows"]) == EXPECTED[name]
    for row in section["rows"]:
        assert row["value"] > 0 or row["what"].endswith("healthy rollouts halted"), row
        assert row["baseline"] > 0, row
        assert row["against"], row


def test_no_call_fails_during_a_swap(measured):
    counted = [row for row in measured["swap"]["rows"] if row["unit"] == "calls"]
    assert [row["met"] for row in counted] == [True] * 4, counted


def test_swaps_leave_no_thread_and_no_file_behind(measured):
    """A hundred of them, of a real model, are `make bench` and `make drill`."""
    judged = {row["unit"]: row["met"] for row in measured["plateau"]["rows"] if row["bar"] and row["unit"] != "MB"}
    assert judged == {"threads": True, "files": True, "calls": True}


def test_the_deltas_of_other_tools_stand_beside_ours(measured):
    """Those that are not installed are named, and nothing fails."""
    head, line = measured["delta"]["beside"]
    assert head == ["Change", "ours", "zstd", "zstd --patch-from", "xdelta3", "bsdiff4"]
    assert len(line) == len(head)
    for cell in line[1:]:
        assert " s; " in cell or cell == "not installed"


def test_a_missed_bar_is_called_missed():
    rows = [
        Row("fast", 1.0, "us", 2.0, "slow", "<= 2 us", met=True),
        Row("late", 3.0, "us", 2.0, "slow", "<= 2 us", met=False),
    ]
    text = page({"speed": written(Section("Speed", rows))})
    assert "2 bars, 1 missed" in text
    assert "| late | 3 us | 2 us | slow | x 1.50 | <= 2 us | **missed** |" in text


def test_every_action_has_its_turn_in_each_round():
    turns: list[str] = []
    actions = {name: lambda name=name: turns.append(name) for name in "ab"}
    clock = iter(range(100))
    spent = interleaved(actions, rounds=2, calls=2, clock=lambda: next(clock))
    assert turns == list("aabb") * 3
    assert spent == {"a": 500_000, "b": 500_000}


def test_the_committed_page_has_every_section():
    assert list(split(RESULTS.read_text())) == list(NAMES)


def test_a_section_that_is_measured_alone_leaves_the_others_as_they_were():
    old = page({"speed": written(Section("Speed", [], ["a note"])), "size": written(Section("Size", []))})
    parts = split(old) | {"size": written(Section("Size, again", []))}
    assert split(page(parts)) == parts
    assert parts["speed"] in page(parts)


def test_the_deltas_come_of_real_training():
    """The gradients by which the bench changes its weights are those of the loss: compared with differences."""
    shape = finetune.TINY
    weights = {name: value.astype(np.float64) for name, value in finetune.initial(shape).items()}
    texts, labels = next(finetune.batches(shape, 1))
    _, gradients = finetune.loss_and_gradients(weights, shape, texts, labels)
    random = np.random.default_rng(0)
    for name, value in weights.items():
        exact = np.zeros_like(value)
        exact[gradients["rows"] if name == "embedding" else slice(None)] = gradients[name]
        way = random.standard_normal(value.shape)
        losses = [
            finetune.loss_and_gradients({**weights, name: value + step * way}, shape, texts, labels)[0]
            for step in (1e-6, -1e-6)
        ]
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx((exact * way).sum(), rel=1e-3, abs=1e-6), name


def test_training_lowers_the_loss_and_its_onnx_answers_as_the_net_does():
    shape = finetune.TINY
    trained, losses = finetune.adamw(finetune.initial(shape), shape, steps=120, seed=1, rate=1e-3)
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])
    texts, labels = next(finetune.batches(shape, 2))
    session = onnxruntime.InferenceSession(finetune.to_onnx(trained, shape), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"texts": texts})
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = -np.log(shares[np.arange(len(labels)), labels]).mean()
    assert finetune.loss_and_gradients(trained, shape, texts, labels)[0] == pytest.approx(loss, rel=1e-4)
    onnxruntime.InferenceSession(
        finetune.to_onnx(finetune.quantised(trained), shape), providers=["CPUExecutionProvider"]
    )
