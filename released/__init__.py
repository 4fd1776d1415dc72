"""What weights.py opens: names of tensors, Configs, addresses of released files."""
