"""Pyro programs: a model p(z) p(x | z) and a guide q(z | x) each.

:mod:`pyro_vae.programs.vae` is the one that most users declare; :mod:`pyro_vae.programs.trace` says what any pair of Pyro
functions has to keep to be trained, evaluated and analysed by this library, and runs it;
:mod:`pyro_vae.programs.contract` holds a program, and its data, to that.
"""
