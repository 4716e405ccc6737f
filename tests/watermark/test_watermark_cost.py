"""The example that measures the cost of a watermark prints time, share of the cores, and delay."""

import re

import pytest
import watermark_cost
from absl.testing import flagsaver

from csm_jax.watermark.config import tiny


def test_cost_and_delay_are_printed(monkeypatch, capsys):
    if not watermark_cost.flags.FLAGS.is_parsed():
        watermark_cost.flags.FLAGS(["watermark_cost"])
    monkeypatch.setattr(watermark_cost, "WatermarkConfig", tiny)
    with flagsaver.flagsaver(seconds=0.2, repeats=1):
        watermark_cost.main([])
    out = capsys.readouterr().out
    assert re.search(r"^delay of a stream: \d+ samples, 0\.0\d\d s of audio$", out, re.M)
    for name in ("stream", "whole"):
        (line,) = re.findall(rf"^{name}: (.*)$", out, re.M)
        seconds, cpu = map(float, re.findall(r"([\d.]+) s (?:a|of)", line))
        assert seconds > 0
        share = float(re.findall(r"([\d.]+)% of the cores", line)[0]) / 100
        cores = int(re.findall(r"^(\d+) cores", out)[0])
        assert share == pytest.approx(cpu / cores, abs=1e-3)
