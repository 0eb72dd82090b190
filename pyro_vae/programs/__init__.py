"""Pyro programs: a model p(z) p(x | z) and a guide q(z | x) each.

:mod:`pyro_vae.programs.vae` is the one that most users declare; :mod:`pyro_vae.programs.contract` is what any pair of
Pyro functions has to keep to be trained, evaluated and analysed by this library.
"""
