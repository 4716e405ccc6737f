"""Training: data, loss, optimizer, step and loop. `python -m csm_jax.finetune` runs it."""
