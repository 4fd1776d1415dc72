"""What prepare.py reads: raw downloads of captions, questions and statements."""
