"""The data path of a model call: who is it, may it start, forward, stream back, measure."""
