"""The usage log as files: old use is written as Parquet by month, day and partition, dropped, and read back.

What is written is what is read back, in every column. Nothing is dropped that was not read back and compared.
"""
