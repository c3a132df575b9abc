"""Faces in photos: find them, align them."""
