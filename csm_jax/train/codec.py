"""Training of the codec: it reconstructs recordings from its own codes.

The network is trained by gradients that pass the codebooks unchanged (straight-through, van den
Oord et al., 2017). The entries of the codebooks are moving averages of the vectors that were
quantized to them, and an unused entry is replaced by a vector of the batch (as in moshi
`quantization/core_vq.py`). There is no discriminator: distances of spectra and waveforms make
speech that is understood, but is not mistaken for a recording.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from csm_jax.config import MimiConfig
from csm_jax.mimi.codec import Mimi, bind
from csm_jax.mimi.quantizer import ResidualQuantizer, SplitQuantizer, nearest
from csm_jax.model.layers import Array, Params, linear_float32
from csm_jax.model.random_numbers import random_key
from csm_jax.train.optimizer import OptimizerConfig, make_optimizer, update
from csm_jax.train.spectral import mel_distance

GROUPS = ("semantic", "acoustic")


@dataclass(frozen=True)
class CodecStepConfig:
    """Everything that a step is compiled for.

    Attributes:
      codec: sizes of the network.
      optimizer: the optimizer and its learning rate.
      wave_weight: of the distance of waveforms, where that of spectra has 1.
      commitment: weight of the distance of latents from what they are quantized to.
      decay: of the moving averages that make the codebooks.
      dead: an entry that is used less than this share of the average entry is replaced.
      dropout: share of the rows that are quantized with fewer codebooks, which makes the first
        codebooks the most important ones.
      average: decay of the moving average of the weights, after the first steps.
      num_labels: kinds of sounds (phonemes) that the first codebook is trained to tell apart; 0 is
        without labels.
      labels_per_frame: labels of a frame, evenly spaced.
      label_weight: of the cross entropy of the labels.
    """

    codec: MimiConfig
    optimizer: OptimizerConfig
    wave_weight: float = 1.0
    commitment: float = 0.25
    decay: float = 0.99
    dead: float = 0.2
    dropout: float = 0.25
    average: float = 0.999
    num_labels: int = 0
    labels_per_frame: int = 2
    label_weight: float = 0.1


class Usage(NamedTuple):
    """Moving averages of the vectors that were quantized to the entries of a codebook.

    Attributes:
      count: float32 [V], vectors a step.
      total: float32 [V, C], sum of these vectors.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride] (its name in checkpoints)
    total: Array


class CodecState(NamedTuple):
    """The state that a run is resumed from.

    Attributes:
      step: int32 [].
      params: float32, of `Mimi`.
      average: their moving average, which is the result of a run.
      label_head: float32, the linear classifier of labels; empty without labels.
      opt_state: optax's, of `params` and `label_head`.
      usage: of the semantic and of the acoustic codebooks.
    """

    step: Array
    params: Params
    average: Params
    label_head: Params
    opt_state: Any
    usage: tuple[list[Usage], list[Usage]]


class CodecMetrics(NamedTuple):
    """Measurements of a step, float32 [] each.

    Attributes:
      mel: distance of spectra, nepers.
      wave: mean absolute distance of waveforms.
      commitment: mean square distance of latents from what they are quantized to.
      perplexity: of the codes of this batch, mean of the codebooks: the number of entries in use,
        if all of these were used equally.
      labels: cross entropy of the labels, nats each; 0 without.
    """

    mel: Array
    wave: Array
    commitment: Array
    perplexity: Array
    labels: Array


class _Choice(NamedTuple):
    """The input and output of a codebook: residuals [M, C], codes int32 [M]."""

    residual: Array
    codes: Array


def init_codec_state(config: CodecStepConfig, seed: int) -> CodecState:
    """The state before the first step, with weights drawn from `seed`."""

    def init() -> Params:
        return nnx.to_pure_dict(nnx.state(Mimi(config.codec, rngs=nnx.Rngs(seed))))

    params = jax.jit(init)()
    quantizer = params["quantizer"]
    # A count of zero: every entry starts at a vector of the first batch.
    usage = _usage(quantizer, lambda book: Usage(jnp.zeros(len(book)), jnp.zeros_like(book)))
    head = _init_label_head(config)
    opt_state = make_optimizer(config.optimizer).init(_trainable(params, head))
    average = jax.tree.map(jnp.copy, params)
    return CodecState(jnp.zeros((), jnp.int32), params, average, head, opt_state, usage)


def _usage(quantizer: Params, make: Callable[[Array], Usage]) -> tuple[list[Usage], list[Usage]]:
    """The results of `make` for every codebook [V, C], by group."""
    semantic, acoustic = ([make(book) for _, book in _books(quantizer[group])] for group in GROUPS)
    return semantic, acoustic


def _init_label_head(config: CodecStepConfig) -> Params:
    if not config.num_labels:
        return {}
    outputs = config.labels_per_frame * config.num_labels
    return {
        "weight": jnp.zeros((outputs, config.codec.codebook_dim)),
        "bias": jnp.zeros(outputs),
    }


def _trainable(params: Params, label_head: Params) -> Params:
    """The parameters that the optimizer updates; by their names it tells matrices from tables."""
    return {"codec": params, "label_head": label_head}


def with_weights(state: CodecState, params: Params) -> CodecState:
    """A first state with other weights; all entries of their codebooks count as used equally.

    Args:
      params: float32, of `Mimi`; each entry counts as used by one vector a step.
    """
    params = jax.tree.map(lambda old, new: jnp.array(new, old.dtype), state.params, params)
    quantizer = params["quantizer"]
    usage = _usage(quantizer, lambda book: Usage(jnp.ones(len(book)), jnp.array(book)))
    return state._replace(params=params, average=jax.tree.map(jnp.copy, params), usage=usage)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def codec_step(
    state: CodecState,
    audio: Array,
    seed: Array,
    labels: Array | None = None,
    *,
    config: CodecStepConfig,
) -> tuple[CodecState, CodecMetrics]:
    """Trains on recordings. `state` is donated: use the one returned.

    Args:
      audio: float32 [B, F * frame_size] at the codec's sample rate.
      seed: uint32 []; with the step it chooses the rows that are quantized with fewer codebooks,
        and the vectors that replace unused entries.
      labels: int32 [B, F, labels_per_frame], -1 where they are unknown; for configs with labels.
    """
    if (labels is None) == bool(config.num_labels):
        raise ValueError("labels are given if, and only if, the config has some")
    key = jax.random.fold_in(random_key(seed), state.step)
    drop, replace = jax.random.split(key)
    kept = _draw_kept(drop, len(audio), config)

    def loss(trainable: Params) -> tuple[Array, tuple[CodecMetrics, Any]]:
        mimi = bind(config.codec, trainable["codec"])
        reconstructed, commitment, choices = reconstruct(mimi, audio, kept)
        mel = mel_distance(reconstructed, audio, config.codec.sample_rate)
        wave = jnp.mean(jnp.abs(reconstructed - audio))
        total = mel + config.wave_weight * wave + config.commitment * commitment
        label_loss = jnp.zeros(())
        if labels is not None:
            first, head = choices[0][0], trainable["label_head"]
            label_loss = _label_loss(mimi.quantizer.semantic, first, head, labels)
            total = total + config.label_weight * label_loss
        return total, (CodecMetrics(mel, wave, commitment, jnp.zeros(()), label_loss), choices)

    trainable = _trainable(state.params, state.label_head)
    gradients, (metrics, choices) = jax.grad(loss, has_aux=True)(trainable)
    trainable, opt_state = update(config.optimizer, gradients, state.opt_state, trainable)
    params = trainable["codec"]
    usage = _update_codebooks(params["quantizer"], state.usage, choices, replace, config)
    metrics = metrics._replace(perplexity=jnp.mean(_perplexities(choices, config.codec)))
    average = _update_average(state.average, params, state.step, config)
    head = trainable["label_head"]
    return CodecState(state.step + 1, params, average, head, opt_state, usage), metrics


def _update_average(
    average: Params, params: Params, step: Array, config: CodecStepConfig
) -> Params:
    """The moving average after another step; its decay is faster over the first steps."""
    keep = jnp.minimum(config.average, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, average, params)


def _label_loss(
    quantizer: ResidualQuantizer, choice: "_Choice", head: Params, labels: Array
) -> Array:
    """Mean cross entropy [] of the known labels, predicted from the first codebook alone."""
    entry = jax.lax.stop_gradient(quantizer.codebooks[0][...])[choice.codes]
    quantized = choice.residual + jax.lax.stop_gradient(entry - choice.residual)
    logits = linear_float32(quantized, head["weight"]) + head["bias"][None]
    logits = logits.reshape(labels.size, -1)
    labels = labels.reshape(-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    known = labels >= 0
    return jnp.sum(losses * known) / jnp.maximum(jnp.sum(known), 1)


def reconstruct(
    mimi: Mimi, audio: Array, kept: Array
) -> tuple[Array, Array, tuple[list[_Choice], list[_Choice]]]:
    """Encodes and decodes recordings, with a gradient.

    Args:
      audio: [B, F * frame_size].
      kept: int32 [B], how many codebooks are used.

    Returns:
      Audio [B, F * frame_size]; the commitment loss []; the choices of the codebooks.
    """
    latent = mimi.encoder_transformer(mimi.encoder(audio[..., None]))
    latent, commitment, choices = _quantize_split(mimi.quantizer, mimi.downsample(latent), kept)
    reconstructed = mimi.decoder(mimi.decoder_transformer(mimi.upsample(latent)))
    return reconstructed[..., 0], commitment, choices


def _quantize_split(
    quantizer: SplitQuantizer, latent: Array, kept: Array
) -> tuple[Array, Array, tuple[list[_Choice], list[_Choice]]]:
    """`_quantize` with both groups of codebooks."""
    semantic, loss, first = _quantize(quantizer.semantic, latent, kept)
    acoustic, more, second = _quantize(quantizer.acoustic, latent, kept - quantizer.num_semantic)
    return semantic + acoustic, loss + more, (first, second)


def _quantize(
    quantizer: ResidualQuantizer, latent: Array, kept: Array
) -> tuple[Array, Array, list[_Choice]]:
    """Quantized latents [B, T, D], the commitment loss, and the choices of the codebooks."""
    projected = quantizer.in_proj(latent)
    residual, chosen, loss = projected, jnp.zeros_like(projected), jnp.zeros(())
    choices = []
    for i, codebook in enumerate(quantizer.codebooks):
        book = jax.lax.stop_gradient(codebook[...])
        codes = nearest(jax.lax.stop_gradient(residual), book)
        choices.append(_Choice(residual.reshape(-1, residual.shape[-1]), codes.reshape(-1)))
        entry = book[codes]
        residual = residual - entry
        loss = loss + jnp.mean(jnp.square(residual))
        chosen = chosen + jnp.where((i < kept)[:, None, None], entry, 0)
    straight_through = projected + jax.lax.stop_gradient(chosen - projected)
    return quantizer.out_proj(straight_through), loss, choices


def _draw_kept(key: Array, rows: int, config: CodecStepConfig) -> Array:
    """How many codebooks are used, int32 [rows]: all, or with `dropout` any number of them."""
    all_of_them = config.codec.num_codebooks
    first, second = jax.random.split(key)
    some = jax.random.randint(first, (rows,), config.codec.num_semantic_codebooks, all_of_them)
    return jnp.where(jax.random.bernoulli(second, config.dropout, (rows,)), some, all_of_them)


def _books(group: Params) -> list[tuple[Any, Array]]:
    """Pairs of key and codebook [V, C] in the parameters of a group, in order."""
    return sorted(group["codebooks"].items())


def _update_codebooks(
    quantizer: Params,
    usage: tuple[list[Usage], list[Usage]],
    choices: tuple[list[_Choice], list[_Choice]],
    key: Array,
    config: CodecStepConfig,
) -> tuple[list[Usage], list[Usage]]:
    """Updates the codebooks in the dictionary by the vectors that were quantized to them."""
    followed = []
    for group, before, chosen in zip(GROUPS, usage, choices, strict=True):
        books = quantizer[group]["codebooks"]
        followed.append([])
        for i, (name, _) in enumerate(_books(quantizer[group])):
            key, draw = jax.random.split(key)
            now, books[name] = _update_codebook(before[i], chosen[i], draw, config)
            followed[-1].append(now)
    semantic, acoustic = followed
    return semantic, acoustic


def _update_codebook(
    usage: Usage, choice: _Choice, key: Array, config: CodecStepConfig
) -> tuple[Usage, Array]:
    """The moving averages after another step, and the codebook [V, C] that they make."""
    size, num_vectors = len(usage.count), len(choice.residual)
    residual = jax.lax.stop_gradient(choice.residual)
    chosen = jax.nn.one_hot(choice.codes, size)  # [M, V]
    count = config.decay * usage.count + (1 - config.decay) * jnp.sum(chosen, axis=0)
    total = config.decay * usage.total + (1 - config.decay) * (chosen.T @ residual)
    average = num_vectors / size
    is_unused = count < config.dead * average
    replacements = residual[jax.random.randint(key, (size,), 0, num_vectors)]
    # It counts as used like the average entry, so that it is not replaced again at once.
    count = jnp.where(is_unused, average, count)
    total = jnp.where(is_unused[:, None], replacements * average, total)
    return Usage(count, total), total / count[:, None]


def _perplexities(choices: tuple[list[_Choice], list[_Choice]], config: MimiConfig) -> Array:
    """The perplexity of the codes of each codebook, float32 [Q]."""

    def perplexity(choice: _Choice) -> Array:
        shares = jnp.mean(jax.nn.one_hot(choice.codes, config.codebook_size), axis=0)
        return jnp.exp(-jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-9))))

    return jnp.stack([perplexity(choice) for group in choices for choice in group])
