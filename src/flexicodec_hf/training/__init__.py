"""
What the training recipes in `examples/` are made of. Needs the extra `[train]`.
"""
