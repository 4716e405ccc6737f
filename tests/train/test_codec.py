"""Training of the codec: spectra, reconstruction, and codebooks that are moving averages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import csm_jax
from csm_jax.mimi.codec import Mimi, bind
from csm_jax.train import codec
from csm_jax.train.codec import CodecStepConfig, Usage, codec_step, init_codec_state, reconstruct
from csm_jax.train.optimizer import OptimizerConfig, make_optimizer
from csm_jax.train.spectral import SCALES, log_mel, mel_distance, mel_filters

CODEC = csm_jax.tiny().codec
STEPS = 40
CONFIG = CodecStepConfig(
    CODEC, OptimizerConfig(kind="muon", learning_rate=1e-2, steps=STEPS, warmup=4)
)
LABELLED = dataclasses.replace(CONFIG, num_labels=5, label_weight=1.0)
SEED = np.uint32(3)


pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture(scope="module")
def mimi():
    return Mimi(CODEC, rngs=nnx.Rngs(0))


def tones(rows: int, num_frames: int) -> np.ndarray:
    """A buzz with another pitch in every row, [rows, samples]."""
    time = np.arange(num_frames * CODEC.frame_size) / CODEC.sample_rate
    pitches = 90 + 37 * np.arange(rows)[:, None]
    buzz = sum(np.sin(2 * np.pi * k * pitches * time) / k for k in range(1, 12))
    return (0.2 * buzz * np.sin(2 * np.pi * 3 * time) ** 2).astype(np.float32)


@pytest.mark.parametrize(("window", "num_mels"), SCALES)
def test_log_mel_spectra_equal_those_of_transformers(window, num_mels):
    audio_utils = pytest.importorskip("transformers.audio_utils")
    audio = tones(1, 3)[0]
    filters = audio_utils.mel_filter_bank(
        window // 2 + 1, num_mels, 0, 12_000, 24_000, mel_scale="htk"
    )
    theirs = audio_utils.spectrogram(
        audio,
        np.hanning(window + 1)[:-1] * (4 / window),
        window,
        window // 4,
        power=1.0,
        center=False,
        mel_filters=filters,
        mel_floor=1e-3,
        log_mel="log",
    )
    ours = log_mel(audio[None], 24_000, window, num_mels)[0]
    np.testing.assert_allclose(mel_filters(24_000, window, num_mels), filters, atol=1e-6)
    np.testing.assert_allclose(ours, theirs.T, atol=1e-3)


def test_mel_distance_is_the_logarithm_of_a_change_in_loudness():
    audio = tones(2, 3) + 0.5  # loud enough to be above the floor in only a few bands
    loud = np.random.default_rng(0).standard_normal(audio.shape).astype(np.float32)
    assert mel_distance(loud, loud, 24_000) == 0
    assert mel_distance(loud, 2 * loud, 24_000) == pytest.approx(np.log(2), rel=1e-2)


@pytest.mark.long
def test_reconstruct_equals_encode_and_decode(mimi):
    audio = tones(2, 5)
    reconstructed, _, _ = reconstruct(mimi, audio, jnp.array([CODEC.num_codebooks, 3]))
    codes = mimi.encode(audio, CODEC.num_codebooks)
    np.testing.assert_allclose(reconstructed[:1], mimi.decode(codes[:1])[..., 0], atol=1e-5)
    np.testing.assert_allclose(reconstructed[1:], mimi.decode(codes[1:, :, :3])[..., 0], atol=1e-5)


def test_the_gradient_passes_the_codebooks_unchanged(mimi):
    quantizer = mimi.quantizer.acoustic
    random = np.random.default_rng(0)
    latent = random.standard_normal((2, 3, CODEC.embed_dim)).astype(np.float32)
    weight = random.standard_normal(latent.shape).astype(np.float32)
    kept = jnp.array([6, 2])

    def quantized(x):
        return jnp.sum(codec._quantize(quantizer, x, kept)[0] * weight)

    def unquantized(x):
        return jnp.sum(quantizer.out_proj(quantizer.in_proj(x)) * weight)

    through, around = (jax.jit(jax.grad(loss))(latent) for loss in (quantized, unquantized))
    np.testing.assert_allclose(through, around, rtol=1e-4, atol=1e-5)


def test_codebooks_are_updated_as_in_moshi():
    torch = pytest.importorskip("torch")
    core_vq = pytest.importorskip("moshi.quantization.core_vq")
    size, dim = CODEC.codebook_size, CODEC.codebook_dim
    random = np.random.default_rng(1)
    count = random.uniform(1, 3, size).astype(np.float32)
    book = random.standard_normal((size, dim)).astype(np.float32)
    theirs = core_vq.EuclideanCodebook(dim, size, decay=CONFIG.decay, check_unused_every=10**6)
    theirs._initialized.fill_(1)
    theirs.cluster_usage.copy_(torch.tensor(count))
    theirs.embedding_sum.copy_(torch.tensor(book * count[:, None]))
    theirs.train()

    usage = Usage(jnp.array(count), jnp.array(book * count[:, None]))
    update = jax.jit(codec._update_codebook, static_argnums=3)
    for step in range(3):
        vectors = random.standard_normal((50, dim)).astype(np.float32)
        codes = codec.nearest(vectors[None], jnp.array(book))[0]
        choice = codec._Choice(jnp.array(vectors), codes)
        usage, book = update(usage, choice, jax.random.key(step), CONFIG)
        with torch.no_grad():
            theirs(torch.tensor(vectors)[None])
    np.testing.assert_allclose(usage.count, theirs.cluster_usage, rtol=1e-5)
    np.testing.assert_allclose(book, theirs.embedding.numpy(), atol=1e-5)


def test_an_unused_entry_is_replaced_by_a_vector_of_the_batch():
    size, dim = CODEC.codebook_size, CODEC.codebook_dim
    vectors = np.random.default_rng(0).standard_normal((40, dim)).astype(np.float32)
    count = np.full(size, 2.0, np.float32)
    # After another step without a vector, the usage is too small.
    count[[4, 9]] = 0.2 * 40 / size * 0.99
    usage = Usage(jnp.array(count), jnp.zeros((size, dim)))
    choice = codec._Choice(jnp.array(vectors), jnp.zeros(40, jnp.int32))
    _, book = codec._update_codebook(usage, choice, jax.random.key(0), CONFIG)
    is_vector = np.isclose(book[:, None], vectors[None], atol=1e-5).all(axis=-1).any(axis=-1)
    assert is_vector.nonzero()[0].tolist() == [4, 9]


@pytest.mark.long
def test_training_lowers_the_losses():
    audio = tones(4, 4)
    # The label depends on the row only: it has a pitch of its own.
    labels = np.broadcast_to(np.arange(4, dtype=np.int32)[:, None, None], (4, 4, 2))
    state = init_codec_state(LABELLED, 0)
    before = state.params["quantizer"]["acoustic"]["codebooks"][5].copy()
    distances, compiled = [], codec_step._cache_size()
    for _ in range(STEPS):
        state, metrics = codec_step(state, audio, SEED, labels, config=LABELLED)
        distances.append(float(metrics.mel))
    assert codec_step._cache_size() == compiled + 1
    everything = jnp.full(len(audio), CODEC.num_codebooks)
    for params in (state.params, state.average):
        reconstructed, _, _ = reconstruct(bind(CODEC, params), audio, everything)
        assert mel_distance(reconstructed, audio, 24_000) < 0.6 * distances[0]
    assert not np.array_equal(before, state.params["quantizer"]["acoustic"]["codebooks"][5])
    assert 1 < metrics.perplexity <= CODEC.codebook_size
    # The classifier starts at zero, with equal probabilities, and Adam takes small steps.
    assert metrics.labels < np.log(LABELLED.num_labels) - 0.03


def known_labels(rows: int, num_frames: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(-1, 5, (rows, num_frames, LABELLED.labels_per_frame)).astype(np.int32)


def test_the_label_loss_equals_that_of_torch(mimi):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    labels = known_labels(2, 3)
    head = {
        "weight": random.standard_normal((2 * 5, CODEC.codebook_dim)).astype(np.float32),
        "bias": random.standard_normal(2 * 5).astype(np.float32),
    }
    everything = jnp.full(2, CODEC.num_codebooks)

    def label_loss(audio):
        _, _, (first, _) = reconstruct(mimi, audio, everything)
        return codec._label_loss(mimi.quantizer.semantic, first[0], head, labels)

    loss = jax.jit(label_loss)(tones(2, 3))
    codes = jax.jit(mimi.encode, static_argnums=1)(tones(2, 3), 1)[..., 0]
    entries = np.asarray(mimi.quantizer.semantic.codebooks[0][...])[np.asarray(codes)]
    logits = entries @ head["weight"].T + head["bias"]
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(logits.reshape(-1, 5)),
        torch.tensor(labels.reshape(-1)).long(),
        ignore_index=-1,
    )
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-4)


def test_unknown_labels_have_no_gradient(mimi):
    head = {"weight": jnp.ones((2 * 5, CODEC.codebook_dim)), "bias": jnp.arange(10.0)}
    choice = codec._Choice(jnp.ones((6, CODEC.codebook_dim)), jnp.zeros(6, jnp.int32))

    def gradients(labels):
        def loss(residual, head):
            asked = choice._replace(residual=residual)
            return codec._label_loss(mimi.quantizer.semantic, asked, head, labels)

        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(choice.residual, head))

    unknown = np.full((2, 3, 2), -1, np.int32)
    assert not any(np.any(leaf) for leaf in gradients(unknown))
    assert all(np.any(leaf) for leaf in gradients(known_labels(2, 3)))


@pytest.mark.parametrize(("step", "kept"), [(0, 0.1), (40, 41 / 50), (10**6, CONFIG.average)])
def test_the_average_follows_the_weights_faster_at_first(step, kept):
    zeros, ones = {"weight": jnp.zeros(3)}, {"weight": jnp.ones(3)}
    average = codec._update_average(zeros, ones, jnp.int32(step), CONFIG)
    np.testing.assert_allclose(average["weight"], 1 - kept, rtol=1e-3)


def test_given_weights_keep_their_codebooks():
    state = init_codec_state(CONFIG, 0)
    params = nnx.to_pure_dict(nnx.state(Mimi(CODEC, rngs=nnx.Rngs(5))))
    state = codec.with_weights(state, params)
    semantic, acoustic = state.usage
    assert (len(semantic), len(acoustic)) == (1, CODEC.num_codebooks - 1)
    for usage, book in zip(
        acoustic, params["quantizer"]["acoustic"]["codebooks"].values(), strict=True
    ):
        np.testing.assert_allclose(usage.total / usage.count[:, None], book)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    jax.tree.map(np.testing.assert_array_equal, state.average, params)


def test_dropout_is_the_share_of_rows_with_fewer_codebooks():
    config = dataclasses.replace(CONFIG, dropout=0.3)
    kept = np.asarray(codec._draw_kept(jax.random.key(0), 4000, config))
    assert set(kept) == set(range(1, CODEC.num_codebooks + 1))
    assert np.mean(kept < CODEC.num_codebooks) == pytest.approx(0.3, abs=0.04)


def test_muon_makes_updates_of_matrices_orthogonal_and_leaves_tables_to_adam():
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.array(random.standard_normal(shape), jnp.float32)

    params = {
        "linear": {"weight": draw(12, 20)},
        "conv": {"weight": draw(3, 8, 10)},
        "transposed": {"weight": draw(2, 8, 4, 5)},
        "depthwise": {"weight": draw(2, 8, 4, 1)},
        "codebook0_head": {"weight": draw(12, 20)},
        "text_embedding": draw(12, 20),
        "norm": {"scale": draw(12)},
    }
    gradients = jax.tree.map(lambda leaf: draw(*leaf.shape), params)
    config = OptimizerConfig(
        learning_rate=1e-2, steps=10, warmup=0, weight_decay=0.0, clip=1e9, kind="muon"
    )
    optimizer = make_optimizer(config)
    update, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    nadam = optax.nadamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.0)
    by_adam, _ = jax.jit(nadam.update)(gradients, nadam.init(params), params)
    matrices = {"linear": (12, 20), "conv": (24, 10), "transposed": (16, 20)}
    for name, shape in matrices.items():
        matrix = np.asarray(update[name]["weight"]).reshape(shape)
        values = np.linalg.svd(matrix, compute_uv=False)
        # Five iterations give singular values of one to within a third.
        assert values.max() / values.min() < 2
        assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.2 * 1e-2, rel=0.3)
    for name in params.keys() - matrices.keys():
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4),
            update[name],
            by_adam[name],
        )
