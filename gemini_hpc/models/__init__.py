"""The example program: GPT-2, BERT and RoBERTa on the public API, as a user's own script would be written."""
