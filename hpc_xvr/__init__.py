"""SWIN-XVR: a fast blurry camera and a slow sharp one in, a fast sharp movie out."""

__version__ = "0.1.0"
