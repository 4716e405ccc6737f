"""Voices as data: prefilled once, kept in files, mixed."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from engine_requests import SMALL
from safetensors.numpy import load_file, save_file

import csm_jax
from csm_jax import generate
from csm_jax.inference import decode_batch
from csm_jax.inference.decode_step import prefill_prefix
from csm_jax.inference.voice import Voice, VoiceLayer
from csm_jax.io.audio import save_audio

OPTIONS = {"guard": "off", "max_audio_length_ms": 800, "seed": 3}


@pytest.fixture(scope="module")
def model():
    """Deeper than that of the other tests of inference."""
    return dataclasses.replace(csm_jax.load("random:tiny"), inference=SMALL)


def recording(seed: int, num_frames: int = 5) -> np.ndarray:
    size = num_frames * csm_jax.tiny().codec.frame_size
    return 0.1 * np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@pytest.fixture(scope="module")
def turns():
    return [csm_jax.Segment(0, "one", recording(1)), csm_jax.Segment(1, None, recording(2, 3))]


@pytest.fixture(scope="module")
def voice(model, turns):
    return model.make_voice(turns)


@pytest.fixture(scope="module")
def file(voice, tmp_path_factory):
    path = tmp_path_factory.mktemp("voices") / "two.safetensors"
    voice.save(path)
    return path


@pytest.fixture(scope="module")
def wanted(model, turns):
    """The codes of a request that prefills the turns."""
    return model.generate_codes("Hi.", context=turns, shared_turns=2, **OPTIONS)


@pytest.fixture
def no_prefill(monkeypatch):
    """Fails tests that prefill a prefix."""

    def refuse(*_, **__):
        raise AssertionError("a prefix was prefilled")

    monkeypatch.setattr(decode_batch, "prefill_prefix", refuse)


def assert_same_layers(ours: Voice, theirs: Voice) -> None:
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        for array, want in zip(mine, other, strict=True):
            assert array.dtype == want.dtype
            np.testing.assert_array_equal(array, want)


@pytest.mark.usefixtures("no_prefill")
def test_a_voice_of_a_file_speaks_to_the_bit_like_its_turns(model, voice, file, wanted):
    loaded = Voice.load(file)
    assert_same_layers(loaded, voice)
    by_position = load_file(file)["layers.0.value"]
    np.testing.assert_array_equal(by_position, voice.layers[0].value.transpose(0, 2, 1))
    assert loaded.model == model.identity
    assert len(wanted) > 5
    np.testing.assert_array_equal(model.generate_codes("Hi.", voice=loaded, **OPTIONS), wanted)
    chunks = list(model.stream("Hi.", voice=loaded, **OPTIONS))
    assert sum(map(len, chunks)) == len(wanted) * model.codec.frame_size


@pytest.mark.long
@pytest.mark.usefixtures("no_prefill")
@pytest.mark.parametrize("over", ["text", "context"])
def test_guidance_has_the_voice_in_the_prompts_that_have_a_context(model, voice, turns, over):
    changes = csm_jax.Interventions(guidance=csm_jax.Guidance(2.0, over))
    codes = model.generate_codes("Hi.", voice=voice, interventions=changes, **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_batch, "prefill_prefix", prefill_prefix)
        shared = {"context": turns, "shared_turns": 2, "interventions": changes}
        want = model.generate_codes("Hi.", **shared, **OPTIONS)
    np.testing.assert_array_equal(codes, want)


@pytest.mark.usefixtures("no_prefill")
def test_an_engine_speaks_with_a_voice_before_the_context(model, voice, wanted):
    context = [csm_jax.Segment(0, "And?", codes=wanted)]
    with csm_jax.Engine(model, max_batch=2, max_seq_len=256) as engine:
        tickets = [
            engine.submit("Hi.", voice=voice, **OPTIONS),
            engine.submit("Hi.", context=context, voice=voice, **OPTIONS),
        ]
        alone, after = (ticket.codes() for ticket in tickets)
    assert len(alone) == len(wanted)
    assert not np.array_equal(alone, after)


def test_a_conversation_has_the_voice_before_its_turns(model, voice):
    conversation = csm_jax.Conversation(model, voice=voice, **OPTIONS)
    conversation.speak("Hi.")
    request = conversation.request("And?")
    assert request.voice is voice
    assert [turn.text for turn in request.context] == ["Hi."]


def test_arrays_of_every_type_are_kept(voice, tmp_path):
    for dtype in (ml_dtypes.bfloat16, np.float16):
        layers = tuple(VoiceLayer(*(x.astype(dtype) for x in layer)) for layer in voice.layers)
        narrow = dataclasses.replace(voice, layers=layers)
        narrow.save(tmp_path / "narrow.safetensors")
        assert_same_layers(Voice.load(tmp_path / "narrow.safetensors"), narrow)


def test_a_voice_of_another_model_is_refused_by_name(model, voice):
    def refused(other: csm_jax.Generator) -> str:
        with pytest.raises(csm_jax.CheckpointError) as caught:
            other.generate("Hi.", voice=voice)
        return str(caught.value)

    head = model.params["codebook0_head"]["weight"]
    params = model.params | {"codebook0_head": {"weight": head + 1}}
    tuned = dataclasses.replace(model, params=params, name="mine/tuned")
    said = refused(tuned)
    assert said.startswith("the voice was made with random:tiny, whose weights are not those of")
    assert "mine/tuned" in said
    assert "in float32, not in bfloat16" in refused(csm_jax.load("random:tiny", "bfloat16"))
    sizes = dataclasses.replace(model.config, space_after_speaker=True)
    assert "whose sizes are not" in refused(dataclasses.replace(model, config=sizes))
    assert dataclasses.replace(model, inference=model.inference).identity == model.identity


def test_files_that_are_no_voices_are_refused(file, tmp_path):
    bad = tmp_path / "bad.safetensors"

    def refused(content: bytes | None = None) -> None:
        if content is not None:
            bad.write_bytes(content)
        with pytest.raises(csm_jax.InputError, match=r"bad\.safetensors is no voice of csm_jax"):
            Voice.load(bad)

    refused()
    refused(b"\x80\x04K\x01.")  # a pickle
    refused(file.read_bytes()[:-5])
    tensors = load_file(file)
    save_file(tensors, bad)
    refused()
    save_file(tensors, bad, {"manifest": json.dumps({"format": "x", "version": 1})})
    refused()


def test_a_voice_must_fit(model, voice, turns):
    with pytest.raises(csm_jax.InputError, match="do not go together"):
        csm_jax.Request("Hi.", context=turns, shared_turns=1, voice=voice)
    with pytest.raises(csm_jax.InputError, match="not Voice"):
        csm_jax.Request("Hi.", voice="anna")
    size = model.config.backbone.max_seq_len - 10
    long = csm_jax.Segment(0, None, codes=np.ones((size, model.config.num_codebooks), np.int32))
    with pytest.raises(csm_jax.InputError, match="make it of a shorter recording"):
        model.generate("Hi.", voice=model.make_voice([long]))
    with pytest.raises(csm_jax.InputError, match="but its turns take"):
        model.generate("Hi.", voice=dataclasses.replace(voice, turns=voice.turns[:1]))
    with pytest.raises(csm_jax.InputError, match="cut them"):
        model.make_voice([long, long])
    with pytest.raises(csm_jax.InputError, match="no recording"):
        model.make_voice([csm_jax.Segment(0, "text alone")])
    with pytest.raises(csm_jax.InputError, match="no turns"):
        model.make_voice([])


def first_values(model: csm_jax.Generator, embedded: np.ndarray) -> np.ndarray:
    """The values of the first layer [K, T, H] of embedded rows [T, D], in numpy."""
    sizes, layer = model.config.backbone, model.params["backbone"]["layers"][0]
    scale = np.asarray(layer["attn_norm"]["scale"])
    power = np.mean(embedded**2, axis=-1, keepdims=True)
    normed = embedded / np.sqrt(power + sizes.norm_eps) * scale
    fused = np.asarray(layer["attn"]["qkv"]["weight"])
    by_head = fused.reshape(sizes.num_kv_heads, -1, sizes.head_dim, sizes.embed_dim)
    return np.einsum("khd,td->kht", by_head[:, -1], normed)


def test_a_mixture_is_one_of_embeddings(model):
    """Those of both prompts, as `states` gives them at layer 0."""
    codes = [model.encode(recording(seed, 4 + seed)) for seed in (1, 2)]
    voices = [model.make_voice([csm_jax.Segment(0, "one", codes=each)]) for each in codes]
    mixed = model.mix_voices(voices, [3, 1])
    size = min(map(len, codes))
    inputs = [model.states("one", each[:size], backbone=[0]).backbone.values[0] for each in codes]
    want = first_values(model, 0.75 * inputs[0] + 0.25 * inputs[1])
    np.testing.assert_allclose(mixed.layers[0].value, want, rtol=1e-3, atol=1e-5)
    assert len(mixed.turns[0].codes) == size
    assert mixed.is_mixed
    whole = model.mix_voices(voices, [0, 1])
    short = model.make_voice([csm_jax.Segment(0, "one", codes=codes[1][:size])])
    assert_same_layers(whole, short)


def test_voices_that_cannot_be_mixed_are_refused(model, voice):
    other = model.make_voice([csm_jax.Segment(0, "two", recording(1))])
    for voices, weights, message in (
        ([voice, other], [1, 1], "same speakers and transcripts"),
        ([voice, voice], [1], "2 voices have 1 weights"),
        ([voice, voice], [1, -1], "must be from 0"),
        ([voice, voice], [0, 0], "not all 0"),
        ([model.mix_voices([other, other], [1, 1])], [1], "mixed already"),
    ):
        with pytest.raises(csm_jax.InputError, match=message):
            model.mix_voices(voices, weights)


def test_voices_on_the_command_line(model, tmp_path, capsys):
    save_audio(tmp_path / "a.wav", recording(1), 24_000)
    path, out = tmp_path / "a.safetensors", [f"--out={tmp_path / 'x.wav'}"]
    common = ["--checkpoint=random:tiny", "--max_audio_length_ms=400"]
    context = [f"--context_audio={tmp_path / 'a.wav'}", "--context_without_text"]
    assert generate.run([*common, *context, f"--save_voice={path}"]) == 0
    saved = Voice.load(path)
    codes = [f"--codes_out={tmp_path / 'x.npy'}"]
    spoken = [*common, "--text=Hi.", "--seed=3", *out, *codes]
    kept = tmp_path / "kept.safetensors"
    assert generate.run([*spoken, f"--voice={path}:1,{path}:3", f"--save_voice={kept}"]) == 0
    mixed = Voice.load(kept)
    assert mixed.is_mixed
    want = model.generate_codes("Hi.", voice=mixed, seed=3, max_audio_length_ms=400)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), want)
    other = tmp_path / "other.safetensors"
    identity = dataclasses.replace(saved.model, checkpoint="mine/tuned", weights="")
    dataclasses.replace(saved, model=identity).save(other)
    capsys.readouterr()
    for wrong, message in (
        ([f"--voice={tmp_path / 'no.safetensors'}"], "is no voice"),
        ([f"--voice={path}:a"], "must be FILE or FILE:WEIGHT"),
        (["--save_voice=a.wav"], "must end with .safetensors"),
        (["--save_voice=a.safetensors"], "needs recordings"),
        ([f"--voice={other}"], "made with mine/tuned, whose weights are not those of random:tiny"),
    ):
        assert generate.run([*spoken, *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_mixture_moves_the_pitch_of_demo():
    """Its two voices: below a share of about one half, the lower one speaks."""
    import steer_pitch

    model = csm_jax.load("demo")
    segments = demo_prompts(model)
    voices = [model.make_voice([segment]) for segment in segments]
    pitches = []
    for share in (1.0, 0.9, 0.1, 0.0):
        mixed = model.mix_voices(voices, [share, 1 - share])
        requests = [csm_jax.Request(text, voice=mixed, seed=2) for text in steer_pitch.SPOKEN]
        audio = np.concatenate(model.generate_batch(requests))
        pitches.append(steer_pitch.median_pitch(audio, model.sample_rate))
    assert min(pitches[:2]) > 1.4 * max(pitches[2:])
    assert np.isfinite(pitches).all()


def demo_prompts(model: csm_jax.Generator) -> list[csm_jax.Segment]:
    """The recordings of both voices of demo, as one speaker without a transcript."""
    from csm_jax.io.audio import load_audio
    from csm_jax.loading import BUNDLED

    paths = [BUNDLED["demo"] / "prompts" / f"{name}.flac" for name in ("slt", "rms")]
    return [csm_jax.Segment(0, None, load_audio(path, model.sample_rate)) for path in paths]
