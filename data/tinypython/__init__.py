"""Small Python programs and their tokens: generator, tokenizer, preparation."""
