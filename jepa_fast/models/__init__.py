"""The models: each file reads like its paper."""
