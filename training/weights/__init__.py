"""Where weights come from and where they go: init_from, upcycling, and Hugging Face's formats."""
