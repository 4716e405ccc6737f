"""Prints digests of the codes of fixed seeds, which a refactoring must not change.

    python examples/codes_digest.py > before.txt      (and after a change: diff)

It prints a line per case: `demo` and `random:tiny`, in full precision and in int8, each alone, as a
stream, through the engine, with context, and from a text of two parts. The codes of two machines
differ, so both runs must be on the same one.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

import csm_jax

LONG_TEXT = "one two three four five six seven eight nine. " * 8
SETTINGS = {"seed": 3, "max_audio_length_ms": 2000}


def outputs(model: csm_jax.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Codes and samples of one model, each with the name of its case."""
    greedy = csm_jax.Sampling(greedy=True)
    narrow = csm_jax.Sampling(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.1)
    yield "alone", model.generate_codes("one two three", **SETTINGS)
    yield "greedy", model.generate_codes("four five", sampling=greedy, **SETTINGS)
    yield "narrow", model.generate_codes("six seven", sampling=narrow, **SETTINGS)
    samples = model.generate("one two", **SETTINGS)
    yield "samples", samples
    # The codec rounds blocks of a stream in another way than the whole.
    stream = np.concatenate(list(model.stream("one two", **SETTINGS)))
    yield "stream_equals_samples", np.array([np.allclose(stream, samples, atol=1e-5)])
    codes = model.generate_codes("two", **SETTINGS)
    context = [csm_jax.Segment(speaker=1, text="two", codes=codes)]
    yield "context", model.generate_codes("three", context=context, **SETTINGS)
    yield "long", model.generate_codes(LONG_TEXT, seed=5, max_audio_length_ms=60_000)
    requests = [csm_jax.Request(text, **SETTINGS) for text in ("one", "two three", LONG_TEXT)]
    with csm_jax.Engine(model, max_batch=2) as engine:
        tickets = [engine.submit(request) for request in requests]
        for index, ticket in enumerate(tickets):
            yield f"engine_{index}", ticket.codes()


def main() -> None:
    for name in ("demo", "random:tiny"):
        for quantize in ("none", "int8"):
            model = csm_jax.load(name, quantize=quantize)
            for case, array in outputs(model):
                digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
                print(name, quantize, case, array.dtype, *array.shape, digest, flush=True)


if __name__ == "__main__":
    main()
