"""A steering vector from two voices moves the pitch; its numbers are in `tests/reference`."""

import steer_pitch


def test_steering_towards_a_lower_voice_lowers_the_pitch():
    pitches = steer_pitch.main(["--strengths=0,2"])
    assert pitches[2] < 0.8 * pitches[0]
