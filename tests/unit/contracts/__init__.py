"""Laws of the vocabulary in contracts/."""
