"""Weights and models from elsewhere: public checkpoints, transformers, timm."""
