"""What is pushed to the Hugging Face hub."""
