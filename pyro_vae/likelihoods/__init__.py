"""p(x | z): one file per family. ``likelihood(features)`` returns a distribution with the event shape of the data."""
