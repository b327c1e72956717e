"""Results put on the Hugging Face Hub: which files, under what card, and sent in one commit."""
