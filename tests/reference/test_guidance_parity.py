"""Guided speech against transformers: the logits of two prompts, combined by hand."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from fixtures import params_of

import csm_jax
import oracles
from csm_jax import Generator, Guidance, Interventions, Request, Sampling, Segment
from csm_jax.convert.layouts import open_checkpoint
from csm_jax.inference.decode_loop import new_batch
from csm_jax.inference.request_state import RequestState
from csm_jax.model.precision import FLOAT32
from csm_jax.prompt.tokenizer import byte_tokenizer
from csm_jax.prompt.turns import join_rows, text_rows, turn_rows

CONFIG = csm_jax.tiny()
RNG = np.random.default_rng(4)
NUM_FRAMES = 10
# Prompts of different lengths, and scales that differ from frame to frame.
CONTEXTS = [
    [Segment(1, "before", codes=RNG.integers(1, 30, (size, CONFIG.num_codebooks)))]
    for size in (9, 2, 5)
]
GUIDANCE = [
    Guidance(2.5),
    Guidance(np.linspace(-2, 3, 7), "context"),
    Guidance([0.0, 4.0], "text", depth_decoder=False),
]


@pytest.fixture(scope="module")
def reference():
    return oracles.hf_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    directory = oracles.save_hf(reference, tmp_path_factory.mktemp("hf") / "model")
    params = params_of(open_checkpoint(directory), FLOAT32)
    return Generator.from_params(CONFIG, params, byte_tokenizer(CONFIG), FLOAT32)


def requests() -> list[Request]:
    return [
        Request(
            "said",
            2,
            context,
            sampling=Sampling(greedy=True),
            max_audio_length_ms=80 * NUM_FRAMES,
            interventions=Interventions(guidance=guidance),
        )
        for context, guidance in zip(CONTEXTS, GUIDANCE, strict=True)
    ]


def logits_after(reference, rows, codes: np.ndarray) -> torch.Tensor:
    """Logits [F, Q, V] of frames after a prompt."""
    frames = np.pad(codes, ((0, 0), (0, 1)))
    columns = np.tile(np.arange(CONFIG.num_codebooks + 1) < CONFIG.num_codebooks, (len(codes), 1))
    spoken = np.concatenate([rows.frames, frames]), np.concatenate([rows.mask, columns])
    hidden = oracles.hf_hidden(reference, spoken)[len(rows.frames) - 1 : -1]
    with torch.no_grad():
        first = reference.lm_head(hidden)[:, None]
    return torch.cat([first, oracles.hf_depth_logits(reference, hidden, codes)], dim=1)


def guided_logits(reference, model, request: Request, codes: np.ndarray) -> torch.Tensor:
    def text(words: str | None):
        return text_rows(words, request.speaker, CONFIG, model.tokenizer)

    guidance = request.interventions.guidance
    context = [r for t in request.context for r in turn_rows(t, CONFIG, model.tokenizer)]
    bare = [text("said")] if guidance.over == "context" else [*context, text(None)]
    plain = logits_after(reference, join_rows([*context, text("said")]), codes)
    other = logits_after(reference, join_rows(bare), codes)
    scales = np.atleast_1d(guidance.scale)
    scales = scales[np.minimum(np.arange(len(codes)), len(scales) - 1)]
    scale = torch.tensor(scales, dtype=torch.float32)[:, None, None].repeat(1, codes.shape[1], 1)
    if not guidance.depth_decoder:
        scale[:, 1:] = 1
    return other + scale * (plain - other)


def behind(logits: torch.Tensor, codes: np.ndarray) -> float:
    """How far the least likely of some codes is behind the likeliest id."""
    chosen = logits.gather(-1, torch.as_tensor(codes).long()[..., None])[..., 0]
    return float((logits.amax(-1) - chosen).max())


def test_guided_codes_of_a_ragged_batch_are_the_likeliest_of_transformers(reference, model):
    wanted = requests()
    plain = dataclasses.replace(wanted[0], interventions=Interventions())
    batch = new_batch(model, 4, 64)
    for index, request in enumerate([*wanted, plain]):
        utterance = RequestState(model, request).next_utterance()
        assert utterance is not None
        batch.join(index, utterance)
    codes = batch.run(NUM_FRAMES).codes
    for request, each in zip(wanted, codes, strict=False):
        assert len(each) == NUM_FRAMES
        assert behind(guided_logits(reference, model, request, each), each) < 1e-3
        changes = Interventions(guidance=dataclasses.replace(GUIDANCE[0], scale=1.0))
        unguided = dataclasses.replace(request, interventions=changes)
        assert behind(guided_logits(reference, model, unguided, each), each) > 0.1
    # A request beside them is not guided.
    np.testing.assert_array_equal(codes[-1], model.generate_codes(plain))
