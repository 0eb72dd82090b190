"""Encoders and decoders: modules that end in features and know no distribution.

A network maps tensors ``(*leading, *in_shape)`` to features ``(*leading, *out_shape)`` for any leading axes, so that
the same decoder serves a minibatch of images and a plate of samples of latents. The distributions that stand on
the features own the last linear maps (:class:`pyro_vae.networks.heads.Head`).
"""
