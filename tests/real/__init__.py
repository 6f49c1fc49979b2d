"""Tests on a real instruct model, which is fetched when they first run."""
