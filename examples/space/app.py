"""A Hugging Face Space: a conversation of two speakers, each with a voice prompt.

    pip install -r requirements.txt && python app.py

The app uses the library inside gradio's server and is for one tenant; its README says what that
means. CSM_CHECKPOINT names the model.
"""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np

import csm_jax
from csm_jax.errors import CSMError, first_line
from csm_jax.loading import find_directory
from csm_jax.serve.audio.decoding import decode_recording
from csm_jax.serve.settings import Limits
from csm_jax.serve.voices.files import VoiceFile, read_voices
from csm_jax.serve.voices.presets import find_presets

SPEAKERS = ("A", "B")
OWN, NONE = "My recording", "None"
MAX_LINES = 32
EXAMPLES = {
    "demo": "one two three\nfour five six\nseven eight nine",
    "sesame/csm-1b": "Did you hear the rain last night?\nI did. It woke me up at three.\n"
    "Then you should sleep in tomorrow.",
}
TERMS = """Do not use this model to impersonate anybody without their explicit consent, to deceive \
or to misinform, or for anything illegal or harmful. Do not pass its speech off as a recording."""


def default_checkpoint() -> str:
    """CSM_CHECKPOINT; else Sesame's model if there is a token, or the bundled demo."""
    default = "sesame/csm-1b" if os.environ.get("HF_TOKEN") else "demo"
    return os.environ.get("CSM_CHECKPOINT", default)


def read_prompts(checkpoint: str) -> dict[str, VoiceFile]:
    """The preset voices of a checkpoint, by name."""
    directories = find_presets(checkpoint, find_directory(checkpoint))
    files = [file for each in directories for file in read_voices(each, Limits())]
    return {file.name: file for file in files}


class Space:
    """The model, its prompts, and the page."""

    def __init__(self, checkpoint: str):
        self.checkpoint = checkpoint
        self.model = csm_jax.load(checkpoint)
        self.prompts = read_prompts(checkpoint)

    def build(self) -> gr.Blocks:
        """Builds the page. Start it with `launch`: only then gradio checks paths of files."""
        with gr.Blocks(title="CSM in JAX", delete_cache=(600, 600)) as demo:
            gr.Markdown(f"# CSM in JAX\n{TERMS}")
            with gr.Row():
                speakers = [self._speaker_inputs(number) for number in range(len(SPEAKERS))]
            example = EXAMPLES.get(self.checkpoint, EXAMPLES["sesame/csm-1b"])
            lines = gr.Textbox(example, lines=6, label="Conversation, a line for each turn")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
            start = gr.Button("Speak", variant="primary")
            audio = gr.Audio(label="Conversation", interactive=False)
            inputs = [lines, seed, *(part for speaker in speakers for part in speaker)]
            start.click(self.speak, inputs, audio, concurrency_limit=1)
        return demo.queue(max_size=16)

    def speak(self, text: str, seed: int, *voices) -> Iterator[tuple[int, np.ndarray]]:
        """Generates line after line; yields all audio so far after each."""
        try:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if not lines or len(lines) > MAX_LINES:
                raise gr.Error(f"Write 1 to {MAX_LINES} lines.")
            turns, speech = self._prompt_turns(voices), []
            conversation = csm_jax.Conversation(self.model, turns, seed=int(seed))
            for number, line in enumerate(lines):
                speech.append(conversation.speak(line, number % len(SPEAKERS)))
                samples = np.clip(np.concatenate(speech), -1, 1)
                yield self.model.sample_rate, (32767 * samples).astype(np.int16)
        except CSMError as error:
            raise gr.Error(first_line(error), print_exception=False) from error

    def _speaker_inputs(self, number: int) -> list[gr.components.Component]:
        """Inputs of a speaker: a preset of the model, or a recording and its transcript."""
        names = list(self.prompts)
        chosen = names[number % len(names)] if names else NONE
        with gr.Column(), gr.Group():
            prompt = gr.Radio(
                [*names, OWN, NONE], value=chosen, label=f"Speaker {SPEAKERS[number]}"
            )
            recording = gr.Audio(type="filepath", label="My recording")
            transcript = gr.Textbox(label="Transcript of my recording")
        return [prompt, recording, transcript]

    def _prompt_turns(self, voices: tuple) -> list[csm_jax.Segment]:
        count = len(voices) // len(SPEAKERS)
        turns = [
            self._prompt_turn(speaker, *voices[count * speaker : count * (speaker + 1)])
            for speaker in range(len(SPEAKERS))
        ]
        return [turn for turn in turns if turn is not None]

    def _prompt_turn(
        self, speaker: int, name: str, recording: str | None, transcript: str
    ) -> csm_jax.Segment | None:
        if name == NONE:
            return None
        if prompt := self.prompts.get(name):
            return csm_jax.Segment(speaker, prompt.text, prompt.audio)
        if not recording or not (transcript or "").strip():
            message = f"Speaker {SPEAKERS[speaker]} needs a recording and its transcript."
            raise gr.Error(message)
        audio = decode_recording(Path(recording).read_bytes(), Limits())
        return csm_jax.Segment(speaker, transcript, audio)


if __name__ == "__main__":
    Space(default_checkpoint()).build().launch(max_file_size="10mb", footer_links=[])
