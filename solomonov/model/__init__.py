"""The model: one list of named layers, built as a plain module or cut into pipeline stages.

Shape letters, used in every docstring and comment of this package:

    B batch rows    T sequence tokens    S keys seen (T, cached + T, or the source's tokens)    D d_model    L layers
    H query heads   K key-value heads    E width of one head               F d_ff       V vocabulary

Modules: ``config`` and ``counts`` need no torch; ``stacks`` and ``naming`` give the stacks of an architecture and the
names of layers and parameters; ``rope``, ``attention``, ``cross``, ``layers``, ``loss`` are the parts, ``front`` is
what stands before a stack that reads no tokens; ``transformer`` is the whole as one module, ``pipeline`` the same
layers one by one; ``parameterization`` holds the table of initial values, which ``init`` draws; ``cache`` keeps keys
and values between calls. This file imports nothing, so that importing a torch-free part of the package stays fast.
"""
