"""The lines of the request log."""

import json
import logging

from small import ask, echo

from csm_jax.serve.metrics import Metrics
from csm_jax.serve.middleware.request_log import RequestLogMiddleware


def test_a_log_entry_is_one_short_line(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "csm_jax.serve")
    monkeypatch.setattr(logging.getLogger("csm_jax.serve"), "propagate", True)
    metrics = Metrics()
    app = RequestLogMiddleware(echo, metrics)
    before = len(metrics.text())
    for number in range(20):
        ask(app, f"/{number}%0A%1B%5B2Jforged" + "a" * 50_000, method="M" * 50_000)
    for record in caplog.records:
        line = record.getMessage()
        assert len(line) < 1000
        assert line.isprintable()
        assert json.loads(line)["path"].startswith("/")
    assert len(caplog.records) == 20
    # Paths without a route share one label.
    assert len(metrics.text()) - before < 500
