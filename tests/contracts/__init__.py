"""What is committed for others to rely on: schemas, examples, AsyncAPI, the event catalogue."""
