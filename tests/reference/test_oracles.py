"""The two torch references agree with each other. Of csm_jax only the config is used.

The tests take about 10 seconds, mostly for imports.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("torchtune")

from safetensors.torch import load_file  # noqa: E402
from torchtune.models.llama3_2 import llama3_2  # noqa: E402

import oracles  # noqa: E402
from csm_jax.config import CSMConfig, csm_1b, tiny  # noqa: E402
from oracles import sesame as assembly  # noqa: E402

DATA = Path(__file__).parent / "data"
NUM_FRAMES = 10


def with_llama_fields(config: CSMConfig, **fields) -> CSMConfig:
    return replace(
        config,
        backbone=replace(config.backbone, **fields),
        depth_decoder=replace(config.depth_decoder, **fields),
    )


def sharp_rope() -> CSMConfig:
    """A config whose length either keeps or slows every frequency; with the length of `tiny()`, one
    frequency of each stack is in between."""
    scaling = replace(tiny().backbone.rope_scaling, original_max_seq_len=64)
    return with_llama_fields(tiny(), rope_scaling=scaling)


CONFIGS = {
    "tiny": tiny(),
    "sharp_rope": sharp_rope(),
    "plain_rope": with_llama_fields(tiny(), rope_scaling=None),
    "wide_heads": with_llama_fields(tiny(), head_dim=10),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """(config, transformers model, torchtune model), both with the same weights."""
    config = CONFIGS[request.param]
    model = oracles.hf_model(config, seed=0)
    return config, model, oracles.sesame_from_hf(model, config)


@pytest.fixture(scope="module")
def tiny_hf():
    return oracles.hf_model(tiny(), seed=0)


def text_prompt(config):
    return oracles.random_prompt(config, seed=1, num_ids=9)


def audio_prompt(config):
    return oracles.random_prompt(config, seed=2, num_ids=6, context=[(5, 11), (3, 4)])


def assert_close(actual, expected, tolerance=1e-4):
    """Relative to the largest expected value."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("prompt", [text_prompt, audio_prompt])
def test_backbone_logits_agree(pair, prompt):
    config, model, sesame = pair
    rows = prompt(config)
    assert_close(sesame.hidden(rows), oracles.hf_hidden(model, rows))
    assert_close(sesame.logits(rows), oracles.hf_logits(model, rows))


def test_depth_logits_agree(pair):
    config, model, sesame = pair
    prompt = audio_prompt(config)
    hidden, codes = oracles.hf_hidden(model, prompt), prompt[0][:, :-1]
    expected = oracles.hf_depth_logits(model, hidden, codes)
    assert expected.shape == (len(codes), config.num_codebooks - 1, config.audio_vocab_size)
    assert_close(sesame.depth_logits(hidden, codes), expected)


@pytest.mark.parametrize("prompt", [text_prompt, audio_prompt])
def test_greedy_codes_are_identical(pair, prompt):
    config, model, sesame = pair
    rows = prompt(config)
    expected = oracles.hf_greedy(model, rows, NUM_FRAMES)
    assert expected.shape == (NUM_FRAMES, config.num_codebooks)
    assert expected.max() < config.codec.codebook_size
    assert oracles.greedy_margin(model, rows, expected) > 1e-4
    assert torch.equal(oracles.greedy(sesame, rows, NUM_FRAMES), expected)


def test_ragged_batch_equals_single_rows(tiny_hf):
    prompts = [text_prompt(tiny()), audio_prompt(tiny())]
    batch = oracles.hf_greedy_batch(tiny_hf, prompts, NUM_FRAMES)
    for codes, prompt in zip(batch, prompts, strict=True):
        assert torch.equal(codes, oracles.hf_greedy(tiny_hf, prompt, NUM_FRAMES))


def test_audio_path_equals_encoded_frames(tiny_hf):
    config, rng = tiny(), torch.Generator().manual_seed(3)
    lengths = [4, 7]
    waveforms = [0.3 * torch.randn(n * config.codec.frame_size, generator=rng) for n in lengths]
    codes = torch.cat([oracles.hf_encode(tiny_hf, waveform) for waveform in waveforms])
    ids = oracles.random_chat_ids(config, rng, [(5, n) for n in lengths], num_ids=6)
    expected = oracles.hf_greedy_from_audio(tiny_hf, ids, waveforms, NUM_FRAMES)
    prompt = oracles.frames_from_ids(config, ids, codes)
    assert torch.equal(oracles.hf_greedy(tiny_hf, prompt, NUM_FRAMES), expected)


def test_codec_uses_many_codes(tiny_hf):
    config = tiny()
    waveform = 0.3 * torch.randn(30 * config.codec.frame_size, generator=torch.manual_seed(4))
    codes = oracles.hf_encode(tiny_hf, waveform)
    assert codes.shape == (30, config.num_codebooks)
    assert min(len(column.unique()) for column in codes.T) >= 8
    assert oracles.hf_decode(tiny_hf, codes).shape == waveform.shape


@pytest.mark.parametrize("other", ["sharp_rope", "plain_rope"])
def test_weights_reveal_wrong_rope(tiny_hf, other):
    prompt = audio_prompt(tiny())
    hidden, codes = oracles.hf_hidden(tiny_hf, prompt), prompt[0][:, :-1]
    wrong = oracles.sesame_from_hf(tiny_hf, CONFIGS[other])
    backbone_error = (wrong.logits(prompt) - oracles.hf_logits(tiny_hf, prompt)).abs().max()
    expected = oracles.hf_depth_logits(tiny_hf, hidden, codes)
    depth_error = (wrong.depth_logits(hidden, codes) - expected).abs().max()
    assert backbone_error > 0.02
    # In its 7 positions, the depth decoder rotates its slow pairs by hundredths of a radian.
    assert depth_error > 0.001


def test_released_rope_numbers_are_equivalent():
    """The hub's `config.json` states the scaling of `models.py` with other numbers."""
    released = oracles.hf_config(csm_1b())
    # (low, high, original length) of each stack on the hub.
    published = {"backbone": (0.125, 0.5, 1024), "depth_decoder": (0.001953125, 0.0078125, 16)}
    configs = {"backbone": released, "depth_decoder": released.depth_decoder_config}
    for name, (low, high, length) in published.items():
        torchtune_theta = assembly._torchtune_rope(getattr(csm_1b(), name)).theta
        torch.testing.assert_close(_inverse_frequencies(configs[name]), torchtune_theta)
        configs[name].rope_parameters |= {
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
        torch.testing.assert_close(_inverse_frequencies(configs[name]), torchtune_theta)


def _inverse_frequencies(config) -> torch.Tensor:
    from transformers.models.csm.modeling_csm import CsmRotaryEmbedding

    return CsmRotaryEmbedding(config).inv_freq


def test_parameter_names_are_torchtunes_own():
    """`models.py` calls torchtune's builder, which refuses some sizes that `SesameModel` has."""
    size = csm_1b().depth_decoder
    with torch.device("meta"):
        assembled = assembly._torchtune_llama(size).state_dict()
        built = llama3_2(
            vocab_size=1,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            num_kv_heads=size.num_kv_heads,
            embed_dim=size.embed_dim,
            max_seq_len=size.max_seq_len,
            intermediate_dim=size.mlp_dim,
        ).state_dict()
    shapes = {name: tensor.shape for name, tensor in assembled.items()}
    expected = {name: t.shape for name, t in built.items() if name != "tok_embeddings.weight"}
    assert shapes == expected


def test_full_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        sesame = oracles.SesameModel(csm_1b())
        codec = transformers.MimiModel(oracles.hf_codec_config(csm_1b().codec))
    assert sum(p.numel() for p in sesame.parameters()) == 1_552_791_552
    assert sum(p.numel() for p in codec.parameters()) == 79_308_609  # without the codebooks


def test_saved_layout_2_loads_again(tiny_hf, tmp_path):
    prompt = audio_prompt(tiny())
    layouts = {
        "single": {},
        "shards": {"max_shard_size": "200KB"},
        "backbone_table": {"audio_tables": ["backbone"]},
        "both_tables": {"audio_tables": ["backbone", "depth_decoder"]},
    }
    for name, options in layouts.items():
        directory = oracles.save_hf(tiny_hf, tmp_path / name, **options)
        loaded = transformers.CsmForConditionalGeneration.from_pretrained(directory).eval()
        expected = oracles.hf_logits(tiny_hf, prompt)
        torch.testing.assert_close(oracles.hf_logits(loaded, prompt), expected)


@pytest.mark.parametrize("max_shard_size", [None, "200KB"])
def test_hub_names_keep_every_tensor(tiny_hf, tmp_path, max_shard_size):
    plain = oracles.save_hf(tiny_hf, tmp_path / "plain")
    hub = oracles.save_hf(tiny_hf, tmp_path / "hub", max_shard_size, hub_names=True)
    index = json.loads((hub / "transformers.safetensors.index.json").read_text())["weight_map"]
    shards = {file.name: load_file(file) for file in hub.glob("*.safetensors")}
    assert set(index.values()) == set(shards)
    assert index == {name: shard for shard, tensors in shards.items() for name in tensors}
    assert index.keys() == load_file(plain / "model.safetensors").keys()


def test_saved_layout_1_loads_again(tiny_hf, tmp_path):
    sesame = oracles.sesame_from_hf(tiny_hf, tiny())
    directory = oracles.save_sesame(sesame, tmp_path / "safetensors")
    pickled = oracles.save_sesame(sesame, tmp_path / "pickle", as_checkpoint=True)
    weights = load_file(directory / "model.safetensors")
    assert weights.keys() == torch.load(pickled / "ckpt.pt").keys() == sesame.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in sesame.state_dict().items())


def test_published_greedy_tokens_are_well_formed():
    cases = json.loads((DATA / "csm_1b_greedy_tokens.json").read_text())["cases"]
    config = csm_1b()
    for case in cases:
        codes = torch.tensor(case["codes"])
        assert codes.shape[1] == config.num_codebooks
        assert codes.min() >= 0
        assert codes.max() < config.codec.codebook_size
        assert codes.any(dim=1).tolist() == [True] * (len(codes) - 1) + [False]
