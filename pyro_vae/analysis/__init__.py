"""What a trained program looks like: pictures of it, and the plain Pyro source that a declaration stands for.

:mod:`pyro_vae.analysis.pictures` draws; :mod:`pyro_vae.analysis.manifold` finds the quantiles of a two-dimensional
prior; :mod:`pyro_vae.analysis.describe` and :mod:`pyro_vae.analysis.source` say what a program is in words and code;
:mod:`pyro_vae.analysis.traversal`, :mod:`pyro_vae.analysis.embedding` and :mod:`pyro_vae.analysis.aggregate` look at its
latents; :mod:`pyro_vae.analysis.report` puts all of it on one page.
"""
