"""What is asked of the log: meters, and statistics of use. Summed exactly by SQL at the moment of asking.

Nothing is kept beside the log, so a new meter, and a changed one, has all of the past at once.
"""
