"""The example of a Hugging Face Space."""

import importlib.util
import re
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

import csm_jax

gradio = pytest.importorskip("gradio")
DIRECTORY = Path(__file__).parents[1] / "examples" / "space"
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def app():
    specification = importlib.util.spec_from_file_location("space_app", DIRECTORY / "app.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["space_app"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["space_app"]


@pytest.fixture(scope="module")
def space(app):
    return app.Space("demo")


def test_the_front_matter_names_gradio_and_the_app():
    text = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    front = dict(re.findall(r"^(\w+): (.+)$", text.split("---")[1], re.MULTILINE))
    assert front["sdk"] == "gradio"
    assert (DIRECTORY / front["app_file"]).is_file()


def test_a_conversation_equals_that_of_the_library(space, app):
    voices = ["slt", None, "", app.NONE, None, ""]
    *_, (rate, samples) = space.speak("one two\nthree four", 5, *voices)
    prompt = space.prompts["slt"]

    context, expected = [csm_jax.Segment(0, prompt.text, prompt.audio)], []
    for number, line in enumerate(["one two", "three four"]):
        codes = space.model.generate_codes(line, number, context, seed=5 + number)
        context.append(csm_jax.Segment(number, line, codes=codes))
        expected.append(space.model.codec.decode(codes))
    assert rate == 24_000
    np.testing.assert_allclose(samples / 32767, np.concatenate(expected), atol=1e-3)


def test_files_of_the_machine_are_not_served(space, tmp_path):
    """Sends the request that could read files when gradio was mounted into another application."""
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    demo = space.build()
    try:
        _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True)
        file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
        data = ["one", 0, file, file, "", "None", file, ""]
        body = {"data": data, "fn_index": 0, "session_hash": "a", "trigger_id": 1}
        joined = httpx.post(f"{url}gradio_api/queue/join", json=body)
        seen = [joined.text]
        with httpx.stream(
            "GET", f"{url}gradio_api/queue/data?session_hash=a", timeout=30
        ) as events:
            for line in events.iter_lines():
                seen.append(line)
                if "process_completed" in line:
                    break
        seen.append(httpx.get(f"{url}gradio_api/file={secret}").text)
        for path in re.findall(r"(/[^\s\"'\\]*secret\.txt)", "".join(seen)):
            seen.append(httpx.get(f"{url}gradio_api/file={path}").text)
    finally:
        demo.close()
    assert "the secret" not in "".join(seen)
    # The request reached the check of file paths, and was refused there.
    completed = next(line for line in seen if "process_completed" in line)
    assert '"success":false' in completed.replace(" ", "")
