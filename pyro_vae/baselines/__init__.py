"""What is compared with, and is no pair of Pyro programs while it is trained: Boltzmann machines, belief networks, and others."""
