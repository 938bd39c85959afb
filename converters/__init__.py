"""Checkpoints in and out: official PyTorch folders, and nd-jax's own form of them. No torch, no pickle.

``component.load_component`` reads one network, ``folders.load_folder`` sees what a folder holds,
``folders.save_folder`` and ``component.save_component`` write, ``convert`` holds the two command-line verbs.
"""
