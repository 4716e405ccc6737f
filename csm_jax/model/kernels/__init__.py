"""Fused kernels of a GPU for steps of one position, in Pallas (Triton): `kernels="pallas"`."""
