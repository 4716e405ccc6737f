"""Training of the codec: it learns to give back what it hears, through its codebooks.

The network learns by gradient, past the codebooks as if they were not there (straight-through,
van den Oord et al., 2017). The codebooks follow the vectors that chose them as moving averages, and
an entry that nobody chooses starts anew at a vector of the batch (as moshi
`quantization/core_vq.py` does). There is no discriminator: spectra and the waveform itself are
enough for speech that is understood, not for speech that is taken for a recording.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from csm_jax.config import MimiConfig
from csm_jax.layers import linear_float32
from csm_jax.mimi.codec import Mimi, bind
from csm_jax.mimi.quantizer import ResidualQuantizer, SplitQuantizer, nearest
from csm_jax.train.optimiser import OptimiserConfig, make_optimiser
from csm_jax.train.spectral import mel_distance

Array = jax.Array
Params = dict[str, Any]


GROUPS = ("semantic", "acoustic")


@dataclass(frozen=True)
class CodecRecipe:
    """All that a step is compiled for.

    Attributes:
      wave_weight: of the distance of waveforms, where that of spectra has 1.
      commitment: weight of the distance of latents from what they are quantised to.
      decay: what a step keeps of the moving averages of the codebooks.
      dead: an entry that is chosen by less than this share of what is chosen on average starts
        anew.
      dropout: share of the rows that make do with fewer codebooks, so that the first ones count.
      average: what a step keeps of the moving average of the weights, later on.
      num_labels: kinds of sounds (phonemes) that the first codebook has to tell apart; 0 without.
      labels_per_frame: of them, evenly spaced.
      label_weight: of their cross entropy.
    """

    config: MimiConfig
    optimiser: OptimiserConfig
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
    """Moving averages of who chose the entries of a codebook.

    Attributes:
      count: float32 [V], vectors a step.
      total: float32 [V, C], their sum.
    """

    count: Array
    total: Array


class CodecState(NamedTuple):
    """What a run goes on from.

    Attributes:
      step: int32 [].
      params: float32, of `Mimi`.
      average: their moving average, which is what to use.
      label_head: float32, the linear classifier of labels; empty without labels.
      optimiser: optax's, of `params` and `label_head`.
      usage: of the semantic and of the acoustic codebooks.
    """

    step: Array
    params: Params
    average: Params
    label_head: Params
    optimiser: optax.OptState
    usage: tuple[list[Usage], list[Usage]]


class CodecMetrics(NamedTuple):
    """Float32 [] each.

    Attributes:
      mel: distance of spectra, nepers.
      wave: mean absolute distance of waveforms.
      commitment: mean square distance of latents from what they are quantised to.
      perplexity: of the codes of this batch, the mean of the codebooks: how many entries are in
        use, if each that is were chosen alike.
      labels: cross entropy of the labels, nats each; 0 without.
    """

    mel: Array
    wave: Array
    commitment: Array
    perplexity: Array
    labels: Array


class _Choice(NamedTuple):
    """What a codebook was asked and what it said: residuals [M, C], codes int32 [M]."""

    residual: Array
    codes: Array


def init_codec_state(recipe: CodecRecipe, seed: int) -> CodecState:
    """The state before the first step, with weights drawn from `seed`."""

    def init() -> Params:
        return nnx.to_pure_dict(nnx.state(Mimi(recipe.config, rngs=nnx.Rngs(seed))))

    params = jax.jit(init)()
    quantizer = params["quantizer"]
    usage = tuple(
        # A count of zero: every entry starts at a vector of the first batch.
        [Usage(jnp.zeros(len(book)), jnp.zeros_like(book)) for _, book in _books(quantizer[group])]
        for group in GROUPS
    )
    head = _init_label_head(recipe)
    optimiser = make_optimiser(recipe.optimiser).init(_learnt(params, head))
    average = jax.tree.map(jnp.copy, params)
    return CodecState(jnp.zeros((), jnp.int32), params, average, head, optimiser, usage)


def _init_label_head(recipe: CodecRecipe) -> Params:
    if not recipe.num_labels:
        return {}
    outputs = recipe.labels_per_frame * recipe.num_labels
    return {
        "weight": jnp.zeros((outputs, recipe.config.codebook_dim)),
        "bias": jnp.zeros(outputs),
    }


def _learnt(params: Params, label_head: Params) -> Params:
    """What the optimiser updates, under the names that it knows matrices from tables by."""
    return {"codec": params, "label_head": label_head}


def with_weights(state: CodecState, params: Params) -> CodecState:
    """A first state with other weights, whose codebooks' entries count as chosen alike.

    Args:
      params: float32, of `Mimi`; an entry is as old as if it had been chosen once a step.
    """
    params = jax.tree.map(lambda old, new: jnp.array(new, old.dtype), state.params, params)
    usage = tuple(
        [
            Usage(jnp.ones(len(book)), jnp.array(book))
            for _, book in _books(params["quantizer"][group])
        ]
        for group in GROUPS
    )
    return state._replace(params=params, average=jax.tree.map(jnp.copy, params), usage=usage)


@functools.partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def codec_step(
    state: CodecState,
    audio: Array,
    seed: Array,
    labels: Array | None = None,
    *,
    recipe: CodecRecipe,
) -> tuple[CodecState, CodecMetrics]:
    """Learns from recordings. `state` is donated: use the one returned.

    Args:
      audio: float32 [B, F * frame_size] at the codec's sample rate.
      seed: uint32 []; with the step it chooses who makes do with fewer codebooks, and which
        vectors entries start anew at.
      labels: int32 [B, F, labels_per_frame], -1 where they are unknown; for recipes with labels.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    drop, revive = jax.random.split(key)
    kept = _draw_kept(drop, len(audio), recipe)

    def loss(learnt: Params) -> tuple[Array, tuple[CodecMetrics, Any]]:
        mimi = bind(recipe.config, learnt["codec"])
        heard, commitment, choices = reconstruct(mimi, audio, kept)
        mel = mel_distance(heard, audio, recipe.config.sample_rate)
        wave = jnp.mean(jnp.abs(heard - audio))
        total = mel + recipe.wave_weight * wave + recipe.commitment * commitment
        told = jnp.zeros(())
        if recipe.num_labels:
            told = _label_loss(mimi.quantizer.semantic, choices[0][0], learnt["label_head"], labels)
            total = total + recipe.label_weight * told
        return total, (CodecMetrics(mel, wave, commitment, jnp.zeros(()), told), choices)

    learnt = _learnt(state.params, state.label_head)
    gradients, (metrics, choices) = jax.grad(loss, has_aux=True)(learnt)
    updates, optimiser = make_optimiser(recipe.optimiser).update(gradients, state.optimiser, learnt)
    learnt = optax.apply_updates(learnt, updates)
    params = learnt["codec"]
    usage = _follow(params["quantizer"], state.usage, choices, revive, recipe)
    metrics = metrics._replace(perplexity=jnp.mean(_perplexities(choices, recipe.config)))
    average = _moved(state.average, params, state.step, recipe)
    head = learnt["label_head"]
    return CodecState(state.step + 1, params, average, head, optimiser, usage), metrics


def _moved(average: Params, params: Params, step: Array, recipe: CodecRecipe) -> Params:
    """The moving average after another step; over the first steps it forgets faster."""
    keep = jnp.minimum(recipe.average, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, average, params)


def _label_loss(
    quantizer: ResidualQuantizer, choice: "_Choice", head: Params, labels: Array
) -> Array:
    """Mean cross entropy [] of the labels that are known, told from the first codebook alone."""
    entry = jax.lax.stop_gradient(quantizer.codebooks[0][...])[choice.codes]
    quantised = choice.residual + jax.lax.stop_gradient(entry - choice.residual)
    logits = linear_float32(quantised, head["weight"]) + head["bias"][None]
    logits = logits.reshape(labels.size, -1)
    labels = labels.reshape(-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    known = labels >= 0
    return jnp.sum(losses * known) / jnp.maximum(jnp.sum(known), 1)


def reconstruct(
    mimi: Mimi, audio: Array, kept: Array
) -> tuple[Array, Array, tuple[list[_Choice], list[_Choice]]]:
    """What comes back of recordings, with a gradient.

    Args:
      audio: [B, F * frame_size].
      kept: int32 [B], codebooks that count.

    Returns:
      Audio [B, F * frame_size]; the commitment loss []; the choices of the codebooks.
    """
    latent = mimi.encoder_transformer(mimi.encoder(audio[..., None]))
    latent, commitment, choices = _quantise_split(mimi.quantizer, mimi.downsample(latent), kept)
    heard = mimi.decoder(mimi.decoder_transformer(mimi.upsample(latent)))
    return heard[..., 0], commitment, choices


def _quantise_split(quantizer: SplitQuantizer, latent: Array, kept: Array):
    semantic, loss, first = _quantise(quantizer.semantic, latent, kept)
    acoustic, more, second = _quantise(quantizer.acoustic, latent, kept - quantizer.num_semantic)
    return semantic + acoustic, loss + more, (first, second)


def _quantise(
    quantizer: ResidualQuantizer, latent: Array, kept: Array
) -> tuple[Array, Array, list[_Choice]]:
    """Latents [B, T, D] as the codebooks say them, the commitment loss, and the choices."""
    asked = quantizer.in_proj(latent)
    residual, answer, loss = asked, jnp.zeros_like(asked), jnp.zeros(())
    choices = []
    for i, codebook in enumerate(quantizer.codebooks):
        book = jax.lax.stop_gradient(codebook[...])
        codes = nearest(jax.lax.stop_gradient(residual), book)
        choices.append(_Choice(residual.reshape(-1, residual.shape[-1]), codes.reshape(-1)))
        entry = book[codes]
        residual = residual - entry
        loss = loss + jnp.mean(jnp.square(residual))
        answer = answer + jnp.where((i < kept)[:, None, None], entry, 0)
    straight_through = asked + jax.lax.stop_gradient(answer - asked)
    return quantizer.out_proj(straight_through), loss, choices


def _draw_kept(key: Array, rows: int, recipe: CodecRecipe) -> Array:
    """How many codebooks count, int32 [rows]: all, or with `dropout` any number of them."""
    all_of_them = recipe.config.num_codebooks
    first, second = jax.random.split(key)
    some = jax.random.randint(first, (rows,), recipe.config.num_semantic_codebooks, all_of_them)
    return jnp.where(jax.random.bernoulli(second, recipe.dropout, (rows,)), some, all_of_them)


def _books(group: Params) -> list[tuple[Any, Array]]:
    """(key, codebook [V, C]) of a group's parameters, in order."""
    return sorted(group["codebooks"].items())


def _follow(
    quantizer: Params,
    usage: tuple[list[Usage], list[Usage]],
    choices: tuple[list[_Choice], list[_Choice]],
    key: Array,
    recipe: CodecRecipe,
) -> tuple[list[Usage], list[Usage]]:
    """Moves the codebooks, in place of the dictionary, to the vectors that chose them."""
    followed = []
    for group, before, chosen in zip(GROUPS, usage, choices, strict=True):
        books = quantizer[group]["codebooks"]
        followed.append([])
        for i, (name, _) in enumerate(_books(quantizer[group])):
            key, draw = jax.random.split(key)
            now, books[name] = _follow_one(before[i], chosen[i], draw, recipe)
            followed[-1].append(now)
    return tuple(followed)


def _follow_one(
    usage: Usage, choice: _Choice, key: Array, recipe: CodecRecipe
) -> tuple[Usage, Array]:
    """The averages after another step, and the codebook [V, C] that they make."""
    size, num_vectors = len(usage.count), len(choice.residual)
    residual = jax.lax.stop_gradient(choice.residual)
    chosen = jax.nn.one_hot(choice.codes, size)  # [M, V]
    count = recipe.decay * usage.count + (1 - recipe.decay) * jnp.sum(chosen, axis=0)
    total = recipe.decay * usage.total + (1 - recipe.decay) * (chosen.T @ residual)
    average = num_vectors / size
    is_dead = count < recipe.dead * average
    anew = residual[jax.random.randint(key, (size,), 0, num_vectors)]
    # As if chosen like the average, so that it is not dead again at once.
    count = jnp.where(is_dead, average, count)
    total = jnp.where(is_dead[:, None], anew * average, total)
    return Usage(count, total), total / count[:, None]


def _perplexities(choices: tuple[list[_Choice], list[_Choice]], config: MimiConfig) -> Array:
    """Of the codes of each codebook, float32 [Q]."""

    def perplexity(choice: _Choice) -> Array:
        shares = jnp.mean(jax.nn.one_hot(choice.codes, config.codebook_size), axis=0)
        return jnp.exp(-jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-9))))

    return jnp.stack([perplexity(choice) for group in choices for choice in group])
