"""Steering, replaced heads and guidance of a ragged batch against transformers with hooks.

The requests share one batch, so each also shows that the others do not change it.
"""

import contextlib
import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import csm_jax
import oracles
from csm_jax import (
    Guidance,
    HeadOutput,
    Interventions,
    Request,
    Sampling,
    Segment,
    Steering,
)
from csm_jax.inference.decode_loop import new_batch
from csm_jax.inference.request_state import RequestState
from csm_jax.prompt.turns import Prompt, join_rows, text_rows, turn_rows

CONFIG = csm_jax.tiny()
UPPER, LOWER = CONFIG.backbone, CONFIG.depth_decoder
NUM_FRAMES = 10
RNG = np.random.default_rng(4)
RAMP = np.linspace(-2, 3, 7)


def vector(size: int) -> np.ndarray:
    return RNG.normal(size=size).astype(np.float32)


CHANGES = {
    "guidance": Interventions(guidance=Guidance(2.5)),
    "guidance by frame": Interventions(guidance=Guidance(RAMP, "context")),
    "guidance of codebook 0": Interventions(guidance=Guidance([0.0, 4.0], depth_decoder=False)),
    "steering by frame": Interventions(
        steering=[
            Steering(1, vector(UPPER.embed_dim), RAMP),
            Steering(1, vector(UPPER.embed_dim), 0.5),
            Steering(UPPER.num_layers, vector(UPPER.embed_dim), [0.0, 1.0]),
        ]
    ),
    "steering of the depth decoder": Interventions(
        steering=[
            Steering(1, vector(LOWER.embed_dim), RAMP, "depth_decoder"),
            Steering(LOWER.num_layers, vector(LOWER.embed_dim), 1.5, "depth_decoder"),
        ]
    ),
    "heads": Interventions(
        heads=[
            HeadOutput(0, UPPER.num_heads - 1),
            HeadOutput(UPPER.num_layers - 1, 1, vector(UPPER.head_dim)),
            HeadOutput(0, 1, vector(LOWER.head_dim), "depth_decoder"),
            HeadOutput(LOWER.num_layers - 1, 0, None, "depth_decoder"),
        ]
    ),
    "all": Interventions(
        steering=[Steering(1, vector(UPPER.embed_dim), RAMP)],
        guidance=Guidance(RAMP),
        heads=[HeadOutput(1, 0, stack="depth_decoder"), HeadOutput(1, 2)],
    ),
    "nothing": Interventions(),
}


def request_for(size: int, changes: Interventions) -> Request:
    """A request whose context has `size` frames."""
    codes = np.random.default_rng(size).integers(1, 30, (size, CONFIG.num_codebooks))
    return Request(
        "said",
        2,
        [Segment(1, "before", codes=codes)],
        sampling=Sampling(greedy=True),
        max_audio_length_ms=80 * NUM_FRAMES,
        interventions=changes,
    )


REQUESTS = {name: request_for(2 + i, each) for i, (name, each) in enumerate(CHANGES.items())}


@pytest.fixture(scope="module")
def generated(model) -> dict[str, np.ndarray]:
    """Greedy codes of all requests, side by side."""
    batch = new_batch(model, len(REQUESTS), 64)
    for index, request in enumerate(REQUESTS.values()):
        utterance = RequestState(model, request).next_utterance()
        assert utterance is not None
        batch.join(index, utterance)
    codes = batch.run(NUM_FRAMES).codes
    assert codes.shape[1] == NUM_FRAMES
    return dict(zip(REQUESTS, codes, strict=True))


def by_frame(values) -> torch.Tensor:
    """A number for each frame, [F], of which the last one goes on."""
    values = np.atleast_1d(np.asarray(values, np.float32))
    return torch.tensor(values[np.minimum(np.arange(NUM_FRAMES), len(values) - 1)])


@contextlib.contextmanager
def hooked(reference, changes: Interventions, start: int):
    """The model of transformers, changed at `NUM_FRAMES` positions of the backbone from `start` on,
    and at all of the depth decoder, whose rows are frames."""
    stacks = {"backbone": reference.backbone_model, "depth_decoder": reference.depth_decoder.model}

    def changed(stack: str, x: torch.Tensor, change) -> torch.Tensor:
        """[B, T, D] after `change` of frames by position, [F, positions, D]."""
        x = x.clone()
        if stack == "depth_decoder":
            return change(x)
        x[0, start : start + NUM_FRAMES] = change(x[0, start : start + NUM_FRAMES, None])[:, 0]
        return x

    def steer(each: Steering):
        strengths, added = by_frame(each.strength)[:, None, None], torch.tensor(each.vector)
        return lambda module, inputs, output: changed(
            each.stack, output, lambda x: x + strengths * added
        )

    def replace(each: HeadOutput):
        size = (UPPER if each.stack == "backbone" else LOWER).head_dim
        output = torch.zeros(size) if each.output is None else torch.tensor(each.output)

        def put(x: torch.Tensor) -> torch.Tensor:
            x[..., each.head * size : (each.head + 1) * size] = output
            return x

        return lambda module, inputs: (changed(each.stack, inputs[0], put),)

    handles = [
        stacks[each.stack].layers[each.layer - 1].register_forward_hook(steer(each))
        for each in changes.steering
    ]
    handles += [
        stacks[each.stack]
        .layers[each.layer]
        .self_attn.o_proj.register_forward_pre_hook(replace(each))
        for each in changes.heads
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_after(
    reference, rows: Prompt, codes: np.ndarray, changes: Interventions
) -> torch.Tensor:
    """Logits [F, Q, V] of frames after a prompt."""
    frames = np.pad(codes, ((0, 0), (0, 1)))
    columns = np.tile(np.arange(CONFIG.num_codebooks + 1) < CONFIG.num_codebooks, (len(codes), 1))
    spoken = np.concatenate([rows.frames, frames]), np.concatenate([rows.mask, columns])
    start = len(rows.frames) - 1
    with hooked(reference, changes, start), torch.no_grad():
        hidden = oracles.hf_hidden(reference, spoken)[start:-1]
        rest = oracles.hf_depth_logits(reference, hidden, codes)
        return torch.cat([reference.lm_head(hidden)[:, None], rest], dim=1)


def changed_logits(reference, model, request: Request, codes: np.ndarray) -> torch.Tensor:
    """Logits [F, Q, V] of both prompts, combined by hand."""
    changes, guidance = request.interventions, request.interventions.guidance
    context = [r for t in request.context for r in turn_rows(t, CONFIG, model.tokenizer)]
    text, tag = (text_rows(each, 2, CONFIG, model.tokenizer) for each in ("said", None))
    plain = logits_after(reference, join_rows([*context, text]), codes, changes)
    if guidance is None:
        return plain
    bare = [text] if guidance.over == "context" else [*context, tag]
    other = logits_after(reference, join_rows(bare), codes, changes)
    scale = by_frame(guidance.scale)[:, None, None].repeat(1, CONFIG.num_codebooks, 1)
    if not guidance.depth_decoder:
        scale[:, 1:] = 1
    return other + scale * (plain - other)


def behind(logits: torch.Tensor, codes: np.ndarray) -> float:
    """How far the least likely of some codes is behind the likeliest id."""
    chosen = logits.gather(-1, torch.as_tensor(codes).long()[..., None])[..., 0]
    return float((logits.amax(-1) - chosen).max())


@pytest.mark.parametrize("name", CHANGES)
def test_changed_codes_are_the_likeliest_of_transformers(reference, model, generated, name):
    request, codes = REQUESTS[name], generated[name]
    assert behind(changed_logits(reference, model, request, codes), codes) < 1e-3
    if name != "nothing":
        plain = dataclasses.replace(request, interventions=Interventions())
        assert behind(changed_logits(reference, model, plain, codes), codes) > 0.1
