"""One module a branch: what an operator's arguments may be, what it allocates, and which kernels it calls.

Every operator has a ``*_fwd`` function (packed tensors that were checked; runs kernels) and a ``*_fake`` one (shapes and dtypes only, for
``torch.compile``). ``nsa_gen.ops`` checks what users give (:mod:`._inputs`) and registers both with ``torch.library``.
"""
