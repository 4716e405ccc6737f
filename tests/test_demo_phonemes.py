"""Phonemes for the synthesizer of the open-vocabulary voice, and labels of a recording."""

import shutil

import pytest
from phonemes import SOUNDS, phonemes_of, sounds_of


def test_stress_marks_belong_to_the_next_sound_and_length_marks_to_the_previous():
    assert sounds_of("həlˈO, juː") == ["h", "ə", "l", "O", "O", " ", " ", "j", "u", "u"]


def test_every_symbol_has_a_sound():
    for phonemes in ("ˈ", "ː", "ˈˌ", "¿a!", "", "aˈ"):
        sounds = sounds_of(phonemes)
        assert len(sounds) == len(phonemes)
        assert all(sound in SOUNDS for sound in sounds)
    assert len(set(SOUNDS)) == len(SOUNDS)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_diphthongs_and_affricates_are_single_letters_and_punctuation_stays():
    """The notation is that of misaki, which Kokoro was trained with."""
    assert phonemes_of("Did the judge choose my boy?") == "dˈɪd ðə ʤˈʌʤ ʧˈuːz mI bˈY?"
    assert phonemes_of("No: go now, Jane!") == "nˈO: ɡˌO nˈW, ʤˈAn!"
    assert phonemes_of("Her first work.") == "hɜɹ fˈɜɹst wˈɜɹk."
