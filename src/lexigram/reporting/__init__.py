"""What is in a result: tables in text, and heat maps. Reads records, never weights."""
