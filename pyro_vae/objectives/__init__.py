"""What SVI minimises: ``objective(program, x, y, step)`` in mean nats per image.

An objective returns two scalars on the program's device: the loss to report, and a surrogate whose gradient is the
gradient estimate. They are the same number where every latent is reparameterized.
"""
