"""`examples/measure_card.py`: stages that fail or are ended keep what they printed."""

from types import SimpleNamespace

import pytest
from measure_card import Stage, count_kernels, main, run_stage

ENDLESS = "import time; print('{\"a\": 1}', flush=True); time.sleep(100)"
FAILING = "import sys; print('text'); sys.exit('it failed')"


def test_a_stage_that_takes_too_long_keeps_its_figures():
    report = run_stage("s", Stage(["-c", ENDLESS], 1.0), seconds=3)
    assert report["output"] == [{"a": 1}]
    assert report["exit_code"] is None
    assert 3 <= report["seconds"] < 30


def test_a_stage_that_fails_tells_why():
    report = run_stage("s", Stage(["-c", FAILING], 1.0), seconds=30)
    assert (report["exit_code"], report["output"]) == (1, ["text"])
    assert "it failed" in report["messages"]


def test_stages_that_there_are_not_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="frame is none of scores, kernels, frames"):
        main([f"--out={tmp_path}", "--stages=frame"])


def test_kernels_are_those_of_the_streams_of_a_card():
    def line(name, *events):
        return SimpleNamespace(
            name=name, events=[SimpleNamespace(name=n, duration_ns=t) for n, t in events]
        )

    def plane(name, *lines):
        return SimpleNamespace(name=name, lines=lines)

    streams = line("Stream #1", ("gemm", 5), ("gemm", 7)), line("Stream #2", ("copy", 1))
    card = plane("/device:GPU:0", *streams, line("XLA Ops", ("dot", 12)))
    host = plane("/host:CPU", line("python", ("call", 90)))
    nanoseconds, number = count_kernels(SimpleNamespace(planes=[host, card]))
    assert nanoseconds == {"gemm": 12, "copy": 1}
    assert number == {"gemm": 2, "copy": 1}
