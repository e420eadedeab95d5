"""Pictures of data, results and training, each in a file of its own: see tools/visualize.py."""
