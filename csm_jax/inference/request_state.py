"""The state of one request: which utterances it takes, and which of their frames count.

Nothing here runs the model. A `RequestState` returns the next utterance to generate and accepts its
frames, so that the same rules hold for a request alone, as a stream, or in a batch with others.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from csm_jax.errors import InputError
from csm_jax.inference.alignment.speech import PartAlignment, SpeechAlignment
from csm_jax.inference.alignment.words import Word
from csm_jax.inference.decode_step import TEXT_POSITIONS
from csm_jax.inference.guard import Guard
from csm_jax.inference.guarded_frames import GoBack, GuardedFrames, GuardedStep, Remark
from csm_jax.inference.history import History
from csm_jax.inference.intervention_arrays import (
    check_room,
    forced_codes,
    from_frame,
    guidance_scale,
    logits_function,
    stack_from_frame,
    stack_interventions,
)
from csm_jax.inference.interventions import STACKS
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.request import Notice, Notify, Request, log_notice
from csm_jax.inference.text_guard import TextGuard
from csm_jax.inference.utterance import Rewind, Utterance, UtteranceGuidance
from csm_jax.prompt.pauses import split_pauses
from csm_jax.prompt.splitting import needed_seconds, split_text
from csm_jax.prompt.turns import join_rows, text_rows

# What a guard did, by the kind of its notice.
_DONE = {
    "resampled": "it went on from there with another seed",
    "continued": "it went on from there",
    "ended": "it was ended there",
    "guard_cut": "it was cut there",
}


class Step(NamedTuple):
    """The outcome of new frames.

    Attributes:
      released: int32 [n, Q], the frames for the caller.
      rewind: where the utterance has to go back to, if it has to.
      is_over: the utterance needs no more frames.
      words: those whose times have become certain.
    """

    released: np.ndarray
    rewind: Rewind | None
    is_over: bool
    words: Sequence[Word] = ()


class RequestState:
    """The progress of a request, from its first utterance to its last frame.

    Call `next_utterance` until it returns None, and `accept` with every utterance's frames until
    it returns that the utterance is over.

    Attributes:
      alignment: the words of the parts that are over.
    """

    def __init__(
        self,
        model: LoadedModel,
        request: Request,
        notify: Notify = log_notice,
        max_seq_len: int | None = None,
    ):
        """Checks the request, and decides which turns of its context fit the window.

        Args:
          model: its codec encodes recordings of the context, in the first `next_utterance`, one
            turn that fits after the other.
          notify: called with each notice.
          max_seq_len: positions of the window, if fewer than the model's own limit.

        Raises:
          InputError: text or context that is empty, malformed or does not fit.
        """
        self._model = model
        self._config = model.config
        self._request = request
        self._notify = notify
        limit = model.config.backbone.max_seq_len
        self._window = min(max_seq_len or limit, limit)
        lead, self._parts, self._pauses = self._split()
        self._forced = forced_codes(request.interventions, model.config)
        self._stacks = {
            stack: stack_interventions(request.interventions, stack, model.config)
            for stack in STACKS
        }
        self._scale = guidance_scale(request.interventions)
        changes = request.interventions
        self._functions = [
            logits_function(each, model.config) for each in (changes.logits, changes.depth_logits)
        ]
        self._max_total_frames = self._total_frames(lead + sum(self._pauses))
        if request.voice is not None:
            request.voice.check(model.identity)
        self._history = History(model, request, self._window, notify)
        self._part = -1
        # Silence before the first part, and all frames so far.
        self._total = self._lead = min(lead, self._max_total_frames - 1)
        self._has_spoken = self._was_cut = False
        self.alignment = SpeechAlignment(model.sample_rate)
        self._aligned: PartAlignment | None = None
        # Here, so that a request that does not fit is refused before anything runs.
        self._start_part()
        if request.voice is not None:
            request.voice.check_room(self._history.num_shared, self._window)
        self._is_new = True

    @property
    def kept_turns(self) -> list[int]:
        """The indices of the turns of the request's context that fit the window."""
        return self._history.kept

    def next_utterance(self) -> Utterance | None:
        """The next utterance to generate; None after the last part or at the limit of frames."""
        if self._is_new:
            self._is_new = False
            self._before = self._unreleased = self._silence(self._lead)
            if any(self._pauses):
                _ = self._model.silent_frame  # here, where the codec may run
            return self._utterance()
        spoken = np.concatenate([self._before, self._codes, self._after])
        self._history.add(self._parts[self._part], spoken)
        if self._aligned is not None:
            self.alignment.add(self._aligned, len(self._codes))
        left = len(self._parts) - self._part - 1
        if not left or self._total >= self._max_total_frames:
            self._was_cut |= left > 0
            self._report_end(left)
            return None
        self._start_part()
        return self._utterance()

    def accept(self, codes: np.ndarray, attention: np.ndarray | None = None) -> Step:
        """Takes the next frames of the utterance, with its end of speech if any.

        What comes after the end of speech or after `max_frames` is ignored. Pauses of the text are
        released with the first and the last frames.

        Args:
          codes: int32 [n, Q].
          attention: of the alignment heads, float32 [n, N, L].
        """
        step = self._accept(codes, attention)
        if self._aligned is not None:
            step = step._replace(words=self._aligned.decide(len(self._codes), step.is_over))
        before, self._unreleased = self._unreleased, self._silence(0)
        if step.is_over:
            self._after = self._pause(self._pauses[self._part])
        return step._replace(released=np.concatenate([before, step.released, self._after]))

    def _accept(self, codes: np.ndarray, attention: np.ndarray | None) -> Step:
        ends = np.flatnonzero((codes == 0).all(axis=-1))
        has_ended = len(ends) > 0
        frames = (codes[: ends[0]] if has_ended else codes)[: self._left]
        self._left -= len(frames)
        mass = None
        if self._aligned is not None and attention is not None:
            mass = self._aligned.push(attention[: len(frames)])
        if self._guarded is None:
            self._keep(frames)
            return Step(frames, None, self._is_over(has_ended))
        step = self._guarded_step(self._guarded, frames, mass, has_ended)
        self._keep(step.released)
        if step.remark is not None:
            self._report_guard(step.remark)
        if self._aligned is not None:
            self._aligned.tracker.truncate(len(self._guarded.codes))
        return Step(step.released, self._rewind(step.back), step.is_over)

    def _guarded_step(
        self, guarded: GuardedFrames, frames: np.ndarray, mass: np.ndarray | None, has_ended: bool
    ) -> GuardedStep:
        step = guarded.accept(frames, mass)
        if step.back or step.is_over or not self._is_over(has_ended):
            return step
        # Without room for more frames there is nothing to decide about the end.
        last = guarded.end() if has_ended and self._left else guarded.finish()
        return last._replace(released=np.concatenate([step.released, last.released]))

    def _is_over(self, has_ended: bool) -> bool:
        if not has_ended and not self._left:
            self._report_full()
        return has_ended or not self._left

    def _keep(self, frames: np.ndarray) -> None:
        self._codes = np.concatenate([self._codes, frames])
        self._total += len(frames)
        self._has_spoken |= len(frames) > 0

    def _pause(self, num_frames: int) -> np.ndarray:
        """Silence after a part, as far as the limit of all frames allows it."""
        num_fit = min(num_frames, self._max_total_frames - self._total)
        self._was_cut |= num_fit < num_frames
        self._total += num_fit
        return self._silence(num_fit)

    def _silence(self, num_frames: int) -> np.ndarray:
        """int32 [num_frames, Q]."""
        if not num_frames:
            return np.zeros((0, self._config.num_codebooks), np.int32)
        return np.tile(self._model.silent_frame, (num_frames, 1))

    def _rewind(self, back: GoBack | None) -> Rewind | None:
        if back is None or self._guarded is None:
            return None
        self._num_resampled += back.new_seed
        self._left = self._max_frames - back.num_frames
        seed = _derive(self._request.seed, self._part, self._num_resampled)
        return Rewind(self._guarded.codes, seed, back.end_bias)

    def _start_part(self) -> None:
        self._part += 1
        self._num_resampled = 0
        # What the model generates, and the silence that is released with it.
        self._codes = self._before = self._after = self._unreleased = self._silence(0)
        request, text = self._request, self._parts[self._part]
        self._rows = text_rows(text, request.speaker, self._config, self._model.tokenizer)
        needed = int(1000 * self._needed_seconds(text) / self._config.frame_ms)
        allowed = self._max_total_frames - self._total
        length = len(self._rows.frames)
        room = self._history.make_room(length, min(allowed, needed // 2))
        if room < 1:
            raise InputError(
                f"the text takes {length} positions of {self._window}, which leaves no room for "
                "its speech: use shorter sentences"
            )
        self._max_frames = min(allowed, room)
        self._is_limited_by_window = room < allowed
        self._aligned = self._new_alignment(text)
        if self._forced is not None:
            silent = self._lead + sum(self._pauses)
            check_room(self._forced, len(self._parts), silent, self._max_frames)
        self._guarded = None
        if request.guard == "on" and self._can_resample():
            self._guarded = self._new_guarded(needed)
            # One more than it may have, for the guard to see it.
            self._max_frames = min(self._max_frames, needed + 1)
        self._left = self._max_frames

    def _can_resample(self) -> bool:
        """Whether frames can be drawn again with another seed, and come out otherwise."""
        has_state = any(each and jax.tree.leaves(each.state) for each in self._functions)
        return self._forced is None and not self._request.sampling.greedy and not has_state

    def _new_alignment(self, text: str) -> PartAlignment | None:
        """The alignment of the part; None without alignment heads, or for a text too long."""
        model = self._model
        if model.alignment is None or len(self._rows.frames) > TEXT_POSITIONS:
            return None
        speaker = self._request.speaker
        return PartAlignment(
            text, speaker, model.tokenizer, model.alignment, self._config, self._total
        )

    def _new_guarded(self, max_frames: int) -> GuardedFrames:
        """The guards of the part, whose text needs at most `max_frames`."""
        model, inference = self._model, self._model.inference
        num_codebooks, silent_codes = self._config.num_codebooks, model.silent_codes
        guard = Guard(max_frames, num_codebooks, silent_codes, inference.guard)
        text_guard = None
        if self._aligned is not None:
            text_guard = TextGuard(self._aligned.texts, inference.text_guard)
        return GuardedFrames(guard, text_guard, silent_codes, num_codebooks)

    def _utterance(self) -> Utterance:
        """The part that was started; encodes what was not encoded before."""
        return Utterance(
            join_rows([*self._history.rows(), self._rows]),
            self._request.sampling,
            _derive(self._request.seed, self._part, 0),
            self._max_frames,
            self._history.num_shared,
            len(self._rows.frames),
            self._model.inference.end_bias,
            self._forced,
            stack_from_frame(self._stacks["backbone"], self._total),
            stack_from_frame(self._stacks["depth_decoder"], self._total),
            self._guidance(),
            self._request.voice,
            *self._functions,
        )

    def _guidance(self) -> UtteranceGuidance | None:
        """The unconditional prompt of the part that was started."""
        guidance = self._request.interventions.guidance
        if guidance is None or self._scale is None:
            return None
        if guidance.over == "context":
            prompt, num_shared = self._rows, 0
        else:
            tag = text_rows(None, self._request.speaker, self._config, self._model.tokenizer)
            prompt, num_shared = join_rows([*self._history.rows(), tag]), self._history.num_shared
        scale = from_frame(self._scale, self._total)
        return UtteranceGuidance(prompt, num_shared, scale, guidance.depth_decoder)

    def _report_guard(self, remark: Remark) -> None:
        frames = self._total - len(self._codes) + remark.frame
        second = frames * self._config.frame_ms / 1000
        message = f"the speech {remark.reason} at {second:.1f} s: {_DONE[remark.kind]}"
        self._notify(Notice(remark.kind, message))

    def _report_full(self) -> None:
        """The part has as many frames as it may have, and has not ended."""
        if self._is_limited_by_window:
            message = (
                f"part {self._part + 1} of the text was cut where the {self._window} positions of "
                "the model end: use shorter sentences, or less context"
            )
            self._notify(Notice("cut", message))
        else:
            self._was_cut = True  # reported at the end, with what is missing

    def _report_end(self, num_missing: int) -> None:
        if not self._has_spoken:
            message = f"the model generated no speech for {self._request.text!r}: try another seed"
            self._notify(Notice("nothing_said", message))
        if self._was_cut:
            second = self._total * self._config.frame_ms / 1000
            missing = f"{num_missing} of {len(self._parts)} parts of the text are missing"
            lack = missing if num_missing else "it may lack its end"
            message = f"the speech was cut at {second:g} s and {lack}: raise max_audio_length_ms"
            self._notify(Notice("cut", message))

    def _split(self) -> tuple[int, list[str], list[int]]:
        """Frames of silence before the text, its parts, and the frames of silence after each."""
        most = self._model.inference.max_part_characters
        if not self._request.pauses:
            parts = split_text(self._request.text, most)
            return 0, parts, [0] * len(parts)
        before, pieces = split_pauses(self._request.text)
        parts, pauses = [], []
        for piece in pieces:
            parts += split_text(piece.text, most)
            pauses += [0] * (len(parts) - len(pauses) - 1) + [self._num_frames(piece.pause)]
        return self._num_frames(before), parts, pauses

    def _num_frames(self, seconds: float) -> int:
        return round(1000 * seconds / self._config.frame_ms)

    def _total_frames(self, num_silent: int) -> int:
        """The most frames of all parts together, of which so many are pauses."""
        milliseconds = self._request.max_audio_length_ms
        if milliseconds is None:
            needed = 1000 * sum(map(self._needed_seconds, self._parts))
            needed += num_silent * self._config.frame_ms
            milliseconds = max(self._config.default_max_audio_length_ms, needed)
        frames = milliseconds / self._config.frame_ms
        if not 1 <= frames < math.inf:
            raise InputError(
                f"max_audio_length_ms is {milliseconds:g}, but one frame takes "
                f"{self._config.frame_ms:g}"
            )
        return int(frames)

    def _needed_seconds(self, text: str) -> float:
        inference = self._model.inference
        return needed_seconds(text, inference.pause_seconds, inference.seconds_per_letter)


def _derive(seed: int, part: int, attempt: int) -> int:
    """The seed of an attempt at a part; the first of all has the request's own."""
    if not part and not attempt:
        return seed
    return int(np.random.SeedSequence([seed % 2**32, part, attempt]).generate_state(1)[0])
