"""Faces in photos.

    alignment     find faces, and cut them out as CelebA's are
    misalignment  how well that works
    photos        a photo in, an edited photo out
    cutting       photos in, a folder of faces out
"""
