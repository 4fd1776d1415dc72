"""What a run needs beside its loop in train.py: settings, processes, optimizer, checkpoints."""
