"""Tensors in, tensors out: whitening, sparse coding, dictionary updates. Imports torch only.

Orientation everywhere in this room is scikit-learn's: ``signals (n, d) ~ codes (n, k) @ dictionary (k, d)``, one signal
and one atom a row. With a torch weight ``W (out, in)`` the signals are the rows of ``W L^T``, so the CoSpaDi paper's
``S`` is ``codes^T`` and its ``D`` is ``dictionary^T``.
"""
