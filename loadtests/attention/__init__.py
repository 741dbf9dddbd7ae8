"""What the comparison of kinds of layers is made of."""
