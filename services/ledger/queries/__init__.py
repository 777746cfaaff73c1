"""What is read: balances now and then, statements, transactions, charges, holds, totals, trees. From one snapshot.

A balance is exact at the time of reading: what is due is done in memory, by the rules by which it will be journalled.
No question reads more than a bound, whatever the size of the journal; what is longer comes in pages.
"""
