"""Training: loss, data, optimiser, the loop around them. `python -m csm_jax.finetune` runs it."""
