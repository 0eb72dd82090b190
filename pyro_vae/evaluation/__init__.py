"""How likely the data are under a program, with the evidence that the number can be trusted."""
