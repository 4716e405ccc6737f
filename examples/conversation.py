"""A conversation of two voices: every turn has all earlier turns as its context.

python examples/conversation.py --checkpoint=random:tiny --out=conversation.wav
"""

import argparse

import numpy as np

import csm_jax
from csm_jax.io.audio import save_audio

TURNS = [
    (0, "Did you hear the rain last night?"),
    (1, "I did. It woke me up at three."),
    (0, "Then you should sleep in tomorrow."),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="sesame/csm-1b")
    parser.add_argument("--out", default="conversation.wav")
    arguments = parser.parse_args()

    model = csm_jax.load(arguments.checkpoint)
    conversation = csm_jax.Conversation(model, max_audio_length_ms=4_000)
    speech = [conversation.speak(text, speaker) for speaker, text in TURNS]
    save_audio(arguments.out, np.concatenate(speech), model.sample_rate)


if __name__ == "__main__":
    main()
