"""Drives the state of a request by hand, with made-up codes: no model is needed."""

import dataclasses

import numpy as np
from fixtures import CONFIG as TINY
from fixtures import TOKENIZER

from csm_jax import CSMConfig, Request, Segment
from csm_jax.inference.config import DEFAULT_INFERENCE
from csm_jax.inference.decode_batch import Utterance
from csm_jax.inference.request_state import RequestState
from csm_jax.prompt.splitting import needed_seconds
from csm_jax.prompt.turns import Encode, join_rows, text_rows, turn_rows

# The window of the released model.
BACKBONE = dataclasses.replace(TINY.backbone, max_seq_len=2048)
CONFIG = dataclasses.replace(TINY, backbone=BACKBONE)
Q, FRAME_MS = CONFIG.num_codebooks, CONFIG.frame_ms
SILENCE = frozenset({3, 4, 5})
END = np.zeros((1, Q), np.int32)
# Three parts of 200 letters and a full stop.
LONG = " ".join(letter * 200 + "." for letter in "abc")
NO_CODES = np.zeros((0, Q), np.int32)


def codes(num_frames: int, seed: int = 0) -> np.ndarray:
    """Speech without a fault: [num_frames, Q], not silent, and no frame twice."""
    return np.random.default_rng([seed, num_frames]).integers(10, 32, (num_frames, Q), np.int32)


def loop(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.repeat(codes(1, seed + 50), num_frames, axis=0)


def join(*frames: np.ndarray) -> np.ndarray:
    return np.concatenate(frames)


class StubModel:
    """What the state of a request takes of a `LoadedModel`, without parameters.

    Attributes:
      num_silences: how often the codes of silence were asked for.
    """

    config, tokenizer, inference = CONFIG, TOKENIZER, DEFAULT_INFERENCE
    sample_rate, alignment = CONFIG.codec.sample_rate, None

    def __init__(self, encode: Encode | None = None):
        """`encode` is for context that has no codes."""
        self.encode = encode
        self.num_silences = 0

    @property
    def silent_codes(self) -> frozenset[int]:
        self.num_silences += 1
        return SILENCE


def begin(
    request: Request, max_seq_len: int | None = None, config: CSMConfig = CONFIG
) -> tuple[RequestState, list]:
    notices, model = [], StubModel()
    model.config = config
    return RequestState(model, request, notices.append, max_seq_len), notices


def play(state: RequestState, *parts, chunks=(25,)):
    """Plays a model that generates given frames.

    Args:
      parts: of every utterance its drafts: the first is played first, and after a rewind the next,
        from there on. As in a `DecodeBatch`, there are no more than `max_frames` frames.
      chunks: how many frames at a time, in turn.

    Returns:
      The utterances, what was released of each, and the rewinds of each.
    """
    utterances, released, rewinds, turn = [], [], [], 0
    while (utterance := state.next_utterance()) is not None:
        drafts = list(parts[len(utterances)])
        utterances.append(utterance)
        released.append(NO_CODES)
        rewinds.append([])
        draft, position, is_over = drafts.pop(0), 0, False
        while not is_over:
            size = chunks[turn % len(chunks)]
            turn += 1
            frames = draft[: utterance.max_frames][position : position + size]
            assert len(frames) > 0, "it waits for frames that cannot come"
            step = state.accept(frames)
            released[-1] = join(released[-1], step.released)
            position, is_over = position + size, step.is_over
            if step.rewind is not None:
                rewinds[-1].append(step.rewind)
                position, draft = len(step.rewind.codes), drafts.pop(0)
                np.testing.assert_array_equal(step.rewind.codes, released[-1])
    return utterances, released, rewinds


def kinds(notices) -> list[str]:
    assert all("\n" not in notice.message for notice in notices)
    return [notice.kind for notice in notices]


def frames_for(text: str) -> int:
    return int(1000 * needed_seconds(text) / FRAME_MS)


def assert_prompt(utterance: Utterance, *turns: Segment, text: str, speaker: int = 0) -> None:
    spoken = [rows for turn in turns for rows in turn_rows(turn, CONFIG, TOKENIZER)]
    expected = join_rows([*spoken, text_rows(text, speaker, CONFIG, TOKENIZER)])
    for got, wanted in zip(utterance.prompt, expected, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
