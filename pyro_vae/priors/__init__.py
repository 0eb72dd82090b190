"""p(z): one file per family. ``prior(like)`` returns a distribution with event shape ``prior.latent_shape``."""
