"""What is sold, and what a payment and the claims on it come to. Pure."""
