"""What tasks read and write: the input, documents, records, counts, lists."""
