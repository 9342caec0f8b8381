"""Faces that join the layers below for other people's programs."""
