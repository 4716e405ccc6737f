"""English phonemes in the symbols of Kokoro-82M, from espeak-ng (Debian package `espeak-ng`)."""

import re
import subprocess

# espeak-ng writes a sound of two symbols with a tie, `t^ʃ`. Kokoro has one letter for it, like
# misaki (`espeak.py`, Apache-2.0).
_AS_ONE = {
    "a^ɪ": "I",
    "a^ʊ": "W",
    "e^ɪ": "A",
    "o^ʊ": "O",
    "ə^ʊ": "O",
    "ɔ^ɪ": "Y",
    "d^ʒ": "ʤ",
    "t^ʃ": "ʧ",
    "ɚ": "əɹ",
    "ɜː": "ɜɹ",
    "r": "ɹ",
    "x": "k",
    "ç": "k",
    "ɬ": "l",
    "^": "",
    # Syllabic, nasal, palatal.
    "\N{COMBINING VERTICAL LINE BELOW}": "",
    "\N{COMBINING TILDE}": "",
    "ʲ": "",
}
SILENCE = " "
# The labels of a unit of time of a recording. A training run of the codec depends on their order.
SOUNDS = SILENCE + "AIOWYabdefhijklmnopstuvwzæðŋɐɑɒɔəɛɜɡɪɹɾʃʊʌʒʔʤʧθᵻ"
STRESS, LONG = "ˈˌ", "ː"
_CLAUSE = re.compile(r"([^.,!?;:]+)([.,!?;:]*)")


def phonemes_of(text: str) -> str:
    """The symbols of a text, with its punctuation.

    espeak-ng drops punctuation, so every clause is converted separately.
    """
    parts = []
    for clause, marks in _CLAUSE.findall(text):
        if symbols := _of_clause(clause.strip()):
            parts.append(symbols + marks[:1])
    return " ".join(parts)


def _of_clause(clause: str) -> str:
    command = ["espeak-ng", "-q", "--ipa", "--tie=^", "-v", "en-us", "--", clause]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    symbols = " ".join(output.split())
    for tied, letter in _AS_ONE.items():
        symbols = symbols.replace(tied, letter)
    return symbols


def sounds_of(phonemes: str) -> list[str]:
    """The sound, of `SOUNDS`, of every symbol.

    A stress mark is the beginning of the next sound, a length mark the end of the previous one;
    punctuation and unknown symbols are silence.
    """
    sounds: list[str] = []
    for symbol in phonemes:
        if symbol == LONG and sounds:
            sounds.append(sounds[-1])
        else:
            sounds.append(symbol if symbol in SOUNDS or symbol in STRESS else SILENCE)
    for i in reversed(range(len(sounds))):
        if sounds[i] in STRESS:
            sounds[i] = sounds[i + 1] if i + 1 < len(sounds) else SILENCE
    return sounds
