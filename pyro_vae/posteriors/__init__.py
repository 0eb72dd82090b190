"""q(z | x): one file per family. ``posterior(features)`` returns a distribution with event shape ``latent_shape``."""
