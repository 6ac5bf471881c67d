"""
What the training recipes in `examples/` are made of. Needs `pip install flexicodec-hf[train]`.
"""
