"""A speech server: the APIs of several providers, and one `Engine` behind them.

pip install "csm-jax[serve]"
python -m csm_jax.serve --checkpoint=demo --port=8000
"""
