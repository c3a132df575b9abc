"""Faces in photos.

    alignment     find faces, and cut them out as CelebA's are
    misalignment  how well that works
    photos        a photo in, an edited photo out
    edits         rows, grids and sheets of edited faces, in a folder
    cutting       photos in, a folder of faces out
"""
