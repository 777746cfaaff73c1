"""Corrections of what was charged: void, amend, re-rate, backfill, and their undoing; and what is settled by itself.

Each posts only the difference, in the transaction that changes the log, under the heads of the partitions it touches.
"""
